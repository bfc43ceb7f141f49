"""What the store's tests share: short ways to submit, append and look."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import UUID

import asyncpg

from meshkit.clock import now_ms
from meshkit.ids import uuid7
from services.session.domain import (
    ActionDecision,
    AppendOutcome,
    AppendResult,
    Claim,
    ClaimOutcome,
    ConcurrencyPolicy,
    EffectClass,
    Event,
    Grant,
    LeaseRef,
    NewEvent,
    NewMessage,
    NewToolCall,
    Run,
    RunAppend,
    RunError,
    RunStatus,
    Session,
    StepCommit,
    Submission,
    Submitted,
    ToolCall,
    Usage,
)
from services.session.operations.resolve import resolve
from services.session.store.postgres import PostgresStore
from services.session.store.rows import tool_call_of


def event(kind: str = "text.delta", data: str = '{"text":"x"}') -> NewEvent:
    return NewEvent(kind, now_ms(), data)


def ref(grant: Grant) -> LeaseRef:
    return LeaseRef(grant.session_id, grant.run_id, grant.fence, grant.attach)


@dataclass
class Kit:
    """A store, a tenant of its own, and the raw pool to look behind the store."""

    store: PostgresStore
    tenant: UUID
    pool: asyncpg.Pool[asyncpg.Record]

    async def session(self, **fields: Any) -> Session:
        values: dict[str, Any] = {
            "title": "",
            "metadata": {},
            "agent": "",
            "user": "",
            "request_id": "",
            "fingerprint": b"",
        }
        return await self.store.create_session(self.tenant, **{**values, **fields})

    async def submit(
        self,
        session_id: UUID,
        *texts: str,
        owner: str = "",
        request_id: str = "",
        fingerprint: bytes = b"",
        policy: ConcurrencyPolicy = ConcurrencyPolicy.DEFAULT,
        timeout_ms: int = 0,
    ) -> Submitted:
        return await self.store.submit(
            self.tenant,
            Submission(
                session_id=session_id,
                input=[("user", text) for text in texts or ("hello",)],
                options=b"\x01\x00",
                model="m",
                request_id=request_id,
                fingerprint=fingerprint,
                concurrency=policy,
                claim_owner=owner,
                timeout_ms=timeout_ms,
            ),
        )

    async def started(self, owner: str = "a", *texts: str) -> Grant:
        """A run that `owner` holds, in a session of its own."""
        session = await self.session()
        submitted = await self.submit(session.session_id, *texts, owner=owner)
        assert submitted.claim is not None
        assert submitted.claim.grant is not None
        return submitted.claim.grant

    async def claimed(self, run_id: UUID, owner: str = "a") -> Claim:
        claim = await self.store.claim(run_id, owner)
        assert claim.outcome is ClaimOutcome.CLAIMED, claim.outcome
        assert claim.grant is not None
        assert claim.context is not None
        return claim

    async def append(self, grant: Grant, seq: int, *events: NewEvent, fence: int = 0) -> AppendResult:
        append = RunAppend(
            grant.session_id, grant.run_id, fence or grant.fence, seq, list(events or (event(),))
        )
        return (await self.store.append([append]))[0]

    async def step(
        self,
        grant: Grant,
        seq: int,
        *events: NewEvent,
        messages: tuple[NewMessage, ...] = (),
        intents: tuple[NewToolCall, ...] = (),
        status: RunStatus | None = None,
        error: RunError | None = None,
        usage: Usage | None = None,
    ) -> AppendResult:
        commit = StepCommit(messages, intents, status, error, usage)
        return await self.store.append_step(
            RunAppend(grant.session_id, grant.run_id, grant.fence, seq, list(events), commit)
        )

    async def finish(self, grant: Grant, seq: int, reply: str = "done") -> AppendResult:
        result = await self.step(
            grant,
            seq,
            event("run.completed", "{}"),
            messages=(NewMessage(uuid7(), "assistant", reply),),
            status=RunStatus.COMPLETED,
            usage=Usage(1, 2, 3),
        )
        assert result.outcome is AppendOutcome.COMMITTED
        return result

    async def calls(self, run_id: UUID) -> list[ToolCall]:
        """All of a run's calls, as the journal has them."""
        rows = await self.pool.fetch(
            "SELECT c.*, session.quiet_in_ms(c.quiet_at) AS quiet_in_ms FROM session.tool_call c"
            " WHERE run_id = $1 ORDER BY position",
            run_id,
        )
        return [tool_call_of(row) for row in rows]

    async def log(self, run_id: UUID) -> list[Event]:
        return await self.store.events_after(self.tenant, run_id, 0, 10_000)

    async def types(self, run_id: UUID) -> list[str]:
        """The run's event types, after a check that its seqs have no gap."""
        events = await self.log(run_id)
        assert [e.seq for e in events] == list(range(1, len(events) + 1))
        return [e.type for e in events]

    async def messages(self, session_id: UUID) -> list[tuple[int, str, str]]:
        page = await self.store.list_messages(self.tenant, session_id, page_size=500, page_token="")
        return [(m.ordinal, m.role, m.content) for m in page.items]

    async def resolve(
        self,
        run_id: UUID,
        call_id: str,
        decision: ActionDecision = ActionDecision.COMPLETED,
        content: str = "",
        *,
        request_id: str = "",
    ) -> tuple[Run, ToolCall]:
        """A person's word, as the service hands it on."""
        return await resolve(self.store, self.tenant, run_id, call_id, decision, content, request_id)

    async def expire(self, session_id: UUID) -> None:
        """Ends the TTL of a session's lease."""
        await self.pool.execute(
            "UPDATE session.lease SET lease_until = clock_timestamp() - interval '1 ms'"
            " WHERE session_id = $1",
            session_id,
        )

    async def run_out(self, run_id: UUID) -> None:
        """Uses up a run's time; it stays used up while the run waits for a person."""
        await self.pool.execute(
            "UPDATE session.run SET left_ms = 0, deadline = CASE WHEN deadline IS NOT NULL"
            " THEN clock_timestamp() - interval '1 ms' END WHERE run_id = $1",
            run_id,
        )

    async def time_left(self, run_id: UUID) -> int:
        """Milliseconds that a run has left; they stand still where it has no deadline."""
        left: int = await self.pool.fetchval(
            "SELECT time_left_ms FROM session.run_view WHERE run_id = $1", run_id
        )
        return left

    async def clock_runs(self, run_id: UUID) -> bool:
        """Whether a run's time passes."""
        runs: bool = await self.pool.fetchval(
            "SELECT deadline IS NOT NULL FROM session.run WHERE run_id = $1", run_id
        )
        return runs

    async def make_due(self) -> None:
        """Ends the wait of runs that were handed out for dispatch."""
        await self.pool.execute("UPDATE session.run SET dispatch_after = now() WHERE dispatch_after > now()")

    async def due(self) -> set[UUID]:
        """This tenant's due runs; takes those of all tenants."""
        found = await self.store.due(10_000)
        rows = await self.pool.fetch(
            "SELECT run_id FROM session.run WHERE run_id = ANY($1::uuid[]) AND tenant_id = $2",
            found,
            self.tenant,
        )
        return {row["run_id"] for row in rows}


def intent(
    run_id: UUID,
    index: int = 0,
    effect: EffectClass = EffectClass.NON_IDEMPOTENT,
    *,
    needs_approval: bool = False,
) -> NewToolCall:
    call_id = f"{run_id}:1:{index}"
    return NewToolCall(call_id, "tool", '{"a":1}', effect, f"key-{call_id}", needs_approval)
