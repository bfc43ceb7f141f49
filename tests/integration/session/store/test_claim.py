"""Claiming: one arbiter, the right order, and the context of a takeover."""

from __future__ import annotations

import asyncio
import json

import pytest

from meshkit.errors import NotFoundError
from meshkit.ids import uuid7
from services.session.domain import (
    AppendOutcome,
    ClaimOutcome,
    EffectClass,
    NewMessage,
    RunStatus,
    ToolCallState,
)
from services.session.store.postgres_runs import MAX_IDLE_CLAIMS
from tests.integration.session.store.kit import Kit, event, intent, ref


async def test_of_many_claims_one_wins(kit: Kit) -> None:
    session = await kit.session()
    run_id = (await kit.submit(session.session_id)).run.run_id
    claims = await asyncio.gather(*(kit.store.claim(run_id, f"a{n}") for n in range(10)))
    outcomes = [claim.outcome for claim in claims]
    assert outcomes.count(ClaimOutcome.CLAIMED) == 1
    assert outcomes.count(ClaimOutcome.ALREADY_CLAIMED) == 9


async def test_an_unknown_run_cannot_be_claimed(kit: Kit) -> None:
    with pytest.raises(NotFoundError) as caught:
        await kit.store.claim(uuid7(), "a")
    assert caught.value.reason == "RUN_NOT_FOUND"


async def test_a_held_run_is_claimed_only_after_its_lease_ended(kit: Kit) -> None:
    grant = await kit.started()
    assert (await kit.store.claim(grant.run_id, "b")).outcome is ClaimOutcome.ALREADY_CLAIMED
    await kit.append(grant, 2)
    await kit.expire(grant.session_id)
    claim = await kit.claimed(grant.run_id, "b")
    assert claim.grant is not None
    assert (claim.grant.fence, claim.grant.next_seq, claim.run.attempt) == (2, 3, 2)
    assert (await kit.append(grant, 3)).outcome is AppendOutcome.FENCED
    assert (await kit.append(claim.grant, 3)).outcome is AppendOutcome.COMMITTED


async def test_who_has_a_lease_may_claim_again_because_the_first_answer_was_lost(kit: Kit) -> None:
    lost = await kit.started()
    for attempt in range(2, MAX_IDLE_CLAIMS + 3):
        claim = await kit.claimed(lost.run_id, "a")
        assert claim.grant is not None
        # As often as it takes: nobody worked on the run, so nobody was lost either.
        assert (claim.run.attempt, claim.grant.fence, claim.grant.next_seq) == (attempt, attempt, 2)
    assert (await kit.append(lost, 2)).outcome is AppendOutcome.FENCED
    assert (await kit.store.claim(lost.run_id, "b")).outcome is ClaimOutcome.ALREADY_CLAIMED
    assert (await kit.append(claim.grant, 2)).outcome is AppendOutcome.COMMITTED


async def test_a_lease_of_ones_own_that_ran_out_is_a_claim_like_any_other(kit: Kit) -> None:
    grant = await kit.started()
    for _ in range(MAX_IDLE_CLAIMS - 1):
        await kit.expire(grant.session_id)
        await kit.claimed(grant.run_id, "a")
    await kit.expire(grant.session_id)
    assert (await kit.store.claim(grant.run_id, "a")).outcome is ClaimOutcome.FINISHED
    assert (await kit.types(grant.run_id))[-1] == "run.failed"


async def test_runs_of_a_session_are_claimed_in_order_only(kit: Kit) -> None:
    session = await kit.session()
    runs = [(await kit.submit(session.session_id)).run.run_id for _ in range(3)]
    assert (await kit.store.claim(runs[1], "a")).outcome is ClaimOutcome.ALREADY_CLAIMED
    first = await kit.claimed(runs[0])
    assert (await kit.store.claim(runs[1], "a")).outcome is ClaimOutcome.ALREADY_CLAIMED
    assert first.grant is not None
    await kit.finish(first.grant, 2)
    assert (await kit.store.claim(runs[2], "a")).outcome is ClaimOutcome.ALREADY_CLAIMED
    second = await kit.claimed(runs[1])
    assert second.grant is not None
    assert second.grant.fence > first.grant.fence
    assert (await kit.store.claim(runs[0], "a")).outcome is ClaimOutcome.FINISHED


