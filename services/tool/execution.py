"""Running calls: the journal's word before, the tool's act under a timeout, the journal's record after.

A call is a task of the service, not of the RPC that asked for it: an RPC only watches, and one that breaks
ends nothing. Nothing here runs a tool twice. What is tried again is only the record of what was done.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import structlog

from meshkit import tracing
from meshkit.errors import (
    AbortedError,
    CancelledCallError,
    DeadlineError,
    FailedPreconditionError,
    HermeshError,
    InternalError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
)
from meshkit.tasks import Backoff, TaskOwner
from services.tool import metrics
from services.tool.acting import act, context_of, judge, lost
from services.tool.domain import BeginOutcome, CallRequest, CallState, Entry, Outcome
from services.tool.journal import CALL_SECONDS, Journal
from services.tool.registry import Effect, Registry, Tool
from services.tool.results import INLINE_BYTES, ResultStore, clean, cut_outcome, shrink
from services.tool.runs import Runs
from services.tool.schemas import ArgumentsError

_log = structlog.get_logger("tool.execution")

# How long a tool that was told to stop gets to do so.
STOP_SECONDS = 1.0
# A wait for the object store or the journal is told after so long, and then again and again: those who
# watch see why nothing comes, and that the call is alive.
_TELL_AFTER = 1.0
_TELL_EACH = 4.0
# How often a call that takes long asks whether its run still goes on.
ASK_SECONDS = 3.0
_RUN_IS_LATE = "The run's time limit was reached"
_KEPT_PROGRESS = 64
_MAX_PROGRESS = 2_000
_RETRY_AFTER_MS = 500
# The journal may answer these and still take the record a moment later.
_PASSING = (UnavailableError, DeadlineError, ResourceExhaustedError, InternalError, CancelledCallError)


@dataclass(frozen=True, slots=True)
class Progress:
    """A sign of life of a running call."""

    text: str


class Execution:
    """One call under way, and those who watch it."""

    def __init__(self, request: CallRequest) -> None:
        self.request = request
        self.cancelled = False
        # The tool was told to stop and does not.
        self.stuck = False
        # Both return their failures: raised ones would be logged as the owner's.
        self.task: asyncio.Task[Outcome | HermeshError] | None = None
        self.act: asyncio.Task[Any] | None = None
        self._recent: deque[tuple[int, str]] = deque(maxlen=_KEPT_PROGRESS)
        self._count = 0
        self._changed = asyncio.Event()

    def publish(self, text: str) -> None:
        """Tells the watchers; one that is slow sees the latest 64."""
        self._count += 1
        self._recent.append((self._count, text))
        self.wake()

    def wake(self) -> None:
        """Lets the watchers look again."""
        self._changed.set()
        self._changed = asyncio.Event()

    def stop(self) -> None:
        """Asks the tool to stop, if it acts already, or ends the wait for a place for its result."""
        if self.act is not None:
            self.act.cancel()

    async def watch(self) -> AsyncGenerator[Progress | Outcome, None]:
        """Yields progress, then the outcome.

        Raises:
            HermeshError: The call ended without one.
        """
        assert self.task is not None
        seen = 0
        while True:
            changed = self._changed
            for index, text in tuple(self._recent):
                if index > seen:
                    seen = index
                    yield Progress(text)
            if self.task.done():
                break
            await changed.wait()
        result = _stopping() if self.task.cancelled() else self.task.result()
        if isinstance(result, HermeshError):
            raise result
        yield result


def _stopping() -> UnavailableError:
    return UnavailableError(message="the tool service is stopping; ask again", retry_after_ms=_RETRY_AFTER_MS)


class Executor:
    """Runs calls, at most `max_calls` at once."""

    def __init__(
        self,
        registry: Registry,
        journal: Journal,
        results: ResultStore | None,
        owner: TaskOwner,
        *,
        runs: Runs | None = None,
        max_calls: int = 64,
        complete_seconds: float = 60.0,
    ) -> None:
        """Wires it.

        Args:
            registry: The tools.
            journal: Asked before each act and told after it.
            results: Where large results go; None cuts them.
            owner: Owns the tasks.
            runs: Asked now and then while a tool acts; None never stops a call whose run is over.
            max_calls: Most calls at once; more are refused.
            complete_seconds: How long an outcome is recorded again while the journal is away, and a large
                result stored again while the object store is.
        """
        self._registry = registry
        self._journal = journal
        self._results = results
        self._owner = owner
        self._runs = runs
        self._max_calls = max_calls
        self._complete_seconds = complete_seconds
        self._running: dict[str, Execution] = {}
        # Acts that were told to stop and do not: they keep their place in the limit.
        self._stuck = 0
        self._refusing = False
        self._draining = False

    async def run(self, request: CallRequest) -> AsyncGenerator[Progress | Outcome, None]:
        """Runs a call, or watches it if it runs here already; yields progress, then the outcome.

        Raises:
            ResourceExhaustedError: The replica is at its limit; nothing was done.
            AbortedError: The fence is old; nothing was done.
            UnavailableError: The journal was not reached (nothing was done), or not told (the outcome is
                unknown to it).
        """
        while True:
            execution = self._submit(request)
            try:
                async with aclosing(execution.watch()) as updates:
                    async for update in updates:
                        yield update
                return
            except AbortedError:
                # Refused by an older fence than ours, under which another caller began: ask under our own.
                if execution.request.fence >= request.fence:
                    raise

    def cancel(self, call_id: str, tenant_id: UUID) -> bool:
        """Asks a call to stop; returns False if it does not run here."""
        execution = self._running.get(call_id)
        if execution is None or execution.request.tenant_id != tenant_id:
            return False
        execution.cancelled = True
        execution.stop()
        return True

    async def drain(self, seconds: float) -> None:
        """Takes no more calls and lets those under way end, then stops them.

        One that was stopped and may run again is left for another replica.
        """
        self._refusing = True
        if await self._owner.wait_idle(max(0.0, seconds - 2 * STOP_SECONDS)):
            return
        self._draining = True
        for execution in tuple(self._running.values()):
            execution.stop()
        await self._owner.wait_idle(2 * STOP_SECONDS)

    def _submit(self, request: CallRequest) -> Execution:
        known = self._running.get(request.call_id)
        if known is not None and known.task is not None and known.task.done():
            known = None
        if known is not None and known.request.tenant_id == request.tenant_id:
            return known
        if self._refusing:
            raise _stopping()
        if known is not None or len(self._running) + self._stuck >= self._max_calls:
            metrics.REFUSED.inc()
            raise ResourceExhaustedError(
                "OVERLOADED",
                "the tool service is at its limit of calls; nothing was done",
                retry_after_ms=_RETRY_AFTER_MS,
            )
        execution = Execution(request)
        self._running[request.call_id] = execution
        metrics.RUNNING.inc()
        execution.task = self._owner.start(self._work(execution), name=f"call-{request.call_id}")
        execution.task.add_done_callback(lambda _: self._ended(execution))
        return execution

    def _ended(self, execution: Execution) -> None:
        if self._running.get(execution.request.call_id) is execution:
            del self._running[execution.request.call_id]
        metrics.RUNNING.dec()
        execution.wake()

    async def _work(self, execution: Execution) -> Outcome | HermeshError:
        request = execution.request
        found = self._registry.find(request.name)
        label = found.name if found is not None else "(unknown)"
        began = time.monotonic()
        try:
            outcome = await self._journalled(execution, found)
        except HermeshError as error:
            metrics.CALLS.labels(label, "error").inc()
            _log.warning("tool call gave up", call_id=request.call_id, tool=label, reason=error.reason)
            return error
        metrics.CALLS.labels(label, "reused" if outcome.reused else outcome.state.name.lower()).inc()
        metrics.SECONDS.labels(label).observe(time.monotonic() - began)
        _log.info(
            "tool call ended",
            call_id=request.call_id,
            tool=label,
            state=outcome.state.name,
            reason=outcome.reason,
            reused=outcome.reused,
        )
        return outcome

    async def _journalled(self, execution: Execution, found: Tool | None) -> Outcome:
        request = execution.request
        # Before the journal is asked: between its word and the act there should be nothing that takes time.
        prepared = _prepare(found, request)
        asked = time.monotonic()
        go, entry = await self._journal.begin(request, 0.0 if isinstance(prepared, Outcome) else reach(found))
        if go is BeginOutcome.DONE:
            return _stored(entry)
        if go is BeginOutcome.UNKNOWN:
            text = entry.content or "It is not known whether this call took effect, so it is not repeated."
            return Outcome(CallState.UNKNOWN, text, reason="TOOL_CALL_UNKNOWN")
        if go is BeginOutcome.FENCED:
            raise AbortedError("FENCE_STALE", "another replica owns the session now; nothing was done")
        if go is BeginOutcome.NOT_APPROVED:
            raise FailedPreconditionError("APPROVAL_REQUIRED", "a person has to approve the call first")
        if isinstance(prepared, Outcome):
            outcome: Outcome | None = prepared
        elif time.monotonic() - asked > CALL_SECONDS:
            # The journal counts on it that an act begins by then, or never.
            outcome = Outcome(
                CallState.FAILED, "The tool was not run: it was too late.", reason="TOOL_TIMEOUT"
            )
        else:
            assert found is not None
            outcome = await self._act(execution, found, prepared, entry)
        if outcome is None:
            raise _stopping()
        return await self._record(execution, await self._shrink(execution, outcome), entry.tries)

    async def _act(
        self, execution: Execution, found: Tool, arguments: Mapping[str, Any], entry: Entry
    ) -> Outcome | None:
        """Runs the tool; None if it was stopped for a drain and may run again elsewhere."""
        # The journal was told an effect when the call was made; the stricter word counts.
        repeatable = max(found.effect, entry.effect) < Effect.NON_IDEMPOTENT
        if execution.cancelled:
            return Outcome(CallState.FAILED, "The call was cancelled before it began.", reason="CANCELLED")
        left = execution.request.ends_at - time.monotonic()
        if left <= 0:
            return Outcome(CallState.FAILED, f"{_RUN_IS_LATE} before the call began.", reason="TOOL_TIMEOUT")
        progress = _progress(execution, asyncio.get_running_loop())
        context = context_of(execution.request, entry, progress)
        seconds = min(found.timeout, left)
        until = time.monotonic() + seconds
        with tracing.span(
            f"act {found.name}",
            {"gen_ai.tool.name": found.name, "hermesh.call_id": context.call_id, "hermesh.try": entry.tries},
        ):
            task = execution.act = self._owner.start(
                act(found, arguments, context, until), name=f"tool-{found.name}"
            )
            await self._wait(execution, task, seconds)
        late = not task.done()
        if late:
            task.cancel()
            await asyncio.wait({task}, timeout=STOP_SECONDS)
        if not task.done():
            execution.stuck = True
            self._stuck += 1
            task.add_done_callback(self._unstuck)
        # A process that was stopped may find the act at its end and its time passed at once.
        late = late or time.monotonic() >= until
        if not task.done() or (late and task.cancelled()):
            text = f"The tool did not finish within {found.timeout:g} seconds."
            if left < found.timeout:
                text = f"{_RUN_IS_LATE} before the tool had finished."
            return lost(repeatable, text, "TOOL_TIMEOUT")
        if task.cancelled():
            if self._draining and repeatable and not execution.cancelled:
                return None
            return lost(repeatable, "The call was cancelled.", "CANCELLED")
        return judge(task.result(), found, repeatable)

    async def _wait(self, execution: Execution, act: asyncio.Task[str | Exception], seconds: float) -> None:
        """Waits for an act, at most so long; stops it when its run is over.

        An agent tells its calls to stop. One that died or hangs tells nobody, and its run may be cancelled or
        failed by others, who do not know where its calls are.
        """
        end = time.monotonic() + seconds
        while not act.done() and (left := end - time.monotonic()) > 0:
            await asyncio.wait({act}, timeout=min(left, ASK_SECONDS))
            if not act.done() and not execution.cancelled and await self._is_over(execution.request):
                _log.info("the run of a tool call is over", call_id=execution.request.call_id)
                execution.cancelled = True
                act.cancel()
                await asyncio.wait({act}, timeout=STOP_SECONDS)
                return

    async def _is_over(self, request: CallRequest) -> bool:
        if self._runs is None:
            return False
        try:
            return await self._runs.over(request)
        except HermeshError as error:
            _log.debug("it is not known whether a run goes on", call_id=request.call_id, reason=error.reason)
            return False

    def _unstuck(self, _: asyncio.Task[str | Exception]) -> None:
        self._stuck -= 1

    async def _shrink(self, execution: Execution, outcome: Outcome) -> Outcome:
        """Stores a large result; watchers are told while that takes, and a drain does not wait for it."""
        data = outcome.content.encode("utf-8")
        if len(data) <= INLINE_BYTES:
            return outcome
        request = execution.request
        storing = self._owner.start(
            shrink(self._results, request, outcome, self._complete_seconds),
            name=f"store-{request.call_id}",
        )
        execution.act = storing
        with metrics.STORING.track_inprogress(), self._telling(execution, "the result waits for the store"):
            await asyncio.wait({storing}, timeout=STOP_SECONDS if self._draining else None)
        if not storing.done() or storing.cancelled():
            storing.cancel()
            return cut_outcome(outcome, data, "stopped", "the wait for the object store was ended")
        return storing.result()

    async def _record(self, execution: Execution, outcome: Outcome, tries: int) -> Outcome:
        request = execution.request
        end = time.monotonic() + self._complete_seconds
        backoff = Backoff(0.1, 5.0)
        with ExitStack() as waiting:
            while True:
                try:
                    entry = await self._journal.complete(request, outcome, tries, still_acts=execution.stuck)
                except HermeshError as error:
                    wait = backoff.next()
                    if not isinstance(error, _PASSING) or time.monotonic() + wait > end:
                        _log.error(
                            "the outcome of a tool call was not recorded",
                            call_id=request.call_id,
                            tool=request.name,
                            state=outcome.state.name,
                            reason=error.reason,
                        )
                        if isinstance(error, NotFoundError):
                            await self._discard(request, outcome)
                        raise
                    metrics.COMPLETE_RETRIES.inc()
                    if backoff.attempts == 1:
                        waiting.enter_context(self._telling(execution, "the outcome waits to be recorded"))
                    await asyncio.sleep(wait)
                else:
                    if entry.state is None:
                        # Begun again under a newer fence, by a replica whose outcome will be the call's.
                        raise AbortedError("FENCE_STALE", "another try of this call has replaced this one")
                    # Somebody else may have settled the call before: the journal's word is the outcome.
                    return outcome if entry.state is outcome.state else _stored(entry)

    async def _discard(self, request: CallRequest, outcome: Outcome) -> None:
        """Deletes what was stored for a session that was deleted before: nobody will look there again."""
        if self._results is None or not outcome.content_ref:
            return
        try:
            await self._results.delete(request.tenant_id, request.session_id)
        except UnavailableError:
            _log.warning("a result of a deleted session is left in the object store", call_id=request.call_id)

    @contextmanager
    def _telling(self, execution: Execution, text: str) -> Iterator[None]:
        """Tells those who watch, now and then, what the call waits for, until the block ends."""

        async def tell() -> None:
            await asyncio.sleep(_TELL_AFTER)
            while True:
                execution.publish(text)
                await asyncio.sleep(_TELL_EACH)

        telling = self._owner.start(tell(), name=f"tell-{execution.request.call_id}")
        try:
            yield
        finally:
            telling.cancel()


def reach(found: Tool | None) -> float:
    """Returns for how many seconds from the journal's go a try may act or take effect at most.

    That is until the act may start, its timeout, the time it gets to stop, and the time within which what it
    sent may still take effect outside.
    """
    return 0.0 if found is None else CALL_SECONDS + found.timeout + STOP_SECONDS + found.settle_seconds


def _prepare(found: Tool | None, request: CallRequest) -> Mapping[str, Any] | Outcome:
    """Returns the arguments, or what to record in place of an act."""
    if found is None:
        return Outcome(CallState.FAILED, f"There is no tool named {request.name!r}.", reason="TOOL_NOT_FOUND")
    try:
        return found.parse(request.arguments)
    except ArgumentsError as error:
        text = f"The arguments do not fit the tool: {error}"
        return Outcome(CallState.FAILED, clean(text), reason="TOOL_ARGUMENTS_INVALID")


def _progress(execution: Execution, loop: asyncio.AbstractEventLoop) -> Callable[[str], None]:
    def progress(text: str) -> None:
        # A tool may speak from a thread, and after the loop has ended.
        if not loop.is_closed():
            loop.call_soon_threadsafe(execution.publish, clean(text)[:_MAX_PROGRESS])

    return progress


def _stored(entry: Entry) -> Outcome:
    state = entry.state if entry.state is not None else CallState.UNKNOWN
    reason = {CallState.COMPLETED: "", CallState.FAILED: "TOOL_FAILED"}.get(state, "TOOL_CALL_UNKNOWN")
    return Outcome(state, entry.content, entry.content_ref, reason, reused=True)
