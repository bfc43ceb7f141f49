"""Looking up in the outside what became of a call whose outcome is unknown. Nothing here ever acts."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import structlog

from meshkit.errors import ResourceExhaustedError
from services.tool import metrics
from services.tool.acting import context_of, rendered
from services.tool.domain import CallRequest, CallState, Entry, Outcome
from services.tool.execution import reach
from services.tool.journal import Journal
from services.tool.registry import (
    Reconciled,
    Registry,
    Tool,
    ToolContext,
    ToolError,
)
from services.tool.results import ResultStore, clean, shrink
from services.tool.schemas import ArgumentsError

_log = structlog.get_logger("tool.reconcile")

_RETRY_AFTER_MS = 500


class Finding(Enum):
    """What a look came to."""

    SETTLED = "settled"
    NOT_DONE = "not_done"
    CANNOT_TELL = "cannot_tell"
    ASK_AGAIN = "ask_again"


@dataclass(frozen=True, slots=True)
class Look:
    """What a look came to; `outcome` with SETTLED, `after` (seconds) with ASK_AGAIN."""

    finding: Finding
    outcome: Outcome | None = None
    after: float = 0.0


class Reconciler:
    """Asks tools' hooks, and records what they found.

    The rule that makes "not done" safe: it counts only when the hook was asked after the moment from which on
    no try that was begun can act any more. The journal keeps that moment by its own clock, as Begin was told:
    the time until the act may start, the tool's timeout, the time it gets to stop, and the time within which
    what it sent may still take effect outside. A try takes no step past its timeout (`acting.Timed`),
    whatever happened to its process. What was found counts only while the call was not begun again.
    The journal's clock may be set forward: so the same time must also have passed by the caller's own.
    """

    def __init__(
        self, registry: Registry, journal: Journal, results: ResultStore | None, *, max_looks: int = 64
    ) -> None:
        """Wires it.

        Args:
            registry: The tools.
            journal: Where calls stand, and what was found is recorded.
            results: Where large results go; None cuts them.
            max_looks: Most looks at once; more are refused.
        """
        self._registry = registry
        self._journal = journal
        self._results = results
        self._max_looks = max_looks
        self._looks = 0

    async def look(self, request: CallRequest, waited: float) -> Look:
        """Asks the call's tool once, and records what it found.

        Args:
            request: The call.
            waited: For how many seconds the caller has known that it may have been begun.

        Raises:
            ResourceExhaustedError: Too many looks at once.
            HermeshError: The journal could not be asked or told.
        """
        if self._looks >= self._max_looks:
            raise ResourceExhaustedError(
                "OVERLOADED", "the tool service is busy looking", retry_after_ms=_RETRY_AFTER_MS
            )
        found = self._registry.find(request.name)
        if found is None or found.reconcile is None:
            return Look(Finding.CANNOT_TELL)
        self._looks += 1
        try:
            look = await self._look(request, found, waited)
        finally:
            self._looks -= 1
        metrics.RECONCILES.labels(found.name, look.finding.value).inc()
        _log.info(
            "looked what became of a call",
            call_id=request.call_id,
            tool=found.name,
            finding=look.finding.value,
        )
        return look

    async def _look(self, request: CallRequest, found: Tool, waited: float) -> Look:
        # Before the hook is asked: only what is looked up once all is quiet can be "not done".
        entry = await self._journal.look(request)
        if entry.state is not CallState.UNKNOWN:
            return _standing(entry)
        try:
            arguments = found.parse(request.arguments)
        except ArgumentsError:
            return Look(Finding.CANNOT_TELL)
        answer = await _ask(found, arguments, context_of(request, entry))
        if answer is Reconciled.CANNOT_TELL:
            return Look(Finding.CANNOT_TELL)
        if answer is None:
            return Look(Finding.ASK_AGAIN)
        if answer is Reconciled.NOT_DONE:
            quiet_in = max(entry.quiet_in, reach(found) - waited)
            if quiet_in > 0:
                return Look(Finding.ASK_AGAIN, after=quiet_in)
            return _standing(await self._journal.reconcile(request, None, entry.tries))
        assert isinstance(answer, Outcome)
        outcome = await shrink(self._results, request, answer, found.reconcile_timeout)
        return _standing(await self._journal.reconcile(request, outcome, entry.tries))


async def _ask(
    found: Tool, arguments: Mapping[str, Any], context: ToolContext
) -> Outcome | Reconciled | None:
    """Asks the hook; None if it could not find out now."""
    assert found.reconcile is not None
    try:
        async with asyncio.timeout(found.reconcile_timeout):
            answer = await found.reconcile(arguments, context)
        if isinstance(answer, Reconciled):
            return answer
        return Outcome(CallState.COMPLETED, rendered(answer))
    except ToolError as error:
        return Outcome(CallState.FAILED, clean(error.message), reason=error.reason)
    except TimeoutError:
        _log.warning("a hook did not answer in time", tool=found.name, call_id=context.call_id)
    except Exception as error:
        # An outside that is away looks like this; a hook with a bug, too, and here is its trace.
        _log.warning("a hook failed", tool=found.name, call_id=context.call_id, exc_info=error)
    return None


def _standing(entry: Entry) -> Look:
    """Returns what the journal's word means for whoever asked."""
    if entry.state in (CallState.COMPLETED, CallState.FAILED):
        reason = "TOOL_FAILED" if entry.state is CallState.FAILED else ""
        return Look(Finding.SETTLED, Outcome(entry.state, entry.content, entry.content_ref, reason))
    if entry.may_begin:
        return Look(Finding.NOT_DONE)
    # Begun again meanwhile, or not quiet yet by the journal's clock.
    return Look(Finding.ASK_AGAIN, after=entry.quiet_in)
