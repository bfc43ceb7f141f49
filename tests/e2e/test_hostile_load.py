"""Outsiders without a key, in bulk: good clients are answered meanwhile, and no service grows by them.

Bounded in number and time, and on loopback only.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from bench.mesh import Mesh
from hermesh.session.v1 import session_service_pb2 as session_pb
from hermesh.session.v1.session_service_pb2_grpc import SessionServiceStub
from tests.e2e.client import assert_whole, http, new_session, run_to_end
from tests.hostile import HostileCalls, unfinished

SESSION = "/hermesh.session.v1.SessionService"
METHODS = (
    f"{SESSION}/GetRun",
    f"{SESSION}/SubmitRun",
    f"{SESSION}/WatchRun",
    "/hermesh.agent.v1.AgentService/Run",
    "/hermesh.tool.v1.ToolService/ListTools",
    "/hermesh.memory.v1.MemoryService/Remember",
    "/grpc.health.v1.Health/Check",
)
HEALTH = METHODS[-1]
OWN_METHODS = {
    "session": f"{SESSION}/SubmitRun",
    "agent": "/hermesh.agent.v1.AgentService/Execute",
    "tool": "/hermesh.tool.v1.ToolService/Execute",
    "memory": "/hermesh.memory.v1.MemoryService/Remember",
}
CONNECTIONS = 4
HALF_OPEN = 350
MESSAGES = 20
SLOW = 150
SECONDS = 90
# A replica of session grew by 150 MiB when 20 of these messages reached it.
GROWTH_MIB = 48


def resident_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1024 / 1024


async def slow_requests(stack: AsyncExitStack, mesh: Mesh) -> None:
    """Opens connections that send nothing, half of their headers, half of a body, half of a handshake."""
    beginnings = (
        b"",
        b"GET /v1/sessions HTTP/1.1\r\nHost: x\r\nX-Slow: ",
        b"POST /auth/login HTTP/1.1\r\nHost: x\r\nOrigin: http://x\r\nContent-Length: 4000\r\n\r\n{",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n{",
        b"GET /v1/sessions/x/ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n",
    )
    for number in range(SLOW):
        _, writer = await asyncio.open_connection("127.0.0.1", mesh.http_port)
        stack.callback(writer.close)
        writer.write(beginnings[number % len(beginnings)])


@asynccontextmanager
async def under_attack(mesh: Mesh) -> AsyncIterator[list[HostileCalls]]:
    """Holds all of it open."""
    async with AsyncExitStack() as stack:
        await slow_requests(stack, mesh)
        connections = [
            await stack.enter_async_context(HostileCalls(mesh.grpc_address)) for _ in range(CONNECTIONS)
        ]
        for number in range(HALF_OPEN):
            for connection in connections:
                connection.begin(METHODS[number % len(METHODS)])
        async with asyncio.TaskGroup() as group:
            for size in (2_000_000, 16_777_216):
                for number in range(MESSAGES):
                    connection = connections[number % CONNECTIONS]
                    stream = connection.begin(METHODS[number % 4])
                    group.create_task(connection.send(stream, unfinished(size)))
        yield connections


async def test_a_good_client_is_answered_while_calls_without_a_key_never_end(mesh: Mesh) -> None:
    pids = {
        row.replica: row.pid
        for row in mesh.status()
        if row.service in ("session", "agent", "gateway", "tool")
    }
    before = {replica: resident_mib(pid) for replica, pid in pids.items()}
    key = (("authorization", f"Bearer {mesh.api_key}"),)
    async with asyncio.timeout(SECONDS), under_attack(mesh) as connections:
        assert not any(connection.ended for connection in connections)
        async with http(mesh) as client, grpc.aio.insecure_channel(mesh.grpc_address) as channel:
            sessions: Any = SessionServiceStub(channel)  # type: ignore[no-untyped-call]
            for _ in range(3):
                session = await new_session(client)
                request = session_pb.GetSessionRequest(session_id=session)
                assert (await sessions.GetSession(request, metadata=key, timeout=10)).session
                frames = await run_to_end(client, session, "[[tokens=5]]")
                assert_whole([frame for frame in frames if frame.id])
                assert frames[-1].event == "run.completed"
        # Nobody was taken out of the mesh, and nobody holds what was never sent whole.
        assert {row.replica: row.pid for row in mesh.status() if row.replica in pids} == pids
        grown = {replica: resident_mib(pid) - before[replica] for replica, pid in pids.items()}
        assert max(grown.values()) < GROWTH_MIB, grown
    mesh.wait_healthy()


async def test_a_service_refuses_such_calls_itself_from_their_headers(mesh: Mesh) -> None:
    """Envoy holds them back; a service that is reached without it waits for none of them either."""
    rows = [row for row in mesh.status() if row.service in OWN_METHODS]
    before = {row.replica: resident_mib(row.pid) for row in rows}
    async with asyncio.timeout(SECONDS), AsyncExitStack() as stack, asyncio.TaskGroup() as group:
        for row in rows:
            connection = await stack.enter_async_context(HostileCalls(row.address))
            for _ in range(HALF_OPEN):
                connection.begin(HEALTH)
            silent = {connection.begin(OWN_METHODS[row.service]) for _ in range(HALF_OPEN)}
            unfinished_calls = {connection.begin(OWN_METHODS[row.service]) for _ in range(MESSAGES)}
            for stream in unfinished_calls:
                group.create_task(connection.send(stream, unfinished(16_777_216)))
            await connection.until_answered(silent | unfinished_calls)
            assert not connection.ended
        async with http(mesh) as client:
            frames = await run_to_end(client, await new_session(client), "[[tokens=5]]")
            assert frames[-1].event == "run.completed"
        now = {row.replica: row for row in mesh.status()}
        assert all(now[row.replica].health == row.health and now[row.replica].pid == row.pid for row in rows)
        grown = {row.replica: resident_mib(row.pid) - before[row.replica] for row in rows}
        assert max(grown.values()) < GROWTH_MIB, grown
    mesh.wait_healthy()


async def test_a_flood_of_wrong_keys_leaves_the_right_one_served(mesh: Mesh) -> None:
    """Each answered 401 and no more: the good client's calls come back among them."""
    async with asyncio.timeout(SECONDS), http(mesh) as client:
        session = await new_session(client)
        done = asyncio.Event()
        refused = 0

        async def flood(number: int) -> None:
            nonlocal refused
            async with http(mesh, Authorization=f"Bearer hm_{number:043d}") as bad:
                while not done.is_set():
                    answer = await bad.get("/v1/sessions")
                    # However many are refused, and for want of a place or of a key: none gets in.
                    assert answer.status_code in (401, 429)
                    refused += 1

        async with asyncio.TaskGroup() as group:
            for number in range(4):
                group.create_task(flood(number))
            for _ in range(10):
                assert (await client.get(f"/v1/sessions/{session}")).status_code == 200
            done.set()
        assert refused