async def test_a_run_that_waits_for_a_person_keeps_the_place(kit: Kit) -> None:
    grant = await kit.started()
    later = await kit.submit(grant.session_id)
    await kit.step(grant, 2, event("action.required", "{}"), status=RunStatus.REQUIRES_ACTION)
    assert (await kit.store.claim(grant.run_id, "b")).outcome is ClaimOutcome.REQUIRES_ACTION
    assert (await kit.store.claim(later.run.run_id, "b")).outcome is ClaimOutcome.ALREADY_CLAIMED
    assert await kit.due() == set()
    # Its holder is done with it, too.
    assert (await kit.append(grant, 3)).outcome is AppendOutcome.FENCED


async def test_claims_that_move_nothing_end_in_a_failed_run(kit: Kit) -> None:
    session = await kit.session()
    run_id = (await kit.submit(session.session_id)).run.run_id
    later = await kit.submit(session.session_id)
    seq = 2
    for attempt in range(1, MAX_IDLE_CLAIMS + 1):
        claim = await kit.claimed(run_id)
        assert claim.grant is not None
        assert claim.run.attempt == attempt
        await kit.append(claim.grant, seq, event("run.started", "{}"), event("step.started", '{"step":1}'))
        seq += 2
        await kit.expire(session.session_id)
    claim = await kit.store.claim(run_id, "a")
    assert claim.outcome is ClaimOutcome.FINISHED
    assert claim.run.status is RunStatus.FAILED
    assert claim.run.error is not None
    assert claim.run.error.reason == "ATTEMPTS_EXHAUSTED"
    log = await kit.log(run_id)
    assert log[-1].type == "run.failed"
    assert json.loads(log[-1].data) == {
        "code": "INTERNAL",
        "reason": "ATTEMPTS_EXHAUSTED",
        "message": claim.run.error.message,
        "retryable": True,
    }
    assert claim.run.last_seq == log[-1].seq == seq
    assert await kit.due() == {later.run.run_id}


async def test_progress_starts_the_count_of_claims_anew(kit: Kit) -> None:
    session = await kit.session()
    run_id = (await kit.submit(session.session_id)).run.run_id
    seq = 2
    for attempt in range(1, 3 * MAX_IDLE_CLAIMS):
        claim = await kit.claimed(run_id)
        assert claim.grant is not None
        await kit.append(claim.grant, seq, event("run.started", "{}"))
        seq += 1
        if attempt % MAX_IDLE_CLAIMS == 0:
            await kit.append(claim.grant, seq, event())
            seq += 1
        await kit.expire(session.session_id)
    assert (await kit.store.get_run(kit.tenant, run_id)).attempt == 3 * MAX_IDLE_CLAIMS - 1


async def test_a_release_is_no_claim_that_moved_nothing(kit: Kit) -> None:
    session = await kit.session()
    run_id = (await kit.submit(session.session_id)).run.run_id
    for _ in range(3 * MAX_IDLE_CLAIMS):
        claim = await kit.claimed(run_id)
        assert claim.grant is not None
        assert await kit.store.release(ref(claim.grant))


async def test_a_cancelled_run_is_finished_by_the_claim(kit: Kit) -> None:
    grant = await kit.started()
    await kit.append(grant, 2)
    run, done = await kit.store.cancel(kit.tenant, grant.run_id, "enough")
    assert done is None
    assert run.cancel_requested
    await kit.expire(grant.session_id)
    claim = await kit.store.claim(grant.run_id, "b")
    assert claim.outcome is ClaimOutcome.FINISHED
    assert claim.run.status is RunStatus.CANCELLED
    log = await kit.log(grant.run_id)
    assert (log[-1].seq, log[-1].type, log[-1].data) == (3, "run.cancelled", '{"reason":"enough"}')


