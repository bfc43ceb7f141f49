"""Redis as platforms run it, for real: a cluster and Sentinel that fail over in the middle of streams; TLS.

What is asked each time: no call fails, no event is missed, repeated or out of order, and how long the longest
wait of a watcher on another replica was, from the acknowledgement on, is printed.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from bench.mesh import free_ports
from hermesh.session.v1 import session_internal_service_pb2 as internal
from tests.deploy.certificates import Authority
from tests.deploy.debian import debian
from tests.integration.session.conftest import bootstrap
from tests.integration.session.live import Start, problem, replicas_on, shows, two
from tests.integration.session.process import Client, SessionProcess, metric
from tests.unit.session.calls import append_stream, new_writer, watch
from tests.valkeys import PASSWORD, Cluster, Server, cluster, running, sentinels, wait

STREAMS = 24
PERIOD_S = 0.1
# Far above what it takes where nothing else runs: a look at PostgreSQL is slow under load.
PAUSE_S = 10.0


@pytest.fixture(scope="module")
def bootstrapped(database: str) -> str:
    bootstrap(database)
    return database


@pytest.fixture
def start(bootstrapped: str) -> Iterator[Start]:
    with replicas_on(bootstrapped) as begin:
        yield begin


@dataclass
class Seen:
    """What writers and watchers of some runs saw.

    Attributes:
        errors: calls that failed, and what came that should not.
        acknowledged: when each event was, by run and seq.
        waits: (when it came, how long that took) of each event at its watcher.
    """

    errors: list[str] = field(default_factory=list)
    acknowledged: dict[tuple[str, int], float] = field(default_factory=dict)
    waits: list[tuple[float, float]] = field(default_factory=list)

    def longest(self, since: float = 0.0) -> float:
        """The longest wait for an event that came since then, in seconds."""
        return max((wait for at, wait in self.waits if at >= since), default=0.0)


@asynccontextmanager
async def streams(first: Client, second: Client, count: int = STREAMS) -> AsyncIterator[Seen]:
    """Has runs written on one replica and watched on the other for the block's time, and to their ends."""
    seen = Seen()
    over = asyncio.Event()

    async def write(run: int) -> None:
        writer = await new_writer(first)
        watching = group.create_task(follow(writer.run_id))
        async with append_stream(first) as stream:
            while not over.is_set():
                await asyncio.sleep(PERIOD_S)
                append = writer.append("text.delta")
                [result] = await stream.write(append)
                if result.outcome != internal.APPEND_OUTCOME_COMMITTED:
                    seen.errors.append(f"an append ended as {result.outcome}")
                seen.acknowledged[writer.run_id, append.first_seq] = time.monotonic()
            await stream.write(writer.append("run.completed", status=4))
        await watching

    async def follow(run_id: str) -> None:
        try:
            async with watch(second, run_id) as watched:
                last, kind = 0, ""
                async for response in watched:
                    now = time.monotonic()
                    for event in response.frame.events:
                        if event.seq != last + 1:
                            seen.errors.append(f"{run_id}: {event.seq} came after {last}")
                        last, kind = event.seq, event.type
                        at = seen.acknowledged.get((run_id, event.seq))
                        if at is not None:
                            seen.waits.append((now, now - at))
                if kind != "run.completed":
                    seen.errors.append(f"{run_id}: the stream ended after {kind or 'nothing'}")
        except Exception as error:
            seen.errors.append(f"{run_id}: {error!r}")

    async with asyncio.timeout(900), asyncio.TaskGroup() as group:
        for run in range(count):
            group.create_task(write(run))
        try:
            while len({run_id for run_id, _ in seen.acknowledged}) < count:
                await asyncio.sleep(0.05)
            yield seen
        finally:
            over.set()


async def carried(replicas: list[SessionProcess]) -> None:
    """Returns once Redis carries every shard's events again."""
    for replica in replicas:
        await problem(replica, None)


async def fail_over_a_cluster(start: Start, rounds: int, hung: Callable[[int], bool]) -> None:
    with cluster() as servers:
        async with two(start, servers.url) as (first, second, replicas):
            await carried(replicas)
            worst = []
            async with streams(first, second) as seen:
                for number in range(rounds):
                    victim = servers.primaries()[number % 3]
                    struck = time.monotonic()
                    if hung(number):
                        victim.send(signal.SIGSTOP)
                        over = partial(failed_over, servers, victim)
                        await asyncio.to_thread(wait, over, "a failover")
                        victim.send(signal.SIGCONT)
                    else:
                        victim.kill()
                        await asyncio.to_thread(wait, servers.serves, "a failover")
                        await carried(replicas)
                        await asyncio.to_thread(victim.start)
                    await carried(replicas)
                    await asyncio.to_thread(wait, servers.settled, "the former primary as a replica")
                    worst.append(seen.longest(struck))
                    print(f"round {number + 1}: the longest wait was {worst[-1]:.2f} s", flush=True)
            assert seen.errors == []
            assert len(seen.waits) > STREAMS * rounds
            print(
                f"Redis Cluster, {rounds} failovers under {STREAMS} streams, {len(seen.waits)} events: "
                f"client errors 0, worst pause {max(worst):.2f} s"
            )
            assert max(worst) < PAUSE_S
            # All of it went through the cluster but for those moments.
            published = sum(metric(one, 'hermesh_session_publishes_total{reply="OK"}') for one in replicas)
            assert published > 0


