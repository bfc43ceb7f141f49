"""One HTTP/1.1 connection of a load generator: it keeps bytes and when they came, and reads nothing.

What happens between a request and the end of its answer is measured, so it is as little as possible: the
body's parts are kept as they came, with a mark (time, length so far) for each time that the socket had some.
Whoever wants to know what the bytes say reads them when the load is over.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlencode, urlsplit

import httptools
import orjson

KEPT_ERROR_BYTES = 600


@dataclass(frozen=True, slots=True)
class Request:
    """What is sent: where to, and the bytes as they go over the wire."""

    host: str
    port: int
    payload: bytes

    @classmethod
    def render(
        cls, method: str, url: str, headers: Mapping[str, str], body: Any = None, *, form: bool = False
    ) -> Request:
        """Renders a request; `body` is sent as JSON, or as a form's fields; None for none."""
        parts = urlsplit(url)
        data = b"" if body is None else urlencode(body).encode() if form else orjson.dumps(body)
        path = parts.path + (f"?{parts.query}" if parts.query else "")
        lines = [f"{method} {path} HTTP/1.1", f"Host: {parts.netloc}"]
        if data:
            kind = "application/x-www-form-urlencoded" if form else "application/json"
            lines += [f"Content-Type: {kind}", f"Content-Length: {len(data)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        head = "\r\n".join(lines).encode() + b"\r\n\r\n"
        return cls(parts.hostname or "127.0.0.1", parts.port or 80, head + data)


@dataclass(slots=True)
class Record:
    """What came of one request; all times in nanoseconds of the monotonic clock.

    Attributes:
        began: when it was sent.
        ended: when its answer was complete or failed; 0 before.
        status: of HTTP; 0 before there was one.
        error: what went wrong, empty for nothing.
        marks: when body bytes came, and how many there were then.
        parts: the body.
    """

    began: int = 0
    ended: int = 0
    status: int = 0
    error: str = ""
    marks: list[tuple[int, int]] = field(default_factory=list)
    parts: list[bytes] = field(default_factory=list)
    size: int = 0


class Connection(asyncio.Protocol):
    """Sends one request at a time; `done` is called with its record, `noted` whenever bytes came."""

    def __init__(self, done: Callable[[Record], None], noted: Callable[[Record], None] | None = None) -> None:
        self._done = done
        self._noted = noted
        self._transport: asyncio.Transport | None = None
        self._parser: Any = None
        self._record: Record | None = None
        self._complete = False
        self._keep = False

    @property
    def open(self) -> bool:
        """Whether a request can be sent."""
        return self._transport is not None and not self._transport.is_closing()

    def send(self, request: Request) -> Record:
        """Sends a request now and returns its record, which fills by and by."""
        assert self._transport is not None
        assert self._record is None
        self._record = record = Record(began=time.monotonic_ns())
        self._transport.write(request.payload)
        return record

    def fail(self, error: str) -> None:
        """Gives the request under way up, and the connection with it."""
        if self._transport is not None:
            self._transport.abort()
        self._finish(error)

    def close(self) -> None:
        """Closes the connection; a request under way is given up without a word."""
        self._record = None
        if self._transport is not None:
            self._transport.close()

    # asyncio's callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begins with a parser of its own."""
        self._transport = cast(asyncio.Transport, transport)
        self._parser = httptools.HttpResponseParser(self)

    def data_received(self, data: bytes) -> None:
        """Keeps what came and when."""
        at = time.monotonic_ns()
        record = self._record
        if record is None:
            return
        before = record.size
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.fail(f"not HTTP: {error}")
            return
        if record.size != before:
            record.marks.append((at, record.size))
        if self._noted is not None:
            self._noted(record)
        if self._complete:
            self._complete = False
            if not self._keep and self._transport is not None:
                self._transport.close()
                self._transport = None
            self._finish("")

    def connection_lost(self, exc: Exception | None) -> None:
        """A request that was under way has failed."""
        self._transport = None
        self._finish(f"the connection was closed: {exc or 'by the server'}")

    def _finish(self, error: str) -> None:
        record, self._record = self._record, None
        if record is None:
            return
        record.ended = time.monotonic_ns()
        if error:
            record.error = error
        elif record.status not in (200, 202):
            record.error = f"status {record.status}"
        if record.error:
            said = b"".join(record.parts)[-KEPT_ERROR_BYTES:].decode(errors="replace")
            record.error += f"; its last bytes: {said!r}"
        self._done(record)

    # httptools' callbacks

    def on_headers_complete(self) -> None:
        """Keeps the status."""
        if self._record is not None:
            self._record.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        """Keeps a part of the body."""
        if self._record is not None:
            self._record.parts.append(body)
            self._record.size += len(body)

    def on_message_complete(self) -> None:
        """The answer is whole; what follows waits until its last bytes have their mark."""
        self._complete = True
        # The parser knows only until this returns.
        self._keep = self._parser.should_keep_alive()
