"""A watcher's response: no task of its own beside the request's, no queue, no timer.

`gateway.watches` hands batches over, `gateway.pulse` the time; both write at once, because a client that
cannot take more is not written to. The request's task does nothing but wait for its client to leave.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any, Protocol

import structlog
from starlette.types import Message, Receive, Scope, Send

from gateway import frames
from gateway.follow import FeedLost
from gateway.streams import StreamHub
from gateway.watches import Batch, Line, Log, Place
from hermesh.common.v1.event_pb2 import Event
from meshkit.errors import HermeshError, UnavailableError

_log = structlog.get_logger("gateway.watch_stream")

# Where the server puts the connection; see `gateway.server`.
CLIENT_EXTENSION = "hermesh.client"
# How long the response waits for its watch, so that an error still gets its status.
_HOLD_S = 0.25


class Client(Protocol):
    """The connection of a request.

    Attributes:
        on_writable: Called when the client takes again.
    """

    on_writable: Callable[[], None] | None

    @property
    def writable(self) -> bool:
        """Whether a write is sent on at once, as far as the server knows."""
        ...

    def abort(self) -> None:
        """Cuts it."""
        ...


class WatchStream:
    """An ASGI application that answers one request with the events of a run or a session."""

    is_socket = False

    __slots__ = (
        "_begun",
        "_client",
        "_closed",
        "_draining",
        "_error",
        "_first",
        "_hub",
        "_last",
        "_log",
        "_send",
        "line",
        "place",
    )

    def __init__(self, hub: StreamHub, log: Log, place: Place) -> None:
        """Prepares a stream of what follows `place`."""
        self._hub = hub
        self._log = log
        self.place = place
        self.line: Line | None = None
        self._client: Client | None = None
        self._send: Send | None = None
        self._first: asyncio.Future[None] | None = None
        self._begun = self._closed = self._draining = False
        self._last: bytes | None = None
        self._error: HermeshError | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves the stream. An error before the first byte is raised, for a proper HTTP status."""
        hub = self._hub
        hub.check_room()
        self._send = send
        self._client = scope["extensions"][CLIENT_EXTENSION]
        self._client.on_writable = self._resumed
        self._first = asyncio.get_running_loop().create_future()
        hub.register(self, scope)
        hub.begin_watching()
        if hub.draining.is_set():
            self._draining = True
        try:
            hub.watches.join(self, self._log, self.place)
            try:
                async with asyncio.timeout(_HOLD_S):
                    await self._first
            except TimeoutError:
                pass
            self._first = None
            if self._error is not None and not self._begun:
                raise self._error
            self._begin()
            while (await receive())["type"] != "http.disconnect":
                pass
        finally:
            self._closed = True
            hub.end_watching()
            hub.unregister(self)
            hub.pulse.remove(self)
            hub.watches.leave(self)
            self._client.on_writable = self._client = self._send = None

    @property
    def writable(self) -> bool:
        """See `watches.Member`."""
        client = self._client
        return client is not None and not self._closed and client.writable

    def opened(self) -> None:
        """See `watches.Member`."""
        self._loosen()

    def deliver(self, batch: Batch) -> None:
        """See `watches.Member`."""
        if self._last is not None:
            return
        self._begin()
        self._write(batch.sse)
        self._hub.metrics.events.inc(len(batch.events))

    def ended(self) -> None:
        """See `watches.Member`."""
        self._finish(b"")

    def failed(self, error: HermeshError | FeedLost) -> None:
        """See `watches.Member`."""
        if not self._begun:
            if isinstance(error, FeedLost):
                error = UnavailableError(retry_after_ms=error.after_ms)
            self._error = error
            self._loosen()
        elif isinstance(error, FeedLost):
            self._finish(frames.reconnect_sse(error.reason, error.after_ms))
        else:
            # Who comes back gets the error with its own status.
            self._finish(frames.reconnect_sse(error.reason.lower(), error.retry_after_ms or 0))

    def drain(self) -> None:
        """Ends the stream with `reconnect`."""
        self._draining = True
        if self._begun:
            self._finish(frames.reconnect_sse("drain", 100))

    def beat(self) -> None:
        """See `pulse.Beating`."""
        if self.writable:
            self._write(frames.HEARTBEAT)

    def drop(self) -> None:
        """See `pulse.Beating`: it can come back with its cursor."""
        self._hub.metrics.dropped.inc()
        _log.info("dropped a client that stopped reading", log=self._log)
        self._closed = True
        if self._client is not None:
            self._client.abort()

    def _loosen(self) -> None:
        if self._first is not None and not self._first.done():
            self._first.set_result(None)

    def _begin(self) -> None:
        """Sends the response's head, once; a stream that drains ends with it."""
        if self._begun:
            return
        self._begun = True
        self._loosen()
        self._put({"type": "http.response.start", "status": 200, "headers": list(frames.SSE_HEADERS)})
        self._note()
        if self._draining:
            self._finish(frames.reconnect_sse("drain", 100))

    def _write(self, body: bytes) -> None:
        if not self._closed and self._last is None:
            self._put({"type": "http.response.body", "body": body, "more_body": True})
            self._note()

    def _note(self) -> None:
        if self._closed:
            return
        if self.writable:
            self._hub.pulse.written(self)
        else:
            self._hub.pulse.blocked(self)

    def _resumed(self) -> None:
        """The client takes again."""
        if self._closed:
            return
        if self._last is not None:
            self._finish(self._last)
            return
        self._hub.pulse.written(self)
        self._hub.watches.resume(self, self._log)

    def _finish(self, body: bytes) -> None:
        """Writes the last bytes, now or when the client takes them; the request then ends by itself."""
        self._begin()
        if self._closed:
            return
        self._hub.watches.leave(self)
        if not self.writable:
            self._last = body
            return
        self._closed = True
        self._hub.pulse.remove(self)
        self._put({"type": "http.response.body", "body": body, "more_body": False})

    def _put(self, message: Message) -> None:
        """Sends without waiting: a server whose client is writable has nothing to wait for."""
        send, client = self._send, self._client
        if send is None or client is None:
            return
        # An ASGI server's `send` is a coroutine function, whose type says only that it can be awaited.
        step: Any = send(message)
        try:
            step.send(None)
        except StopIteration:
            return
        except OSError:
            # The server's word for a client that is gone; the request hears of it, too.
            self._closed = True
            return
        step.close()
        _log.error("a write to a client that takes was not at once")
        self._closed = True
        client.abort()


