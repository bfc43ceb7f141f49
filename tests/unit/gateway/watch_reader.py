"""A reader of watches that takes when a test says so."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from gateway.follow import FeedLost
from gateway.watches import START, Batch, Line, Log, Place, Watches
from hermesh.common.v1.event_pb2 import Event
from meshkit.errors import HermeshError

SESSION: Log = ("tenant", "session", "s")


class Reader:
    """A member whose client takes when `takes` says so."""

    def __init__(self, watches: Watches, place: Place = START, log: Log = SESSION) -> None:
        self.watches = watches
        self.log = log
        self.place = place
        self.line: Line | None = None
        self.takes = True
        self.stands = False
        self.seen: list[Event] = []
        self.batches: list[Batch] = []
        self.outcome: Any = None
        self.changed = asyncio.Event()
        watches.join(self, log, place)

    @property
    def writable(self) -> bool:
        return self.takes

    def opened(self) -> None:
        self.stands = True
        self.changed.set()

    def deliver(self, batch: Batch) -> None:
        assert self.takes
        self.seen += batch.events
        self.batches.append(batch)
        self.changed.set()

    def ended(self) -> None:
        self.outcome = "ended"
        self.changed.set()

    def failed(self, error: HermeshError | FeedLost) -> None:
        self.outcome = error
        self.changed.set()

    def go_on(self) -> None:
        self.takes = True
        self.watches.resume(self, self.log)

    async def until(self, check: Callable[[Reader], object], seconds: float = 10) -> None:
        async with asyncio.timeout(seconds):
            while not check(self):
                self.changed.clear()
                await self.changed.wait()
