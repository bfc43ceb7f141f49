"""Which event comes next: the rule that makes every client's stream gap-free and duplicate-free. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from itertools import groupby
from typing import Protocol, TypeVar
from uuid import UUID

TERMINAL = frozenset({"run.completed", "run.failed", "run.cancelled"})
# int32, as the protos have it.
MAX_SEQ = 2**31 - 1
_FINISHED_KEPT = 64


class EventLike(Protocol):
    """The part of an event that decides its place."""

    @property
    def run_id(self) -> str:
        """The run."""
        ...

    @property
    def seq(self) -> int:
        """The position in the run's log, from 1."""
        ...

    @property
    def type(self) -> str:
        """What happened."""
        ...


E = TypeVar("E", bound=EventLike)


class GapError(Exception):
    """A source skipped events. What it sends is not to be used: ask again from the cursor."""


class RunCursor:
    """A reader's place in one run's log.

    Attributes:
        run_id: The run; empty until the first event names it.
        last_seq: The last event delivered, 0 before the first.
        finished: Whether the terminal event was delivered; nothing comes after it.
    """

    __slots__ = ("finished", "last_seq", "run_id")

    def __init__(self, run_id: str = "", after_seq: int = 0) -> None:
        """Starts after `after_seq`."""
        self.run_id = run_id
        self.last_seq = after_seq
        self.finished = False

    def admit(self, events: Iterable[E]) -> list[E]:
        """Moves over a batch and returns what of it is new, in order.

        Events at or before the cursor are duplicates of a source that started earlier, and are dropped.

        Raises:
            GapError: An event is missing, or belongs to another run. Those before it are lost to this call
                but not to the reader: the cursor has not moved.
        """
        fresh: list[E] = []
        run_id, expected, finished = self.run_id, self.last_seq + 1, self.finished
        for event in events:
            if event.run_id != run_id:
                if run_id:
                    raise GapError(f"an event of run {event.run_id} in the stream of {run_id}")
                run_id = event.run_id
            seq = event.seq
            if seq < expected:
                continue
            if finished or seq > expected:
                raise GapError(f"seq {seq} where {expected} comes next")
            expected += 1
            fresh.append(event)
            finished = event.type in TERMINAL
        self.run_id, self.last_seq, self.finished = run_id, expected - 1, finished
        return fresh


class SessionCursor:
    """A reader's place in a session's log: one run after another, each from seq 1 to its terminal event."""

    __slots__ = ("_done", "_run", "_witnessed")

    def __init__(self, run_id: str = "", after_seq: int = 0) -> None:
        """Starts after `run_id:after_seq`; without a run from the session's start.

        Args:
            run_id: The run of the last event the reader has.
            after_seq: Its seq.
        """
        self._run = RunCursor(run_id, after_seq)
        # Whether events of this run came by. If not, its terminal event may be the one that the reader
        # already has, which only the log knows.
        self._witnessed = False
        self._done: deque[str] = deque(maxlen=_FINISHED_KEPT)

    @property
    def run_id(self) -> str:
        """The run of the last event delivered; empty before the first."""
        return self._run.run_id

    @property
    def last_seq(self) -> int:
        """The seq of the last event delivered."""
        return self._run.last_seq

    @property
    def finished(self) -> bool:
        """Never true: a session's log has no end."""
        return False

    def admit(self, events: Iterable[E]) -> list[E]:
        """Moves over a batch and returns what of it is new, in order.

        Raises:
            GapError: An event is missing, or a run began before the last one ended. The cursor has not moved.
        """
        fresh: list[E] = []
        before = self._run, self._run.last_seq, self._run.finished, self._witnessed
        begun: list[str] = []
        try:
            for run_id, group in groupby(events, key=lambda event: event.run_id):
                batch = list(group)
                if run_id != self._run.run_id:
                    if run_id in self._done or run_id in begun:
                        continue
                    if self._witnessed and not self._run.finished:
                        raise GapError(f"run {run_id} before the end of {self._run.run_id}")
                    begun.append(self._run.run_id)
                    self._run = RunCursor(run_id)
                admitted = self._run.admit(batch)
                self._witnessed = True
                fresh += admitted
        except GapError:
            self._run, self._run.last_seq, self._run.finished, self._witnessed = before
            raise
        self._done.extend(begun)
        return fresh


def parse_event_id(text: str) -> tuple[str, int]:
    """Splits `run_id:seq`.

    Raises:
        ValueError: The text has another form.
    """
    run_id, colon, seq = text.strip().rpartition(":")
    if not colon:
        raise ValueError("must be <run_id>:<seq>")
    return canonical_id(run_id), parse_seq(seq)


def parse_seq(text: str) -> int:
    """Reads a seq.

    Raises:
        ValueError: It is not a number from 0 to 2**31 - 1.
    """
    if not text.isascii() or not text.isdigit() or len(text) > 10 or int(text) > MAX_SEQ:
        raise ValueError(f"must be a number from 0 to {MAX_SEQ}")
    return int(text)


def canonical_id(text: str) -> str:
    """Returns a UUID in canonical text.

    Raises:
        ValueError: The text is not a UUID.
    """
    if len(text) != 36:
        raise ValueError("must be a UUID")
    return str(UUID(text))
