"""One timer for all event streams: heartbeats into silence, and an end for clients that take nothing."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Protocol

# What is done in one go, before others have their turn.
_AT_ONCE = 500
_NEXT_S = 0.02


class Beating(Protocol):
    """A stream with a pulse."""

    def beat(self) -> None:
        """Writes a heartbeat."""
        ...

    def drop(self) -> None:
        """Cuts off a client that took nothing for too long."""
        ...


class Pulse:
    """Streams by the time of their last write: the first one is the next to be due."""

    def __init__(self, heartbeat: float, write_timeout: float) -> None:
        """Sets the seconds of silence before a heartbeat, and of a blocked write before the end."""
        self._heartbeat = heartbeat
        self._write_timeout = write_timeout
        self._written: OrderedDict[Beating, float] = OrderedDict()
        self._blocked: OrderedDict[Beating, float] = OrderedDict()
        self._timer: asyncio.Handle | None = None
        # Not asked of the timer: uvloop's has no `when` once that is past.
        self._timer_at = 0.0
        self._ticking = False

    def written(self, stream: Beating) -> None:
        """Something was written to a stream that can take more."""
        self._blocked.pop(stream, None)
        self._written[stream] = asyncio.get_running_loop().time()
        self._written.move_to_end(stream)
        self._set()

    def blocked(self, stream: Beating) -> None:
        """A stream's client does not take what was written."""
        self._written.pop(stream, None)
        self._blocked.setdefault(stream, asyncio.get_running_loop().time())
        self._set()

    def remove(self, stream: Beating) -> None:
        """A stream has ended."""
        self._written.pop(stream, None)
        self._blocked.pop(stream, None)

    def _due(self) -> float | None:
        found = [
            next(iter(streams.values())) + seconds
            for streams, seconds in ((self._written, self._heartbeat), (self._blocked, self._write_timeout))
            if streams
        ]
        return min(found) if found else None

    def _set(self, earliest: float = 0.0) -> None:
        due = None if self._ticking else self._due()
        if due is None:
            return
        due = max(due, earliest)
        if self._timer is not None:
            if self._timer_at <= due:
                return
            self._timer.cancel()
        self._timer_at = due
        self._timer = asyncio.get_running_loop().call_at(due, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._ticking = True
        now = asyncio.get_running_loop().time()
        try:
            for _ in range(_AT_ONCE):
                stream = next(iter(self._written), None)
                if stream is None or self._written[stream] + self._heartbeat > now:
                    break
                # Whatever comes of it, it is not the first any more.
                self.written(stream)
                stream.beat()
            for _ in range(_AT_ONCE):
                stream = next(iter(self._blocked), None)
                if stream is None or self._blocked[stream] + self._write_timeout > now:
                    break
                self.remove(stream)
                stream.drop()
        finally:
            self._ticking = False
            self._set(now + _NEXT_S)
