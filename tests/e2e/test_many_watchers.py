"""More watchers than a connection of HTTP/2 takes by default: each is served, and so is everybody else."""

import asyncio
import json
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx

from bench.mesh import Mesh
from hermesh.session.v1 import session_service_pb2 as session_pb
from hermesh.session.v1.session_service_pb2_grpc import SessionServiceStub
from tests.e2e.client import TERMINAL, http, new_session, submit

# Envoy's own bound is 1,024 streams a connection.
WATCHERS = 1_150
SESSIONS = 10
AT_ONCE = 50
NO_MEMORY = {"options": {"memory": False}}


@dataclass
class Watcher:
    """A client of one session's events that is no more than a socket: httpx has a pool to look after."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    seen: list[tuple[str, int]] = field(default_factory=list)

    @classmethod
    async def open(cls, address: str, headers: dict[str, str], session: str) -> "Watcher":
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        writer.write(f"GET /v1/sessions/{session}/events HTTP/1.1\r\nHost: test\r\n{lines}\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        return cls(reader, writer)

    async def until_terminal(self) -> list[tuple[str, int]]:
        """The ids of the events up to a run's last one."""
        while True:
            line = await self.reader.readline()
            assert line, "the stream ended"
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                self.seen.append((event["run_id"], event["seq"]))
                if event["type"] in TERMINAL:
                    return self.seen


async def test_one_gateway_serves_watchers_beyond_a_connections_usual_bound(mesh: Mesh) -> None:
    gateway = mesh.of("gateway")[0].address
    async with AsyncExitStack() as stack, asyncio.timeout(240):
        client = await stack.enter_async_context(http(mesh))
        client.base_url = httpx.URL(f"http://{gateway}")
        sessions = [await new_session(client) for _ in range(SESSIONS)]
        watchers: list[Watcher] = []
        for start in range(0, WATCHERS, AT_ONCE):
            several = range(start, min(start + AT_ONCE, WATCHERS))
            opened = await asyncio.gather(
                *(Watcher.open(gateway, mesh.headers, sessions[number % SESSIONS]) for number in several)
            )
            for watcher in opened:
                stack.callback(watcher.writer.transport.abort)
            watchers += opened
        # A unary call on the same connection, while all of them are open.
        answer = await client.get(f"/v1/sessions/{sessions[0]}", timeout=10)
        assert answer.status_code == 200
        runs = [await submit(client, session, "[[tokens=3]]", **NO_MEMORY) for session in sessions]
        logs = await asyncio.gather(*(watcher.until_terminal() for watcher in watchers))
        for number, log in enumerate(logs):
            assert log == [(runs[number % SESSIONS], seq) for seq in range(1, len(log) + 1)]
        assert len({len(log) for log in logs[::SESSIONS]}) == 1


async def test_one_grpc_client_watches_beyond_a_connections_usual_bound(mesh: Mesh) -> None:
    key = (("authorization", f"Bearer {mesh.api_key}"),)
    async with (
        http(mesh) as client,
        grpc.aio.insecure_channel(mesh.grpc_address) as channel,
        asyncio.timeout(240),
        AsyncExitStack() as stack,
    ):
        session = await new_session(client)
        stub: Any = SessionServiceStub(channel)  # type: ignore[no-untyped-call]
        calls = []
        for _ in range(WATCHERS):
            call = stub.WatchSession(session_pb.WatchSessionRequest(session_id=session), metadata=key)
            stack.callback(call.cancel)
            calls.append(call)
        found = await stub.GetSession(
            session_pb.GetSessionRequest(session_id=session), metadata=key, timeout=60
        )
        assert found.session.session_id == session
        run = await submit(client, session, "[[tokens=3]]", **NO_MEMORY)

        async def until_terminal(call: Any) -> list[tuple[str, int]]:
            seen: list[tuple[str, int]] = []
            async for answer in call:
                seen += [(event.run_id, event.seq) for event in answer.frame.events]
                if any(event.type in TERMINAL for event in answer.frame.events):
                    return seen
            raise AssertionError("the watch ended")

        logs = await asyncio.gather(*(until_terminal(call) for call in calls))
        assert logs[0] == [(run, seq) for seq in range(1, len(logs[0]) + 1)]
        assert all(log == logs[0] for log in logs)
