"""A fake of the session store, in memory, for unit tests only.

It keeps the port's rules on fences, seqs, idempotency and tenants, and nothing of PostgreSQL's: no
transactions, no locks, no SQL. `fail` makes the next writes fail; `gate` holds writes back.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from uuid import UUID

from meshkit.errors import AlreadyExistsError, InvalidArgumentError, NotFoundError, UnavailableError
from meshkit.ids import uuid7
from services.session.domain import (
    AppendOutcome,
    AppendResult,
    Claim,
    ClaimOutcome,
    Cut,
    Event,
    GoneSession,
    Grant,
    LeaseRef,
    Message,
    NewEvent,
    Page,
    Renewal,
    Run,
    RunAppend,
    RunContext,
    RunStatus,
    Session,
    Submission,
    Submitted,
    Tenant,
    TenantChange,
    ToolCall,
)

TTL_MS = 10_000


class Lease:
    """The lease row of a session."""

    def __init__(self) -> None:
        self.run_id: UUID | None = None
        self.fence = 0
        self.attach = 0
        self.next_seq = 0
        self.owner = ""
        self.until = 0.0


class FakeStore:
    """See the module."""

    refused: str | None = None

    def __init__(self) -> None:
        self.keys: dict[str, UUID] = {}
        self.tenants: dict[str, Tenant] = {}
        self.sessions: dict[UUID, Session] = {}
        self.runs: dict[UUID, Run] = {}
        self.events: dict[UUID, list[Event]] = defaultdict(list)
        self.leases: dict[UUID, Lease] = defaultdict(Lease)
        self.messages: dict[UUID, list[Message]] = defaultdict(list)
        self.requests: dict[tuple[UUID, str], tuple[bytes, UUID]] = {}
        self.shortened: list[tuple[list[LeaseRef], int]] = []
        self.shortened_event = asyncio.Event()
        self.shortened_claims: asyncio.Queue[tuple[str, int]] = asyncio.Queue()
        self.ended_former: asyncio.Queue[str] = asyncio.Queue()
        self.locked: set[UUID] = set()
        self.asked_again: list[bool] = []
        self.flushes: list[int] = []
        self.due_runs: list[UUID] = []
        self.queued_runs: dict[UUID, int] = {}
        self.orphans = 0
        self.reads = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.fail: list[Exception] = []
        self.fail_due: list[Exception] = []
        self.committed_then_fail: list[Exception] = []

    # Tenants

    def add_key(self, key: str) -> UUID:
        tenant_id = uuid7()
        self.keys[hashlib.sha256(key.encode()).hexdigest()] = tenant_id
        return tenant_id

    async def moved_tenants(self) -> frozenset[UUID]:
        return frozenset()

    async def tenant_of_key(self, key_hash: str) -> UUID | None:
        return self.keys.get(key_hash)

    async def ensure_key(self, tenant_name: str, key_hash: str, key_name: str) -> UUID:
        return self.keys.setdefault(key_hash, uuid7())

    async def get_tenant(self, name: str) -> Tenant | None:
        return self.tenants.get(name)

    async def set_tenant(self, name: str, change: TenantChange) -> Tenant | None:
        if name not in self.tenants:
            return None
        changed = {field: value for field, value in asdict(change).items() if value is not None}
        self.tenants[name] = replace(self.tenants[name], **changed)
        return self.tenants[name]

    # Conversations

    async def create_session(
        self,
        tenant_id: UUID,
        *,
        title: str,
        metadata: dict[str, str],
        agent: str,
        user: str,
        request_id: str,
        fingerprint: bytes,
    ) -> Session:
        known = self.requests.get((tenant_id, request_id)) if request_id else None
        if known is not None:
            if known[0] != fingerprint:
                raise AlreadyExistsError("REQUEST_ID_REUSED", "the request id was used with another body")
            return self.sessions[known[1]]
        session = Session(uuid7(), tenant_id, title, metadata, agent, user, 1, 1, None, 0)
        self.sessions[session.session_id] = session
        if request_id:
            self.requests[tenant_id, request_id] = (fingerprint, session.session_id)
        return session

    async def get_session(self, tenant_id: UUID, session_id: UUID) -> Session:
        session = self.sessions.get(session_id)
        if session is None or session.tenant_id != tenant_id:
            raise NotFoundError("SESSION_NOT_FOUND", "no such session")
        return session

    async def delete_session(self, tenant_id: UUID, session_id: UUID) -> list[ToolCall]:
        await self.get_session(tenant_id, session_id)
        del self.sessions[session_id]
        for run in [run for run in self.runs.values() if run.session_id == session_id]:
            del self.runs[run.run_id]
            self.events.pop(run.run_id, None)
        self.leases.pop(session_id, None)
        return []

    # Runs

    async def submit(self, tenant_id: UUID, submission: Submission, *, history: bool = True) -> Submitted:
        await self.get_session(tenant_id, submission.session_id)
        key = (tenant_id, submission.request_id)
        known = self.requests.get(key) if submission.request_id else None
        if known is not None:
            if known[0] != submission.fingerprint:
                raise AlreadyExistsError("REQUEST_ID_REUSED", "the request id was used with another body")
            return Submitted(self.runs[known[1]], self.events[known[1]][0], True)
        ordinal = 1 + sum(1 for run in self.runs.values() if run.session_id == submission.session_id)
        run = Run(
            uuid7(),
            submission.session_id,
            tenant_id,
            ordinal,
            RunStatus.QUEUED,
            submission.model,
            0,
            1,
            None,
            None,
            1,
            0,
            False,
            "",
            submission.options,
        )
        self.runs[run.run_id] = run
        data = json.dumps({"session_id": str(run.session_id), "ordinal": ordinal})
        created = Event(run.run_id, 1, "run.created", 1, data)
        self.events[run.run_id].append(created)
        if submission.request_id:
            self.requests[key] = (submission.fingerprint, run.run_id)
        claim = None
        if submission.claim_owner:
            claim = await self.claim(run.run_id, submission.claim_owner)
            if claim.outcome is not ClaimOutcome.CLAIMED:
                claim = None
        return Submitted(self.runs[run.run_id], created, False, claim)

    async def claim(self, run_id: UUID, owner: str, *, history: bool = True) -> Claim:
        run = self.runs[run_id]
        if run.status.terminal:
            return Claim(ClaimOutcome.FINISHED, run)
        lease = self.leases[run.session_id]
        if lease.owner and lease.until > time.monotonic():
            return Claim(ClaimOutcome.ALREADY_CLAIMED, run)
        lease.run_id, lease.owner, lease.fence, lease.attach = run_id, owner, lease.fence + 1, 0
        lease.next_seq = len(self.events[run_id]) + 1
        lease.until = time.monotonic() + TTL_MS / 1000
        run = self.runs[run_id] = replace(run, status=RunStatus.RUNNING, attempt=run.attempt + 1)
        grant = Grant(run.session_id, run_id, lease.fence, 0, lease.next_seq, TTL_MS)
        return Claim(ClaimOutcome.CLAIMED, run, grant, RunContext((), (), (), "", ""))

    async def get_run(self, tenant_id: UUID, run_id: UUID) -> Run:
        run = self.runs.get(run_id)
        if run is None or run.tenant_id != tenant_id:
            raise NotFoundError("RUN_NOT_FOUND", "no such run")
        return replace(run, last_seq=len(self.events[run_id]))

    async def accepted(self, tenant_id: UUID, request_id: str) -> bool:
        return (tenant_id, request_id) in self.requests

    async def list_runs(
        self, tenant_id: UUID, session_id: UUID, *, page_size: int, page_token: str
    ) -> Page[Run]:
        await self.get_session(tenant_id, session_id)
        found = [run for run in self.runs.values() if run.session_id == session_id]
        found.sort(key=lambda run: -run.ordinal)
        start = int(page_token or 0)
        end = start + page_size
        return Page(found[start:end], str(end) if end < len(found) else "")

    async def runs_from(self, tenant_id: UUID, session_id: UUID, ordinal: int, limit: int) -> list[Run]:
        found = [
            await self.get_run(tenant_id, run.run_id)
            for run in list(self.runs.values())
            if run.session_id == session_id and run.ordinal >= ordinal
        ]
        return sorted(found, key=lambda run: run.ordinal)[:limit]

    async def cancel(self, tenant_id: UUID, run_id: UUID, reason: str) -> tuple[Run, Event | None]:
        run = await self.get_run(tenant_id, run_id)
        if run.status.terminal:
            return run, None
        if self.leases[run.session_id].run_id == run_id:
            self.runs[run_id] = replace(run, cancel_requested=True)
            return self.runs[run_id], None
        event = self.log(run_id, "run.cancelled", json.dumps({"reason": reason}))
        self.runs[run_id] = replace(run, status=RunStatus.CANCELLED)
        return await self.get_run(tenant_id, run_id), event

    async def due(self, limit: int, *, again: bool = False) -> list[UUID]:
        self.asked_again.append(again)
        if self.fail_due:
            raise self.fail_due.pop(0)
        taken, self.due_runs = self.due_runs[:limit], self.due_runs[limit:]
        return taken

    async def queued(self) -> dict[UUID, int]:
        if self.fail_due:
            raise self.fail_due.pop(0)
        return dict(self.queued_runs)

    async def end_orphans(self, limit: int) -> int:
        if self.fail_due:
            raise self.fail_due.pop(0)
        ended, self.orphans = min(limit, self.orphans), max(0, self.orphans - limit)
        return ended

    # Log

    def log(self, run_id: UUID, kind: str, data: str = "{}") -> Event:
        """Adds an event past all rules."""
        event = Event(run_id, len(self.events[run_id]) + 1, kind, 1, data)
        self.events[run_id].append(event)
        return event

    def _write(self, append: RunAppend) -> AppendResult:
        lease = self.leases[append.session_id]
        if lease.run_id != append.run_id or lease.fence != append.fence:
            return AppendResult(append.run_id, append.first_seq, AppendOutcome.FENCED, lease.next_seq)
        if lease.next_seq != append.first_seq:
            return AppendResult(append.run_id, append.first_seq, AppendOutcome.GAP, lease.next_seq)
        for seq, event in enumerate(append.events, start=append.first_seq):
            self.events[append.run_id].append(
                Event(append.run_id, seq, event.type, event.time_ms, event.data)
            )
        lease.next_seq += len(append.events)
        if append.commit is not None and append.commit.status is not None:
            self.runs[append.run_id] = replace(self.runs[append.run_id], status=append.commit.status)
            lease.owner, lease.run_id = "", None
        return AppendResult(append.run_id, append.first_seq, AppendOutcome.COMMITTED, lease.next_seq)

    async def append(self, appends: Sequence[RunAppend]) -> list[AppendResult]:
        await self.gate.wait()
        assert len({append.session_id for append in appends}) == len(appends)
        self.flushes.append(len(appends))
        if self.fail:
            raise self.fail.pop(0)
        if any("\x00" in event.data for append in appends for event in append.events):
            raise InvalidArgumentError("INVALID_ARGUMENT", "a text holds a character that cannot be stored")
        results = [
            AppendResult(append.run_id, append.first_seq, AppendOutcome.RETRY, 0)
            if append.run_id in self.locked
            else self._write(append)
            for append in appends
        ]
        if self.committed_then_fail:
            raise self.committed_then_fail.pop(0)
        return results

    async def append_step(self, append: RunAppend) -> AppendResult:
        await self.gate.wait()
        if self.fail:
            raise self.fail.pop(0)
        if append.run_id in self.locked:
            return AppendResult(append.run_id, append.first_seq, AppendOutcome.RETRY, 0)
        return self._write(append)

    async def reattach(self, ref: LeaseRef, owner: str) -> Grant | None:
        if self.fail:
            raise self.fail.pop(0)
        lease = self.leases[ref.session_id]
        if lease.run_id != ref.run_id or lease.fence != ref.fence:
            return None
        lease.fence += 1
        lease.attach += 1
        lease.owner = owner
        return Grant(ref.session_id, ref.run_id, lease.fence, lease.attach, lease.next_seq, TTL_MS)

    async def renew(self, refs: Sequence[LeaseRef], owner: str = "") -> Renewal:
        lost = [ref.run_id for ref in refs if self.leases[ref.session_id].fence != ref.fence]
        cancelled = [ref.run_id for ref in refs if self.runs[ref.run_id].cancel_requested]
        return Renewal(lost, cancelled)

    async def release(self, ref: LeaseRef, owner: str = "") -> bool:
        lease = self.leases[ref.session_id]
        if lease.fence != ref.fence:
            return False
        lease.owner, lease.run_id = "", None
        return True

    async def fail_held(self, ref: LeaseRef, message: str) -> Run | None:
        lease = self.leases[ref.session_id]
        if lease.run_id != ref.run_id or lease.fence != ref.fence:
            return None
        lease.owner, lease.run_id, lease.fence = "", None, lease.fence + 1
        events = self.events[ref.run_id]
        events.append(Event(ref.run_id, len(events) + 1, "run.failed", 1, json.dumps({"message": message})))
        failed = replace(self.runs[ref.run_id], status=RunStatus.FAILED, last_seq=len(events))
        self.runs[ref.run_id] = failed
        return failed

    async def shorten(self, refs: Sequence[LeaseRef], grace_ms: int) -> set[UUID]:
        if self.fail:
            raise self.fail.pop(0)
        self.shortened.append((list(refs), grace_ms))
        self.shortened_event.set()
        return {ref.run_id for ref in refs} - self.locked

    async def shorten_claims(self, owner: str, grace_ms: int, age_ms: int = 0) -> Cut:
        if self.fail:
            raise self.fail.pop(0)
        self.shortened_claims.put_nowait((owner, grace_ms))
        return Cut()

    async def end_former(self, owner: str) -> Cut:
        if self.fail:
            raise self.fail.pop(0)
        self.ended_former.put_nowait(owner)
        return Cut(1)

    async def leases_of(self, owner: str) -> list[LeaseRef]:
        return [
            LeaseRef(session_id, lease.run_id, lease.fence, lease.attach)
            for session_id, lease in self.leases.items()
            if lease.owner == owner and lease.run_id
        ]

    async def lost_leases(self, refs: Sequence[LeaseRef], owner: str = "") -> set[UUID]:
        if self.fail:
            raise self.fail.pop(0)
        kept = {(lease.run_id, lease.fence) for lease in self.leases.values() if lease.owner and lease.run_id}
        return {ref.run_id for ref in refs if (ref.run_id, ref.fence) not in kept}

    async def fences(self, session_ids: Sequence[UUID]) -> dict[UUID, int]:
        return {key: self.leases[key].fence for key in session_ids if key in self.leases}

    async def events_after(self, tenant_id: UUID, run_id: UUID, seq: int, limit: int) -> list[Event]:
        self.reads += 1
        await asyncio.sleep(0)
        return self.events[run_id][seq : seq + limit] if run_id in self.events else []

    async def heads(self, run_ids: Sequence[UUID]) -> dict[UUID, int]:
        return {key: len(self.events[key]) for key in run_ids if key in self.runs}

    async def last_ordinals(self, session_ids: Sequence[UUID]) -> dict[UUID, int]:
        return {
            key: max((run.ordinal for run in self.runs.values() if run.session_id == key), default=0)
            for key in session_ids
            if key in self.sessions
        }

    async def waiting_calls(self, tenant_id: UUID, run_id: UUID) -> list[ToolCall]:
        await self.get_run(tenant_id, run_id)
        return []

    async def synchronous(self) -> bool:
        return False

    async def confirm(self) -> None:
        pass

    async def maintain(self) -> None:
        pass

    async def take_gone(self, limit: int, *, grace_seconds: float, retry_seconds: float) -> list[GoneSession]:
        return []

    async def count_gone(self) -> int:
        return 0


def text(word: str) -> NewEvent:
    """A text.delta event."""
    return NewEvent("text.delta", 1, json.dumps({"text": word}))


def unavailable() -> UnavailableError:
    """What the store raises when PostgreSQL does not answer."""
    return UnavailableError("DATABASE_UNAVAILABLE", "the database does not answer")
