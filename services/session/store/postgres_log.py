"""The event log and its leases in PostgreSQL."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from uuid import UUID

import asyncpg

from meshkit import failpoints
from meshkit.errors import InvalidArgumentError, OutOfRangeError, UnavailableError
from meshkit.postgres import load_sql
from services.session.domain import (
    AppendOutcome,
    AppendResult,
    Cut,
    Event,
    Grant,
    LeaseRef,
    Renewal,
    RunAppend,
    StepCommit,
)
from services.session.store.port import PAGE_BYTES
from services.session.store.postgres_base import PostgresPart, Record, not_found
from services.session.store.rows import error_json, intents_json, messages_json

_SQL = load_sql("services.session.store.sql", "log.sql")
_RUNS = load_sql("services.session.store.sql", "runs.sql")

_NO_COMMIT = StepCommit()


def _cut(rows: Sequence[Record]) -> Cut:
    cut = sum(row["cut"] for row in rows)
    return Cut(cut, len(rows) - cut)


class PostgresLog(PostgresPart):
    """See `port.Log`."""

    @failpoints.around("session.append")
    async def append(self, appends: Sequence[RunAppend]) -> list[AppendResult]:
        """See the port."""
        sessions = [append.session_id for append in appends]
        if len(set(sessions)) != len(sessions):
            raise InvalidArgumentError(message="the sessions of one append must be distinct")
        if not appends:
            return []
        arrays = (
            sessions,
            [append.run_id for append in appends],
            [append.fence for append in appends],
            [append.first_seq for append in appends],
            [len(append.events) for append in appends],
        )
        places: list[int] = []
        seqs: list[int] = []
        types: list[str] = []
        times: list[int] = []
        data: list[str] = []
        for place, append in enumerate(appends, start=1):
            for seq, event in enumerate(append.events, start=append.first_seq):
                places.append(place)
                seqs.append(seq)
                types.append(event.type)
                times.append(event.time_ms)
                data.append(event.data)
        rows = await self._fetch(_SQL["append"], *arrays, places, seqs, types, times, data)
        results = [
            AppendResult(
                append.run_id,
                append.first_seq,
                AppendOutcome.COMMITTED,
                append.first_seq + len(append.events),
            )
            for append in appends
        ]
        if len(rows) < len(appends):
            won = {row["i"] for row in rows}
            await self._explain(appends, [i for i in range(len(appends)) if i + 1 not in won], results)
        return results

    async def _explain(
        self, appends: Sequence[RunAppend], places: Sequence[int], results: list[AppendResult]
    ) -> None:
        """Replaces the results at `places` by why they were refused."""
        refused = [appends[place] for place in places]
        rows = await self._fetch(
            _SQL["refusals"],
            [append.session_id for append in refused],
            [append.run_id for append in refused],
            [append.fence for append in refused],
            [append.first_seq for append in refused],
            [len(append.events) for append in refused],
        )
        for place, append, row in zip(places, refused, rows, strict=True):
            results[place] = AppendResult(
                append.run_id, append.first_seq, AppendOutcome(row["outcome"]), row["next_seq"]
            )

    @failpoints.around("session.step")
    async def append_step(self, append: RunAppend) -> AppendResult:
        """See the port. One round trip: `session.append_step`."""
        commit = append.commit or _NO_COMMIT
        usage = commit.usage
        try:
            row = await self._one(
                _SQL["append_step"],
                append.session_id,
                append.run_id,
                append.fence,
                append.first_seq,
                [event.type for event in append.events],
                [event.time_ms for event in append.events],
                [event.data for event in append.events],
                messages_json(commit.messages),
                intents_json(commit.intents),
                None if commit.status is None else int(commit.status),
                error_json(commit.error),
                None if usage is None else usage.input_tokens,
                None if usage is None else usage.output_tokens,
                None if usage is None else usage.cached_tokens,
            )
        except UnavailableError as error:
            if isinstance(error.__cause__, asyncpg.LockNotAvailableError):
                return AppendResult(append.run_id, append.first_seq, AppendOutcome.RETRY, 0)
            raise
        return AppendResult(append.run_id, append.first_seq, AppendOutcome(row["outcome"]), row["next_seq"])

    @failpoints.around("session.reattach")
    async def reattach(self, ref: LeaseRef, owner: str) -> Grant | None:
        """See the port."""
        row = await self._fetchrow(
            _SQL["reattach"],
            ref.session_id,
            ref.run_id,
            ref.fence,
            owner,
            timedelta(milliseconds=self._ttl_ms),
        )
        if row is None:
            return None
        return Grant(ref.session_id, ref.run_id, row["fence"], row["attach"], row["next_seq"], self._ttl_ms)

    @failpoints.around("session.renew")
    async def renew(self, refs: Sequence[LeaseRef], owner: str = "") -> Renewal:
        """See the port."""
        if not refs:
            return Renewal()
        rows = await self._fetch(
            _SQL["renew"],
            [ref.session_id for ref in refs],
            [ref.run_id for ref in refs],
            [ref.fence for ref in refs],
            timedelta(milliseconds=self._ttl_ms),
            owner,
        )
        kept = {row["run_id"] for row in rows}
        others = [ref for ref in refs if ref.run_id not in kept]
        # A lease that somebody has locked at this moment is neither renewed nor lost.
        lost = await self.lost_leases(others, owner) if others else set()
        return Renewal(
            lost=[ref.run_id for ref in others if ref.run_id in lost],
            cancelled=[row["run_id"] for row in rows if row["cancel_requested"]],
            busy=[ref.run_id for ref in others if ref.run_id not in lost],
        )

    @failpoints.around("session.release")
    async def release(self, ref: LeaseRef, owner: str = "") -> bool:
        """See the port."""
        row = await self._fetchrow(_SQL["release"], ref.session_id, ref.run_id, ref.fence, owner)
        return row is not None

    @failpoints.around("session.shorten")
    async def shorten(self, refs: Sequence[LeaseRef], grace_ms: int) -> set[UUID]:
        """See the port."""
        if not refs:
            return set()
        rows = await self._fetch(
            _SQL["shorten"],
            [ref.session_id for ref in refs],
            [ref.run_id for ref in refs],
            [ref.fence for ref in refs],
            [ref.attach for ref in refs],
            timedelta(milliseconds=grace_ms),
        )
        return {row["run_id"] for row in rows}

    async def shorten_claims(self, owner: str, grace_ms: int, age_ms: int = 0) -> Cut:
        """See the port."""
        grace, age = timedelta(milliseconds=grace_ms), timedelta(milliseconds=age_ms)
        return _cut(await self._fetch(_SQL["shorten_claims"], owner, grace, age))

    async def end_former(self, owner: str) -> Cut:
        """See the port."""
        return _cut(await self._fetch(_SQL["end_former"], owner))

    async def leases_of(self, owner: str) -> list[LeaseRef]:
        """See the port."""
        rows = await self._fetch(_SQL["leases_of"], owner)
        return [LeaseRef(row["session_id"], row["run_id"], row["fence"], row["attach"]) for row in rows]

    async def lost_leases(self, refs: Sequence[LeaseRef], owner: str = "") -> set[UUID]:
        """See the port."""
        rows = await self._fetch(
            _SQL["lost_leases"],
            [ref.session_id for ref in refs],
            [ref.run_id for ref in refs],
            [ref.fence for ref in refs],
            owner,
        )
        return {row["run_id"] for row in rows}

    async def fences(self, session_ids: Sequence[UUID]) -> dict[UUID, int]:
        """See the port."""
        rows = await self._fetch(_SQL["fences"], session_ids)
        return {row["session_id"]: row["fence"] for row in rows}

    async def events_after(self, tenant_id: UUID, run_id: UUID, seq: int, limit: int) -> list[Event]:
        """See the port.

        Raises:
            NotFoundError: RUN_NOT_FOUND.
        """
        rows: list[Record] | None = None
        if self._standby is not None:
            rows = await self._standby.events_after(tenant_id, run_id, seq, limit)
        if rows is None:
            rows = await self._fetch(_SQL["events_after"], tenant_id, run_id, seq, limit, PAGE_BYTES)
        if rows:
            # Readers are shown nothing that a failover could take back.
            await self.confirm()
        if rows and rows[0]["seq"] == seq + 1:
            return [Event(run_id, *row) for row in rows]
        # Nothing that follows the cursor: either it is the end of the log, or older events are gone.
        run = await self._fetchrow(_RUNS["get_run"], tenant_id, run_id)
        if run is None:
            raise not_found("run", run_id)
        if not rows:
            rows = await self._fetch(_SQL["events_after"], tenant_id, run_id, seq, limit, PAGE_BYTES)
            await self.confirm()
        if (rows and rows[0]["seq"] != seq + 1) or (not rows and run["last_seq"] > seq):
            raise OutOfRangeError(
                "CURSOR_EXPIRED",
                "the events after this cursor are older than what is kept",
                metadata={"run_id": str(run_id), "after_seq": str(seq)},
            )
        return [Event(run_id, *row) for row in rows]

    async def heads(self, run_ids: Sequence[UUID]) -> dict[UUID, int]:
        """See the port."""
        rows = await self._fetch(_SQL["heads"], run_ids)
        return {row["run_id"]: row["last_seq"] for row in rows}
