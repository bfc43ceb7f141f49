"""Group commit: everything that is pending goes to PostgreSQL in one statement, then the next.

There is no timer. While one commit is under way the next batch gathers, so batches grow exactly as far as
the load asks for, and a lone append is written at once.
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Protocol

import structlog

from meshkit import tracing
from meshkit.context import use_run
from meshkit.errors import HermeshError, InvalidArgumentError, UnavailableError
from meshkit.tasks import Backoff, TaskOwner
from services.session import metrics
from services.session.domain import AppendOutcome, AppendResult, RunAppend

_log = structlog.get_logger("session.flusher")

# Longer than the server's own limits on statements and locks, so that their clearer word comes first.
_WRITE_TIMEOUT = 8.0
_MAX_FLUSH_BYTES = 8 * 1024 * 1024

# An append whose lease somebody has locked is tried again by itself, after pauses from the first to the
# longest, for so long; then its writer is told to send again. Far below what the writer waits for an answer.
_LOCKED_FIRST = 0.002
_LOCKED_PAUSE = 0.05
_LOCKED_SECONDS = 5.0

# Looking a label up costs more than counting.
_COUNT = {outcome: metrics.appends.labels(outcome.name) for outcome in AppendOutcome}


class Writer(Protocol):
    """The part of the store that the flusher needs; see `store.port.Log`."""

    async def append(self, appends: Sequence[RunAppend]) -> list[AppendResult]:
        """Writes plain appends of distinct sessions."""
        ...

    async def append_step(self, append: RunAppend) -> AppendResult:
        """Writes one append with its step commit."""
        ...


class Sink(Protocol):
    """Who waits for the outcome of a write."""

    def settled(self, pending: "Pending", outcome: AppendOutcome, next_seq: int, detail: str) -> None:
        """Takes the outcome; must not block."""
        ...


class Pending:
    """One write on its way: `run_text` is the run's id as the writer sent it."""

    __slots__ = ("_locked", "append", "run_text", "sink")

    def __init__(self, append: RunAppend, run_text: str, sink: Sink) -> None:
        self.append = append
        self.run_text = run_text
        self.sink = sink
        self._locked: tuple[float, Backoff] | None = None

    def pause(self) -> float | None:
        """Returns after how many seconds to try again because of a lock; None if it was tried long enough."""
        now = time.monotonic()
        if self._locked is None:
            backoff = Backoff(_LOCKED_FIRST, _LOCKED_PAUSE)
            self._locked = now + _LOCKED_SECONDS, backoff
        until, backoff = self._locked
        metrics.locked_appends.inc()
        return backoff.next() if now < until else None


