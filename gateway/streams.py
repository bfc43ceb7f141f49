"""Event streams to HTTP clients: a raw ASGI responder, and the set that owns all of them.

A pump task reads the feed and writes to the client; the request's own task watches over it: it notices a
client that left, sends heartbeats, drops a client that stopped reading, and ends the stream on a drain. The
pump is not the request's task, because a stream of `Run` outlives its client: it stays open as long as the
work, and so the load stays visible to the balancer. Streams that only watch are leaner, and are in
`gateway.watch_stream`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from contextlib import aclosing
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar
from uuid import UUID

import structlog
from prometheus_client import REGISTRY, CollectorRegistry, Gauge
from prometheus_client import Counter as CounterMetric
from starlette.types import Receive, Scope, Send

from gateway import frames
from gateway.follow import Feed, FeedLost
from gateway.pulse import Pulse
from gateway.settings import GatewaySettings
from gateway.watches import Watches
from hermesh.common.v1.event_pb2 import Event
from meshkit.context import run_id_var
from meshkit.errors import (
    DeadlineError,
    HermeshError,
    InternalError,
    ResourceExhaustedError,
    UnavailableError,
)
from meshkit.fairness import admits
from meshkit.identity import current_identity
from meshkit.tasks import TaskOwner

_log = structlog.get_logger("gateway.streams")

T = TypeVar("T")

# Where the server puts a function that cuts the connection; see `gateway.server`.
ABORT_EXTENSION = "hermesh.abort"


class StreamMetrics:
    """Figures of the event streams."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        """Registers them; once a registry."""
        self.open = Gauge("hermesh_gateway_streams", "Event streams being served.", registry=registry)
        self.lingering = Gauge(
            "hermesh_gateway_lingering_streams", "Streams of runs whose client left.", registry=registry
        )
        self.events = CounterMetric("hermesh_gateway_events", "Events written to clients.", registry=registry)
        self.dropped = CounterMetric(
            "hermesh_gateway_slow_clients", "Clients dropped because they stopped reading.", registry=registry
        )


class Renderer(Protocol):
    """Turns events into a stream's bytes."""

    def events(self, batch: list[Event]) -> bytes:
        """Returns what to write for a batch; may be empty."""
        ...

    def reconnect(self, reason: str, after_ms: int) -> bytes:
        """Returns the last bytes of a stream that ends before its log."""
        ...

    def failed(self, error: HermeshError) -> bytes:
        """Returns the last bytes of a stream whose log can no longer be read."""
        ...

    @property
    def complete(self) -> bool:
        """Whether the client has all that it gets, although the log may go on."""
        ...


class NativeRenderer:
    """Hermesh's own events."""

    complete = False

    def events(self, batch: list[Event]) -> bytes:
        """Returns one SSE frame an event."""
        return frames.sse(batch)

    def reconnect(self, reason: str, after_ms: int) -> bytes:
        """Returns the transport's `reconnect`."""
        return frames.reconnect_sse(reason, after_ms)

    def failed(self, error: HermeshError) -> bytes:
        """Returns `reconnect`: the client that comes back gets the error with its own status."""
        return frames.reconnect_sse(error.reason.lower(), error.retry_after_ms or 0)


