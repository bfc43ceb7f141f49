"""Runs that do not end by their agent's word: their input stays, and the store ends what cannot."""

from __future__ import annotations

import json

import pytest

from meshkit.ids import uuid7
from services.session.domain import (
    AppendOutcome,
    ClaimOutcome,
    ConcurrencyPolicy,
    LeaseRef,
    NewMessage,
    RunStatus,
    ToolCallState,
)
from tests.integration.session.store.kit import Kit, event, intent, ref

INTERRUPT = ConcurrencyPolicy.INTERRUPT
ROLLBACK = ConcurrencyPolicy.ROLLBACK
CANCELLED = event("run.cancelled", '{"reason":"x"}')


def said(*texts: str) -> list[tuple[int, str, str]]:
    return [
        (n, "assistant" if text.startswith("reply") else "user", text)
        for n, text in enumerate(texts, start=1)
    ]


async def test_interrupts_at_once_lose_no_input_that_was_accepted(kit: Kit) -> None:
    first = await kit.started("a", "A")
    await kit.submit(first.session_id, "B", "B too", policy=INTERRUPT)
    last = await kit.submit(first.session_id, "C", policy=INTERRUPT)
    assert await kit.messages(first.session_id) == said("A")
    await kit.step(
        first,
        2,
        CANCELLED,
        messages=(NewMessage(uuid7(), "assistant", "reply to A"),),
        status=RunStatus.CANCELLED,
    )
    expected = said("A", "reply to A", "B", "B too")
    assert await kit.messages(first.session_id) == expected
    claim = await kit.claimed(last.run.run_id)
    assert claim.context is not None
    expected = said("A", "reply to A", "B", "B too", "C")
    assert [(m.ordinal, m.role, m.content) for m in claim.context.messages] == expected
    assert await kit.messages(first.session_id) == expected
    assert (await kit.store.get_session(kit.tenant, first.session_id)).message_count == 5


async def test_an_interrupt_that_takes_its_place_at_once_has_all_input_before_it(kit: Kit) -> None:
    first = await kit.started("a", "A")
    await kit.submit(first.session_id, "B")
    await kit.expire(first.session_id)
    last = await kit.submit(first.session_id, "C", owner="b", policy=INTERRUPT)
    assert last.claim is not None
    assert last.claim.context is not None
    assert [m.content for m in last.claim.context.messages] == ["A", "B", "C"]


async def test_an_interrupt_keeps_what_waits_behind_a_run_that_waits_for_a_person(kit: Kit) -> None:
    first = await kit.started("a", "A")
    await kit.step(first, 2, event("action.required", "{}"), status=RunStatus.REQUIRES_ACTION)
    await kit.submit(first.session_id, "B")
    await kit.submit(first.session_id, "C", owner="b", policy=INTERRUPT)
    assert await kit.messages(first.session_id) == said("A", "B", "C")


async def test_a_cancel_of_queued_input_ends_it_at_once_and_keeps_it_for_its_turn(kit: Kit) -> None:
    first = await kit.started("a", "A")
    second = await kit.submit(first.session_id, "B")
    third = await kit.submit(first.session_id, "C")
    run, terminal = await kit.store.cancel(kit.tenant, second.run.run_id, "stopped")
    assert terminal is not None
    assert run.status is RunStatus.CANCELLED
    assert await kit.messages(first.session_id) == said("A")
    await kit.finish(first, 2, "reply to A")
    assert await kit.messages(first.session_id) == said("A", "reply to A", "B")
    await kit.claimed(third.run.run_id)
    assert await kit.messages(first.session_id) == said("A", "reply to A", "B", "C")


async def test_a_cancel_of_the_only_run_before_its_claim_keeps_its_input(kit: Kit) -> None:
    session = await kit.session()
    submitted = await kit.submit(session.session_id, "A")
    await kit.store.cancel(kit.tenant, submitted.run.run_id, "stopped")
    assert await kit.messages(session.session_id) == said("A")
    assert (await kit.store.get_session(kit.tenant, session.session_id)).message_count == 1


async def test_rollback_drops_queued_input_and_keeps_what_an_interrupt_had_ended_before(kit: Kit) -> None:
    first = await kit.started("a", "A")
    await kit.submit(first.session_id, "B")
    await kit.submit(first.session_id, "C", policy=INTERRUPT)
    last = await kit.submit(first.session_id, "D", policy=ROLLBACK)
    await kit.step(first, 2, CANCELLED, status=RunStatus.CANCELLED)
    await kit.claimed(last.run.run_id)
    # A and C were not finished when D wished them gone; B had ended, and stays.
    assert await kit.messages(first.session_id) == said("B", "D")
    assert (await kit.store.get_session(kit.tenant, first.session_id)).message_count == 2


