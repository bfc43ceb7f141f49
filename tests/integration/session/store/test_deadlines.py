"""A run's time limit: from its first claim on, by PostgreSQL's clock, whoever holds it, if anyone does."""

from __future__ import annotations

import asyncio
import json

import pytest

from services.session.domain import (
    AppendOutcome,
    ClaimOutcome,
    ConcurrencyPolicy,
    Grant,
    RunStatus,
)
from tests.integration.session.store.kit import Kit, event, intent, ref


async def started(kit: Kit, timeout_ms: int, owner: str = "a") -> Grant:
    session = await kit.session()
    submitted = await kit.submit(session.session_id, owner=owner, timeout_ms=timeout_ms)
    assert submitted.claim is not None
    assert submitted.claim.grant is not None
    return submitted.claim.grant


async def park(kit: Kit, grant: Grant, seq: int = 2) -> str:
    """Lets a run wait for a person; returns the call that it waits for."""
    asked = intent(grant.run_id, seq, needs_approval=True)
    result = await kit.step(
        grant, seq, event("action.required", "{}"), intents=(asked,), status=RunStatus.REQUIRES_ACTION
    )
    assert result.outcome is AppendOutcome.COMMITTED
    return asked.call_id


async def timed_out(kit: Kit, grant: Grant) -> None:
    """The run failed for its time, and its log says so once."""
    run = await kit.store.get_run(kit.tenant, grant.run_id)
    assert run.status is RunStatus.FAILED
    assert run.error is not None
    assert (run.error.code, run.error.reason, run.error.retryable) == (
        "DEADLINE_EXCEEDED",
        "RUN_TIMEOUT",
        True,
    )
    types = await kit.types(grant.run_id)
    assert types.count("run.failed") == 1
    assert types[-1] == "run.failed"
    data = json.loads((await kit.log(grant.run_id))[-1].data)
    assert (data["reason"], data["message"]) == ("RUN_TIMEOUT", run.error.message)


async def test_time_runs_from_the_first_claim_on_and_not_before(kit: Kit) -> None:
    session = await kit.session()
    submitted = await kit.submit(session.session_id, timeout_ms=60_000)
    assert not await kit.clock_runs(submitted.run.run_id)
    assert await kit.time_left(submitted.run.run_id) == 60_000
    claim = await kit.claimed(submitted.run.run_id)
    assert claim.grant is not None
    assert 59_000 < claim.grant.time_left_ms <= 60_000


async def test_a_takeover_gets_what_is_left_and_not_the_whole(kit: Kit) -> None:
    grant = await started(kit, 60_000)
    await kit.pool.execute(
        "UPDATE session.run SET deadline = deadline - interval '50 s' WHERE run_id = $1", grant.run_id
    )
    for owner in ("b", "c"):
        await kit.expire(grant.session_id)
        claim = await kit.claimed(grant.run_id, owner)
        assert claim.grant is not None
        assert 9_000 < claim.grant.time_left_ms <= 10_000
    assert claim.grant is not None
    await kit.store.release(ref(claim.grant))
    assert await kit.time_left(grant.run_id) <= 10_000


async def test_a_claim_that_comes_too_late_ends_the_run(kit: Kit) -> None:
    grant = await started(kit, 60_000)
    await kit.append(grant, 2)
    queued = await kit.submit(grant.session_id, "next")
    await kit.run_out(grant.run_id)
    # Whoever holds it ends it by itself.
    assert (await kit.store.claim(grant.run_id, "b")).outcome is ClaimOutcome.ALREADY_CLAIMED
    await kit.expire(grant.session_id)
    assert (await kit.store.claim(grant.run_id, "b")).outcome is ClaimOutcome.FINISHED
    await timed_out(kit, grant)
    assert (await kit.append(grant, 3)).outcome is AppendOutcome.FENCED
    await kit.claimed(queued.run.run_id, "b")


async def test_a_sweep_ends_a_late_orphan_without_any_agent(kit: Kit) -> None:
    grant = await started(kit, 60_000)
    queued = await kit.submit(grant.session_id, "next")
    await kit.run_out(grant.run_id)
    assert await kit.store.end_orphans(100) == 0
    await kit.expire(grant.session_id)
    assert await kit.store.end_orphans(100) == 1
    assert await kit.store.end_orphans(100) == 0
    await timed_out(kit, grant)
    assert queued.run.run_id in await kit.due()


