"""The act itself: a tool's function under a clock, and what its end says about what it did."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Generator, Mapping
from functools import partial
from typing import Any, Generic, TypeVar

import structlog

from meshkit import failpoints
from services.tool.domain import CallRequest, CallState, Entry, Outcome
from services.tool.registry import OutcomeUnknownError, Tool, ToolContext, ToolError, ignore
from services.tool.results import clean

_log = structlog.get_logger("tool.acting")

T = TypeVar("T")


class Timed(Awaitable[T], Generic[T]):
    """An awaitable that begins no further step once its time has passed: it is cancelled there, once.

    A timer is not enough. A process that was stopped and goes on finds its timer and the answer that the act
    waited for ready at the same moment, and the act may come first: long after everybody took it for dead.

    Args:
        awaitable: what is driven.
        until: `time.monotonic()` from which on it makes no step.
    """

    def __init__(self, awaitable: Awaitable[T], until: float) -> None:
        self._awaitable = awaitable
        self._until = until

    def __await__(self) -> Generator[Any, Any, T]:
        inner: Any = self._awaitable.__await__()
        step: Callable[[], Any] = partial(inner.send, None)
        told = False
        while True:
            if not told and time.monotonic() >= self._until:
                # What it does from here on is to clean up.
                told = True
                step = partial(inner.throw, asyncio.CancelledError())
            try:
                waits_for = step()
            except StopIteration as stop:
                result: T = stop.value
                return result
            try:
                value = yield waits_for
            except BaseException as error:
                told = told or isinstance(error, asyncio.CancelledError)
                step = partial(inner.throw, error)
            else:
                step = partial(inner.send, value)


def context_of(request: CallRequest, entry: Entry, progress: Callable[[str], None] = ignore) -> ToolContext:
    """Returns what a tool may know of a call."""
    return ToolContext(
        call_id=request.call_id,
        idempotency_key=entry.idempotency_key or request.call_id,
        tenant_id=request.tenant_id,
        session_id=request.session_id,
        run_id=request.run_id,
        user=request.user,
        progress=progress,
    )


@failpoints.around("tool.act")
async def act(
    found: Tool, arguments: Mapping[str, Any], context: ToolContext, until: float
) -> str | Exception:
    """Runs a tool's function until `time.monotonic()` is `until`; returns its text, or what it raised."""
    try:
        return rendered(await Timed(found.function(arguments, context), until))
    except Exception as error:
        return error


def rendered(value: Any) -> str:
    """Returns what a tool returned as text.

    Raises:
        TypeError, ValueError: It is not what JSON can hold.
    """
    if value is None:
        return ""
    return clean(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def lost(repeatable: bool, text: str, reason: str) -> Outcome:
    """Returns the outcome of a call that ended without telling what it did."""
    if repeatable:
        return Outcome(CallState.FAILED, text, reason=reason)
    return Outcome(CallState.UNKNOWN, f"{text} It is not known whether it took effect.", reason=reason)


def judge(result: str | Exception, found: Tool, repeatable: bool) -> Outcome:
    """Returns the outcome of a call whose tool ended by itself."""
    if isinstance(result, str):
        return Outcome(CallState.COMPLETED, result)
    if isinstance(result, ToolError):
        return Outcome(CallState.FAILED, clean(result.message), reason=result.reason)
    if not isinstance(result, OutcomeUnknownError):
        # Here is its trace; the model and the log of events get none of it.
        _log.error("a tool failed by an error of its own", tool=found.name, exc_info=result)
    return lost(repeatable, "The tool failed.", "TOOL_FAILED")