class WatchFeed:
    """The same for a reader that has tasks of its own: batches to wait for."""

    def __init__(self, hub: StreamHub, log: Log, place: Place) -> None:
        """Prepares to read what follows `place`."""
        self._hub = hub
        self._log = log
        self.place = place
        self.line: Line | None = None
        self._batch: list[Event] | None = None
        self._outcome: HermeshError | FeedLost | None = None
        self._over = False
        self._wake = asyncio.Event()

    @property
    def finished(self) -> bool:
        """Whether the log's last event was in the last batch."""
        return self._over and self._batch is None

    async def batches(self) -> AsyncGenerator[list[Event], None]:
        """Yields batches until the log's end.

        Raises:
            HermeshError: The log cannot be read.
            FeedLost: No replica could be reached for too long.
        """
        watches = self._hub.watches
        watches.join(self, self._log, self.place)
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                batch, self._batch = self._batch, None
                if batch:
                    yield batch
                if self._outcome is not None:
                    raise self._outcome
                if self._over:
                    return
                if batch:
                    watches.resume(self, self._log)
        finally:
            self._over = True
            watches.leave(self)

    @property
    def writable(self) -> bool:
        """See `watches.Member`: while its reader is at a batch, no other comes."""
        return self._batch is None and not self._over

    def opened(self) -> None:
        """See `watches.Member`."""

    def deliver(self, batch: Batch) -> None:
        """See `watches.Member`."""
        self._batch = batch.events
        self._wake.set()

    def ended(self) -> None:
        """See `watches.Member`."""
        self._over = True
        self._wake.set()

    def failed(self, error: HermeshError | FeedLost) -> None:
        """See `watches.Member`."""
        self._outcome = error
        self._wake.set()