async def test_a_sweep_carries_out_a_cancel_that_no_agent_is_left_for(kit: Kit) -> None:
    grant = await started(kit, 60_000)
    await kit.store.cancel(kit.tenant, grant.run_id, "the first word")
    await kit.store.cancel(kit.tenant, grant.run_id, "another word")
    assert await kit.store.end_orphans(100) == 0
    await kit.expire(grant.session_id)
    # A cancel goes before a failure: the caller asked for it.
    await kit.run_out(grant.run_id)
    assert await kit.store.end_orphans(100) == 1
    assert await kit.types(grant.run_id) == ["run.created", "run.cancelled"]
    assert json.loads((await kit.log(grant.run_id))[-1].data) == {"reason": "the first word"}
    run = await kit.store.get_run(kit.tenant, grant.run_id)
    assert (run.status, run.cancel_reason) == (RunStatus.CANCELLED, "the first word")


async def test_an_interrupt_keeps_the_reason_of_a_cancel_before_it(kit: Kit) -> None:
    grant = await started(kit, 60_000)
    await kit.store.cancel(kit.tenant, grant.run_id, "enough")
    await kit.expire(grant.session_id)
    await kit.submit(grant.session_id, policy=ConcurrencyPolicy.INTERRUPT)
    assert json.loads((await kit.log(grant.run_id))[-1].data) == {"reason": "enough"}


async def test_many_orphans_are_ended_a_batch_at_a_time_by_sweepers_side_by_side(kit: Kit) -> None:
    grants = [await started(kit, 60_000) for _ in range(12)]
    for grant in grants:
        await kit.expire(grant.session_id)
        await kit.run_out(grant.run_id)
    assert await kit.store.end_orphans(5) == 5
    assert sum(await asyncio.gather(*(kit.store.end_orphans(100) for _ in range(4)))) == 7
    for grant in grants:
        await timed_out(kit, grant)


async def test_a_sweep_waits_for_nobody_who_holds_the_lease_row(kit: Kit) -> None:
    grant = await started(kit, 60_000)
    await kit.expire(grant.session_id)
    await kit.run_out(grant.run_id)
    async with kit.pool.acquire() as connection, connection.transaction():
        await connection.execute(
            "SELECT FROM session.lease WHERE session_id = $1 FOR UPDATE", grant.session_id
        )
        async with asyncio.timeout(2):
            assert await kit.store.end_orphans(100) == 0
    assert await kit.store.end_orphans(100) == 1


async def test_waiting_for_a_person_takes_no_time(kit: Kit) -> None:
    grant = await started(kit, 60_000)
    call_id = await park(kit, grant)
    left = await kit.time_left(grant.run_id)
    assert not await kit.clock_runs(grant.run_id)
    assert await kit.store.end_orphans(100) == 0
    await kit.resolve(grant.run_id, call_id, content="done")
    # From here on it waits for an agent, and that counts.
    assert await kit.clock_runs(grant.run_id)
    claim = await kit.claimed(grant.run_id, "b")
    assert claim.grant is not None
    assert left - 5_000 < claim.grant.time_left_ms <= left


async def test_a_run_that_parked_at_its_limit_is_failed_once_it_may_go_on(kit: Kit) -> None:
    grant = await started(kit, 60_000)
    await kit.run_out(grant.run_id)
    call_id = await park(kit, grant)
    assert (await kit.time_left(grant.run_id), await kit.store.end_orphans(100)) == (0, 0)
    await kit.resolve(grant.run_id, call_id, content="done")
    assert await kit.store.end_orphans(100) == 1
    await timed_out(kit, grant)


@pytest.mark.parametrize("policy", [ConcurrencyPolicy.INTERRUPT, ConcurrencyPolicy.ROLLBACK])
async def test_an_interrupt_ends_a_late_run_that_waits_for_a_person(
    kit: Kit, policy: ConcurrencyPolicy
) -> None:
    grant = await started(kit, 60_000)
    await kit.run_out(grant.run_id)
    await park(kit, grant)
    second = await kit.submit(grant.session_id, "instead", owner="b", policy=policy, timeout_ms=30_000)
    assert second.claim is not None
    assert second.claim.grant is not None
    assert 29_000 < second.claim.grant.time_left_ms <= 30_000
    assert (await kit.store.get_run(kit.tenant, grant.run_id)).status is RunStatus.CANCELLED
    kept = ["hello"] if policy is ConcurrencyPolicy.INTERRUPT else []
    assert [text for _, _, text in await kit.messages(grant.session_id)] == [*kept, "instead"]
    assert await kit.store.end_orphans(100) == 0
