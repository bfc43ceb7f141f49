"""The tool journal in PostgreSQL."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from meshkit import failpoints
from meshkit.postgres import load_sql
from services.session.domain import BeginOutcome, NewEvent, Run, ToolCall, ToolCallState
from services.session.store.postgres_base import PostgresPart, not_found
from services.session.store.rows import run_of, tool_call_of

_SQL = load_sql("services.session.store.sql", "journal.sql")


class PostgresJournal(PostgresPart):
    """See `port.Journal`."""

    @failpoints.around("session.begin")
    async def begin(self, call_id: str, session_id: UUID, fence: int) -> tuple[BeginOutcome, ToolCall]:
        """See the port. Raises NotFoundError(TOOL_CALL_NOT_FOUND)."""
        row = await self._one(_SQL["begin"], call_id, session_id, fence, call_id=call_id)
        return BeginOutcome(row["outcome"]), tool_call_of(row)

    @failpoints.around("session.complete")
    async def complete(
        self, call_id: str, fence: int, state: ToolCallState, content: str, content_ref: str
    ) -> ToolCall:
        """See the port. Raises NotFoundError(TOOL_CALL_NOT_FOUND)."""
        row = await self._one(
            _SQL["complete"], call_id, fence, int(state), content, content_ref, call_id=call_id
        )
        return tool_call_of(row)

    @failpoints.around("session.reconcile")
    async def reconcile(self, call_id: str, state: ToolCallState, content: str, content_ref: str) -> ToolCall:
        """See the port. Raises NotFoundError(TOOL_CALL_NOT_FOUND)."""
        row = await self._one(_SQL["reconcile"], call_id, int(state), content, content_ref, call_id=call_id)
        return tool_call_of(row)

    async def calls_of_run(self, tenant_id: UUID, run_id: UUID) -> list[ToolCall]:
        """See the port."""
        return [tool_call_of(row) for row in await self._fetch(_SQL["calls_of_run"], tenant_id, run_id)]

    @failpoints.around("session.resolve")
    async def resolve(
        self,
        tenant_id: UUID,
        run_id: UUID,
        call_id: str,
        decision: int,
        content: str,
        events: Sequence[NewEvent],
    ) -> tuple[Run, ToolCall]:
        """See the port. The same word again changes nothing.

        Raises:
            NotFoundError: RUN_NOT_FOUND or TOOL_CALL_NOT_FOUND.
            FailedPreconditionError: ACTION_NOT_REQUIRED.
        """
        run = await self._one(
            _SQL["resolve"],
            tenant_id,
            run_id,
            call_id,
            decision,
            content,
            [event.type for event in events],
            [event.time_ms for event in events],
            [event.data for event in events],
            run_id=run_id,
            call_id=call_id,
        )
        call = await self._fetchrow(_SQL["get_call"], tenant_id, run_id, call_id)
        if call is None:
            raise not_found("tool_call", call_id)
        return run_of(run), tool_call_of(call)
