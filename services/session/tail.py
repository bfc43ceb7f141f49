"""The live tail: what is committed reaches every watcher of this replica, and nobody relies on it.

Three sources feed it. Commits of this replica are handed over at once; commits of other replicas come by one
read over all watched Redis streams of a shard; and one slow query over all watched runs tells what both have
missed. A source may lose, repeat or reorder: a watcher takes only what follows its cursor and reads the rest
from PostgreSQL. That query comes often while Redis is known not to bring what others commit, or was found out
not to.
"""

import asyncio
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol
from uuid import UUID

import structlog

from meshkit.context import peer_var
from meshkit.errors import HermeshError
from meshkit.tasks import Backoff
from services.session import metrics
from services.session.domain import Event, NewEvent
from services.session.shards import Shards

_log = structlog.get_logger("session.tail")

_MAX_QUEUED_EVENTS = 1024
_MAX_QUEUED_BYTES = 1024 * 1024
# What an event weighs beside its text.
_EVENT_OVERHEAD = 200
_POLL_CHUNK = 1000
_READ_PAUSE_S = 0.003
# For so long a shard counts as deaf that has brought nothing while PostgreSQL had something.
_DEAF_S = 10.0


class Heads(Protocol):
    """The part of the store that the tail needs; see `store.port.Log`."""

    async def heads(self, run_ids: Sequence[UUID]) -> dict[UUID, int]:
        """Returns the last seq of each run's log."""
        ...

    async def last_ordinals(self, session_ids: Sequence[UUID]) -> dict[UUID, int]:
        """Returns the ordinal of each session's newest run."""
        ...


@dataclass(frozen=True, slots=True)
class Position:
    """Where a reader of a run's live stream stands."""

    session_id: UUID
    seq: int


class LiveReader(Protocol):
    """Where other replicas' commits come from: Redis."""

    @property
    def healthy(self) -> bool:
        """Whether, as far as is known, commits are written there and can be read."""
        ...

    async def read(self, positions: Mapping[UUID, Position]) -> Mapping[UUID, Sequence[Event]]:
        """Waits a bounded time for events past the positions; an empty answer means none came."""
        ...

    async def wake(self) -> None:
        """Ends the read that is under way, so that the next one takes new positions."""
        ...


class Subscription:
    """One watcher's bounded queue of live events.

    Past its bound the queue is dropped and `lost` is set: the watcher goes back to PostgreSQL, at its own
    pace.

    Attributes:
        position: The last seq that the watcher has sent; the watcher keeps it up to date.
        lost: The watcher must read PostgreSQL.
        tenant_id: Whose watch it is, where that is known.
        draining: The replica, or the Envoy that the watcher came by, stops and the watcher shall end.
    """

    __slots__ = ("_events", "_size", "_wake", "draining", "lost", "position", "tenant_id")

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._size = 0
        self._wake = asyncio.Event()
        self.position = 0
        self.lost = False
        self.draining = False
        self.tenant_id: UUID | None = None

    def push(self, events: Sequence[Event]) -> None:
        """Queues committed events."""
        if self.lost:
            return
        self._events.extend(events)
        for event in events:
            self._size += len(event.data) + _EVENT_OVERHEAD
        if len(self._events) > _MAX_QUEUED_EVENTS or self._size > _MAX_QUEUED_BYTES:
            self.lose("overflow")
        self._wake.set()

    def lose(self, cause: str) -> None:
        """Drops what is queued and sends the watcher to PostgreSQL."""
        if not self.lost:
            metrics.watch_catch_up.labels(cause).inc()
        self._events.clear()
        self._size = 0
        self.lost = True
        self._wake.set()

    def stop(self) -> None:
        """Tells the watcher to end and come back."""
        self.draining = True
        self._wake.set()

    @property
    def reached(self) -> int:
        """The last seq that is sent or queued."""
        return max(self.position, self._events[-1].seq) if self._events else self.position

    async def take(self, timeout: float) -> list[Event]:
        """Returns what is queued, waiting up to `timeout` seconds; empty when nothing came or on a notice."""
        if not self._events and not self.lost and not self.draining:
            self._wake.clear()
            try:
                async with asyncio.timeout(timeout):
                    await self._wake.wait()
            except TimeoutError:
                pass
        events, self._events = self._events, []
        self._size = 0
        return events