def failed_over(servers: Cluster, victim: Server) -> bool:
    """Whether the others have another primary in a frozen one's place."""
    others = [node for node in servers.nodes if node is not victim]
    return sum(node.info("replication")["role"] == "master" for node in others) == 3


async def test_a_cluster_fails_over_in_the_middle_of_streams(start: Start) -> None:
    await fail_over_a_cluster(start, 1, hung=lambda _: False)


@pytest.mark.deploy_long
@pytest.mark.timeout(1200)
async def test_a_cluster_fails_over_twenty_times(start: Start) -> None:
    await fail_over_a_cluster(start, 20, hung=lambda number: number % 3 == 2)


async def test_a_clusters_shards_are_spread_and_read_from_replicas(start: Start) -> None:
    with cluster() as servers:
        settings = {"HERMESH_REDIS_READ_FROM": "replicas"}
        async with two(start, servers.url, **settings) as (first, second, replicas):
            await carried(replicas)
            async with streams(first, second) as seen:
                await asyncio.sleep(2)
            assert seen.errors == []
            for primary in servers.primaries():
                assert primary.ask("DBSIZE") >= STREAMS / 3 / 2
                assert "cmdstat_xread" not in primary.info("commandstats")
            # Half of them by Redis and not by a look at PostgreSQL, at the least.
            waits = sorted(wait for _, wait in seen.waits)
            assert waits[len(waits) // 2] < 0.5


async def test_slots_move_while_streams_flow(start: Start) -> None:
    with cluster() as servers:
        async with two(start, servers.url) as (first, second, replicas):
            await carried(replicas)
            async with streams(first, second) as seen:
                # A planned failover: the former primary lives, and says that the slots are elsewhere.
                replica = next(node for node in servers.nodes if node not in servers.primaries())
                replica.ask("CLUSTER", "FAILOVER")
                await asyncio.to_thread(wait, lambda: replica in servers.primaries(), "the planned failover")
                await asyncio.sleep(0.5)
                await carried(replicas)
            assert seen.errors == []


async def test_sentinel_fails_over_in_the_middle_of_streams(start: Start) -> None:
    with sentinels() as servers:
        async with two(start, servers.url) as (first, second, replicas):
            await carried(replicas)
            async with streams(first, second) as seen:
                former = servers.primary()
                struck = time.monotonic()
                former.kill()
                await asyncio.to_thread(wait, lambda: servers.primary() is not former, "a failover")
                await carried(replicas)
                print(f"Sentinel: worst pause {seen.longest(struck):.2f} s")
                # Once more, planned: the one that is left in place takes writes until it is told.
                await asyncio.to_thread(former.start)
                await asyncio.to_thread(wait, servers.settled, "the former primary as a replica")
                current = servers.primary()
                struck = time.monotonic()
                servers.sentinels[0].ask("SENTINEL", "FAILOVER", "mesh")
                await asyncio.to_thread(wait, lambda: servers.primary() is not current, "a planned failover")
                await carried(replicas)
                print(f"Sentinel, planned: worst pause {seen.longest(struck):.2f} s")
            assert seen.errors == []
            assert seen.longest() < PAUSE_S


@pytest.fixture
def secured(tmp_path: Path) -> Iterator[tuple[Server, Authority]]:
    """Debian's Redis, which knows TLS, with nothing else."""
    authority = Authority(tmp_path / "ca")
    certificate, key = authority.issue("127.0.0.1", "localhost")
    # One program that goes by its name; the package with the server's own name would start one.
    program = tmp_path / "redis-server"
    os.symlink(debian("redis-tools", "redis-check-rdb"), program)
    [port] = free_ports(1)
    server = Server(
        tmp_path / "server",
        port,
        'save ""',
        "port 0",
        f"tls-port {port}",
        f"tls-cert-file {certificate}",
        f"tls-key-file {key}",
        f"tls-ca-cert-file {authority.file}",
        "tls-auth-clients optional",
        command=(str(program),),
        tls=str(authority.file),
    )
    with running(server):
        yield server, authority


def trusting(server: Server, authority: Authority) -> str:
    """The URL of a server, for a client that trusts an authority."""
    return f"rediss://:{PASSWORD}@{server.address}/0?ssl_ca_certs={authority.file}"


async def test_tls_carries_events(start: Start, secured: tuple[Server, Authority]) -> None:
    async with two(start, trusting(*secured)) as (first, second, replicas):
        await carried(replicas)
        delays = await shows(first, second)
        assert delays[len(delays) // 2] < 0.5


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("nobody is trusted", "certificate is not accepted"),
        ("a stranger is trusted", "certificate is not accepted"),
        ("no TLS", "if it wants TLS"),
        ("it has run out", "certificate has expired"),
    ],
)
async def test_tls_that_cannot_be_is_told_in_one_line(
    start: Start, secured: tuple[Server, Authority], tmp_path: Path, fault: str, says: str
) -> None:
    server, authority = secured
    url = trusting(server, authority)
    match fault:
        case "nobody is trusted":
            url = url.partition("?")[0]
        case "a stranger is trusted":
            url = trusting(server, Authority(tmp_path / "stranger"))
        case "no TLS":
            url = server.url
        case "it has run out":
            certificate, key = map(str, authority.issue("127.0.0.1", days=-1))
            server.ask("CONFIG", "SET", "tls-cert-file", certificate, "tls-key-file", key)
    replica = start(url)
    await asyncio.to_thread(replica.wait_ready)
    await problem(replica, says)
    assert PASSWORD not in replica.log.read_text()