class Flusher:
    """The one writer of plain appends of a replica, beside a bounded number of step commits."""

    def __init__(
        self,
        writer: Writer,
        *,
        tasks: TaskOwner,
        on_commit: Callable[[RunAppend], None],
        max_appends: int,
        max_steps: int,
    ) -> None:
        """Makes a flusher that starts with `run`.

        Args:
            writer: The store.
            tasks: Owns the tasks of step commits.
            on_commit: Told of every committed append, before its writer is; must not block.
            max_appends: Most appends in one statement.
            max_steps: Most step commits at once.
        """
        self._writer = writer
        self._tasks = tasks
        self._on_commit = on_commit
        self._max_appends = max_appends
        self._plain: deque[Pending] = deque()
        self._wake = asyncio.Event()
        self._slots = asyncio.Semaphore(max_steps)

    def submit(self, pending: Pending) -> None:
        """Takes a write; its sink bounds how many it has under way."""
        if pending.append.commit is None:
            self._plain.append(pending)
            self._wake.set()
        else:
            self._tasks.start(self._step(pending), name="step")

    async def run(self) -> None:
        """Flushes until cancelled."""
        while True:
            if not self._plain:
                self._wake.clear()
                await self._wake.wait()
            batch = self._take()
            try:
                await self._flush(batch)
            except Exception as error:
                _log.error("a flush failed by a bug", exc_info=error)
                self._settle_all(batch, AppendOutcome.RETRY)

    def _take(self) -> list[Pending]:
        """Takes what fits in one statement: at most one append a session, the others wait for the next."""
        batch: list[Pending] = []
        sessions = set()
        later: list[Pending] = []
        size = 0
        plain = self._plain
        while plain and len(batch) < self._max_appends and size < _MAX_FLUSH_BYTES:
            pending = plain.popleft()
            session_id = pending.append.session_id
            if session_id in sessions:
                later.append(pending)
                continue
            sessions.add(session_id)
            batch.append(pending)
            size += pending.append.size
        plain.extendleft(reversed(later))
        return batch

    async def _flush(self, batch: list[Pending]) -> None:
        started = time.perf_counter()
        try:
            async with asyncio.timeout(_WRITE_TIMEOUT):
                results = await self._writer.append([pending.append for pending in batch])
        except (UnavailableError, TimeoutError) as error:
            _log.warning("a flush got no answer", appends=len(batch), reason=str(error))
            self._settle_all(batch, AppendOutcome.RETRY)
            return
        except HermeshError as error:
            if len(batch) == 1:
                self._refuse(batch[0], error)
                return
            # One write that PostgreSQL cannot take must not fail the others: each goes by itself.
            for pending in batch:
                await self._flush([pending])
            return
        metrics.flush_seconds.observe(time.perf_counter() - started)
        metrics.flush_appends.observe(len(batch))
        # Counted once a flush: to count takes as long as to settle.
        events = 0
        outcomes: Counter[int] = Counter()
        for pending, result in zip(batch, results, strict=True):
            if result.outcome is AppendOutcome.COMMITTED:
                events += len(pending.append.events)
            elif result.outcome is AppendOutcome.RETRY and (pause := pending.pause()) is not None:
                asyncio.get_running_loop().call_later(pause, self.submit, pending)
                continue
            outcomes[int(self._settle(pending, result))] += 1
        metrics.events.inc(events)
        for outcome, count in outcomes.items():
            _COUNT[AppendOutcome(outcome)].inc(count)

    async def _step(self, pending: Pending) -> None:
        started = time.perf_counter()
        try:
            with use_run(pending.run_text), _span(pending) as span:
                while True:
                    async with self._slots, asyncio.timeout(_WRITE_TIMEOUT):
                        result = await self._writer.append_step(pending.append)
                    if result.outcome is not AppendOutcome.RETRY or (pause := pending.pause()) is None:
                        break
                    await asyncio.sleep(pause)
                if result.outcome is not AppendOutcome.COMMITTED:
                    span.fail(result.outcome.name)
        except (UnavailableError, TimeoutError) as error:
            _log.warning("a step commit got no answer", run_id=pending.run_text, reason=str(error))
            self._settle_all([pending], AppendOutcome.RETRY)
        except HermeshError as error:
            self._refuse(pending, error)
        except Exception as error:
            _log.error("a step commit failed by a bug", run_id=pending.run_text, exc_info=error)
            self._settle_all([pending], AppendOutcome.RETRY)
        else:
            metrics.step_seconds.observe(time.perf_counter() - started)
            if result.outcome is AppendOutcome.COMMITTED:
                metrics.events.inc(len(pending.append.events))
            _COUNT[self._settle(pending, result)].inc()

    def _settle(self, pending: Pending, result: AppendResult) -> AppendOutcome:
        """Tells those concerned what became of a write; returns it."""
        append = pending.append
        outcome = result.outcome
        next_seq = result.next_seq
        after = append.first_seq + len(append.events)
        if outcome is AppendOutcome.COMMITTED:
            next_seq = next_seq or after
            self._on_commit(append)
        elif outcome is AppendOutcome.GAP and next_seq >= after:
            # The fence was current, so the writer is the only one there is: what stands at these seqs is
            # this very write, committed earlier by a try whose answer was lost.
            outcome = AppendOutcome.COMMITTED
        pending.sink.settled(pending, outcome, next_seq, result.detail)
        return outcome

    def _refuse(self, pending: Pending, error: HermeshError) -> None:
        _log.error("a write cannot be stored", run_id=pending.run_text, reason=error.reason, error=str(error))
        metrics.appends.labels(AppendOutcome.INVALID.name).inc()
        detail = (
            error.message if isinstance(error, InvalidArgumentError) else "the database refuses this write"
        )
        pending.sink.settled(pending, AppendOutcome.INVALID, 0, detail)

    def _settle_all(self, batch: Sequence[Pending], outcome: AppendOutcome) -> None:
        for pending in batch:
            _COUNT[outcome].inc()
            pending.sink.settled(pending, outcome, 0, "")


def _span(pending: Pending) -> tracing.Span:
    """Returns the span of a step commit, below what the step was a part of."""
    append = pending.append
    assert append.commit is not None
    if not append.commit.traceparent:
        return tracing.NO_SPAN
    about: dict[str, tracing.Value] = {
        "db.system.name": "postgresql",
        "db.operation.name": "append_step",
        "hermesh.run_id": pending.run_text,
        "hermesh.session_id": str(append.session_id),
        "hermesh.first_seq": append.first_seq,
        "hermesh.events": len(append.events),
    }
    if append.commit.status is not None:
        about["hermesh.status"] = append.commit.status.name
    return tracing.span_below(append.commit.traceparent, "commit", about, kind="client")
