"""Replicas whose surroundings fail: Valkey, a sibling, the agent, the client that does not read."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from hermesh.agent.v1 import agent_service_pb2 as agent_pb
from hermesh.agent.v1 import agent_service_pb2_grpc as agent_grpc
from hermesh.session.v1 import session_internal_service_pb2 as internal
from hermesh.session.v1 import session_service_pb2 as public
from hermesh.session.v1 import session_service_pb2_grpc as public_grpc
from launcher import probes
from launcher.embedded.postgres import Postgres
from meshkit.errors import from_rpc_error
from meshkit.migrate import migrate
from tests.conftest import MIGRATIONS, ValkeyServer, wait_for
from tests.integration.session.conftest import bootstrap
from tests.integration.session.process import Client, SessionProcess, connect, environment, metric
from tests.integration.session.test_two_replicas import play, reattach
from tests.unit.session.calls import (
    append_stream,
    events_of,
    events_until,
    new_session,
    new_writer,
    submit,
    watch,
)

COMMITTED = internal.APPEND_OUTCOME_COMMITTED

Start = Callable[..., SessionProcess]


@pytest.fixture(scope="module")
def bootstrapped(database: str) -> str:
    bootstrap(database)
    return database


@pytest.fixture
def start(bootstrapped: str) -> Iterator[Start]:
    """Starts replicas that end with the test."""
    replicas: list[SessionProcess] = []

    def begin(redis_url: str = "", **more: str) -> SessionProcess:
        values = environment(bootstrapped, redis_url, **more)
        replica = SessionProcess(f"session-{len(replicas) + 1}", values)
        replicas.append(replica)
        return replica

    yield begin
    for replica in replicas:
        if replica.process.poll() is None:
            replica.kill()
        shutil.rmtree(replica.folder, ignore_errors=True)


@asynccontextmanager
async def two(
    start: Start, redis_url: str = ""
) -> AsyncIterator[tuple[Client, Client, list[SessionProcess]]]:
    replicas = [start(redis_url), start(redis_url)]
    for replica in replicas:
        await asyncio.to_thread(replica.wait_ready)
    async with connect(replicas[0]) as first, connect(replicas[1]) as second:
        yield first, second, replicas


async def test_without_redis_all_of_it_works(start: Start) -> None:
    async with two(start) as (first, second, _):
        writer = await new_writer(first)
        async with append_stream(first) as stream, watch(second, writer.run_id) as watched:
            for seq in range(2, 8):
                await stream.write(writer.append("text.delta"))
                async with asyncio.timeout(3):
                    assert (await events_until(watched, seq))[-1].seq == seq
            await stream.write(writer.append("run.completed", status=4))
            async with asyncio.timeout(3):
                assert [event.seq for event in await events_of(watched)] == [8]


async def test_valkey_dies_and_comes_back_in_the_middle(start: Start, valkey: ValkeyServer) -> None:
    async with two(start, valkey.url) as (first, second, replicas):
        writer = await new_writer(first)
        async with append_stream(first) as stream, watch(second, writer.run_id) as watched:

            async def write(count: int) -> float:
                slowest = 0.0
                for _ in range(count):
                    started = time.monotonic()
                    [result] = await stream.write(writer.append("text.delta"))
                    slowest = max(slowest, time.monotonic() - started)
                    assert result.outcome == COMMITTED
                return slowest

            async def seen() -> None:
                async with asyncio.timeout(10):
                    found.extend(await events_until(watched, writer.next_seq - 1))

            found: list[Any] = []
            await write(10)
            await seen()
            valkey.kill()
            # Nobody waits for a dead Redis: neither the writer nor, for long, the watcher.
            assert await write(10) < 1.0
            await seen()
            status, checks = await asyncio.to_thread(readiness, replicas[0])
            assert (status, checks["redis"]["ok"], checks["postgresql"]["ok"]) == (200, False, True)
            assert metric(replicas[0], 'hermesh_dependency_up{dependency="redis"}') == 0
            await asyncio.to_thread(valkey.start)
            await write(10)
            await seen()
            valkey.freeze()
            assert await write(10) < 1.0
            await seen()
            valkey.thaw()
            await write(10)
            await stream.write(writer.append("run.completed", status=4))
            async with asyncio.timeout(10):
                found.extend(await events_of(watched))
        assert [event.seq for event in found] == list(range(1, 53))
        async with watch(first, writer.run_id) as again:
            assert await events_of(again) == found


async def test_cut_points_while_valkey_is_down(start: Start, valkey: ValkeyServer) -> None:
    async with two(start, valkey.url) as (first, second, _):

        async def disturb(seq: int) -> None:
            if seq > 20:
                valkey.kill()

        stored, seen = await play(first, second, disturb, seed=6)
        assert [event.seq for event in stored] == list(range(1, 61))
        assert all(events == stored for events in seen)


async def test_a_killed_replica_costs_a_reconnect_and_nothing_else(
    start: Start, valkey: ValkeyServer
) -> None:
    async with two(start, valkey.url) as (first, second, replicas):
        writer = await new_writer(first)
        seen: list[Any] = []
        async with append_stream(first) as stream, watch(first, writer.run_id) as watched:
            await stream.write(writer.append("text.delta", "text.delta"))
            seen += await events_until(watched, 3)
            # In flight while the replica dies: nobody knows whether it is committed.
            unsure = writer.append("text.delta", "text.delta")
            await stream.send(unsure)
            await asyncio.to_thread(replicas[0].kill)
            with pytest.raises(grpc.aio.AioRpcError):
                await events_of(watched)
        async with append_stream(second) as stream, watch(second, writer.run_id, 3) as watched:
            await reattach(stream, writer)
            assert writer.next_seq in (4, 6)
            if writer.next_seq == 4:
                unsure.fence = writer.fence
                [result] = await stream.write(unsure)
                assert result.outcome == COMMITTED
                writer.next_seq = 6
            await stream.write(writer.append("run.completed", status=4))
            async with asyncio.timeout(10):
                seen += await events_of(watched)
        assert [event.seq for event in seen] == list(range(1, 7))


async def test_a_drain_moves_everybody_and_exits_clean(start: Start, valkey: ValkeyServer) -> None:
    async with two(start, valkey.url) as (first, second, replicas):
        writer = await new_writer(first)
        session_watch = first.public.WatchSession(
            public.WatchSessionRequest(session_id=(await new_session(first)).session_id),
            metadata=first.metadata,
        )
        async with append_stream(first) as stream, watch(first, writer.run_id) as watched:
            await stream.write(writer.append("text.delta"))
            assert len(await events_until(watched, 2)) == 2
            ending = asyncio.create_task(asyncio.to_thread(replicas[0].stop))
            async with asyncio.timeout(10):
                frames = [response.frame async for response in watched]
                assert frames[-1].reconnect.reason == "drain"
                frames = [response.frame async for response in session_watch]
                assert frames[-1].reconnect.reason == "drain"
                assert (await stream.call.read()).draining
            stream.call.cancel()
            # The lease was not cut: the writer goes on elsewhere under the same claim.
            async with append_stream(second) as other:
                await reattach(other, writer)
                [result] = await other.write(writer.append("run.completed", status=4))
                assert result.outcome == COMMITTED
        async with asyncio.timeout(10):
            assert await ending == 0
        log = replicas[0].log.read_text()
        assert "Traceback" not in log
        assert "never awaited" not in log


@asynccontextmanager
async def own_database() -> AsyncIterator[OwnDatabase]:
    """A PostgreSQL that a test may kill and start again."""
    folder = Path(tempfile.mkdtemp(prefix="hm-pg-"))
    server = OwnDatabase(folder)
    try:
        await asyncio.to_thread(server.server.initialize)
        await asyncio.to_thread(server.start)
        await migrate(server.url, MIGRATIONS["session"], schema="session")
        await asyncio.to_thread(bootstrap, server.url)
        yield server
    finally:
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)


class OwnDatabase:
    def __init__(self, folder: Path) -> None:
        self.server = Postgres(folder / "data", folder, "test-password")
        self.url = self.server.url()
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            self.server.command(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/"
        )
        wait_for(lambda: asyncio.run(probes.postgres(self.url)), self.process)

    def kill(self) -> None:
        """Stops it at once: connections break, and the log is replayed at the next start."""
        if self.process is not None:
            self.process.send_signal(signal.SIGQUIT)
            self.process.wait(timeout=30)
            self.process = None


async def test_postgresql_restarts_in_the_middle() -> None:
    async with own_database() as database:
        replica = SessionProcess("session-1", environment(database.url))
        try:
            await asyncio.to_thread(replica.wait_ready)
            async with connect(replica) as client:
                await restart_under(client, replica, database)
        finally:
            replica.kill()
            shutil.rmtree(replica.folder, ignore_errors=True)


def readiness(replica: SessionProcess) -> tuple[int, Any]:
    """The status of /ready and its checks by name."""
    try:
        answer = urllib.request.urlopen(f"http://{replica.metrics_address}/ready", timeout=5)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        return int(answer.status), json.load(answer)["checks"]


def probe(replica: SessionProcess, name: str) -> int:
    """The status that a replica answers on one of its probes."""
    try:
        with urllib.request.urlopen(f"http://{replica.metrics_address}/{name}", timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


async def restart_under(client: Client, replica: SessionProcess, database: OwnDatabase) -> None:
    writer = await new_writer(client)
    session = await new_session(client)
    async with append_stream(client) as stream, watch(client, writer.run_id) as watched:
        assert (await stream.write(writer.append("text.delta")))[0].outcome == COMMITTED
        assert (await events_until(watched, 2))[-1].seq == 2
        await asyncio.to_thread(database.kill)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await submit(client, session.session_id)
        error = from_rpc_error(raised.value)
        assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE")
        assert error.retry_after_ms
        assert "postgres" not in error.message.lower()
        append = writer.append("text.delta")
        [result] = await stream.write(append)
        assert result.outcome == internal.APPEND_OUTCOME_RETRY
        assert await asyncio.to_thread(probe, replica, "health") == 200
        # All replicas share it: this one is degraded and says why, and stays in.
        status, checks = await asyncio.to_thread(readiness, replica)
        assert (status, checks["postgresql"]["ok"]) == (200, False)
        await asyncio.to_thread(database.start)
        # The writer sends the same bytes again until they are in; the watch was never cut.
        async with asyncio.timeout(15):
            while result.outcome != COMMITTED:
                [result] = await stream.write(append)
                await asyncio.sleep(0.05)
            [result] = await stream.write(writer.append("run.completed", status=4))
            assert result.outcome == COMMITTED
            assert [event.seq for event in await events_of(watched)] == [3, 4]
        assert (await submit(client, session.session_id)).run.ordinal == 1


class FakeAgent(agent_grpc.AgentServiceServicer):
    """A fake agent: notes what it is asked to execute and holds the stream."""

    def __init__(self) -> None:
        self.taken: asyncio.Queue[tuple[str, dict[str, Any]]] = asyncio.Queue()
        self.release = asyncio.Event()

    async def Execute(self, request: agent_pb.ExecuteRequest, context: Any) -> AsyncIterator[Any]:
        self.taken.put_nowait((request.run_id, dict(context.invocation_metadata())))
        await self.release.wait()
        yield agent_pb.ExecuteResponse(finished=True)

    async def Run(self, request: Any, context: Any) -> Any:
        raise NotImplementedError

    async def ListModels(self, request: Any, context: Any) -> Any:
        raise NotImplementedError


@asynccontextmanager
async def serving(agent: FakeAgent) -> AsyncIterator[str]:
    server = grpc.aio.server()
    agent_grpc.add_AgentServiceServicer_to_server(agent, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        agent.release.set()
        await server.stop(0)


async def taken(agent: FakeAgent, run_id: str, timeout: float) -> dict[str, Any]:
    """Waits until the agent is asked for a run; others of this database are let pass."""
    async with asyncio.timeout(timeout):
        while True:
            found, metadata = await agent.taken.get()
            if found == run_id:
                return metadata


async def test_runs_are_pushed_to_an_agent_and_orphans_again(start: Start) -> None:
    agent = FakeAgent()
    async with serving(agent) as mesh_address:
        replica = start(HERMESH_MESH_ADDRESS=mesh_address)
        await asyncio.to_thread(replica.wait_ready)
        async with connect(replica) as client:
            session = await new_session(client)
            started = time.monotonic()
            run = (await submit(client, session.session_id)).run
            metadata = await taken(agent, run.run_id, 10)
            assert time.monotonic() - started < 1.5
            assert metadata["x-hermesh-mesh"] == "mesh-secret"
            assert "traceparent" in metadata
            claim = await client.mesh.ClaimRun(internal.ClaimRunRequest(run_id=run.run_id, owner="agent-1"))
            append = internal.RunAppend(
                session_id=session.session_id, run_id=run.run_id, fence=claim.grant.fence, first_seq=2
            )
            append.events.add(type="text.delta", time_ms=1, data="{}")
            async with append_stream(client) as stream:
                assert (await stream.write(append))[0].outcome == COMMITTED
                # The agent dies: its stream breaks, its lease is cut, and the run goes to another one.
                broken = time.monotonic()
            await taken(agent, run.run_id, 10)
            assert time.monotonic() - broken < 4
            again = await client.mesh.ClaimRun(internal.ClaimRunRequest(run_id=run.run_id, owner="agent-2"))
            assert again.outcome == internal.CLAIM_OUTCOME_CLAIMED
            assert again.grant.fence > claim.grant.fence
            assert metric(replica, "hermesh_session_leases_shortened_total") == 1


async def test_a_slow_reader_does_not_grow_memory(start: Start) -> None:
    replica = start()
    await asyncio.to_thread(replica.wait_ready)
    async with connect(replica) as client:
        writer = await new_writer(client)
        async with append_stream(client) as stream:
            payload = '{"text":"' + "x" * 20_000 + '"}'

            async def write(count: int) -> None:
                for _ in range(count):
                    await stream.write(writer.append(*["text.delta"] * 10, data=payload))

            # The first ones warm caches and pools up.
            await write(10)
            options = [("grpc.max_receive_message_length", -1), ("grpc.http2.bdp_probe", 0)]
            async with grpc.aio.insecure_channel(replica.address, options=options) as channel:
                stub = public_grpc.SessionServiceStub(channel)
                request = public.WatchRunRequest(run_id=writer.run_id)
                calls = [stub.WatchRun(request, metadata=client.metadata) for _ in range(10)]
                for call in calls:
                    await call.initial_metadata()
                    assert (await call.read()).frame.events
                before = resident(replica)
                # 60 MB for each of ten readers that take nothing.
                await write(300)
                grown = resident(replica) - before
                assert grown < 60_000_000, f"{grown} bytes"
                # And whoever reads again misses nothing.
                await stream.write(writer.append("run.completed", status=4))
                for call in calls[:2]:
                    seqs = []
                    async with asyncio.timeout(60):
                        while True:
                            response = await call.read()
                            if response is grpc.aio.EOF:
                                break
                            seqs += [event.seq for event in response.frame.events]
                    assert seqs[-1] == 3102
                    assert seqs == list(range(seqs[0], 3103))
                for call in calls:
                    call.cancel()


def resident(replica: SessionProcess) -> int:
    """Bytes of memory that a replica has in use."""
    with open(f"/proc/{replica.process.pid}/statm") as file:
        return int(file.read().split()[1]) * 4096