async def test_takeover_gets_the_current_turn_and_the_journal(kit: Kit) -> None:
    grant = await kit.started("a", "question")
    calls = (intent(grant.run_id, 0), intent(grant.run_id, 1, EffectClass.PURE))
    await kit.append(grant, 2, event("run.started", "{}"), event("step.started", '{"step":1}'), event())
    await kit.step(
        grant,
        5,
        event("message.completed", "{}"),
        messages=(NewMessage(uuid7(), "assistant", "let me see", '[{"call_id":"c"}]'),),
        intents=calls,
    )
    for call in calls:
        await kit.store.begin(call.call_id, grant.session_id, grant.fence)
    await kit.append(grant, 6, event("step.started", '{"step":2}'), event("text.delta", '{"text":"ha"}'))
    await kit.expire(grant.session_id)
    claim = await kit.claimed(grant.run_id, "b")
    assert claim.context is not None
    assert [(e.seq, e.type, e.data) for e in claim.context.events] == [
        (6, "step.started", '{"step":2}'),
        (7, "text.delta", '{"text":"ha"}'),
    ]
    assert [(m.role, m.content) for m in claim.context.messages] == [
        ("user", "question"),
        ("assistant", "let me see"),
    ]
    # What may have acted and must not act twice is unknown from this very transaction on.
    assert [(c.call_id, c.state, c.effect) for c in claim.context.tool_calls] == [
        (calls[0].call_id, ToolCallState.UNKNOWN, EffectClass.NON_IDEMPOTENT),
        (calls[1].call_id, ToolCallState.RUNNING, EffectClass.PURE),
    ]
    assert claim.context.tool_calls[0].idempotency_key == calls[0].idempotency_key
    assert claim.context.tool_calls[0].arguments == '{"a":1}'
    assert await kit.calls(grant.run_id) == claim.context.tool_calls


async def test_takeover_before_the_first_step_finds_nothing_that_it_needs(kit: Kit) -> None:
    grant = await kit.started()
    await kit.append(grant, 2, event("run.started", "{}"), event("memory.recalled", "{}"))
    await kit.expire(grant.session_id)
    claim = await kit.claimed(grant.run_id, "b")
    assert claim.context is not None
    assert claim.context.events == []


async def test_context_keeps_the_newest_messages_within_the_limits(kit: Kit) -> None:
    grant = await kit.started("a", "old")
    await kit.step(
        grant,
        2,
        event(),
        messages=tuple(NewMessage(uuid7(), "assistant", f"m{n}") for n in range(249)),
    )
    await kit.finish(grant, 3, "last")
    submitted = await kit.submit(grant.session_id, "new", owner="a")
    assert submitted.claim is not None
    context = submitted.claim.context
    assert context is not None
    assert len(context.messages) == 201
    assert context.omitted_messages == 51
    assert [m.ordinal for m in context.messages] == list(range(52, 253))
    assert context.messages[-1].content == "new"


async def test_context_keeps_a_history_within_its_bytes_and_always_the_input(kit: Kit) -> None:
    grant = await kit.started("a", "old")
    big = "x" * (200 * 1024)
    await kit.step(grant, 2, event(), messages=tuple(NewMessage(uuid7(), "assistant", big) for _ in range(4)))
    await kit.finish(grant, 3, "last")
    for text, kept in (("small", 4), ("y" * (600 * 1024), 6), ("after a large one", 2)):
        submitted = await kit.submit(grant.session_id, text, owner="a")
        assert submitted.claim is not None
        context, next_grant = submitted.claim.context, submitted.claim.grant
        assert context is not None
        assert next_grant is not None
        assert len(context.messages) == kept
        total = (await kit.store.get_session(kit.tenant, grant.session_id)).message_count
        assert context.omitted_messages == total - kept
        assert context.messages[-1].content == text
        await kit.finish(next_grant, 2)


async def test_next_seq_is_the_logs_truth_even_if_the_lease_row_was_another_runs(kit: Kit) -> None:
    grant = await kit.started()
    await kit.append(grant, 2, event(), event())
    await kit.store.release(ref(grant))
    # As after a restore that lost the lease rows.
    await kit.pool.execute(
        "UPDATE session.lease SET run_id = NULL, next_seq = 1 WHERE session_id = $1", grant.session_id
    )
    claim = await kit.claimed(grant.run_id, "b")
    assert claim.grant is not None
    assert claim.grant.next_seq == 4
