"""Clients without a key and without manners: calls that never send their message, bytes that come too slowly.

HTTP/2 by hand, as much as it takes: a library would refuse to leave a call half done.
"""

from __future__ import annotations

import asyncio
import struct
from collections import Counter
from types import TracebackType
from typing import Self

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, END_HEADERS, ACK = 1, 4, 1
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_FRAME = 16_384
_WINDOW = 65_535
_INITIAL_WINDOW = 4


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Returns a frame of HTTP/2."""
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def _text(value: str) -> bytes:
    data = value.encode()
    # HPACK's integer with a prefix of seven bits.
    if len(data) < 127:
        return bytes((len(data),)) + data
    rest, size = len(data) - 127, b"\x7f"
    while rest >= 128:
        size += bytes((rest % 128 + 128,))
        rest //= 128
    return size + bytes((rest,)) + data


def header_block(headers: dict[str, str]) -> bytes:
    """Returns headers in HPACK, literally and never indexed."""
    return b"".join(b"\x10" + _text(name) + _text(value) for name, value in headers.items())


class HostileCalls:
    """One connection to a gRPC port whose calls are never finished.

    Attributes:
        sent: Bytes of each stream's message that the server let in.
        answered: Streams on which something came back.
        ended: Whether the server closed the connection.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._next = 1
        self._initial = _WINDOW
        self._connection_window = _WINDOW
        self._windows: dict[int, int] = {}
        self._changed = asyncio.Condition()
        self.sent: Counter[int] = Counter()
        self.answered: set[int] = set()
        self.ended = False

    async def __aenter__(self) -> Self:
        host, _, port = self._address.rpartition(":")
        self._reader, self._writer = await asyncio.open_connection(host, int(port))
        self._writer.write(_PREFACE + frame(SETTINGS, 0, 0))
        self._task = asyncio.create_task(self._read())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _read(self) -> None:
        try:
            while True:
                head = await self._reader.readexactly(9)
                size = int.from_bytes(head[:3], "big")
                kind, flags, stream = head[3], head[4], int.from_bytes(head[5:9], "big")
                payload = await self._reader.readexactly(size)
                async with self._changed:
                    self._take(kind, flags, stream, payload)
                    self._changed.notify_all()
        except (OSError, asyncio.IncompleteReadError):
            async with self._changed:
                self.ended = True
                self._changed.notify_all()

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == SETTINGS and not flags & ACK:
            for at in range(0, len(payload), 6):
                name, value = struct.unpack(">HI", payload[at : at + 6])
                if name == _INITIAL_WINDOW:
                    for known in self._windows:
                        self._windows[known] += value - self._initial
                    self._initial = value
            self._writer.write(frame(SETTINGS, ACK, 0))
        elif kind == PING and not flags & ACK:
            self._writer.write(frame(PING, ACK, 0, payload))
        elif kind == WINDOW_UPDATE:
            more = int.from_bytes(payload, "big")
            if stream:
                self._windows[stream] = self._windows.get(stream, 0) + more
            else:
                self._connection_window += more
        elif kind in (HEADERS, RST_STREAM):
            self.answered.add(stream)

    def begin(self, path: str, metadata: dict[str, str] | None = None) -> int:
        """Begins a call, its headers only; returns its stream."""
        stream, self._next = self._next, self._next + 2
        block = header_block(
            {
                ":method": "POST",
                ":scheme": "http",
                ":path": path,
                ":authority": "mesh",
                "content-type": "application/grpc",
                "te": "trailers",
                **(metadata or {}),
            }
        )
        self._windows[stream] = self._initial
        self._writer.write(frame(HEADERS, END_HEADERS, stream, block))
        return stream

    async def send(self, stream: int, data: bytes) -> None:
        """Sends a part of a call's message, as the server's windows allow, until the stream is answered."""
        while data:
            async with self._changed:
                await self._changed.wait_for(lambda: self._room(stream) > 0 or self._over(stream))
                if self._over(stream):
                    return
                size = min(self._room(stream), _FRAME, len(data))
                self._windows[stream] -= size
                self._connection_window -= size
                self.sent[stream] += size
            part, data = data[:size], data[size:]
            try:
                self._writer.write(frame(DATA, 0, stream, part))
                await self._writer.drain()
            except OSError:
                return

    def _room(self, stream: int) -> int:
        return min(self._connection_window, self._windows[stream])

    def _over(self, stream: int) -> bool:
        return self.ended or stream in self.answered

    async def until_answered(self, streams: set[int]) -> None:
        """Returns once the server has ended all of these calls, or the connection."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.ended or streams <= self.answered)


def unfinished(size: int) -> bytes:
    """Returns the beginning of a message that says to have `size` bytes, all but the last one."""
    return b"\0" + struct.pack(">I", size) + b"x" * (size - 1)