class _Feed:
    """A watched run."""

    __slots__ = ("behind", "excused", "known", "lane", "live", "seen", "session_id", "subscriptions")

    def __init__(self, session_id: UUID, lane: "Lane") -> None:
        self.session_id = session_id
        self.lane = lane
        self.subscriptions: set[Subscription] = set()
        self.seen = 0  # the highest seq that came live; where the Redis read goes on
        self.live = False  # something came live since the last look at PostgreSQL
        self.behind = 0  # the head at the last look
        self.excused = False  # something was committed that does not come live
        self.known = 0  # up to here it does not matter whether it came live


class Lane:
    """The watched runs of one shard, and the way by which other replicas' commits of them come."""

    def __init__(self, reader: LiveReader | None) -> None:
        """Makes one without runs."""
        self.reader = reader
        self.feeds: dict[UUID, _Feed] = {}
        self.changed = asyncio.Event()
        self.reading = False
        self._deaf_until = float("-inf")
        self._heard = self._missed = False

    @property
    def degraded(self) -> bool:
        """True while commits of other replicas come only by looking at PostgreSQL."""
        if self.reader is None or not self.reader.healthy:
            return True
        return time.monotonic() < self._deaf_until

    def compared(self, feed: _Feed, head: int) -> None:
        """Notes what a look found of a run whose writer is elsewhere."""
        self._heard |= feed.live
        if feed.excused or self.reader is None or not self.reader.healthy:
            # There is a reason, which is known.
            feed.known, feed.excused = head, False
        if feed.behind > max(feed.seen, feed.known):
            # It was there at the last look, and has not come since. That counts once.
            self._missed = True
            feed.known = feed.behind

    def looked(self) -> None:
        """Ends a look: if it found what did not come, and nothing came at all, nothing can be expected."""
        if self._missed and not self._heard:
            self._deaf_until = time.monotonic() + _DEAF_S
        self._heard = self._missed = False