class StreamHub:
    """Owns the pumps of all event streams of this process, and ends them on a drain.

    Attributes:
        watches: Where streams that only watch get their events from.
        pulse: Their heartbeats.
        open: How many streams there are, of any kind.
    """

    def __init__(self, settings: GatewaySettings, metrics: StreamMetrics, watches: Watches) -> None:
        """Starts empty; enter it before use."""
        self.settings = settings
        self.metrics = metrics
        self.watches = watches
        self.pulse = Pulse(settings.heartbeat_seconds, settings.write_timeout_seconds)
        self.open = 0
        self.owner = TaskOwner("streams")
        self._by_tenant: Counter[UUID | None] = Counter()
        # Set at the stop signal: the balancer is told first, and streams end a moment later.
        self.leaving = False
        self.draining = asyncio.Event()
        # Each with the address that it came by.
        self._streams: dict[Drainable, str] = {}
        self._sockets = 0
        self._sockets_gone = asyncio.Event()
        self._sockets_gone.set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.owner.close()
        await self.watches.close()

    def start(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Starts a task of a stream of the current tenant, which counts until it ends."""
        tenant_id = current_identity().tenant_id
        task = self.owner.start(work, name=name)
        self._count_in(tenant_id)
        task.add_done_callback(lambda _: self._count_out(tenant_id))
        return task

    def begin_watching(self) -> None:
        """Counts in a stream of the current tenant that `start` does not count."""
        self._count_in(current_identity().tenant_id)

    def end_watching(self) -> None:
        """Counts it out, in the same request."""
        self._count_out(current_identity().tenant_id)

    def _count_in(self, tenant_id: UUID | None) -> None:
        self.open += 1
        self._by_tenant[tenant_id] += 1

    def _count_out(self, tenant_id: UUID | None) -> None:
        self.open -= 1
        self._by_tenant[tenant_id] -= 1
        if not self._by_tenant[tenant_id]:
            del self._by_tenant[tenant_id]

    def check_room(self) -> None:
        """Refuses a stream too many.

        Raises:
            ResourceExhaustedError: This gateway serves as many as it may, or as it may to this tenant.
        """
        mine = self._by_tenant[current_identity().tenant_id]
        if not admits(mine, self.open, self.settings.max_streams):
            raise ResourceExhaustedError(
                "OVERLOADED", "this gateway serves as many streams as it can", retry_after_ms=1000
            )

    def drain(self) -> None:
        """Asks all streams that can be resumed to send `reconnect` and end."""
        self.draining.set()
        for stream in list(self._streams):
            stream.drain()

    def peers(self) -> set[str]:
        """Returns the addresses that streams came by: Envoys', or a balancer's."""
        return set(self._streams.values()) - {""}

    def drain_from(self, peer: str) -> int:
        """Asks those that came by this address to send `reconnect` and end; returns how many."""
        found = [stream for stream, came_by in self._streams.items() if came_by == peer]
        for stream in found:
            stream.drain()
        return len(found)

    async def wait_for_sockets(self, seconds: float) -> None:
        """Waits after `drain` until every WebSocket has said `reconnect` and closed, so long at most."""
        try:
            async with asyncio.timeout(seconds):
                await self._sockets_gone.wait()
        except TimeoutError:
            _log.warning("websockets were still open at the end", open=self._sockets)

    def register(self, stream: Drainable, scope: Scope) -> None:
        """Counts a request's stream in, so that a drain reaches it."""
        self._streams[stream] = (scope.get("client") or ("",))[0]
        if stream.is_socket:
            self._sockets += 1
            self._sockets_gone.clear()
        self.metrics.open.inc()

    def unregister(self, stream: Drainable) -> None:
        """Counts it out."""
        self._streams.pop(stream, None)
        self.metrics.open.dec()
        if stream.is_socket:
            self._sockets -= 1
            if not self._sockets:
                self._sockets_gone.set()


class Drainable(Protocol):
    """A stream that can be asked to end.

    Attributes:
        is_socket: Whether it is a WebSocket: the server lets other streams finish, and closes these at once.
    """

    is_socket: bool

    def drain(self) -> None:
        """Ends the stream soon, with `reconnect`."""
        ...


class EventStream:
    """An ASGI application that answers one request with a stream of events.

    An error before the first byte is raised, for a proper HTTP status.
    """

    is_socket = False

    def __init__(
        self,
        hub: StreamHub,
        feed: Feed,
        renderer: Renderer | None = None,
        *,
        keep: bool = False,
        resumable: bool = True,
        hold: float = 0.25,
        hold_fails: bool = False,
        headers: Iterable[tuple[bytes, bytes]] = (),
        name: str = "stream",
    ) -> None:
        """Prepares a stream; nothing runs until it is called.

        Args:
            hub: Owns the pump.
            feed: Where the events come from.
            renderer: How they look; SSE of Hermesh's own events if None.
            keep: Go on reading the feed when the client left.
            resumable: The client can come back after `reconnect`; else a drain lets the stream finish.
            hold: Seconds to wait for the first event before the response starts without one.
            hold_fails: Answer 504 after `hold` instead of starting.
            headers: More response headers.
            name: Of the pump's task, for logs.
        """
        self._hub = hub
        self._feed = feed
        self._renderer: Renderer = renderer if renderer is not None else NativeRenderer()
        self._keep = keep
        self._resumable = resumable
        self._hold = hold
        self._hold_fails = hold_fails
        self._headers = [*frames.SSE_HEADERS, *headers]
        self._name = name
        self._send: Send | None = None
        self._wake = asyncio.Event()
        self._begun = False
        # Nobody else may write: the client left, was dropped, or its last bytes are on their way.
        self._closed = False
        # The last bytes were taken.
        self._complete = False
        self._left = False
        self._draining = False
        self._error: HermeshError | None = None
        self._sending_since = 0.0
        self._written_at = 0.0
        self._count = 0
        self._run_id = ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves the stream."""
        hub = self._hub
        hub.check_room()
        self._send = send
        loop = asyncio.get_running_loop()
        self._written_at = loop.time()
        hub.register(self, scope)
        if hub.draining.is_set():
            self.drain()
        pump = hub.start(self._pump(), name=self._name)
        pump.add_done_callback(lambda _: self._wake.set())
        try:
            async with asyncio.TaskGroup() as group:
                watcher = group.create_task(self._watch(receive), name="disconnect")
                await self._attend(pump, scope)
                watcher.cancel()
        finally:
            # Also when the server cancels this request at the end of its grace.
            self._closed = True
            hub.metrics.events.inc(self._count)
            hub.unregister(self)
            if self._run_id:
                run_id_var.set(self._run_id)
            if not pump.done():
                if not self._keep:
                    pump.cancel()
                elif self._left:
                    hub.metrics.lingering.inc()
                    pump.add_done_callback(lambda _: hub.metrics.lingering.dec())
        if self._error is not None and not self._begun and not self._left:
            raise self._error

    def drain(self) -> None:
        """Ends the stream with `reconnect` as soon as its client has an event to come back with."""
        if self._resumable:
            self._draining = True
            self._wake.set()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._left = True
        self._wake.set()

    async def _attend(self, pump: asyncio.Task[None], scope: Scope) -> None:
        loop = asyncio.get_running_loop()
        settings = self._hub.settings
        hold_until = loop.time() + self._hold
        while True:
            now = loop.time()
            if not self._begun:
                wait = hold_until - now
            elif self._sending_since:
                wait = self._sending_since + settings.write_timeout_seconds - now
            else:
                silent_until = self._written_at + settings.heartbeat_seconds
                wait = min(silent_until - now, settings.write_timeout_seconds)
            try:
                async with asyncio.timeout(max(wait, 0.001)):
                    await self._wake.wait()
                self._wake.clear()
            except TimeoutError:
                pass
            if self._complete or self._left or pump.done():
                return
            if not self._begun:
                if loop.time() < hold_until:
                    continue
                if self._hold_fails:
                    self._error = DeadlineError(
                        message="not accepted in time; send it again with the same Idempotency-Key"
                    )
                    return
                await self._write(b"")
                continue
            if self._sending_since:
                if loop.time() - self._sending_since >= settings.write_timeout_seconds:
                    self._drop(scope)
                    return
                continue
            try:
                # A write of this task's own has nobody else to watch over it.
                async with asyncio.timeout(settings.write_timeout_seconds):
                    if self._draining:
                        await self._finish(self._renderer.reconnect("drain", 100))
                        return
                    if not self._closed and loop.time() - self._written_at >= settings.heartbeat_seconds:
                        await self._write(frames.HEARTBEAT)
            except TimeoutError:
                self._drop(scope)
                return

    def _drop(self, scope: Scope) -> None:
        """Cuts the connection of a client that stopped reading; it can come back with its cursor."""
        self._hub.metrics.dropped.inc()
        _log.info("dropped a client that stopped reading", stream=self._name)
        self._closed = self._left = True
        abort: Callable[[], None] | None = scope.get("extensions", {}).get(ABORT_EXTENSION)
        if abort is not None:
            abort()
        else:
            # Nothing else would free the pump from its write.
            self._keep = False

    async def _pump(self) -> None:
        try:
            batches: AsyncGenerator[list[Event], None] = self._feed.batches()
            async with aclosing(batches):
                async for batch in batches:
                    if not self._run_id and batch:
                        self._run_id = batch[0].run_id
                        run_id_var.set(self._run_id)
                    if self._closed:
                        continue
                    body = self._renderer.events(batch)
                    if body:
                        self._count += len(batch)
                        await self._write(body)
                    if self._renderer.complete or self._feed.finished:
                        # The client need not wait until the stream behind has ended too.
                        await self._finish(b"")
                    elif body and self._draining:
                        await self._finish(self._renderer.reconnect("drain", 100))
            await self._finish(b"")
        except FeedLost as lost:
            if not self._begun:
                self._error = UnavailableError(retry_after_ms=lost.after_ms)
                return
            await self._finish(self._renderer.reconnect(lost.reason, lost.after_ms))
        except HermeshError as error:
            await self._fail(error)
        except Exception as error:
            _log.error("stream failed", stream=self._name, exc_info=error)
            await self._fail(InternalError())

    async def _fail(self, error: HermeshError) -> None:
        self._error = error
        if self._begun:
            await self._finish(self._renderer.failed(error))

    async def _write(self, body: bytes) -> None:
        send = self._send
        assert send is not None
        self._sending_since = now = asyncio.get_running_loop().time()
        try:
            if not self._begun:
                self._begun = True
                # From here on it is silence that is watched, not the wait for the first event.
                self._wake.set()
                await send({"type": "http.response.start", "status": 200, "headers": self._headers})
            if body:
                await send({"type": "http.response.body", "body": body, "more_body": True})
        except OSError:
            # The server's word for a client that is gone.
            self._left = self._closed = True
            self._wake.set()
        finally:
            self._sending_since = 0.0
        self._written_at = now

    async def _finish(self, body: bytes) -> None:
        """Writes the last bytes once, and lets the request go."""
        if self._closed:
            return
        self._closed = True
        send = self._send
        assert send is not None
        try:
            self._sending_since = asyncio.get_running_loop().time()
            if not self._begun:
                self._begun = True
                await send({"type": "http.response.start", "status": 200, "headers": self._headers})
            await send({"type": "http.response.body", "body": body, "more_body": False})
            self._complete = True
        except OSError:
            self._left = True
        finally:
            self._sending_since = 0.0
            self._wake.set()
