"""Redis that cannot be used: one clear line, nothing lost, and over as soon as it is put right."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.mesh import free_ports
from tests.integration.session.conftest import bootstrap
from tests.integration.session.live import Start, lines, problem, replicas_on, shows, two
from tests.integration.session.process import connect, metric
from tests.unit.session.calls import append_stream, new_writer
from tests.valkeys import PASSWORD, Server, documented, folder, primary_and_replica, running

PAGE = Path(__file__).resolve().parents[3] / "docs/deploy/redis.md"
STREAMS = ("+xadd", "+xread", "+xrevrange")


@pytest.fixture(scope="module")
def bootstrapped(database: str) -> str:
    bootstrap(database)
    return database


@pytest.fixture
def start(bootstrapped: str) -> Iterator[Start]:
    with replicas_on(bootstrapped) as begin:
        yield begin


@pytest.fixture
def server() -> Iterator[Server]:
    with folder() as place:
        [port] = free_ports(1)
        found = Server(place, port, *documented("What to set on the server"))
        with running(found):
            yield found


async def test_a_read_only_primary_is_told_at_once_and_over_at_once(start: Start) -> None:
    with primary_and_replica() as (primary, replica):
        async with two(start, replica.url) as (first, second, processes):
            for process in processes:
                why = await problem(process, "Redis takes no writes: it is a read-only replica")
                assert metric(process, 'hermesh_session_redis_failures_total{cause="read_only"}') >= 1
                assert metric(process, "hermesh_session_tail_degraded") == 1
                async with asyncio.timeout(10):
                    while metric(process, 'hermesh_dependency_up{dependency="redis"}') != 0:  # noqa: ASYNC110
                        await asyncio.sleep(0.1)
            # Nothing is lost, and nothing waits for the look that finds by chance what was lost.
            delays = await shows(first, second)
            assert delays[len(delays) // 2] < 0.7
            [line] = [line for line in lines(processes[0]) if line.get("dependency") == "redis"]
            assert (line["event"], line["reason"]) == ("degraded", why)
            primary.kill()
            replica.ask("REPLICAOF", "NO", "ONE")
            for process in processes:
                await problem(process, None)
                assert metric(process, "hermesh_session_tail_degraded") == 0
            # Redis carries it again: the next look is a second away.
            delays = await shows(first, second)
            assert delays[len(delays) // 2] < 0.5
            assert sum(metric(one, 'hermesh_session_publishes_total{reply="OK"}') for one in processes) > 0


def sentinel_url(server: Server) -> str:
    """A URL that takes a server for a Sentinel."""
    return f"redis+sentinel://{server.address}/mesh?sentinel_password={PASSWORD}"


@pytest.mark.parametrize(
    ("url", "says"),
    [
        (lambda server: server.url.replace(PASSWORD, "wrong-secret"), "refuses the user or the password"),
        (lambda server: f"redis://{server.address}", "refuses the user or the password"),
        (lambda server: server.url.replace("redis://", "rediss://"), "if it speaks no TLS"),
        (lambda server: server.url.replace("redis://", "redis+cluster://"), "Redis is no cluster"),
        (sentinel_url, "no Sentinels"),
        (lambda server: server.url.replace(str(server.port), "1"), "Redis cannot be reached"),
    ],
)
async def test_a_wrong_url_is_one_line_and_the_replica_serves(
    start: Start, server: Server, url: Callable[[Server], str], says: str
) -> None:
    replica = start(url(server))
    await asyncio.to_thread(replica.wait_ready)
    why = await problem(replica, says)
    assert "PostgreSQL" in why
    async with connect(replica) as client:
        assert len(await shows(client, client, 3)) == 3
    told = [line for line in lines(replica) if "edis" in json.dumps(line)]
    assert [(line["event"], line["reason"]) for line in told] == [("degraded", why)]
    assert "wrong-secret" not in replica.log.read_text()


async def test_a_scheme_that_is_none_ends_the_start(start: Start) -> None:
    replica = start("tcp://127.0.0.1:6379")
    assert await asyncio.to_thread(replica.process.wait, 30) == 1
    assert "HERMESH_REDIS_URL must be redis://" in replica.log.read_text()


async def test_an_acl_user_needs_what_the_page_lists_and_no_more(start: Start, server: Server) -> None:
    [line] = re.findall("^ACL SETUSER mesh .*$", PAGE.read_text(), re.MULTILINE)
    rules = line.replace("PASSWORD", PASSWORD).split()
    server.ask(*(rule for rule in rules if rule not in STREAMS))
    url = f"redis://mesh:{PASSWORD}@{server.address}/0"
    async with two(start, url) as (first, second, processes):
        await problem(processes[0], "Redis's ACL keeps this user from what is needed")
        assert len(await shows(first, second, 3)) == 3
        server.ask(*rules)
        for process in processes:
            await problem(process, None)
        refused = 'hermesh_session_redis_failures_total{cause="acl"}'
        before = [metric(process, refused) for process in processes]
        assert len(await shows(first, second, 3)) == 3
        # Conversations, too.
        writer = await new_writer(first)
        async with append_stream(first) as stream:
            step = writer.append("run.completed", status=4)
            step.commit.messages.add(message_id=writer.run_id, role="assistant", content="done")
            await stream.write(step)
        async with asyncio.timeout(10):
            key = f"hermesh:{{{writer.session_id}}}:messages"
            while not server.ask("EXISTS", key):  # noqa: ASYNC110 -- written behind the answer
                await asyncio.sleep(0.05)
        assert [metric(process, refused) for process in processes] == before


# Not yet of CI: in a whole run beside other work it has missed its minute once.
@pytest.mark.deploy_long
async def test_a_read_replica_carries_tails_and_one_that_is_cut_off_is_noticed(start: Start) -> None:
    with primary_and_replica() as (primary, replica):
        async with two(start, primary.url, HERMESH_REDIS_READ_FROM=replica.url) as (first, second, processes):
            for process in processes:
                await problem(process, None)
            delays = await shows(first, second)
            assert delays[len(delays) // 2] < 0.5
            assert int(replica.info("commandstats")["cmdstat_xread"]["calls"]) > 0
            assert "cmdstat_xread" not in primary.info("commandstats")
            # It follows a server that is not there, and answers with what it has.
            replica.ask("REPLICAOF", "127.0.0.1", 1)
            await problem(processes[1], "more than a second behind")
            assert metric(processes[1], "hermesh_session_tail_degraded") == 1
            assert len(await shows(first, second, 5)) == 5
            replica.ask("REPLICAOF", "127.0.0.1", primary.port)
            await problem(processes[1], None)
