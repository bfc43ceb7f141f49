"""Commits on their way to Redis: behind the acknowledgement, in bulk, and never in anybody's way."""

import asyncio
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol
from uuid import UUID

import structlog

from meshkit.errors import HermeshError
from services.session import metrics
from services.session.domain import Event, NewEvent, Run, RunAppend
from services.session.shards import Shards

_log = structlog.get_logger("session.publisher")

_MAX_QUEUED = 20_000
_MAX_QUEUED_BYTES = 16 * 1024 * 1024
# Data of events beyond so many characters stays out of Redis, whose memory is dear: PostgreSQL has it.
_LARGE = 4096
_BATCH = 64
_MAX_BATCH_BYTES = 1024 * 1024
# Before a batch is taken more of it may gather: several appends of one run become one publication. It is
# behind the acknowledgement, and watchers on other replicas do not notice a few milliseconds.
_GATHER_S = 0.004
# So far apart publications begin while they keep up: under load it is their number that costs, here and in
# Redis. Watchers on this replica do not wait for them.
_APART_S = 0.04
# The fence of an event that was committed without a lease: PostgreSQL is asked for the session's.
_ASK = 0


class Reply(StrEnum):
    """What Redis says to a publication."""

    OK = "OK"
    STALE = "STALE"  # a newer writer was here
    GAP = "GAP"  # the stream ends before the publication begins
    MISSING = "MISSING"  # Redis does not know the session's fence
    BROKEN = "BROKEN"  # something else was at its keys; it is dropped


@dataclass(slots=True)
class Publication:
    """Committed events of one run in a row; the data of one that is too large for Redis is left out ("").

    Not frozen, because one is made of nearly every append, and freezing doubles what that costs.
    """

    session_id: UUID
    run_id: UUID
    fence: int
    first_seq: int
    events: Sequence[NewEvent]


class Streams(Protocol):
    """The live streams in Redis."""

    @property
    def refuses(self) -> bool:
        """True while Redis is known to be down."""
        ...

    async def publish(self, items: Sequence[Publication], *, reseed: bool = False) -> list[Reply]:
        """Writes publications in order; with `reseed` a stream with a gap begins anew.

        Raises:
            UnavailableError: Redis does not answer.
        """
        ...

    async def seed(self, fences: Mapping[UUID, int]) -> None:
        """Sets fences, unless higher ones are there.

        Raises:
            UnavailableError: Redis does not answer.
        """
        ...


class Fences(Protocol):
    """The part of the store that the publisher needs; see `store.port.Log`."""

    async def fences(self, session_ids: Sequence[UUID]) -> dict[UUID, int]:
        """Returns the current fences."""
        ...


class ShardedPublisher:
    """Hands each commit to the publisher of its session's shard: one that is slow or down delays no other."""

    def __init__(self, shards: "Shards[RedisPublisher]") -> None:
        """Takes one publisher a shard."""
        self._shards = shards

    def offer_event(self, run: Run, event: Event) -> None:
        """Takes an event that was committed without a lease."""
        self._shards.of(run.session_id).offer_event(run, event)

    def offer(self, append: RunAppend) -> None:
        """Takes a committed append."""
        self._shards.of(append.session_id).offer(append)


class RedisPublisher:
    """Publishes what is committed in the sessions of a shard; what it loses, watchers find in PostgreSQL."""

    def __init__(self, streams: Streams, store: Fences) -> None:
        """Makes a publisher that starts with `run`."""
        self._streams = streams
        self._store = store
        self._queue: deque[RunAppend] = deque()
        self._size = 0
        self._wake = asyncio.Event()

    def offer_event(self, run: Run, event: Event) -> None:
        """Takes an event that was committed without a lease."""
        new = NewEvent(event.type, event.time_ms, event.data)
        size = len(event.data)
        self.offer(RunAppend(run.session_id, run.run_id, _ASK, event.seq, [new], size=size))

    def offer(self, append: RunAppend) -> None:
        """Takes a committed append."""
        if append.size > _LARGE:
            append = _slim(append)
        if self._streams.refuses and self._queue:
            # One waits as the breaker's trial; the others would only be late.
            metrics.publishes.labels("dropped").inc()
            return
        if len(self._queue) >= _MAX_QUEUED or self._size >= _MAX_QUEUED_BYTES:
            metrics.publishes.labels("dropped").inc()
            return
        self._queue.append(append)
        self._size += append.size
        self._wake.set()

    async def run(self) -> None:
        """Publishes until cancelled."""
        loop = asyncio.get_running_loop()
        last = float("-inf")
        all_taken = True
        while True:
            if not self._queue:
                self._wake.clear()
                await self._wake.wait()
            if all_taken:
                await asyncio.sleep(max(_GATHER_S, last + _APART_S - loop.time()))
            last = loop.time()
            batch = self._take()
            all_taken = not self._queue
            try:
                await self._publish(batch)
            except HermeshError as error:
                metrics.publishes.labels("failed").inc(len(batch))
                _log.debug("commits did not reach Redis", appends=len(batch), error=str(error))
            except Exception as error:
                _log.error("publishing failed by a bug", exc_info=error)

    def _take(self) -> list[Publication]:
        """Takes what is queued, at most one publication a run unless its fence or place jumps."""
        batch: list[Publication] = []
        of_run: dict[UUID, Publication] = {}
        size = 0
        while self._queue and len(batch) < _BATCH and size < _MAX_BATCH_BYTES:
            append = self._queue.popleft()
            self._size -= append.size
            size += append.size
            item = of_run.get(append.run_id)
            if (
                item is not None
                and item.fence == append.fence
                and item.first_seq + len(item.events) == append.first_seq
            ):
                item.events = [*item.events, *append.events]
                continue
            item = Publication(
                append.session_id, append.run_id, append.fence, append.first_seq, append.events
            )
            of_run[append.run_id] = item
            batch.append(item)
        return batch

    async def _publish(self, batch: list[Publication]) -> None:
        known = [item for item in batch if item.fence != _ASK]
        missing = [item for item in batch if item.fence == _ASK]
        gaps = []
        if known:
            replies = await self._streams.publish(known)
            for reply, count in Counter(replies).items():
                metrics.publishes.labels(reply.value).inc(count)
            for item, reply in zip(known, replies, strict=True):
                if reply is Reply.MISSING:
                    missing.append(item)
                elif reply is Reply.GAP:
                    gaps.append(item)
        if missing:
            gaps.extend(await self._fenced(missing))
        if gaps:
            await self._streams.publish(gaps, reseed=True)

    async def _fenced(self, items: list[Publication]) -> list[Publication]:
        """Seeds the fences that Redis does not know; returns what may be published under them."""
        fences = await self._store.fences(list({item.session_id for item in items}))
        await self._streams.seed(fences)
        found = []
        for item in items:
            fence = fences.get(item.session_id)
            if fence is None:
                continue
            if item.fence == _ASK:
                found.append(replace(item, fence=fence))
            elif item.fence >= fence:
                found.append(item)
        return found


def _slim(append: RunAppend) -> RunAppend:
    """Returns an append as Redis gets it: without the data of large events, and without its commit."""
    events = [
        event if len(event.data) <= _LARGE else NewEvent(event.type, event.time_ms, "")
        for event in append.events
    ]
    size = sum(len(event.data) for event in events)
    return RunAppend(append.session_id, append.run_id, append.fence, append.first_seq, events, size=size)
