"""A client of HTTP/2 in a few frames, for what no gRPC client sends: headers alone, and messages that never
end."""

from __future__ import annotations

import asyncio
import struct
from collections import Counter
from collections.abc import Iterable
from types import TracebackType
from typing import Self

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _ACK, _END_HEADERS = 1, 1, 4
_WINDOW = 65_535


class RawClient:
    """One connection. It obeys the server's flow control and notes which of its streams the server ended."""

    def __init__(self, address: str) -> None:
        self._host, _, self._port = address.rpartition(":")
        self._next = 1
        self._windows: Counter[int] = Counter({0: _WINDOW})
        self._changed = asyncio.Event()
        self.sent: Counter[int] = Counter()
        self.ended: set[int] = set()

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_connection(self._host, int(self._port))
        self._writer.write(_PREFACE)
        self._frame(SETTINGS, 0, 0, b"")
        self._reading = asyncio.ensure_future(self._read())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)
        self._writer.close()
        await asyncio.gather(self._writer.wait_closed(), return_exceptions=True)

    def open(self, path: str, metadata: Iterable[tuple[str, str]] = ()) -> int:
        """Sends a call's headers, and nothing of its message."""
        stream, self._next = self._next, self._next + 2
        fields = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", path),
            (":authority", "x"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
            *metadata,
        ]
        # Literal fields without an index and without Huffman's code.
        block = b"".join(b"\x00" + _text(name) + _text(value) for name, value in fields)
        self._windows[stream] = _WINDOW
        self._frame(HEADERS, _END_HEADERS, stream, block)
        return stream

    async def begin_message(self, stream: int, size: int, least: int = 0) -> None:
        """Announces a message of `size` bytes and sends of it what the server lets in.

        Ends when the server ended the stream, or once `least` bytes went out.
        """
        rest = struct.pack(">BI", 0, size)
        while stream not in self.ended:
            room = min(16_384, self._windows[0], self._windows[stream], size - 1 - self.sent[stream])
            if room <= 0:
                if self.sent[stream] >= least:
                    return
                self._changed.clear()
                await self._changed.wait()
                continue
            piece = (rest + b"\x00" * room)[:room]
            rest = rest[room:]
            self._frame(DATA, 0, stream, piece)
            self._windows[0] -= len(piece)
            self._windows[stream] -= len(piece)
            self.sent[stream] += len(piece)
            await self._writer.drain()

    async def wait_ended(self, streams: Iterable[int]) -> None:
        """Waits until the server ended these streams."""
        wanted = set(streams)
        while not wanted <= self.ended:
            self._changed.clear()
            await self._changed.wait()

    def _frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        self._writer.write(
            struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload
        )

    async def _read(self) -> None:
        while True:
            head = await self._reader.readexactly(9)
            size, kind, flags, stream = int.from_bytes(head[:3]), head[3], head[4], int.from_bytes(head[5:])
            payload = await self._reader.readexactly(size)
            if kind == SETTINGS and not flags & _ACK:
                for at in range(0, size, 6):
                    if payload[at : at + 2] == b"\x00\x04":
                        # The stream's window at its start; ours are opened after this came or corrected by
                        # it.
                        grown = int.from_bytes(payload[at + 2 : at + 6]) - _WINDOW
                        for known in self._windows:
                            self._windows[known] += grown if known else 0
                self._frame(SETTINGS, _ACK, 0, b"")
            elif kind == PING and not flags & _ACK:
                self._frame(PING, _ACK, 0, payload)
            elif kind == WINDOW_UPDATE:
                self._windows[stream] += int.from_bytes(payload)
            elif kind == RST_STREAM or (kind in (HEADERS, DATA) and flags & _END_STREAM):
                self.ended.add(stream)
            self._changed.set()


def _text(text: str) -> bytes:
    data = text.encode("ascii")
    if len(data) < 127:
        return bytes([len(data)]) + data
    size, more = len(data) - 127, b"\x7f"
    while size >= 128:
        more += bytes([size % 128 + 128])
        size //= 128
    return more + bytes([size]) + data
