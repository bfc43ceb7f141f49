"""A small HTTP/1.1 client for long streamed replies.

One asyncio protocol a connection feeds httptools directly, and `read()` hands over everything that has
arrived: no task, queue or copy a chunk. Connections are kept alive and pooled; a reply that is not read
to its end closes its connection, which is how the backend learns that nobody listens any more.
"""

from __future__ import annotations

import asyncio
import math
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

import httptools

from services.agent.model.errors import (
    ModelProtocolError,
    ModelTimeoutError,
    ModelTruncatedError,
    ModelUnavailableError,
)

# A reader this far behind stops the socket: the backend's own flow control takes over.
HIGH_WATER = 1024 * 1024
MAX_IDLE_SECONDS = 15.0


class StaleConnectionError(Exception):
    """A kept-alive connection was closed by the backend before it answered: safe to send again."""


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds to wait for a connection, for the reply's first byte, and between two reads."""

    connect: float = 5.0
    first_byte: float = 60.0
    idle: float = 60.0


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a base URL points: its server, the path of requests, the query that all of them have."""

    host: str
    port: int
    tls: bool
    path: str
    query: str = ""

    @classmethod
    def parse(cls, url: str) -> Origin:
        """Split a base URL.

        Raises:
            ValueError: it is not an http or https URL with a host.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"not an http(s) URL with a host: {url!r}")
        tls = parts.scheme == "https"
        port = parts.port or (443 if tls else 80)
        return cls(parts.hostname, port, tls, parts.path.rstrip("/"), parts.query)

    @property
    def place(self) -> str:
        """Host, port and path, for people: what tells one backend from another."""
        path = self.path.removesuffix("/v1")
        return f"{self.host}:{self.port}{path}"

    @property
    def authority(self) -> str:
        """The Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"


class Connection(asyncio.Protocol):
    """One connection, used by one request at a time."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._waiter: asyncio.Future[None] | None = None
        self._give_up_at = math.inf
        self._look_at = math.inf
        self._watchdog: asyncio.TimerHandle | None = None
        self._body: list[bytes] = []
        self._size = 0
        self._reading_paused = False
        self._broken = ""
        self.idle_since = 0.0
        self.used = False
        self.released = False
        self.got_bytes = False
        self.headers_done = False
        self.complete = False
        self.keep_alive = False
        self.status = 0
        self.headers: dict[str, str] = {}

    # asyncio's callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember the transport."""
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Wake the reader; a reply without a length ends here."""
        self._transport = None
        if self.headers_done and not self.complete and not self._has_length():
            self.complete = True
        if self._watchdog is not None:
            self._watchdog.cancel()
        self._wake()

    def data_received(self, data: bytes) -> None:
        """Parse what arrived."""
        self.got_bytes = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._broken = f"the backend does not speak HTTP: {error}"
            self.close()
        self._wake()

    # httptools' callbacks

    def on_header(self, name: bytes, value: bytes) -> None:
        """Collect a header."""
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """Note the status; interim answers (100, 103) are skipped."""
        self.status = self._parser.get_status_code()
        self.headers_done = self.status >= 200

    def on_body(self, body: bytes) -> None:
        """Collect body bytes; stop the socket when the reader is far behind."""
        self._body.append(body)
        self._size += len(body)
        if self._size > HIGH_WATER and not self._reading_paused and self._transport is not None:
            self._reading_paused = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        """The reply is whole."""
        if self.status >= 200:
            self.complete = True
            self.keep_alive = self._parser.should_keep_alive()

    # the request's side

    @property
    def open(self) -> bool:
        """Whether the transport is still there."""
        return self._transport is not None and not self._transport.is_closing()

    @property
    def reusable(self) -> bool:
        """Whether another request may be sent on it now."""
        return self.complete and self.keep_alive and self.open

    def start(self, request: bytes) -> None:
        """Send a request and forget the reply before it."""
        self._parser = httptools.HttpResponseParser(self)
        self._body, self._size, self._broken = [], 0, ""
        self.released = self.got_bytes = self.headers_done = self.complete = self.keep_alive = False
        self.status, self.headers = 0, {}
        self._give_up_at = math.inf
        if self._transport is None:
            raise StaleConnectionError
        self._transport.write(request)

    async def wait_headers(self) -> None:
        """Wait for the status and headers.

        Raises:
            StaleConnectionError: a reused connection was already gone.
            ModelUnavailableError: a fresh one was closed without an answer.
            ModelProtocolError: the answer is not HTTP.
        """
        while not self.headers_done:
            if self._broken:
                raise ModelProtocolError(self._broken)
            if not self.open:
                if self.used and not self.got_bytes:
                    raise StaleConnectionError
                raise ModelUnavailableError("the backend closed the connection without an answer")
            await self._wait()

    async def read(self, seconds: float) -> bytes:
        """Return all body bytes that have arrived, waiting for some; b"" at the reply's end.

        Raises:
            TimeoutError: nothing came for so many seconds.
            ModelTruncatedError: the connection broke before the reply's end.
            ModelProtocolError: the answer is not HTTP.
        """
        self._give_up_at = self._loop.time() + seconds
        while not self._body:
            if self._broken:
                raise ModelProtocolError(self._broken)
            if self.complete:
                return b""
            if self._transport is None:
                raise ModelTruncatedError("the backend broke the stream off")
            if self._give_up_at < self._look_at:
                self._arm()
            await self._wait()
        data = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._body, self._size = [], 0
        if self._reading_paused and self._transport is not None:
            self._reading_paused = False
            self._transport.resume_reading()
        return data

    def close(self) -> None:
        """Close at once, without waiting for anything to be sent."""
        if self._transport is not None:
            self._transport.abort()

    def _has_length(self) -> bool:
        return "content-length" in self.headers or "chunked" in self.headers.get("transfer-encoding", "")

    async def _wait(self) -> None:
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _arm(self) -> None:
        """Look at the wait when its time is up: one timer a connection, not one a read."""
        if self._watchdog is not None:
            self._watchdog.cancel()
        self._look_at = self._give_up_at
        self._watchdog = self._loop.call_at(self._look_at, self._look)

    def _look(self) -> None:
        self._watchdog, self._look_at = None, math.inf
        if self._waiter is None or self._waiter.done() or self._give_up_at == math.inf:
            return  # the next read that waits arms it anew
        if self._loop.time() < self._give_up_at:
            self._arm()
        else:
            self._waiter.set_exception(TimeoutError())

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Response:
    """A reply under way: its status and headers, then `read()` until b""."""

    def __init__(self, connection: Connection, timeouts: Timeouts) -> None:
        self._connection = connection
        self._idle = timeouts.idle
        # A backend may send its headers at once and its first token much later.
        self._wait = timeouts.first_byte
        self.status = connection.status
        self.headers: Mapping[str, str] = connection.headers

    async def read(self) -> bytes:
        """Return what has arrived, b"" at the end.

        Raises:
            ModelTimeoutError: nothing came in time.
            ModelTruncatedError, ModelProtocolError: as `Connection.read`.
        """
        wait, self._wait = self._wait, self._idle
        try:
            return await self._connection.read(wait)
        except TimeoutError:
            raise ModelTimeoutError(f"the model sent nothing for {wait:g} s") from None

    def release(self) -> None:
        """Say that what is left of the reply is not wanted, but that its end will come by itself.

        The connection goes back to the pool, and is used again only if the end came by then.
        """
        self._connection.released = True

    async def read_all(self, limit: int = 16 * 1024 * 1024) -> bytes:
        """Return the whole body.

        Raises:
            ModelProtocolError: it is larger than `limit`.
        """
        parts: list[bytes] = []
        size = 0
        while data := await self.read():
            size += len(data)
            if size > limit:
                raise ModelProtocolError("the backend's answer is too large")
            parts.append(data)
        return b"".join(parts)


class HttpPool:
    """Connections to one origin, at most `limit` of them, kept alive between requests.

    Args:
        base_url: where requests go; their paths are put under its path.
        limit: the most connections at once; a further request waits for one (within `connect`).
        timeouts: see `Timeouts`.
    """

    def __init__(self, base_url: str, limit: int, timeouts: Timeouts) -> None:
        self.origin = Origin.parse(base_url)
        self._timeouts = timeouts
        self._slots = asyncio.Semaphore(limit)
        self._idle: list[Connection] = []
        self._ssl = ssl.create_default_context() if self.origin.tls else None
        self._closed = False

    @asynccontextmanager
    async def request(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes = b""
    ) -> AsyncIterator[Response]:
        """Send a request and yield its reply; leaving before the reply's end closes the connection.

        Raises:
            ModelUnavailableError: no connection.
            ModelTimeoutError: no connection, or no first byte in time.
            ModelProtocolError: the answer is not HTTP.
        """
        raw = self._render(method, path, headers, body)
        try:
            async with asyncio.timeout(self._timeouts.connect):
                await self._slots.acquire()
        except TimeoutError:
            raise ModelUnavailableError("all connections to the model backend are in use") from None
        try:
            connection = await self._send(raw)
            try:
                yield Response(connection, self._timeouts)
            finally:
                self._give_back(connection)
        finally:
            self._slots.release()

    async def aclose(self) -> None:
        """Close all idle connections."""
        self._closed = True
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    def _render(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> bytes:
        query = f"?{self.origin.query}" if self.origin.query else ""
        lines = [f"{method} {self.origin.path}{path}{query} HTTP/1.1", f"Host: {self.origin.authority}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if body:
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + body

    async def _send(self, raw: bytes) -> Connection:
        while True:
            connection = self._take_idle() or await self._connect()
            try:
                async with asyncio.timeout(self._timeouts.first_byte):
                    connection.start(raw)
                    await connection.wait_headers()
            except StaleConnectionError:
                continue  # the next one is fresh sooner or later, and a fresh one is never stale
            except TimeoutError:
                connection.close()
                raise ModelTimeoutError(
                    f"the model did not start to answer within {self._timeouts.first_byte:g} s"
                ) from None
            except BaseException:
                connection.close()
                raise
            return connection

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        origin = self.origin
        try:
            async with asyncio.timeout(self._timeouts.connect):
                _, connection = await loop.create_connection(
                    Connection, origin.host, origin.port, ssl=self._ssl
                )
        except TimeoutError:
            raise ModelTimeoutError(
                f"no connection to the model backend within {self._timeouts.connect:g} s"
            ) from None
        except ssl.SSLError as error:
            raise ModelUnavailableError(f"TLS with the model backend failed: {error.reason}") from error
        except OSError as error:
            raise ModelUnavailableError("the model backend cannot be reached") from error
        return connection

    def _take_idle(self) -> Connection | None:
        oldest = asyncio.get_running_loop().time() - MAX_IDLE_SECONDS
        while self._idle:
            connection = self._idle.pop()  # the last used: the others may time out unused
            if connection.reusable and connection.idle_since > oldest:
                return connection
            connection.close()
        return None

    def _give_back(self, connection: Connection) -> None:
        if self._closed or not (connection.reusable or (connection.released and connection.open)):
            connection.close()
            return
        connection.used = True
        connection.idle_since = asyncio.get_running_loop().time()
        self._idle.append(connection)
