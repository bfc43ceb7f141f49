"""All watches of a gateway over one stream: each a task, what they bring gathered into few messages.

A watch sends no more than a window ahead of what was taken of it, and all watches of a stream together no
more than a bound. Beyond, a watch stops taking from its live queue, which is bounded itself and falls back to
PostgreSQL (`services.session.watch`): a gateway, or one of its clients, that does not read costs no memory.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from uuid import UUID

import structlog

from hermesh.common.v1 import event_pb2
from hermesh.session.v1 import session_internal_service_pb2 as pb
from meshkit.errors import (
    HermeshError,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    to_status,
)
from meshkit.tasks import TaskOwner
from services.session import convert
from services.session.watch import Batch, Moved, Watcher

_log = structlog.get_logger("session.watch_hub")

# As the proto says.
WINDOW_BYTES = 65_536
HEARTBEAT_S = 5.0
_MAX_QUEUED_BYTES = 8 * 1024 * 1024
_MAX_MESSAGE_BYTES = 1024 * 1024
_MAX_WATCHES = 50_000
# A gateway that comes from another replica brings all its watches at once; PostgreSQL has others to serve.
_STARTING = 16


class WatchHub:
    """The watch streams of a replica."""

    def __init__(self, watcher_for: Callable[[UUID], Watcher], *, tasks: TaskOwner) -> None:
        """Makes a hub without streams.

        Args:
            watcher_for: Makes a watcher for a tenant.
            tasks: Owns the watches.
        """
        self.watcher_for = watcher_for
        self.tasks = tasks
        self.draining = False
        self._streams: set[WatchStream] = set()

    def open(self) -> "WatchStream":
        """Returns a new stream; give it to `close` in the end."""
        stream = WatchStream(self)
        self._streams.add(stream)
        return stream

    def close(self, stream: "WatchStream") -> None:
        """Ends a stream's watches."""
        self._streams.discard(stream)
        stream.end()

    def drain(self) -> None:
        """Lets each stream end once its watches have moved; `Tail.drain` makes them."""
        self.draining = True
        for stream in self._streams:
            stream.wake.set()


class _Watch:
    """One watch of a stream, and how far it is ahead of its reader."""

    __slots__ = ("room", "sent", "taken", "task", "watch_id")

    def __init__(self, watch_id: int) -> None:
        self.watch_id = watch_id
        self.sent = 0
        self.taken = 0
        self.room = asyncio.Event()
        self.task: asyncio.Task[None] | None = None


