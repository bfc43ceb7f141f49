"""A TCP proxy that delays, cuts and swallows, as a process of its own.

    python -m tests.chaos.faults.proxy CONTROL_SOCKET ROUTES_JSON

Routes are `{"postgres": {"port": 1234, "to": "/path/to/socket"}, "mesh": {"port": 1235, "to": "host:99"}}`.
Commands are JSON lines on the unix socket, each answered by a line:

    {"route": "postgres", "mode": "pass"}            whole again; connections that lost bytes are cut
    {"route": "postgres", "mode": "cut"}             reset all connections, once
    {"route": "postgres", "mode": "refuse"}          reset all connections, and new ones until "pass"
    {"route": "mesh", "mode": "hold", "pids": [7]}   nothing passes either way until "pass"
    {"route": "mesh", "mode": "delay", "seconds": 0.2}   each piece comes later, in order
    {"route": "ledger", "mode": "swallow"}           requests arrive, replies do not; until "pass"

`pids` bounds a mode to connections whose client is one of these processes, so that one replica of many is
partitioned. A mode replaces the one before it on that route.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop

_CHUNK = 64 * 1024
_CONNECT_SECONDS = 2.0


@dataclass
class Mode:
    """What a route does to its connections; `pids` empty means all."""

    name: str = "pass"
    seconds: float = 0.0
    pids: frozenset[int] = frozenset()


class Connection:
    """A client's connection and the one made for it."""

    def __init__(self, route: Route, peer: tuple[str, int]) -> None:
        self.route = route
        self.peer = peer
        self.pid: int | None = None
        self.lossy = False
        self.writers: list[asyncio.StreamWriter] = []

    def mode(self) -> Mode:
        """The route's mode, if this connection is concerned."""
        mode = self.route.mode
        if mode.pids:
            if self.pid is None:
                self.pid = owner_of(self.peer, mode.pids)
            if self.pid not in mode.pids:
                return _PASS
        return mode

    def abort(self) -> None:
        """Resets both sides."""
        for writer in self.writers:
            writer.transport.abort()


_PASS = Mode()


@dataclass(eq=False)
class Route:
    """A port and where it leads."""

    name: str
    port: int
    to: str
    mode: Mode = field(default_factory=Mode)
    connections: set[Connection] = field(default_factory=set)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    server: asyncio.Server | None = None

    async def serve(self) -> None:
        """Listens from now on."""
        self.server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)

    async def ended(self) -> None:
        """Returns once no connection is left."""
        while self.connections:
            await asyncio.sleep(0.01)

    def set(self, mode: Mode) -> int:
        """Changes the mode; returns how many connections it cut."""
        before, self.mode = self.mode, mode
        for connection in self.connections:
            connection.pid = None
        self.changed.set()
        self.changed = asyncio.Event()
        cut = [
            connection
            for connection in self.connections
            if connection.lossy or (connection.mode().name in ("cut", "refuse"))
        ]
        for connection in cut:
            connection.abort()
        if mode.name == "cut":
            self.mode = before if before.name == "delay" else Mode()
        return len(cut)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(self, writer.get_extra_info("peername"))
        connection.writers.append(writer)
        if connection.mode().name == "refuse":
            writer.transport.abort()
            return
        self.connections.add(connection)
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                if self.to.startswith("/"):
                    back_reader, back = await asyncio.open_unix_connection(self.to)
                else:
                    host, _, port = self.to.rpartition(":")
                    back_reader, back = await asyncio.open_connection(host, int(port))
            connection.writers.append(back)
            await asyncio.gather(
                self._pump(connection, reader, back, reply=False),
                self._pump(connection, back_reader, writer, reply=True),
            )
        except (OSError, TimeoutError):
            # A side that is gone, or was never there: the other one learns of it by the reset below.
            pass
        finally:
            connection.abort()
            self.connections.discard(connection)

    async def _pump(
        self, connection: Connection, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, reply: bool
    ) -> None:
        while data := await source.read(_CHUNK):
            while connection.mode().name == "hold":
                await self.changed.wait()
            mode = connection.mode()
            if mode.name == "swallow" and reply:
                connection.lossy = True
                continue
            if mode.name == "delay":
                await asyncio.sleep(mode.seconds)
            if sink.is_closing():
                # Reset while this waited.
                return
            sink.write(data)
            await sink.drain()
        if sink.can_write_eof() and not sink.is_closing():
            sink.write_eof()


def owner_of(peer: tuple[str, int], pids: frozenset[int]) -> int:
    """Returns which of some processes owns the local socket bound to `peer`; 0 for none of them."""
    inode = _inode(peer)
    if inode:
        wanted = f"socket:[{inode}]"
        for pid in pids:
            folder = f"/proc/{pid}/fd"
            try:
                if any(os.readlink(f"{folder}/{name}") == wanted for name in os.listdir(folder)):
                    return pid
            except OSError:
                # It ended, or closed one meanwhile.
                continue
    return 0


def _inode(peer: tuple[str, int]) -> str:
    host, port = peer[0], peer[1]
    address = "".join(f"{int(part):02X}" for part in reversed(host.split("."))) + f":{port:04X}"
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1] == address:
            return fields[9]
    return ""


async def _control(
    routes: dict[str, Route], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    try:
        while line := await reader.readline():
            command: dict[str, Any] = json.loads(line)
            route = routes[command["route"]]
            mode = Mode(command["mode"], float(command.get("seconds", 0)), frozenset(command.get("pids", ())))
            answer = {"cut": route.set(mode), "open": len(route.connections)}
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
    finally:
        writer.close()


async def _main(control: str, routes_json: str) -> None:
    routes = {name: Route(name, **spec) for name, spec in json.loads(routes_json).items()}
    for route in routes.values():
        await route.serve()
    server = await asyncio.start_unix_server(lambda reader, writer: _control(routes, reader, writer), control)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_main(sys.argv[1], sys.argv[2]))
