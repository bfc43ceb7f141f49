"""Everything at once on a few sessions: no deadlock, no lost message, nothing that cannot be finished."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from uuid import UUID

from meshkit.errors import FailedPreconditionError, NotFoundError
from meshkit.ids import uuid7
from services.session.domain import (
    AppendOutcome,
    ClaimOutcome,
    ConcurrencyPolicy,
    Grant,
    NewMessage,
    RunStatus,
    ToolCallState,
)
from tests.integration.session.store.kit import Kit, event, intent, ref

SESSIONS = 4
ROUNDS = 200
AGENTS = 4
POLICIES = [ConcurrencyPolicy.ENQUEUE] * 6 + list(ConcurrencyPolicy)


class Storm:
    """Clients, agents and sweepers on the same sessions; agents at times die without a word."""

    def __init__(self, kit: Kit, sessions: list[UUID], seed: int) -> None:
        self.kit = kit
        self.sessions = sessions
        self.random = random.Random(seed)
        self.accepted: list[UUID] = []
        self.done = asyncio.Event()
        self.counts: Counter[str] = Counter()

    async def client(self) -> None:
        kit, pick = self.kit, self.random
        for _ in range(ROUNDS):
            session_id = pick.choice(self.sessions)
            try:
                submitted = await kit.submit(
                    session_id, owner=pick.choice(["", "c"]), policy=pick.choice(POLICIES)
                )
                self.accepted.append(submitted.run.run_id)
                if submitted.claim is not None and submitted.claim.grant is not None:
                    await self.work(submitted.claim.grant, submitted.claim.grant.next_seq)
            except FailedPreconditionError:
                self.counts["busy"] += 1
            action = pick.random()
            if action < 0.15 and self.accepted:
                await kit.store.cancel(kit.tenant, pick.choice(self.accepted), "x")
            elif action < 0.3:
                await kit.store.update_session(kit.tenant, session_id, title="t", metadata={"a": "b"})
            elif action < 0.4:
                await kit.expire(session_id)
            elif action < 0.5:
                await self.settle(pick.choice(self.accepted))

    async def settle(self, run_id: UUID) -> None:
        kit = self.kit
        for call in await kit.calls(run_id):
            try:
                await kit.resolve(run_id, call.call_id, content="ok")
                self.counts["resolved"] += 1
            except FailedPreconditionError:
                pass

    async def agent(self, name: str) -> None:
        while not self.done.is_set():
            await self.kit.make_due()
            for run_id in await self.kit.store.due(3):
                await self.take(run_id, name)

    async def take(self, run_id: UUID, name: str) -> None:
        try:
            claim = await self.kit.store.claim(run_id, name)
        except NotFoundError:
            return
        self.counts[claim.outcome.name] += 1
        if claim.outcome is ClaimOutcome.CLAIMED:
            assert claim.grant is not None
            await self.work(claim.grant, claim.grant.next_seq)

    async def work(self, grant: Grant, seq: int) -> None:
        """Writes like an agent that may be cut short anywhere."""
        kit, pick = self.kit, self.random
        while True:
            action = pick.random()
            if action < 0.35:
                result = await kit.append(grant, seq)
            elif action < 0.5:
                result = await kit.step(
                    grant, seq, event(), messages=(NewMessage(uuid7(), "assistant", "x"),)
                )
            elif action < 0.6:
                call = intent(grant.run_id, seq)
                result = await kit.step(grant, seq, event(), intents=(call,))
                if result.outcome is AppendOutcome.COMMITTED:
                    await kit.store.begin(call.call_id, grant.session_id, grant.fence)
                    if pick.random() < 0.7:
                        state = pick.choice([ToolCallState.COMPLETED, ToolCallState.UNKNOWN])
                        await kit.store.complete(call.call_id, grant.fence, state, "ok", "")
            elif action < 0.7:
                again = await kit.store.reattach(ref(grant), "c")
                if again is None:
                    return
                assert again.next_seq == seq
                grant = again
                continue
            elif action < 0.75:
                await kit.store.renew([ref(grant)])
                continue
            elif action < 0.8:
                await kit.store.release(ref(grant))
                return
            elif action < 0.85:
                await kit.expire(grant.session_id)
                return
            else:
                status = pick.choice([RunStatus.COMPLETED, RunStatus.FAILED, RunStatus.REQUIRES_ACTION])
                kinds = {
                    RunStatus.COMPLETED: "run.completed",
                    RunStatus.FAILED: "run.failed",
                    RunStatus.REQUIRES_ACTION: "action.required",
                }
                parks = status is RunStatus.REQUIRES_ACTION
                intents = (intent(grant.run_id, seq, needs_approval=True),) if parks else ()
                await kit.step(grant, seq, event(kinds[status], "{}"), intents=intents, status=status)
                return
            if result.outcome is AppendOutcome.RETRY:
                continue
            if result.outcome is not AppendOutcome.COMMITTED:
                assert result.outcome is AppendOutcome.FENCED
                return
            seq = result.next_seq

    async def finish(self) -> None:
        """Ends whatever is left: every run can be brought to its end."""
        kit = self.kit
        while True:
            unfinished = [
                run
                for session_id in self.sessions
                for run in await kit.store.runs_from(kit.tenant, session_id, 1, 10_000)
                if not run.status.terminal
            ]
            if not unfinished:
                return
            for run in unfinished:
                if run.status is RunStatus.REQUIRES_ACTION:
                    await self.settle(run.run_id)
            for session_id in self.sessions:
                await kit.expire(session_id)
            await kit.make_due()
            due = await kit.due()
            assert due, "runs are left and none of them is due"
            for run_id in due:
                claim = await kit.store.claim(run_id, "last")
                if claim.outcome is ClaimOutcome.CLAIMED:
                    assert claim.grant is not None
                    await kit.finish(claim.grant, claim.grant.next_seq)


async def test_a_storm_of_everything_keeps_every_log_and_conversation_whole(kit: Kit) -> None:
    sessions = [(await kit.session()).session_id for _ in range(SESSIONS)]
    storm = Storm(kit, sessions, seed=11)
    async with asyncio.timeout(90):
        async with asyncio.TaskGroup() as agents:
            for n in range(AGENTS):
                agents.create_task(storm.agent(f"a{n}"))
            async with asyncio.TaskGroup() as clients:
                for _ in range(3):
                    clients.create_task(storm.client())
            storm.done.set()
        await storm.finish()
    assert storm.counts["CLAIMED"] > 20, storm.counts
    for session_id in sessions:
        runs = await kit.store.runs_from(kit.tenant, session_id, 1, 10_000)
        assert [run.ordinal for run in runs] == list(range(1, len(runs) + 1))
        for run in runs:
            types = await kit.types(run.run_id)
            assert len(types) == run.last_seq
            terminals = [kind for kind in types if kind in {"run.completed", "run.failed", "run.cancelled"}]
            assert terminals == types[-1:]
        messages = await kit.messages(session_id)
        assert [ordinal for ordinal, _, _ in messages] == list(range(1, len(messages) + 1))
        session = await kit.store.get_session(kit.tenant, session_id)
        assert session.message_count == len(messages)
        assert session.active_run_id is None
    assert len(storm.accepted) == sum(
        [len(await kit.store.runs_from(kit.tenant, session_id, 1, 10_000)) for session_id in sessions]
    )
    fences = await kit.pool.fetch(
        "SELECT array_agg(fence ORDER BY seq) fences FROM session.event WHERE session_id = ANY($1)"
        " GROUP BY run_id",
        sessions,
    )
    assert all(row["fences"] == sorted(row["fences"]) for row in fences)