async def test_ended_queued_runs_join_in_order_over_several_ends(kit: Kit) -> None:
    first = await kit.started("a", "A")
    runs = [(await kit.submit(first.session_id, text)).run.run_id for text in ("B", "C", "D", "E")]
    for run_id in (runs[2], runs[0]):
        await kit.store.cancel(kit.tenant, run_id, "stopped")
    await kit.finish(first, 2, "reply to A")
    assert await kit.messages(first.session_id) == said("A", "reply to A", "B")
    claim = await kit.claimed(runs[1])
    assert claim.grant is not None
    await kit.finish(claim.grant, claim.grant.next_seq, "reply to C")
    assert await kit.messages(first.session_id) == said("A", "reply to A", "B", "C", "reply to C", "D")


async def test_a_session_is_deleted_with_input_that_waits_for_its_turn(kit: Kit) -> None:
    first = await kit.started("a", "A")
    second = await kit.submit(first.session_id, "B")
    await kit.store.cancel(kit.tenant, second.run.run_id, "stopped")
    await kit.store.delete_session(kit.tenant, first.session_id)
    assert (
        await kit.pool.fetchval("SELECT count(*) FROM session.run WHERE session_id = $1", first.session_id)
        == 0
    )


async def test_a_run_that_cannot_write_its_end_is_ended_by_the_store(kit: Kit) -> None:
    grant = await kit.started("a", "A")
    behind = await kit.submit(grant.session_id, "B")
    await kit.append(grant, 2)
    run = await kit.store.fail_held(ref(grant), 'it "could" not\n')
    assert run is not None
    assert (run.status, run.last_seq) == (RunStatus.FAILED, 3)
    assert run.error is not None
    assert (run.error.code, run.error.reason, run.error.retryable) == ("INTERNAL", "INTERNAL", False)
    assert await kit.types(grant.run_id) == ["run.created", "text.delta", "run.failed"]
    data = json.loads((await kit.log(grant.run_id))[-1].data)
    assert data == {
        "code": "INTERNAL",
        "reason": "INTERNAL",
        "message": 'it "could" not\n',
        "retryable": False,
    }
    # What it had on its way is refused, and the session goes on.
    assert (await kit.append(grant, 3)).outcome is AppendOutcome.FENCED
    assert await kit.store.fail_held(ref(grant), "again") is None
    await kit.claimed(behind.run.run_id)


async def test_a_run_that_was_to_be_cancelled_ends_so_when_it_cannot_write_its_end(kit: Kit) -> None:
    grant = await kit.started()
    await kit.store.cancel(kit.tenant, grant.run_id, "stopped")
    run = await kit.store.fail_held(ref(grant), "m")
    assert run is not None
    assert (run.status, run.cancel_reason) == (RunStatus.CANCELLED, "stopped")
    assert await kit.types(grant.run_id) == ["run.created", "run.cancelled"]


async def test_a_call_under_way_is_unknown_when_its_run_cannot_write_its_end(kit: Kit) -> None:
    grant = await kit.started()
    call = intent(grant.run_id)
    await kit.step(grant, 2, event("tool.call", "{}"), intents=(call,))
    await kit.store.begin(call.call_id, grant.session_id, grant.fence)
    assert await kit.store.fail_held(ref(grant), "m") is not None
    assert (await kit.store.look(call.call_id, grant.session_id)).state is ToolCallState.UNKNOWN


@pytest.mark.parametrize("stale", ["taken over", "finished", "released", "waiting", "never"])
async def test_only_who_holds_a_run_may_have_it_ended(kit: Kit, stale: str) -> None:
    grant = await kit.started()
    if stale == "taken over":
        await kit.expire(grant.session_id)
        await kit.claimed(grant.run_id, "b")
    elif stale == "finished":
        await kit.finish(grant, 2)
    elif stale == "released":
        await kit.store.release(ref(grant))
    elif stale == "waiting":
        await kit.step(grant, 2, event("action.required", "{}"), status=RunStatus.REQUIRES_ACTION)
    before = await kit.store.get_run(kit.tenant, grant.run_id)
    lease = LeaseRef(grant.session_id, grant.run_id, grant.fence + (9 if stale == "never" else 0))
    assert await kit.store.fail_held(lease, "m") is None
    assert await kit.store.get_run(kit.tenant, grant.run_id) == before


async def test_a_fence_of_before_a_reattach_still_ends_its_run(kit: Kit) -> None:
    grant = await kit.started()
    assert await kit.store.reattach(ref(grant), "a") is not None
    assert await kit.store.fail_held(ref(grant), "m") is not None
    assert (await kit.store.claim(grant.run_id, "b")).outcome is ClaimOutcome.FINISHED
