"""Clients that stop reading: they cost a bounded amount of memory, and nobody else anything."""

import asyncio
import json
import re
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx

from bench.mesh import Mesh
from hermesh.agent.v1 import agent_service_pb2 as agent_pb
from hermesh.agent.v1.agent_service_pb2_grpc import AgentServiceStub
from hermesh.common.v1.event_pb2 import InputMessage
from hermesh.session.v1 import session_service_pb2 as session_pb
from hermesh.session.v1.resources_pb2 import RunOptions
from hermesh.session.v1.session_service_pb2_grpc import SessionServiceStub
from tests.e2e.client import (
    TERMINAL,
    assert_whole,
    frames_of,
    http,
    new_session,
    run_to_end,
    submit,
    watch,
    watch_to_end,
)

MIB = 1024 * 1024
# A reply of many tokens and much text: more than the sockets and windows on its way hold.
FLOOD = "[[echo]] " + "a-word-of-the-flood " * 50_000
LONG_RUNS = 20
WATCHERS = 6
# What one reader who has stopped may hold in all processes together: windows, socket buffers and a frame
# of the largest kind in each of them. Its whole stream would be 20 MiB.
MOST_MIB = 8
# What slow readers may add to another conversation, on a machine that has much else to do.
QUICK_SECONDS = 3.0
NO_MEMORY = {"options": {"memory": False}}


def rss(mesh: Mesh) -> dict[str, int]:
    """The memory of each process that events pass through, in bytes."""
    found = {}
    for row in mesh.status():
        if row.service in ("gateway", "agent", "session", "envoy"):
            size = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{row.pid}/status").read_text())
            assert size is not None
            found[f"{row.replica} {row.pid}"] = int(size[1]) * 1024
    return found


