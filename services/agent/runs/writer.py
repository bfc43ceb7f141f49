"""One run's writer: what arrives while an append is in flight becomes the next append.

The first event goes out at once; under load batches grow by themselves, because text that waits is
joined. At most one append of a run is in flight, and its bytes never change once it was sent: sent again
after a broken stream it is either in the log as a whole already, or not at all.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import orjson

from hermesh.common.v1.event_pb2 import Event
from hermesh.session.v1.resources_pb2 import Grant
from hermesh.session.v1.session_internal_service_pb2 import (
    APPEND_OUTCOME_COMMITTED,
    APPEND_OUTCOME_FENCED,
    APPEND_OUTCOME_GAP,
    APPEND_OUTCOME_INVALID,
    AppendResult,
    RunAppend,
    StepCommit,
)
from meshkit import failpoints, tracing
from services.agent.runs.subscription import Subscription

MAX_TEXT = 64 * 1024
MAX_APPEND = 512 * 1024
MAX_EVENTS = 1000
HIGH_WATER = 1024 * 1024
MAX_WAITING = 4096
# From how much text on a write counts as fast, in characters and in characters a second. People read 30 a
# second, and cannot tell a stream of 20 writes a second from one of 100.
FAST_SIZE = 32
FAST_RATE = 800.0
# A fast model's first token comes within this time, seconds; then a turn's opening costs no write of its own.
PATIENCE = 0.015

_acknowledged = failpoints.point("agent.append.acknowledged")


class WriterStopped(Exception):
    """The run's events can no longer be written here.

    Attributes:
        kind: "lost" = another replica owns the run; "rejected" = the store refused the write itself.
    """

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind


class Attachment(Enum):
    """A writer's tie to the append stream."""

    NEW = "new"
    ATTACHED = "attached"
    DETACHED = "detached"


@dataclass(slots=True)
class _Pending:
    type: str
    time_ms: int
    parts: list[str] = field(default_factory=list)
    size: int = 0
    fixed: list[tuple[str, str]] = field(default_factory=list)
    commit: StepCommit | None = None

    def render(self) -> list[tuple[str, str]]:
        """Return the events, type and data of each."""
        if not self.type:
            return self.fixed
        text = "".join(self.parts)
        # What needs no escapes is its own JSON: at one token a write, looking costs less than rendering.
        if text.isascii() and text.isprintable() and '"' not in text and "\\" not in text:
            return [(self.type, f'{{"text":"{text}"}}')]
        return [(self.type, f'{{"text":{orjson.dumps(text).decode()}}}')]


def _bytes(text: str) -> int:
    """Return how many bytes a text has on the wire; of ASCII, as most is, it is known without a look."""
    return len(text) if text.isascii() else len(text.encode())


