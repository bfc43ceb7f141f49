"""The proxy of the chaos suite does to a connection what it says, and to no other."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from bench.mesh import free_ports
from tests.chaos.faults.proxy import Mode, Route

SECONDS = 5.0
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest.fixture
async def received() -> list[bytes]:
    """What the server behind the proxy got."""
    return []


@pytest.fixture
async def route(received: list[bytes]) -> AsyncIterator[Route]:
    """A route to a server that repeats each line."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                received.append(line)
                writer.write(line)
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    made = Route("echo", free_ports(1)[0], f"127.0.0.1:{port}")
    await made.serve()
    yield made
    made.set(Mode("refuse"))
    assert made.server is not None
    made.server.close()
    server.close()
    await made.ended()


@asynccontextmanager
async def connected(route: Route) -> AsyncIterator[Streams]:
    reader, writer = await asyncio.open_connection("127.0.0.1", route.port)
    yield reader, writer
    writer.close()


async def said(streams: Streams, text: bytes) -> bytes:
    """Sends a line and returns what comes back: empty when the connection ended."""
    reader, writer = streams
    try:
        writer.write(text)
        async with asyncio.timeout(SECONDS):
            return await reader.readline()
    except ConnectionError:
        return b""


CHILD = """
import socket, sys
connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=5)
connection.sendall(b"one\\n")
print(connection.recv(9), flush=True)
sys.stdin.readline()
connection.sendall(b"two\\n")
print(connection.recv(9), flush=True)
"""


def start_child(port: int) -> subprocess.Popen[str]:
    """Another process that talks to the server, its second line when it is told to."""
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


async def silent(streams: Streams) -> bool:
    """Whether nothing comes for a moment."""
    try:
        async with asyncio.timeout(0.2):
            await streams[0].readline()
    except TimeoutError:
        return True
    return False


async def test_it_passes_both_ways(route: Route) -> None:
    async with connected(route) as streams:
        assert await said(streams, b"one\n") == b"one\n"


async def test_a_cut_ends_what_is_open_and_nothing_else(route: Route) -> None:
    async with connected(route) as streams:
        assert await said(streams, b"one\n") == b"one\n"
        assert route.set(Mode("cut")) == 1
        assert await said(streams, b"two\n") == b""
    async with connected(route) as streams:
        assert await said(streams, b"three\n") == b"three\n"


async def test_a_refusing_route_lets_nobody_in_until_it_passes_again(route: Route) -> None:
    route.set(Mode("refuse"))
    async with connected(route) as streams:
        assert await said(streams, b"one\n") == b""
    route.set(Mode("pass"))
    async with connected(route) as streams:
        assert await said(streams, b"two\n") == b"two\n"


async def test_what_is_held_comes_late_and_whole(route: Route) -> None:
    async with connected(route) as streams:
        assert await said(streams, b"one\n") == b"one\n"
        route.set(Mode("hold"))
        streams[1].write(b"two\n")
        assert await silent(streams)
        route.set(Mode("pass"))
        async with asyncio.timeout(SECONDS):
            assert await streams[0].readline() == b"two\n"


async def test_a_swallowed_reply_is_lost_though_the_request_arrived(
    route: Route, received: list[bytes]
) -> None:
    async with connected(route) as streams:
        assert await said(streams, b"one\n") == b"one\n"
        route.set(Mode("swallow"))
        streams[1].write(b"two\n")
        assert await silent(streams)
        assert received == [b"one\n", b"two\n"]
        # Bytes are missing in it: it cannot be whole again.
        assert route.set(Mode("pass")) == 1
        assert await said(streams, b"three\n") == b""


async def test_a_delay_keeps_the_order(route: Route) -> None:
    route.set(Mode("delay", 0.05))
    async with connected(route) as streams:
        for text in (b"one\n", b"two\n", b"three\n"):
            streams[1].write(text)
        async with asyncio.timeout(SECONDS):
            assert [await streams[0].readline() for _ in range(3)] == [b"one\n", b"two\n", b"three\n"]


async def test_a_partition_is_of_one_process(route: Route) -> None:
    child = start_child(route.port)
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        async with connected(route) as streams:
            assert await said(streams, b"ours\n") == b"ours\n"
            assert await asyncio.to_thread(child.stdout.readline) == "b'one\\n'\n"
            route.set(Mode("hold", pids=frozenset({child.pid})))
            child.stdin.write("\n")
            child.stdin.flush()
            assert await said(streams, b"still ours\n") == b"still ours\n"
            route.set(Mode("hold", pids=frozenset({os.getpid()})))
            assert await asyncio.to_thread(child.stdout.readline) == "b'two\\n'\n"
            streams[1].write(b"held\n")
            assert await silent(streams)
    finally:
        child.stdin.close()
        child.stdout.close()
        child.wait(timeout=10)
