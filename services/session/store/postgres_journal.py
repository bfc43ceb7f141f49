"""The tool journal in PostgreSQL."""

from __future__ import annotations

from datetime import timedelta
from uuid import UUID

from meshkit import failpoints
from meshkit.paging import make_page_token, read_page_token
from meshkit.postgres import load_sql
from services.session.domain import (
    BeginOutcome,
    Decision,
    Page,
    PendingAction,
    Run,
    ToolCall,
    ToolCallState,
)
from services.session.store.port import PAGE_BYTES
from services.session.store.postgres_base import PostgresPart, not_found
from services.session.store.postgres_sessions import bad_token
from services.session.store.rows import run_of, tool_call_of

_SQL = load_sql("services.session.store.sql", "journal.sql")
_FIRST = (UUID(int=0), 0)


class PostgresJournal(PostgresPart):
    """See `port.Journal`."""

    @failpoints.around("session.begin")
    async def begin(
        self, call_id: str, session_id: UUID, fence: int, act_ms: int = 0
    ) -> tuple[BeginOutcome, ToolCall]:
        """See the port. Raises NotFoundError(TOOL_CALL_NOT_FOUND)."""
        act = timedelta(milliseconds=act_ms)
        row = await self._one(_SQL["begin"], call_id, session_id, fence, act, call_id=call_id)
        return BeginOutcome(row["outcome"]), tool_call_of(row)

    @failpoints.around("session.complete")
    async def complete(
        self,
        call_id: str,
        fence: int,
        state: ToolCallState,
        content: str,
        content_ref: str,
        tries: int = 0,
        acts: bool = False,
    ) -> ToolCall:
        """See the port. Raises NotFoundError(TOOL_CALL_NOT_FOUND)."""
        row = await self._one(
            _SQL["complete"], call_id, fence, int(state), content, content_ref, tries, acts, call_id=call_id
        )
        return tool_call_of(row)

    @failpoints.around("session.reconcile")
    async def reconcile(
        self, call_id: str, state: ToolCallState, content: str, content_ref: str, tries: int = 0
    ) -> ToolCall:
        """See the port. Raises NotFoundError(TOOL_CALL_NOT_FOUND)."""
        row = await self._one(
            _SQL["reconcile"], call_id, int(state), content, content_ref, tries, call_id=call_id
        )
        return tool_call_of(row)

    async def look(self, call_id: str, session_id: UUID) -> ToolCall:
        """See the port."""
        row = await self._fetchrow(_SQL["look"], call_id, session_id)
        if row is None:
            raise not_found("tool_call", call_id)
        return tool_call_of(row)

    async def call_of_run(self, tenant_id: UUID, run_id: UUID, call_id: str) -> ToolCall:
        """See the port."""
        row = await self._fetchrow(_SQL["get_call"], tenant_id, run_id, call_id)
        if row is None:
            raise not_found("tool_call", call_id)
        return tool_call_of(row)

    async def waiting_calls(self, tenant_id: UUID, run_id: UUID) -> list[ToolCall]:
        """See the port."""
        return [tool_call_of(row) for row in await self._fetch(_SQL["waiting_calls"], tenant_id, run_id)]

    @failpoints.around("session.resolve")
    async def resolve(
        self, tenant_id: UUID, run_id: UUID, call_id: str, decision: Decision
    ) -> tuple[Run, ToolCall]:
        """See the port. The same word again changes nothing.

        Raises:
            NotFoundError: RUN_NOT_FOUND or TOOL_CALL_NOT_FOUND.
            AlreadyExistsError: REQUEST_ID_REUSED.
            FailedPreconditionError: ACTION_NOT_REQUIRED.
        """
        run = await self._one(
            _SQL["resolve"],
            tenant_id,
            run_id,
            call_id,
            int(decision.decision),
            decision.content,
            decision.request_id,
            decision.fingerprint,
            decision.time_ms,
            decision.data,
            run_id=run_id,
            call_id=call_id,
        )
        return run_of(run), await self.call_of_run(tenant_id, run_id, call_id)

    async def pending_actions(
        self, tenant_id: UUID, *, page_size: int, page_token: str
    ) -> Page[PendingAction]:
        """See the port."""
        bound = (tenant_id,)
        after = _position(read_page_token("ListPendingActions", bound, page_token))
        rows = await self._fetch(_SQL["pending"], tenant_id, *after, page_size + 1, PAGE_BYTES)
        fitting = [row for row in rows[:page_size] if row["fits"]]
        actions = [PendingAction(tool_call_of(row), row["since_ms"]) for row in fitting]
        if len(rows) == len(actions):
            return Page(actions)
        last = fitting[-1]
        position = f"{last['run_id']}:{last['position']}"
        return Page(actions, make_page_token("ListPendingActions", bound, position))


def _position(text: str) -> tuple[UUID, int]:
    if not text:
        return _FIRST
    run_id, _, place = text.partition(":")
    try:
        found = UUID(run_id), int(place)
    except ValueError:
        raise bad_token() from None
    if not 0 <= found[1] < 2**31:
        raise bad_token()
    return found
