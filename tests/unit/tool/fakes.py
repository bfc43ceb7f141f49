"""A journal in memory, with the session service's rules, and tools to run under it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

from meshkit.errors import HermeshError, NotFoundError
from services.tool.domain import BeginOutcome, CallRequest, CallState, Entry, Outcome
from services.tool.registry import Effect, Reconciled, Tool, ToolContext

TENANT = UUID("0192aaaa-0000-7000-8000-000000000001")
SESSION = UUID("0192aaaa-0000-7000-8000-000000000002")
RUN = UUID("0192aaaa-0000-7000-8000-000000000003")
_RUNNING = "running"


@dataclass
class Row:
    effect: Effect
    entry: Entry
    running: bool = False
    fence: int = 0


class FakeJournal:
    """Begin and Complete as the session service means them, for one session."""

    def __init__(self, fence: int = 1) -> None:
        self.fence = fence
        self.rows: dict[str, Row] = {}
        self.begins: list[str] = []
        self.reach: list[float] = []
        self.looks = 0
        self.completes: list[Outcome] = []
        self.acting: list[bool] = []
        self.begin_errors: list[HermeshError] = []
        self.complete_errors: list[HermeshError] = []
        self.begin_gate: asyncio.Event | None = None

    def intend(self, call_id: str, effect: Effect = Effect.PURE) -> None:
        self.rows[call_id] = Row(effect, Entry(None, idempotency_key=f"key-{call_id}", effect=int(effect)))

    async def begin(self, request: CallRequest, act_seconds: float = 0.0) -> tuple[BeginOutcome, Entry]:
        self.begins.append(request.call_id)
        self.reach.append(act_seconds)
        if self.begin_gate is not None:
            await self.begin_gate.wait()
        if self.begin_errors:
            raise self.begin_errors.pop(0)
        row = self.rows.get(request.call_id)
        if row is None:
            raise NotFoundError("TOOL_CALL_NOT_FOUND", "no such call")
        if request.fence != self.fence:
            return BeginOutcome.FENCED, row.entry
        if row.entry.state in (CallState.COMPLETED, CallState.FAILED):
            return BeginOutcome.DONE, row.entry
        if row.entry.state is CallState.UNKNOWN or (row.running and row.effect is Effect.NON_IDEMPOTENT):
            row.entry = replace(row.entry, state=CallState.UNKNOWN)
            return BeginOutcome.UNKNOWN, row.entry
        row.running, row.fence = True, request.fence
        row.entry = replace(row.entry, tries=row.entry.tries + 1, quiet_in=act_seconds)
        return BeginOutcome.GO, row.entry

    async def look(self, request: CallRequest) -> Entry:
        self.looks += 1
        row = self.rows[request.call_id]
        return replace(row.entry, may_begin=row.entry.state is None and not row.running)

    async def reconcile(self, request: CallRequest, outcome: Outcome | None, tries: int) -> Entry:
        row = self.rows[request.call_id]
        if row.entry.state is CallState.UNKNOWN and tries == row.entry.tries:
            if outcome is not None:
                row.entry = replace(
                    row.entry, state=outcome.state, content=outcome.content, content_ref=outcome.content_ref
                )
            elif row.entry.quiet_in == 0:
                row.entry, row.running = replace(row.entry, state=None), False
        return await self.look(request)

    async def complete(
        self, request: CallRequest, outcome: Outcome, tries: int = 0, *, still_acts: bool = False
    ) -> Entry:
        if self.complete_errors:
            raise self.complete_errors.pop(0)
        row = self.rows.get(request.call_id)
        if row is None:
            raise NotFoundError("TOOL_CALL_NOT_FOUND", "no such call")
        begun = row.running and row.fence == request.fence
        if begun and row.entry.state in (None, CallState.UNKNOWN):
            self.completes.append(outcome)
            self.acting.append(still_acts)
            row.entry = replace(
                row.entry, state=outcome.state, content=outcome.content, content_ref=outcome.content_ref
            )
        return row.entry


class FakeResults:
    """An object store in memory that may be away for its first tries."""

    def __init__(self, errors: list[HermeshError] | None = None) -> None:
        self.errors = errors or []
        self.objects: list[bytes] = []

    async def put(self, tenant_id: UUID, session_id: UUID, data: bytes) -> str:
        if self.errors:
            raise self.errors.pop(0)
        self.objects.append(data)
        return f"sha256:{len(self.objects)}"

    async def delete(self, tenant_id: UUID, session_id: UUID) -> tuple[int, bool]:
        number = len(self.objects)
        self.objects.clear()
        return number, False

    async def problem(self) -> str | None:
        return "away" if self.errors else None


class Lever:
    """A tool that does what the test says, and counts."""

    def __init__(self, effect: Effect = Effect.PURE, timeout: float = 5.0, name: str = "lever") -> None:
        self.calls: list[dict[str, Any]] = []
        self.contexts: list[ToolContext] = []
        self.started = asyncio.Event()
        self.release = asyncio.Event()
        self.wait = False
        self.stubborn = False
        self.result: Any = "done"
        self.error: Exception | None = None
        self.found: Any = Reconciled.CANNOT_TELL
        self.tool = Tool(
            name=name,
            description="A lever.",
            input_schema={
                "type": "object",
                "properties": {"n": {"type": "integer"}},
                "additionalProperties": False,
            },
            function=self.run,
            effect=effect,
            timeout=timeout,
            reconcile=self.reconcile if effect is Effect.NON_IDEMPOTENT else None,
        )

    async def reconcile(self, arguments: Mapping[str, Any], context: ToolContext) -> Any:
        return self.found

    async def run(self, arguments: Mapping[str, Any], context: ToolContext) -> Any:
        self.calls.append(dict(arguments))
        self.contexts.append(context)
        context.progress("started")
        self.started.set()
        while self.wait and not self.release.is_set():
            try:
                await self.release.wait()
            except asyncio.CancelledError:
                if not self.stubborn:
                    raise
        if self.error is not None:
            raise self.error
        return self.result


def call(
    call_id: str = "run:1:0",
    *,
    name: str = "lever",
    arguments: str = "{}",
    fence: int = 1,
    tenant: UUID = TENANT,
) -> CallRequest:
    return CallRequest(call_id, tenant, SESSION, RUN, fence, name, arguments, "ann")