class RunWriter:
    """Writes the events of one run under one lease.

    Args:
        grant: the lease.
        lease_until: monotonic time at which it must be taken for lost unless renewed.
        now_ms: the clock of the events' times.
        schedule: asks the append stream to come and `take` what is ready.
        monotonic: the clock of `lease_until`.
    """

    def __init__(
        self,
        grant: Grant,
        *,
        lease_until: float,
        now_ms: Callable[[], int],
        schedule: Callable[[RunWriter], None],
        monotonic: Callable[[], float],
    ) -> None:
        self.run_id = grant.run_id
        self.session_id = grant.session_id
        self.fence = grant.fence
        self.next_seq = grant.next_seq
        self.lease_until = lease_until
        self.asked_at = lease_until - grant.ttl_ms / 1000
        self.attachment = Attachment.NEW
        self.sent_at = float("-inf")
        # Whether what waits must not wait longer: a turn's first text, and all that is not text.
        self.urgent = False
        # Whether the last write's text came faster than anyone reads.
        self.fast = False
        # Until when what waits may wait for a first text that goes along.
        self.hold_until = float("-inf")
        # Bytes of events that the run has in its log, or here on their way there.
        self.written = 0
        self.on_stopped: Callable[[WriterStopped], None] = lambda stopped: None
        self._now_ms = now_ms
        self._monotonic = monotonic
        self._schedule = schedule
        self._pending: deque[_Pending] = deque()
        self._pending_size = 0
        self._pending_events = 0
        self._in_flight: RunAppend | None = None
        self._sent = False
        # Whether what was sent is to be sent again, which it may be by a re-attach first.
        self._again = False
        self._moved = asyncio.Event()
        self._stopped: WriterStopped | None = None
        self._said = False
        self._subscriptions: list[Subscription] = []

    # the runner's side

    def subscribe(self, subscription: Subscription) -> None:
        """Send every event that is stored from now on to a caller."""
        self._subscriptions.append(subscription)

    def close_subscriptions(self, reconnect: str = "") -> None:
        """End the callers' streams after what they were sent."""
        for subscription in self._subscriptions:
            subscription.close(reconnect)
        self._subscriptions.clear()

    def text(self, kind: str, text: str) -> int:
        """Write text ("text.delta" or "reasoning.delta"); text that waits is joined.

        Returns:
            The seq of the event that the text becomes a part of.
        """
        if self._stopped is not None:
            raise self._stopped
        last = self._pending[-1] if self._pending else None
        if last is None or last.type != kind or last.size > MAX_TEXT:
            last = _Pending(kind, self._now_ms())
            self._pending.append(last)
            self._pending_events += 1
        if not self._said:
            self._said = self.urgent = True
        last.parts.append(text)
        last.size += len(text)
        self.written += _bytes(text)
        self._pending_size += len(text)
        before = self.next_seq
        if self._in_flight is None:
            self._schedule(self)
        else:
            before += len(self._in_flight.events)
        return before + self._pending_events - 1

    @property
    def full(self) -> bool:
        """Whether so much waits to be stored that a producer should wait in `room`."""
        return self._pending_size > HIGH_WATER or len(self._pending) > MAX_WAITING

    def event(self, kind: str, data: Mapping[str, Any], *, patient: bool = False) -> None:
        """Write an event; see `events`."""
        self.events([(kind, data)], patient=patient)

    def events(
        self,
        events: Sequence[tuple[str, Mapping[str, Any]]],
        commit: StepCommit | None = None,
        *,
        patient: bool = False,
    ) -> None:
        """Write events that are stored together, in one transaction with `commit`.

        Args:
            events: type and data of each.
            commit: what else changes with them.
            patient: whether they may wait a moment for what follows, to be stored together with it.
        """
        if self._stopped is not None:
            raise self._stopped
        fixed = [(kind, orjson.dumps(data).decode()) for kind, data in events]
        size = sum(len(data) for _, data in fixed)
        self.written += sum(_bytes(data) for _, data in fixed)
        if commit is not None and tracing.recording():
            commit.traceparent = tracing.current_traceparent()
        self._pending.append(_Pending("", self._now_ms(), size=size, fixed=fixed, commit=commit))
        self._pending_events += len(fixed)
        self._pending_size += size
        self._said = False
        if patient:
            if not self.urgent:
                self.hold_until = self._monotonic() + PATIENCE
        else:
            self.urgent = True
        if self._in_flight is None:
            self._schedule(self)

    async def room(self) -> None:
        """Wait while too much is waiting to be stored: the producer must not outrun the store."""
        while self.full:
            await self._wait()

    async def flush(self) -> None:
        """Wait until everything written so far is stored.

        Raises:
            WriterStopped: it cannot be.
        """
        if self._pending:
            self.urgent = True
            self._schedule(self)
        while self._pending or self._in_flight is not None:
            await self._wait()
        if self._stopped is not None:
            raise self._stopped

    async def _wait(self) -> None:
        if self._stopped is not None:
            raise self._stopped
        self._moved.clear()
        await self._moved.wait()
        if self._stopped is not None:
            raise self._stopped

    def stop(self, stopped: WriterStopped) -> None:
        """Write nothing more, at once and for good."""
        if self._stopped is None:
            self._stopped = stopped
            self._pending.clear()
            self._pending_size = self._pending_events = 0
            self._in_flight = None
            self._moved.set()
            self.on_stopped(stopped)

    def discard(self) -> None:
        """Drop what a rejected write left behind, so that the run's end can be written in its place."""
        self._stopped = None
        self._pending.clear()
        self._pending_size = self._pending_events = 0
        self._in_flight = None

    # the append stream's side

    @property
    def stopped(self) -> bool:
        """Whether the writer was stopped."""
        return self._stopped is not None

    @property
    def in_flight(self) -> bool:
        """Whether a write waits for its answer."""
        return self._in_flight is not None and self._sent

    @property
    def lease_held(self) -> bool:
        """Whether the lease is surely still ours."""
        return self._monotonic() < self.lease_until

    @property
    def ready(self) -> bool:
        """Whether there is something to send that is not under way."""
        if self._stopped is not None or self.attachment is Attachment.DETACHED:
            return False
        return not self._sent if self._in_flight is not None else bool(self._pending)

    def take(self, target: RunAppend) -> int:
        """Fill in the next write, its bytes now fixed; call it only when `ready`.

        Args:
            target: an empty write inside the message that is about to be sent.

        Returns:
            Its size, roughly, in bytes.
        """
        size = chars = 0
        if self._in_flight is None:
            target.session_id, target.run_id = self.session_id, self.run_id
            target.fence, target.first_seq = self.fence, self.next_seq
            while self._pending and size < MAX_APPEND and len(target.events) < MAX_EVENTS:
                if size and size + self._pending[0].size > MAX_APPEND:
                    break
                entry = self._pending.popleft()
                chars += entry.size
                for kind, data in entry.render():
                    target.events.add(type=kind, time_ms=entry.time_ms, data=data)
                    size += _bytes(data)
                if entry.commit is not None:
                    target.commit.CopyFrom(entry.commit)
                    size += entry.commit.ByteSize()
                    break
            self._pending_size = max(0, self._pending_size - chars)
            self._pending_events -= len(target.events)
            self._in_flight = target
            self._moved.set()
        else:
            target.CopyFrom(self._in_flight)
            size = target.ByteSize()
            chars = sum(len(event.data) for event in target.events)
        self._sent = True
        self._again = False
        # What a commit or the bound on size left behind is not held back.
        self.urgent = bool(self._pending)
        now = self._monotonic()
        self.fast = chars >= FAST_SIZE and chars >= FAST_RATE * (now - self.sent_at)
        self.sent_at = now
        self.attachment = Attachment.ATTACHED
        return size

    def send_again(self, first_seq: int) -> None:
        """Send the write in flight once more, unchanged, if it is still that one and was not sent since."""
        if self._in_flight is not None and self._again and self._in_flight.first_seq == first_seq:
            self._sent = self._again = False
            self._schedule(self)

    def answered(self, result: AppendResult) -> bool:
        """Take an append's result in.

        Returns:
            Whether the write is to be sent again after a moment.
        """
        append = self._in_flight
        if self._stopped is not None or append is None or result.first_seq != append.first_seq:
            return False  # an answer to what was settled by a re-attach in the meantime
        if result.outcome == APPEND_OUTCOME_COMMITTED:
            self._stored(append)
        elif result.outcome == APPEND_OUTCOME_GAP:
            # Only this lease writes: a log that ends right after this write has it, from an earlier try.
            self._settle(append, result.next_seq)
        elif result.outcome == APPEND_OUTCOME_FENCED:
            if append.fence == self.fence:
                # Whose lease it is now is asked before the run is given up.
                self.detach()
        elif result.outcome == APPEND_OUTCOME_INVALID:
            self.stop(WriterStopped("rejected", result.detail))
        else:
            self._again = True
            return True
        return False

    def detach(self) -> None:
        """The append stream broke: nothing is sent until the lease is attached to another one.

        So it is for a writer that sent nothing yet: the session service cut the leases of those, too.
        """
        self.attachment = Attachment.DETACHED

    def reattached(self, grant: Grant, lease_until: float) -> None:
        """Go on under a new fence: what the store has is dropped, the rest is sent again."""
        if self._stopped is not None:
            return
        self.fence = grant.fence
        self.lease_until = lease_until
        self.attachment = Attachment.ATTACHED
        append = self._in_flight
        if append is None:
            if grant.next_seq != self.next_seq:
                self.stop(WriterStopped("lost", "the log went on without this writer"))
            elif self._pending:
                self._schedule(self)
            return
        append.fence = grant.fence
        self._settle(append, grant.next_seq)

    def _settle(self, append: RunAppend, next_seq: int) -> None:
        # A commit without events leaves no trace in the seqs: it is sent again, and done once.
        if append.events and next_seq == append.first_seq + len(append.events):
            self._stored(append)
        elif next_seq == append.first_seq:
            self._sent = False
            self._schedule(self)
        else:
            self.stop(WriterStopped("lost", "the log went on without this writer"))

    def _stored(self, append: RunAppend) -> None:
        _acknowledged()
        self._in_flight = None
        self._sent = False
        self.next_seq = append.first_seq + len(append.events)
        if self._subscriptions:
            events = self._events(append)
            for subscription in self._subscriptions:
                subscription.push(events)
            self._subscriptions = [one for one in self._subscriptions if not one.closed]
        self._moved.set()
        if self._pending:
            self._schedule(self)

    def _events(self, append: RunAppend) -> Sequence[Event]:
        run_id, seq = self.run_id, append.first_seq
        return [
            Event(run_id=run_id, seq=seq + place, type=new.type, time_ms=new.time_ms, data=new.data)
            for place, new in enumerate(append.events)
        ]
