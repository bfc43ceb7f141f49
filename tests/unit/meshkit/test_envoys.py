"""An Envoy that is about to stop loses the streams that came by it, and no others. The Envoys are FAKEs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from meshkit.envoys import Envoys

SECONDS = 20
DELAY = 2.0


@dataclass
class Streams:
    by: set[str]
    ended: list[str] = field(default_factory=list)

    def peers(self) -> set[str]:
        return self.by

    def drain_from(self, peer: str) -> int:
        self.ended.append(peer)
        return 1


@dataclass
class Fake:
    """Says its status; None closes the connection, "" never answers."""

    status: int | str | None = 200

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            if self.status == "":
                await asyncio.sleep(SECONDS)
            elif self.status is not None:
                writer.write(f"HTTP/1.1 {self.status} x\r\n\r\n".encode())
        finally:
            writer.close()


@asynccontextmanager
async def envoys(*addresses: str) -> AsyncIterator[tuple[int, dict[str, Fake]]]:
    """Fakes on one port of several addresses of loopback."""
    fakes = {address: Fake() for address in addresses}
    first = await asyncio.start_server(fakes[addresses[0]].serve, addresses[0], 0)
    port = first.sockets[0].getsockname()[1]
    servers = [first]
    try:
        for address in addresses[1:]:
            servers.append(await asyncio.start_server(fakes[address].serve, address, port))
        yield port, fakes
    finally:
        for server in servers:
            server.close()


@pytest.mark.parametrize("silent", [None, ""])
async def test_streams_leave_an_envoy_that_is_about_to_stop_once_others_know(silent: str | None) -> None:
    now = 0.0
    streams = Streams({"127.0.0.2", "127.0.0.3", "127.0.0.4"})
    async with asyncio.timeout(SECONDS), envoys("127.0.0.2", "127.0.0.3") as (port, fakes):
        watching = Envoys(streams, port, DELAY, lambda: now)
        await watching.look()
        fakes["127.0.0.2"].status = 503
        # Not an answer, and at the third address nobody is there to give one.
        fakes["127.0.0.3"].status = silent
        await watching.look()
        assert streams.ended == []
        now = DELAY
        await watching.look()
        assert streams.ended == ["127.0.0.2"]
        # Who came back by the same one is told again, until it has changed its mind.
        await watching.look()
        assert streams.ended == ["127.0.0.2"] * 2
        fakes["127.0.0.2"].status = 200
        await watching.look()
        fakes["127.0.0.2"].status = 503
        await watching.look()
        assert streams.ended == ["127.0.0.2"] * 2