class WatchStream:
    """One gateway's watches.

    Attributes:
        wake: Set when there is something to send, or the stream may have to end.
    """

    def __init__(self, hub: WatchHub) -> None:
        """Use `WatchHub.open`."""
        self._hub = hub
        self._watches: dict[int, _Watch] = {}
        self._outbox: deque[tuple[pb.WatchFrame, int]] = deque()
        self._queued = 0
        self._room = asyncio.Event()
        self._starting = asyncio.Semaphore(_STARTING)
        self._over = False
        self.wake = asyncio.Event()

    async def read(self, requests: AsyncIterator[pb.WatchRequest]) -> None:
        """Takes the gateway's messages until it has no more."""
        try:
            async for request in requests:
                for ack in request.acks:
                    watch = self._watches.get(ack.watch_id)
                    if watch is not None and ack.taken > watch.taken:
                        watch.taken = ack.taken
                        watch.room.set()
                for watch_id in request.stops:
                    watch = self._watches.pop(watch_id, None)
                    if watch is not None and watch.task is not None:
                        watch.task.cancel()
                for start in request.starts:
                    self._start(start)
        except HermeshError as error:
            _log.error("a gateway asked for what cannot be", error=str(error))
        except Exception as error:
            # The gateway is gone, or on its way here broke: it begins its watches again on another stream.
            _log.info("a stream of watches broke", error=type(error).__name__)
        finally:
            self._over = True
            self.wake.set()

    async def responses(self) -> AsyncGenerator[pb.WatchResponse]:
        """Yields what the watches bring, until the gateway is gone or has moved on a drain."""
        loop = asyncio.get_running_loop()
        heartbeat = loop.time() + HEARTBEAT_S
        while True:
            if not self._outbox and not self._done:
                self.wake.clear()
                try:
                    async with asyncio.timeout_at(heartbeat):
                        await self.wake.wait()
                except TimeoutError:
                    pass
            response, size = pb.WatchResponse(), 0
            while self._outbox and size < _MAX_MESSAGE_BYTES:
                frame, weight = self._outbox.popleft()
                response.frames.append(frame)
                size += weight
            self._queued -= size
            self._room.set()
            if response.frames:
                yield response
            elif self._done:
                return
            if loop.time() >= heartbeat:
                heartbeat = loop.time() + HEARTBEAT_S
                yield pb.WatchResponse()

    def end(self) -> None:
        """Ends all watches."""
        watches, self._watches = self._watches, {}
        for watch in watches.values():
            if watch.task is not None:
                watch.task.cancel()

    @property
    def _done(self) -> bool:
        return self._over or (self._hub.draining and not self._watches)

    def _start(self, start: pb.WatchStart) -> None:
        if start.watch_id in self._watches:
            raise InvalidArgumentError("INVALID_ARGUMENT", f"watch {start.watch_id} is open already")
        if len(self._watches) >= _MAX_WATCHES:
            error = ResourceExhaustedError("OVERLOADED", "too many watches", retry_after_ms=1000)
            self._put(pb.WatchFrame(watch_id=start.watch_id, error=to_status(error).SerializeToString()), 0)
            return
        watch = self._watches[start.watch_id] = _Watch(start.watch_id)
        watch.task = self._hub.tasks.start(self._run(watch, start), name="watch")

    async def _run(self, watch: _Watch, start: pb.WatchStart) -> None:
        last = pb.WatchFrame(watch_id=watch.watch_id)
        try:
            if not await self._follow(watch, start):
                return
            last.ended.SetInParent()
        except HermeshError as error:
            last.error = to_status(error).SerializeToString()
        except Exception as error:
            _log.error("watch failed unexpectedly", exc_info=error)
            last.error = to_status(InternalError()).SerializeToString()
        finally:
            if self._watches.get(watch.watch_id) is watch:
                del self._watches[watch.watch_id]
                self.wake.set()
        self._put(last, 0)

    async def _follow(self, watch: _Watch, start: pb.WatchStart) -> bool:
        """Sends a watch's frames; returns whether the log has ended, False if it goes on elsewhere."""
        await self._starting.acquire()
        begun = False

        def opened() -> None:
            nonlocal begun
            begun = True
            self._starting.release()
            self._put(pb.WatchFrame(watch_id=watch.watch_id, opened=pb.WatchOpened()), 0)

        try:
            async with aclosing(self._batches(start, opened)) as batches:
                async for batch in batches:
                    if isinstance(batch, Moved):
                        await self._send(watch, convert.reconnect_frame(batch.reason))
                        return False
                    await self._send(watch, convert.frame_of(batch))
            return True
        finally:
            if not begun:
                self._starting.release()

    def _batches(self, start: pb.WatchStart, opened: Callable[[], None]) -> AsyncGenerator[Batch]:
        watcher = self._hub.watcher_for(convert.uuid_of(start.tenant_id, "tenant_id"))
        target = start.WhichOneof("target")
        if target == "run":
            run_id = convert.uuid_of(start.run.run_id, "run_id")
            return watcher.run(run_id, max(0, start.run.after_seq), opened=opened)
        if target == "session":
            order = start.session
            after = convert.uuid_of(order.after_run_id, "after_run_id") if order.after_run_id else None
            session_id = convert.uuid_of(order.session_id, "session_id")
            return watcher.session(
                session_id, after, max(0, order.after_seq), only_new=order.only_new, opened=opened
            )
        raise InvalidArgumentError("INVALID_ARGUMENT", "a watch needs a run or a session")

    async def _send(self, watch: _Watch, frame: event_pb2.Frame) -> None:
        size = frame.ByteSize()
        while watch.sent - watch.taken >= WINDOW_BYTES:
            watch.room.clear()
            await watch.room.wait()
        while self._queued >= _MAX_QUEUED_BYTES:
            self._room.clear()
            await self._room.wait()
        watch.sent += size
        self._put(pb.WatchFrame(watch_id=watch.watch_id, frame=frame, size=size), size)

    def _put(self, frame: pb.WatchFrame, size: int) -> None:
        self._outbox.append((frame, size))
        self._queued += size
        self.wake.set()
