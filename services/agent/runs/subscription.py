"""A caller's bounded view of the events that a run has stored."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from hermesh.common.v1.event_pb2 import Event


# From this size on, in characters, the rest is taken the next time.
MAX_TAKEN = 1024 * 1024


class Subscription:
    """Events on their way to one caller.

    A caller that falls further behind than the bounds is cut off with `reconnect = "slow_reader"`: what
    was queued until then is still delivered, so that what it got is a prefix of the log.

    Args:
        max_events, max_bytes: bounds of what is queued.
    """

    def __init__(self, max_events: int = 4096, max_bytes: int = 4 * 1024 * 1024) -> None:
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._queue: list[Event] = []
        self._bytes = 0
        self._changed = asyncio.Event()
        self._closed = False
        self._beat = False
        self.reconnect = ""

    @property
    def closed(self) -> bool:
        """Whether nothing more will be queued."""
        return self._closed

    @property
    def queued(self) -> int:
        """How many events wait to be taken."""
        return len(self._queue)

    def push(self, events: Sequence[Event]) -> None:
        """Queue stored events, or cut the caller off when it is too far behind."""
        if self._closed:
            return
        size = sum(len(event.data) for event in events)
        full = self._queue and (
            len(self._queue) + len(events) > self._max_events or self._bytes + size > self._max_bytes
        )
        if full:
            self.close("slow_reader")
            return
        self._queue.extend(events)
        self._bytes += size
        self._pushed()

    def _pushed(self) -> None:
        self.wake()

    def close(self, reconnect: str = "") -> None:
        """End the stream after what is queued; `reconnect` says why when the log goes on without it."""
        if not self._closed:
            self._closed = True
            self.reconnect = reconnect
            self.wake()

    def beat(self) -> None:
        """Let whoever waits in `next` have an empty answer, as a sign of life for its caller."""
        self._beat = True
        self.wake()

    def wake(self) -> None:
        """Let whoever waits look again."""
        self._changed.set()

    async def changed(self) -> None:
        """Wait until there is something to look at, which may turn out to be nothing."""
        self._changed.clear()
        await self._changed.wait()

    def take(self) -> list[Event]:
        """Return what is queued: all, or as much as one message should hold."""
        if self._bytes <= MAX_TAKEN:
            events, self._queue, self._bytes = self._queue, [], 0
            return events
        size = count = 0
        while size < MAX_TAKEN and count < len(self._queue):
            size += len(self._queue[count].data)
            count += 1
        events, self._queue = self._queue[:count], self._queue[count:]
        self._bytes -= size
        return events

    def take_beat(self) -> bool:
        """Whether a sign of life is due; it is from now on no more."""
        beat, self._beat = self._beat, False
        return beat

    async def next(self) -> list[Event] | None:
        """Return what is queued (see `take`), waiting for some; [] on a beat, None at the end."""
        while not self._queue:
            if self._closed:
                return None
            if self._beat:
                break
            await self.changed()
        self._beat = False
        return self.take()