def growth(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    """What each process has more, in MiB; processes that began meanwhile are left out."""
    return {name: (after[name] - before[name]) // MIB for name in before if name in after}


@dataclass
class Deaf:
    """An HTTP client that reads nothing unless asked to, with a small buffer."""

    reader: asyncio.StreamReader

    async def lines(self, most: int) -> list[str]:
        """Reads the response's body to its end, or at least `most` bytes; returns its complete frames."""
        body = bytearray()
        head = await self.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        assert b"chunked" in head.lower()
        while len(body) < most:
            size = int(await self.reader.readuntil(b"\r\n"), 16)
            body += (await self.reader.readexactly(size + 2))[:-2]
            if not size:
                break
        return [frame for frame in body.decode(errors="replace").split("\n\n")[:-1] if "id: " in frame]


@asynccontextmanager
async def deaf(mesh: Mesh, method: str, path: str, body: Any = None) -> AsyncIterator[Deaf]:
    """Sends a request and reads none of its response."""
    content = json.dumps(body).encode() if body is not None else b""
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: test\r\nAuthorization: Bearer {mesh.api_key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", mesh.http_port))
    reader, writer = await asyncio.open_connection(sock=sock, limit=4096)
    try:
        writer.write(head.encode() + content)
        await writer.drain()
        yield Deaf(reader)
    finally:
        writer.transport.abort()


async def quick_run(mesh: Mesh) -> float:
    """Has a short conversation and returns how long it took."""
    async with http(mesh) as client:
        session = await new_session(client)
        start = time.monotonic()
        assert_whole(await run_to_end(client, session, "[[tokens=20 rate=100]]", **NO_MEMORY))
        return time.monotonic() - start


async def whole_session(client: httpx.AsyncClient, session: str, last_run: str, after: str = "") -> list[str]:
    """A session's frames from a cursor to the end of a run."""
    frames = []
    headers = {"Last-Event-ID": after} if after else {}
    async with client.stream("GET", f"/v1/sessions/{session}/events", headers=headers) as response:
        assert response.status_code == 200
        async for frame in frames_of(response):
            if frame.id:
                frames.append(frame.raw)
            if frame.run_id == last_run and frame.event in TERMINAL:
                break
    return frames


def last_id(frames: Sequence[str]) -> str:
    return frames[-1].partition("id: ")[2].partition("\n")[0]


async def test_watchers_that_do_not_read_cost_little_and_resume(mesh: Mesh) -> None:
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(http(mesh))
        session = await new_session(client)
        for _ in range(LONG_RUNS):
            run = await submit(client, session, "[[tokens=1]] " + "x" * 1_000_000, **NO_MEMORY)
        await watch(client, run)
        alone = await quick_run(mesh)
        before = rss(mesh)
        path = f"/v1/sessions/{session}/events"
        readers = [await stack.enter_async_context(deaf(mesh, "GET", path)) for _ in range(WATCHERS)]
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(mesh.grpc_address))
        stub: Any = SessionServiceStub(channel)  # type: ignore[no-untyped-call]
        calls = [
            stub.WatchSession(
                session_pb.WatchSessionRequest(session_id=session),
                metadata=(("authorization", f"Bearer {mesh.api_key}"),),
                timeout=60,
            )
            for _ in range(WATCHERS)
        ]
        for call in calls:
            stack.callback(call.cancel)
            await call.wait_for_connection()
        assert min([await quick_run(mesh) for _ in range(3)]) < alone + QUICK_SECONDS
        truth = await whole_session(client, session, run)
        assert sum(len(frame) for frame in truth) > LONG_RUNS * 1_000_000
        grown = growth(before, rss(mesh))
        assert sum(grown.values()) < WATCHERS * 2 * MOST_MIB, grown
        part = await readers[0].lines(2_000_000)
        assert 0 < len(part) < len(truth)
        assert part + await whole_session(client, session, run, last_id(part)) == truth
        seen = []
        async for answer in calls[0]:
            seen += [f"{event.run_id}:{event.seq}" for event in answer.frame.events]
            if seen[-1] == last_id(truth):
                break
        assert seen == [last_id([frame]) for frame in truth]


async def test_a_reply_that_nobody_reads_is_finished_and_resumed(mesh: Mesh) -> None:
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(http(mesh))
        before = rss(mesh)
        sessions = [await new_session(client) for _ in range(4)]
        body = {"input": FLOOD, "stream": True} | NO_MEMORY
        readers = [
            await stack.enter_async_context(deaf(mesh, "POST", f"/v1/sessions/{session}/runs", body))
            for session in sessions
        ]
        assert await quick_run(mesh) < QUICK_SECONDS
        runs = []
        async with asyncio.timeout(30):
            for session in sessions:
                listed: list[Any] = []
                while not listed:
                    listed = (await client.get(f"/v1/sessions/{session}/runs")).json()["runs"]
                run = str(listed[0]["run_id"])
                runs.append(run)
                assert_whole(await watch_to_end(client, run))
                assert (await client.get(f"/v1/runs/{run}")).json()["status"] == "completed"
        grown = growth(before, rss(mesh))
        assert sum(grown.values()) < len(sessions) * 3 * MOST_MIB, grown
        truth = [[frame.raw for frame in await watch(client, run)] for run in runs]
        async with asyncio.timeout(30):
            slow = await readers[0].lines(1 << 40)
            assert slow == truth[0]
            for reader, run, log in zip(readers[1:], runs[1:], truth[1:], strict=True):
                part = await reader.lines(1_300_000)
                seq = int(last_id(part).rpartition(":")[2])
                assert 1 < len(part) < len(log)
                rest = [frame.raw for frame in await watch(client, run, seq)]
                assert part + rest == log


async def test_grpc_calls_that_nobody_reads_hold_nobody_up(mesh: Mesh) -> None:
    """A Run and a WatchRun of a flood, unread until it is over, are then read without a gap."""
    key = (("authorization", f"Bearer {mesh.api_key}"),)
    async with (
        http(mesh) as client,
        grpc.aio.insecure_channel(mesh.grpc_address) as channel,
        grpc.aio.insecure_channel(mesh.grpc_address) as another,
    ):
        request = agent_pb.RunRequest(
            session_id=await new_session(client),
            input=[InputMessage(role="user", content=FLOOD)],
            options=RunOptions(memory=False),
        )
        run_call = AgentServiceStub(channel).Run(request, metadata=key, timeout=60)  # type: ignore[no-untyped-call]
        first = await run_call.read()
        run = first.frame.events[0].run_id
        watch_call = SessionServiceStub(another).WatchRun(  # type: ignore[no-untyped-call]
            session_pb.WatchRunRequest(run_id=run), metadata=key, timeout=60
        )
        await watch_call.wait_for_connection()
        frames = await watch_to_end(client, run)
        assert_whole(frames)
        assert frames[-1].event == "run.completed"
        truth = [frame.seq for frame in frames]
        watched = [event.seq async for answer in watch_call for event in answer.frame.events]
        assert watched == truth
        seen = [event.seq for event in first.frame.events]
        moved = False
        while (answer := await run_call.read()) is not grpc.aio.EOF:
            seen += [event.seq for event in answer.frame.events]
            moved = moved or answer.frame.HasField("reconnect")
        # Whoever is too far behind is sent to WatchRun, and has had a prefix until then.
        assert seen == truth[: len(seen)]
        assert moved or seen == truth