class SessionWaiter:
    """One watcher that waits for a session's next run."""

    __slots__ = ("draining", "ordinal", "tenant_id", "wake")

    def __init__(self) -> None:
        self.tenant_id: UUID | None = None
        self.ordinal = 0
        self.draining = False
        self.wake = asyncio.Event()

    def stop(self) -> None:
        """Tells the watcher to end and come back."""
        self.draining = True
        self.wake.set()

    async def wait(self, timeout: float) -> None:
        """Waits for a notice, at most `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                await self.wake.wait()
        except TimeoutError:
            pass
        self.wake.clear()


class Tail:
    """All watched runs and sessions of a replica."""

    def __init__(
        self,
        store: Heads,
        *,
        readers: Iterable[LiveReader] | None,
        holds: Callable[[UUID], bool],
        poll_seconds: float,
        degraded_seconds: float,
    ) -> None:
        """Makes a tail that watches nothing.

        Args:
            store: For the look at PostgreSQL.
            readers: Redis, if there is one: a reader for each of its shards.
            holds: Says whether a run's writer is on this replica, so that Redis need not be read for it.
            poll_seconds: Between two looks at PostgreSQL.
            degraded_seconds: The same while Redis is down and other replicas' commits come no other way.
        """
        self._store = store
        self.lanes: Shards[Lane] = Shards([Lane(reader) for reader in readers or (None,)])
        self._holds = holds
        self._poll_seconds = poll_seconds
        self._degraded_seconds = degraded_seconds
        self._feeds: dict[UUID, _Feed] = {}
        self._sessions: dict[UUID, set[SessionWaiter]] = {}
        self._watched = asyncio.Event()
        self._draining = False
        # Watches of clients from outside: the address that each came by.
        self._came_by: dict[Subscription | SessionWaiter, str] = {}
        self._random = random.Random()  # noqa: S311 -- spreads load, keeps no secret

    @contextmanager
    def subscribe(
        self, session_id: UUID, run_id: UUID, after_seq: int, head: int = 0
    ) -> Iterator[Subscription]:
        """Watches a run inside the block. Subscribe first, then read what is stored: nothing falls between.

        Args:
            session_id: The run's session.
            run_id: The run.
            after_seq: The watcher's cursor.
            head: About where the log stood: Redis is read from there on, PostgreSQL has what is before.
        """
        subscription = Subscription()
        subscription.position = after_seq
        subscription.draining = self._draining
        feed = self._feeds.get(run_id)
        if feed is None:
            lane = self.lanes.of(session_id)
            feed = self._feeds[run_id] = lane.feeds[run_id] = _Feed(session_id, lane)
            feed.seen = max(after_seq, head)
        feed.subscriptions.add(subscription)
        self._note(subscription)
        self._watched.set()
        feed.lane.changed.set()
        try:
            yield subscription
        finally:
            feed.subscriptions.discard(subscription)
            self._came_by.pop(subscription, None)
            if not feed.subscriptions and self._feeds.get(run_id) is feed:
                del self._feeds[run_id], feed.lane.feeds[run_id]

    @contextmanager
    def wait_for_runs(self, session_id: UUID) -> Iterator[SessionWaiter]:
        """Watches for new runs of a session inside the block."""
        waiter = SessionWaiter()
        waiter.draining = self._draining
        self._sessions.setdefault(session_id, set()).add(waiter)
        self._note(waiter)
        self._watched.set()
        try:
            yield waiter
        finally:
            self._came_by.pop(waiter, None)
            waiters = self._sessions.get(session_id)
            if waiters is not None:
                waiters.discard(waiter)
                if not waiters:
                    del self._sessions[session_id]

    def deliver(self, run_id: UUID, first_seq: int, events: Sequence[NewEvent]) -> None:
        """Hands over events that this replica has just committed."""
        feed = self._feeds.get(run_id)
        if feed is None:
            return
        self._push(
            feed,
            [
                Event(run_id, seq, event.type, event.time_ms, event.data)
                for seq, event in enumerate(events, start=first_seq)
            ],
        )

    def deliver_events(self, run_id: UUID, events: Sequence[Event]) -> None:
        """Hands over committed events from wherever they came; one without data is there to be read."""
        feed = self._feeds.get(run_id)
        if feed is None or not events:
            return
        whole = next((place for place, event in enumerate(events) if not event.data), len(events))
        self._push(feed, events[:whole])
        if whole < len(events):
            feed.live = True
            feed.seen = max(feed.seen, events[-1].seq)
            for subscription in feed.subscriptions:
                if subscription.reached < events[-1].seq:
                    subscription.lose("large")

    def _push(self, feed: _Feed, events: Sequence[Event]) -> None:
        if not events:
            return
        feed.live = True
        feed.seen = max(feed.seen, events[-1].seq)
        for subscription in feed.subscriptions:
            subscription.push(events)

    def announce(self, session_id: UUID, ordinal: int = 0) -> None:
        """Tells watchers of a session that a run was added (its ordinal, 0 if unknown)."""
        for waiter in self._sessions.get(session_id, ()):
            waiter.ordinal = max(waiter.ordinal, ordinal)
            waiter.wake.set()

    def nudge(self, run_id: UUID) -> None:
        """Sends a run's watchers to PostgreSQL: something was committed that does not come live."""
        feed = self._feeds.get(run_id)
        if feed is not None:
            feed.excused = True
            for subscription in feed.subscriptions:
                subscription.lose("nudge")

    def wake_tenants(self, tenant_ids: Set[UUID]) -> None:
        """Has the watches of some tenants look whether they may go on."""
        for feed in self._feeds.values():
            for subscription in feed.subscriptions:
                if subscription.tenant_id in tenant_ids:
                    subscription.lose("moved")
        for waiters in self._sessions.values():
            for waiter in waiters:
                if waiter.tenant_id in tenant_ids:
                    waiter.wake.set()

    def drain(self) -> None:
        """Ends all watches, present and future, with a notice to reconnect."""
        self._draining = True
        for feed in self._feeds.values():
            for subscription in feed.subscriptions:
                subscription.stop()
        for waiters in self._sessions.values():
            for waiter in waiters:
                waiter.stop()

    def _note(self, watch: Subscription | SessionWaiter) -> None:
        if peer := peer_var.get():
            self._came_by[watch] = peer

    def peers(self) -> set[str]:
        """Returns the addresses that watches of clients came by: Envoys', or a balancer's."""
        return set(self._came_by.values())

    def drain_from(self, peer: str) -> int:
        """Ends the watches of clients that came by this address, with a notice; returns how many."""
        found = [watch for watch, came_by in self._came_by.items() if came_by == peer]
        for watch in found:
            watch.stop()
        return len(found)

    @property
    def degraded(self) -> bool:
        """True while commits of other replicas, or some of them, come only by looking at PostgreSQL."""
        return any(lane.degraded for lane in self.lanes)

    async def poll(self) -> None:
        """Looks at PostgreSQL for what the live tail missed, until cancelled."""
        backoff = Backoff(first=0.2, limit=2.0)
        while True:
            await self._watched.wait()
            if not self._feeds and not self._sessions:
                self._watched.clear()
                continue
            interval = self._degraded_seconds if self.degraded else self._poll_seconds
            await asyncio.sleep(interval * self._random.uniform(0.8, 1.2))
            try:
                await self.look()
            except HermeshError as error:
                _log.warning("watched runs could not be looked up", error=str(error))
                await backoff.sleep()
            else:
                backoff.reset()

    async def look(self) -> None:
        """Looks once: one query for all watched runs, one for all sessions that wait for a run."""
        run_ids = list(self._feeds)
        for start in range(0, len(run_ids), _POLL_CHUNK):
            chunk = run_ids[start : start + _POLL_CHUNK]
            heads = await self._store.heads(chunk)
            for run_id in chunk:
                feed = self._feeds.get(run_id)
                if feed is not None:
                    self._compare(run_id, feed, heads.get(run_id))
        for lane in self.lanes:
            lane.looked()
        session_ids = list(self._sessions)
        for start in range(0, len(session_ids), _POLL_CHUNK):
            chunk = session_ids[start : start + _POLL_CHUNK]
            ordinals = await self._store.last_ordinals(chunk)
            for session_id in chunk:
                newest = ordinals.get(session_id)
                for waiter in self._sessions.get(session_id, ()):
                    if newest is None or newest > waiter.ordinal:
                        waiter.wake.set()

    def _compare(self, run_id: UUID, feed: _Feed, head: int | None) -> None:
        if head is None:
            # The run is gone; reading it again tells the watcher so.
            for subscription in feed.subscriptions:
                subscription.lose("gone")
            return
        # While events flow, what was committed a moment ago is still on its way: it counts as missed only
        # if it is still missing at the next look.
        elsewhere = not self._holds(run_id)
        flowing = feed.live and not (elsewhere and feed.lane.degraded)
        limit = feed.behind if flowing else head
        if elsewhere:
            feed.lane.compared(feed, head)
        else:
            feed.known = head
        feed.behind = head
        feed.live = False
        for subscription in feed.subscriptions:
            if limit > subscription.reached:
                subscription.lose("missed")

    async def follow(self, lane: Lane) -> None:
        """Reads the live streams of a lane's runs whose writer is elsewhere, until cancelled."""
        reader = lane.reader
        if reader is None:
            return
        backoff = Backoff(first=0.1, limit=1.0)
        while True:
            lane.changed.clear()
            positions = {
                run_id: Position(feed.session_id, feed.seen)
                for run_id, feed in lane.feeds.items()
                if not self._holds(run_id)
            }
            if not positions:
                # Woken by the next watch; else look again, since a run's writer may have left this replica.
                try:
                    async with asyncio.timeout(1.0):
                        await lane.changed.wait()
                except TimeoutError:
                    pass
                continue
            lane.reading = True
            try:
                found = await reader.read(positions)
            except HermeshError:
                await backoff.sleep()
                continue
            finally:
                lane.reading = False
            backoff.reset()
            for run_id, events in found.items():
                self.deliver_events(run_id, events)
            if found:
                # One read brings what came meanwhile on all streams.
                await asyncio.sleep(_READ_PAUSE_S)

    async def wake_reader(self, lane: Lane) -> None:
        """Wakes the read that is under way whenever a watch begins, until cancelled."""
        reader = lane.reader
        if reader is None:
            return
        while True:
            await lane.changed.wait()
            # Watches that begin together need one wake.
            await asyncio.sleep(0.005)
            if lane.reading and lane.changed.is_set():
                try:
                    await reader.wake()
                except HermeshError:
                    pass
            await asyncio.sleep(0.02)
