"""Runs in PostgreSQL: accepting, claiming, cancelling, finding what to dispatch."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from uuid import UUID

import orjson

from meshkit import failpoints
from meshkit.clock import now_ms
from meshkit.errors import AbortedError
from meshkit.ids import uuid7
from meshkit.paging import make_page_token, read_page_token
from meshkit.postgres import load_sql
from services.session.domain import (
    Claim,
    ClaimOutcome,
    ContextPosition,
    Event,
    LeaseRef,
    Page,
    Run,
    RunContext,
    Submission,
    Submitted,
)
from services.session.store.port import CONTEXT_PAGE_BYTES, MAX_CONTEXT_BYTES, MAX_CONTEXT_MESSAGES
from services.session.store.postgres_base import PostgresPart, Record, not_found
from services.session.store.postgres_sessions import ordinal_at
from services.session.store.rows import context_of, context_page_of, grant_of, run_of, title_of

_SQL = load_sql("services.session.store.sql", "runs.sql")
_SESSIONS = load_sql("services.session.store.sql", "sessions.sql")

# After so many claims in a row that moved nothing a run fails: no run poisons the mesh.
MAX_IDLE_CLAIMS = 5
# A run that was handed out for dispatch is due again after this.
DISPATCH_AGAIN = timedelta(seconds=2)

_LAST_ORDINAL = 2**31 - 1


class PostgresRuns(PostgresPart):
    """See `port.Runs`."""

    @failpoints.around("session.submit")
    async def submit(self, tenant_id: UUID, submission: Submission, *, history: bool = True) -> Submitted:
        """See the port. One round trip: `session.submit_run`."""
        session_id = submission.session_id
        head = b'{"session_id":"%s","ordinal":' % str(session_id).encode()
        middle = b',"input":%s,"agent":' % orjson.dumps(
            [{"role": role, "content": content} for role, content in submission.input]
        )
        tail = b',"model":%s}' % orjson.dumps(submission.model)
        row = await self._one(
            _SQL["submit"],
            tenant_id,
            session_id,
            uuid7(),
            submission.request_id,
            submission.fingerprint,
            int(submission.concurrency),
            submission.timeout_ms,
            self._run_timeout_ms,
            orjson.dumps([[str(uuid7()), role, content] for role, content in submission.input]).decode(),
            submission.options,
            submission.model,
            title_of(submission.input),
            head.decode(),
            middle.decode(),
            tail.decode(),
            now_ms(),
            submission.claim_owner,
            timedelta(milliseconds=self._ttl_ms),
            MAX_IDLE_CLAIMS,
            MAX_CONTEXT_MESSAGES if history else 0,
            MAX_CONTEXT_BYTES,
            session_id=session_id,
        )
        run = run_of(row)
        created = Event(run.run_id, 1, "run.created", row["event_time_ms"], row["created_data"])
        claim = None
        if row["outcome"] == ClaimOutcome.CLAIMED:
            claim = self._claim_of(row, run)
        return Submitted(run, created, row["duplicate"], claim)

    @failpoints.around("session.claim")
    async def claim(self, run_id: UUID, owner: str, *, history: bool = True) -> Claim:
        """See the port. One round trip: `session.claim_run`.

        Raises:
            NotFoundError: RUN_NOT_FOUND.
        """
        row = await self._one(
            _SQL["claim"],
            run_id,
            owner,
            timedelta(milliseconds=self._ttl_ms),
            MAX_IDLE_CLAIMS,
            MAX_CONTEXT_MESSAGES if history else 0,
            MAX_CONTEXT_BYTES,
            CONTEXT_PAGE_BYTES,
            run_id=run_id,
        )
        return self._claim_of(row, run_of(row))

    async def read_context(self, run_id: UUID, fence: int, position: ContextPosition) -> RunContext:
        """See the port."""
        row = await self._fetchrow(
            _SQL["read_context"],
            run_id,
            fence,
            position.message,
            position.call,
            position.event,
            CONTEXT_PAGE_BYTES,
        )
        if row is None:
            raise AbortedError(
                "FENCE_STALE", "the run is another replica's now", metadata={"run_id": str(run_id)}
            )
        return context_page_of(row, run_id)

    def _claim_of(self, row: Record, run: Run) -> Claim:
        outcome = ClaimOutcome(row["outcome"])
        if outcome is not ClaimOutcome.CLAIMED:
            return Claim(outcome, run)
        return Claim(outcome, run, grant_of(row, run, self._ttl_ms), context_of(row["context"], run))

    async def get_run(self, tenant_id: UUID, run_id: UUID) -> Run:
        """See the port."""
        row = await self._fetchrow(_SQL["get_run"], tenant_id, run_id)
        if row is None:
            raise not_found("run", run_id)
        return run_of(row)

    async def accepted(self, tenant_id: UUID, request_id: str) -> bool:
        """See the port."""
        return bool((await self._one(_SQL["accepted"], tenant_id, request_id))["accepted"])

    async def list_runs(
        self, tenant_id: UUID, session_id: UUID, *, page_size: int, page_token: str
    ) -> Page[Run]:
        """See the port."""
        bound = (tenant_id, session_id)
        before = ordinal_at(read_page_token("ListRuns", bound, page_token), _LAST_ORDINAL)
        rows = await self._fetch(_SQL["list_runs"], tenant_id, session_id, before, page_size + 1)
        if not rows and await self._fetchrow(_SESSIONS["get_session"], tenant_id, session_id) is None:
            raise not_found("session", session_id)
        runs = [run_of(row) for row in rows[:page_size]]
        if len(rows) <= page_size:
            return Page(runs)
        return Page(runs, make_page_token("ListRuns", bound, str(runs[-1].ordinal)))

    async def runs_from(self, tenant_id: UUID, session_id: UUID, ordinal: int, limit: int) -> list[Run]:
        """See the port."""
        rows = await self._fetch(_SQL["runs_from"], tenant_id, session_id, ordinal, limit)
        return [run_of(row) for row in rows]

    @failpoints.around("session.cancel")
    async def cancel(self, tenant_id: UUID, run_id: UUID, reason: str) -> tuple[Run, Event | None]:
        """See the port."""
        row = await self._one(_SQL["cancel"], tenant_id, run_id, reason, run_id=run_id)
        run = run_of(row)
        if row["event_seq"] is None:
            return run, None
        return run, Event(run_id, row["event_seq"], "run.cancelled", row["event_time_ms"], row["event_data"])

    @failpoints.around("session.fail")
    async def fail_held(self, ref: LeaseRef, message: str) -> Run | None:
        """See the port."""
        row = await self._fetchrow(_SQL["fail_held"], ref.session_id, ref.run_id, ref.fence, message)
        return None if row is None else run_of(row)

    @failpoints.around("session.due")
    async def due(self, limit: int, *, again: bool = False) -> list[UUID]:
        """See the port."""
        ahead = DISPATCH_AGAIN if again else timedelta()
        return [row["run_id"] for row in await self._fetch(_SQL["due"], limit, DISPATCH_AGAIN, ahead)]

    async def queued(self) -> dict[UUID, int]:
        """See the port."""
        return {row["tenant_id"]: row["runs"] for row in await self._fetch(_SQL["queued"])}

    async def end_orphans(self, limit: int) -> int:
        """See the port."""
        row = await self._one(_SQL["end_orphans"], limit)
        ended: int = row[0]
        return ended

    async def last_ordinals(self, session_ids: Sequence[UUID]) -> dict[UUID, int]:
        """See the port."""
        rows = await self._fetch(_SQL["last_ordinals"], session_ids)
        return {row["session_id"]: row["run_count"] for row in rows}
