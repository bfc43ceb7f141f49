"""The tool journal: what may have acted is never sent again by itself."""

from __future__ import annotations

import asyncio
import json

import pytest

from meshkit.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
)
from meshkit.ids import uuid7
from services.session.domain import (
    ActionDecision,
    AppendOutcome,
    BeginOutcome,
    EffectClass,
    Grant,
    NewToolCall,
    RunStatus,
    ToolCallState,
)
from tests.integration.session.store.kit import Kit, event, intent, ref

COMPLETED, FAILED, RETRY, ABANDON, APPROVE, DENY = ActionDecision


async def journalled(kit: Kit, *effects: EffectClass) -> tuple[Grant, list[str]]:
    """A held run with intents of these effects."""
    grant = await kit.started()
    intents = tuple(intent(grant.run_id, i, effect) for i, effect in enumerate(effects))
    await kit.step(grant, 2, event("step.started", "{}"), event("message.completed", "{}"), intents=intents)
    return grant, [call.call_id for call in intents]


async def asked(kit: Kit, calls: int = 1) -> tuple[Grant, list[str]]:
    """A held run with calls that need approval."""
    grant = await kit.started()
    intents = tuple(intent(grant.run_id, i, needs_approval=True) for i in range(calls))
    await kit.step(grant, 2, event("step.started", "{}"), event("message.completed", "{}"), intents=intents)
    return grant, [call.call_id for call in intents]


async def waiting(kit: Kit, calls: int = 1) -> tuple[Grant, list[str]]:
    """A run that waits for a person about non-idempotent calls that may have acted."""
    grant, call_ids = await journalled(kit, *[EffectClass.NON_IDEMPOTENT] * calls)
    for call_id in call_ids:
        await kit.store.begin(call_id, grant.session_id, grant.fence)
    await kit.expire(grant.session_id)
    newer = (await kit.claimed(grant.run_id, "b")).grant
    assert newer is not None
    await kit.step(newer, 4, event("action.required", "{}"), status=RunStatus.REQUIRES_ACTION)
    return newer, call_ids


async def test_a_call_begins_once_and_is_done_with_its_first_outcome(kit: Kit) -> None:
    grant, (call_id,) = await journalled(kit, EffectClass.NON_IDEMPOTENT)
    outcome, call = await kit.store.begin(call_id, grant.session_id, grant.fence)
    assert (outcome, call.state, call.fence) == (BeginOutcome.GO, ToolCallState.RUNNING, grant.fence)
    done = await kit.store.complete(call_id, grant.fence, ToolCallState.COMPLETED, "42", "sha256:x")
    assert (done.state, done.content, done.content_ref) == (ToolCallState.COMPLETED, "42", "sha256:x")
    again = await kit.store.complete(call_id, grant.fence, ToolCallState.FAILED, "no", "")
    assert again == done
    assert await kit.store.begin(call_id, grant.session_id, grant.fence) == (BeginOutcome.DONE, done)
    # What is done is not unknown, so there is nothing to reconcile.
    assert await kit.store.reconcile(call_id, ToolCallState.FAILED, "no", "") == done


async def test_of_many_begins_of_a_non_idempotent_call_one_goes(kit: Kit) -> None:
    grant, (call_id,) = await journalled(kit, EffectClass.NON_IDEMPOTENT)
    begun = await asyncio.gather(*(kit.store.begin(call_id, grant.session_id, grant.fence) for _ in range(8)))
    assert [outcome for outcome, _ in begun].count(BeginOutcome.GO) == 1
    assert [outcome for outcome, _ in begun].count(BeginOutcome.UNKNOWN) == 7


@pytest.mark.parametrize("effect", [EffectClass.PURE, EffectClass.IDEMPOTENT])
async def test_what_may_run_again_goes_again_under_the_new_fence(kit: Kit, effect: EffectClass) -> None:
    grant, (call_id,) = await journalled(kit, effect)
    await kit.store.begin(call_id, grant.session_id, grant.fence)
    await kit.expire(grant.session_id)
    newer = (await kit.claimed(grant.run_id, "b")).grant
    assert newer is not None
    outcome, call = await kit.store.begin(call_id, grant.session_id, newer.fence)
    assert (outcome, call.fence) == (BeginOutcome.GO, newer.fence)
    # The former agent's outcome is of a try that no longer counts.
    late = await kit.store.complete(call_id, grant.fence, ToolCallState.COMPLETED, "old", "")
    assert late.state is ToolCallState.RUNNING
    done = await kit.store.complete(call_id, newer.fence, ToolCallState.COMPLETED, "new", "")
    assert done.content == "new"


async def test_an_old_fence_begins_nothing(kit: Kit) -> None:
    grant, (call_id,) = await journalled(kit, EffectClass.PURE)
    await kit.expire(grant.session_id)
    newer = (await kit.claimed(grant.run_id, "b")).grant
    assert newer is not None
    outcome, call = await kit.store.begin(call_id, grant.session_id, grant.fence)
    assert (outcome, call.state) == (BeginOutcome.FENCED, ToolCallState.INTENT)
    assert (await kit.store.begin(call_id, grant.session_id, newer.fence + 1))[0] is BeginOutcome.FENCED
    await kit.store.release(ref(newer))
    assert (await kit.store.begin(call_id, grant.session_id, newer.fence))[0] is BeginOutcome.FENCED


async def test_a_reattach_does_not_fence_the_holders_own_tools(kit: Kit) -> None:
    grant, (call_id,) = await journalled(kit, EffectClass.NON_IDEMPOTENT)
    await kit.store.reattach(ref(grant), "a")
    outcome, call = await kit.store.begin(call_id, grant.session_id, grant.fence)
    assert (outcome, call.fence) == (BeginOutcome.GO, grant.fence)


async def test_begin_and_takeover_at_once_never_both_let_a_call_act(kit: Kit) -> None:
    for _ in range(15):
        grant, (call_id,) = await journalled(kit, EffectClass.NON_IDEMPOTENT)
        await kit.expire(grant.session_id)
        (outcome, _), claim = await asyncio.gather(
            kit.store.begin(call_id, grant.session_id, grant.fence), kit.store.claim(grant.run_id, "b")
        )
        assert claim.grant is not None
        assert claim.context is not None
        (call,) = claim.context.tool_calls
        if outcome is BeginOutcome.GO:
            assert call.state is ToolCallState.UNKNOWN
            assert (await kit.store.begin(call_id, grant.session_id, claim.grant.fence))[
                0
            ] is BeginOutcome.UNKNOWN
        else:
            assert outcome is BeginOutcome.FENCED
            assert call.state is ToolCallState.INTENT


async def test_unknown_calls_and_calls_of_other_sessions_are_not_found(kit: Kit) -> None:
    grant, (call_id,) = await journalled(kit, EffectClass.PURE)
    other = await kit.started()
    for awaited in (
        kit.store.begin("nothing", grant.session_id, grant.fence),
        kit.store.begin(call_id, other.session_id, other.fence),
        kit.store.complete("nothing", 1, ToolCallState.COMPLETED, "", ""),
        kit.store.reconcile("nothing", ToolCallState.COMPLETED, "", ""),
        kit.resolve(grant.run_id, "nothing", COMPLETED, ""),
        kit.store.call_of_run(kit.tenant, grant.run_id, "nothing"),
        kit.store.call_of_run(uuid7(), grant.run_id, call_id),
    ):
        with pytest.raises(NotFoundError) as caught:
            await awaited
        assert caught.value.reason == "TOOL_CALL_NOT_FOUND"
    with pytest.raises(NotFoundError) as caught:
        await kit.resolve(uuid7(), call_id, COMPLETED, "")
    assert caught.value.reason == "RUN_NOT_FOUND"


@pytest.mark.parametrize(
    ("decision", "state", "content"),
    [
        (COMPLETED, ToolCallState.COMPLETED, "it was done"),
        (FAILED, ToolCallState.FAILED, "it was not"),
        (RETRY, ToolCallState.INTENT, ""),
    ],
)
async def test_a_persons_word_lets_the_run_go_on(
    kit: Kit, decision: ActionDecision, state: ToolCallState, content: str
) -> None:
    grant, (call_id,) = await waiting(kit)
    run, call = await kit.resolve(grant.run_id, call_id, decision, content)
    assert (run.status, call.state, call.content) == (RunStatus.QUEUED, state, content)
    log = await kit.log(grant.run_id)
    assert (log[-1].seq, log[-1].type) == (5, "action.resolved")
    data = {"call_id": call_id, "decision": decision.name.lower(), "content": content}
    assert json.loads(log[-1].data) == data
    assert run.last_seq == 5
    assert await kit.due() == {grant.run_id}
    claim = await kit.claimed(grant.run_id, "c")
    assert claim.grant is not None
    assert claim.context is not None
    assert claim.grant.next_seq == 6
    assert [e.type for e in claim.context.events][-2:] == ["action.required", "action.resolved"]
    outcome, _ = await kit.store.begin(call_id, grant.session_id, claim.grant.fence)
    assert outcome is (BeginOutcome.GO if decision == RETRY else BeginOutcome.DONE)


@pytest.mark.parametrize("unheld", [False, True])
async def test_a_run_that_ends_leaves_in_doubt_what_may_have_acted(kit: Kit, unheld: bool) -> None:
    grant = await kit.started()
    calls = [intent(grant.run_id, number, effect) for number, effect in enumerate(EffectClass)]
    await kit.step(grant, 2, event("step.started", "{}"), intents=tuple(calls))
    for call in calls:
        await kit.store.begin(call.call_id, grant.session_id, grant.fence)
    if unheld:
        await kit.expire(grant.session_id)
        await kit.store.cancel(kit.tenant, grant.run_id, "x")
    else:
        await kit.step(grant, 3, event("run.cancelled", "{}"), status=RunStatus.CANCELLED)
    states = {call.effect: call.state for call in await kit.calls(grant.run_id)}
    assert states == {
        effect: ToolCallState.UNKNOWN if effect is EffectClass.NON_IDEMPOTENT else ToolCallState.RUNNING
        for effect in EffectClass
    }
    # It did end, and its tool says so late.
    late = calls[list(EffectClass).index(EffectClass.NON_IDEMPOTENT)].call_id
    call = await kit.store.complete(late, grant.fence, ToolCallState.COMPLETED, "done", "", 1)
    assert (call.state, call.content) == (ToolCallState.COMPLETED, "done")


async def test_abandon_ends_the_run_and_frees_the_session(kit: Kit) -> None:
    grant, (call_id,) = await waiting(kit)
    later = await kit.submit(grant.session_id)
    run, call = await kit.resolve(grant.run_id, call_id, ABANDON, "no use")
    assert (run.status, call.state) == (RunStatus.CANCELLED, ToolCallState.UNKNOWN)
    assert (await kit.types(grant.run_id))[-2:] == ["action.resolved", "run.cancelled"]
    assert json.loads((await kit.log(grant.run_id))[-1].data) == {"reason": "no use"}
    assert await kit.due() == {later.run.run_id}


async def test_the_run_waits_until_every_unknown_call_is_settled(kit: Kit) -> None:
    grant, (first, second) = await waiting(kit, 2)
    run, _ = await kit.resolve(grant.run_id, first, COMPLETED, "a")
    assert run.status is RunStatus.REQUIRES_ACTION
    assert await kit.due() == set()
    run, _ = await kit.resolve(grant.run_id, second, FAILED, "b")
    assert run.status is RunStatus.QUEUED


async def test_the_same_word_twice_is_one_and_another_comes_too_late(kit: Kit) -> None:
    grant, (call_id,) = await waiting(kit)
    for _ in range(2):
        _, call = await kit.resolve(grant.run_id, call_id, COMPLETED, "a")
        assert call.content == "a"
    assert (await kit.types(grant.run_id)).count("action.resolved") == 1
    for decision, content in ((COMPLETED, "b"), (FAILED, "a"), (RETRY, ""), (ABANDON, "")):
        with pytest.raises(FailedPreconditionError) as caught:
            await kit.resolve(grant.run_id, call_id, decision, content)
        assert caught.value.reason == "ACTION_NOT_REQUIRED"


@pytest.mark.parametrize(
    ("decision", "state"),
    [
        (APPROVE, ToolCallState.INTENT),
        (RETRY, ToolCallState.INTENT),
        (DENY, ToolCallState.FAILED),
        (FAILED, ToolCallState.FAILED),
        (COMPLETED, ToolCallState.COMPLETED),
    ],
)
async def test_a_person_decides_about_a_call_that_was_only_intended(
    kit: Kit, decision: ActionDecision, state: ToolCallState
) -> None:
    grant, (call_id,) = await asked(kit)
    await kit.step(grant, 4, event("action.required", "{}"), status=RunStatus.REQUIRES_ACTION)
    run, call = await kit.resolve(grant.run_id, call_id, decision)
    assert (run.status, call.state, call.needs_approval) == (RunStatus.QUEUED, state, False)


async def test_reconciling_settles_an_unknown_call_and_lets_the_run_go_on(kit: Kit) -> None:
    grant, (first, second) = await waiting(kit, 2)
    call = await kit.store.reconcile(first, ToolCallState.COMPLETED, "found", "")
    assert (call.state, call.content) == (ToolCallState.COMPLETED, "found")
    assert (await kit.store.get_run(kit.tenant, grant.run_id)).status is RunStatus.REQUIRES_ACTION
    await kit.store.reconcile(second, ToolCallState.FAILED, "was not done", "")
    assert (await kit.store.get_run(kit.tenant, grant.run_id)).status is RunStatus.QUEUED
    last = (await kit.log(grant.run_id))[-1]
    assert last.type == "action.resolved"
    assert json.loads(last.data) == {"call_id": second, "decision": "failed"}
    assert await kit.due() == {grant.run_id}


async def test_the_tools_own_late_word_settles_an_unknown_call(kit: Kit) -> None:
    grant, (call_id,) = await waiting(kit)
    (call,) = await kit.calls(grant.run_id)
    # Of another begin: not its word.
    await kit.store.complete(call_id, call.fence + 1, ToolCallState.COMPLETED, "no", "")
    assert (await kit.calls(grant.run_id))[0].state is ToolCallState.UNKNOWN
    done = await kit.store.complete(call_id, call.fence, ToolCallState.COMPLETED, "late", "")
    assert (done.state, done.content) == (ToolCallState.COMPLETED, "late")
    assert (await kit.store.get_run(kit.tenant, grant.run_id)).status is RunStatus.QUEUED


async def test_a_late_word_under_a_holder_changes_no_log(kit: Kit) -> None:
    grant, (call_id,) = await journalled(kit, EffectClass.NON_IDEMPOTENT)
    await kit.store.begin(call_id, grant.session_id, grant.fence)
    await kit.expire(grant.session_id)
    newer = (await kit.claimed(grant.run_id, "b")).grant
    assert newer is not None
    done = await kit.store.complete(call_id, grant.fence, ToolCallState.COMPLETED, "late", "")
    assert done.state is ToolCallState.COMPLETED
    assert (await kit.append(newer, 4)).outcome is AppendOutcome.COMMITTED


async def test_a_timeout_after_the_request_was_sent_is_unknown(kit: Kit) -> None:
    grant, (call_id,) = await journalled(kit, EffectClass.NON_IDEMPOTENT)
    await kit.store.begin(call_id, grant.session_id, grant.fence)
    call = await kit.store.complete(call_id, grant.fence, ToolCallState.UNKNOWN, "", "")
    assert call.state is ToolCallState.UNKNOWN
    assert (await kit.store.begin(call_id, grant.session_id, grant.fence))[0] is BeginOutcome.UNKNOWN


async def test_a_cancel_that_comes_while_a_run_parks_still_ends_it(kit: Kit) -> None:
    grant, _ = await journalled(kit, EffectClass.NON_IDEMPOTENT)
    later = await kit.submit(grant.session_id, "next")
    run, ended = await kit.store.cancel(kit.tenant, grant.run_id, "enough")
    assert (run.cancel_requested, ended) == (True, None), "the holder is told, and is just about to park"
    await kit.step(grant, 4, event("action.required", "{}"), status=RunStatus.REQUIRES_ACTION)
    assert (await kit.store.get_run(kit.tenant, grant.run_id)).status is RunStatus.CANCELLED
    assert (await kit.types(grant.run_id))[-1] == "run.cancelled"
    assert later.run.run_id in await kit.due()


async def test_a_call_that_settles_while_its_run_parks_does_not_leave_it_waiting(kit: Kit) -> None:
    grant, (call_id,) = await journalled(kit, EffectClass.NON_IDEMPOTENT)
    await kit.store.begin(call_id, grant.session_id, grant.fence)
    await kit.store.complete(call_id, grant.fence, ToolCallState.UNKNOWN, "", "")
    await kit.store.complete(call_id, grant.fence, ToolCallState.COMPLETED, "42", "")
    await kit.step(grant, 4, event("action.required", "{}"), status=RunStatus.REQUIRES_ACTION)
    assert grant.run_id in await kit.due()


async def test_whatever_had_no_outcome_when_its_run_parked_can_be_settled(kit: Kit) -> None:
    grant, (call_id,) = await journalled(kit, EffectClass.NON_IDEMPOTENT)
    await kit.store.begin(call_id, grant.session_id, grant.fence)
    await kit.step(grant, 4, event("action.required", "{}"), status=RunStatus.REQUIRES_ACTION)
    [call] = await kit.calls(grant.run_id)
    assert call.state is ToolCallState.UNKNOWN
    run, call = await kit.resolve(grant.run_id, call_id, COMPLETED, "7")
    assert (run.status, call.state, call.content) == (RunStatus.QUEUED, ToolCallState.COMPLETED, "7")


async def test_all_calls_that_need_approval_are_waited_for(kit: Kit) -> None:
    grant, (first, second) = await asked(kit, 2)
    await kit.step(
        grant, 4, event("action.required"), event("action.required"), status=RunStatus.REQUIRES_ACTION
    )
    run, _ = await kit.resolve(grant.run_id, first, APPROVE)
    assert run.status is RunStatus.REQUIRES_ACTION
    assert await kit.due() == set()
    run, _ = await kit.resolve(grant.run_id, second, DENY, "not today")
    assert run.status is RunStatus.QUEUED
    assert (await kit.types(grant.run_id))[-2:] == ["action.resolved"] * 2
    claim = await kit.claimed(grant.run_id)
    assert claim.grant is not None
    assert (await kit.store.begin(first, grant.session_id, claim.grant.fence))[0] is BeginOutcome.GO
    outcome, denied = await kit.store.begin(second, grant.session_id, claim.grant.fence)
    assert (outcome, denied.content) == (BeginOutcome.DONE, "not today")


async def test_nothing_begins_that_a_person_has_not_approved(kit: Kit) -> None:
    grant, (call_id,) = await asked(kit)
    outcome, call = await kit.store.begin(call_id, grant.session_id, grant.fence)
    assert (outcome, call.state, call.tries) == (BeginOutcome.NOT_APPROVED, ToolCallState.INTENT, 0)


@pytest.mark.parametrize("lost", [False, True])
async def test_a_word_that_comes_while_the_run_works_on_is_kept_and_told_later(kit: Kit, lost: bool) -> None:
    grant, (first, second) = await asked(kit, 2)
    for call_id, decision in ((second, DENY), (first, APPROVE)):
        run, call = await kit.resolve(grant.run_id, call_id, decision)
        assert (run.status, call.needs_approval) == (RunStatus.RUNNING, False)
    assert (await kit.append(grant, 4)).outcome is AppendOutcome.COMMITTED, "the holder is not disturbed"
    if lost:
        await kit.expire(grant.session_id)
    else:
        await kit.step(grant, 5, status=RunStatus.REQUIRES_ACTION)
        assert grant.run_id in await kit.due(), "nothing is left to wait for"
    claim = await kit.claimed(grant.run_id, "b")
    types = await kit.types(grant.run_id)
    assert types[-2:] == ["action.resolved"] * 2
    told = [json.loads(e.data)["decision"] for e in (await kit.log(grant.run_id))[-2:]]
    assert sorted(told) == ["approve", "deny"]
    assert claim.grant is not None
    assert claim.grant.next_seq == len(types) + 1
    assert (await kit.store.begin(first, grant.session_id, claim.grant.fence))[0] is BeginOutcome.GO


async def test_giving_up_a_run_that_works_on_asks_for_its_cancel(kit: Kit) -> None:
    grant, (call_id,) = await asked(kit)
    run, call = await kit.resolve(grant.run_id, call_id, ABANDON, "no use")
    assert (run.status, run.cancel_requested, run.cancel_reason) == (RunStatus.RUNNING, True, "no use")
    assert call.needs_approval
    assert list((await kit.store.renew([ref(grant)])).cancelled) == [grant.run_id]


async def test_approve_and_deny_are_no_answer_to_what_may_have_run(kit: Kit) -> None:
    grant, (call_id,) = await waiting(kit)
    for decision in (APPROVE, DENY):
        with pytest.raises(FailedPreconditionError) as caught:
            await kit.resolve(grant.run_id, call_id, decision)
        assert caught.value.reason == "ACTION_NOT_REQUIRED"


@pytest.mark.parametrize("decision", [RETRY, ABANDON, COMPLETED])
async def test_a_word_with_its_request_id_may_be_sent_again_at_any_time(
    kit: Kit, decision: ActionDecision
) -> None:
    grant, (call_id,) = await waiting(kit)
    run, call = await kit.resolve(grant.run_id, call_id, decision, "x", request_id="once")
    again = await kit.resolve(grant.run_id, call_id, decision, "x", request_id="once")
    assert again == (run, call)
    assert (await kit.types(grant.run_id)).count("action.resolved") == 1
    for other in ((decision, "y"), (FAILED, "x")):
        with pytest.raises(AlreadyExistsError) as caught:
            await kit.resolve(grant.run_id, call_id, *other, request_id="once")
        assert caught.value.reason == "REQUEST_ID_REUSED"
    if decision is RETRY:
        claim = await kit.claimed(grant.run_id)
        assert claim.grant is not None
        await kit.store.begin(call_id, grant.session_id, claim.grant.fence)
        _, call = await kit.resolve(grant.run_id, call_id, decision, "x", request_id="once")
        assert call.state is ToolCallState.RUNNING, "it is the same word, not another one"


async def test_a_refused_word_leaves_its_request_id_free(kit: Kit) -> None:
    grant, (call_id,) = await journalled(kit, EffectClass.NON_IDEMPOTENT)
    with pytest.raises(FailedPreconditionError):
        await kit.resolve(grant.run_id, call_id, RETRY, request_id="once")
    await kit.store.begin(call_id, grant.session_id, grant.fence)
    await kit.step(grant, 4, event("action.required"), status=RunStatus.REQUIRES_ACTION)
    run, _ = await kit.resolve(grant.run_id, call_id, RETRY, request_id="once")
    assert run.status is RunStatus.QUEUED


async def unknown(kit: Kit, act_ms: int = 0) -> tuple[Grant, str, int]:
    """A held run with an unknown call, begun once for `act_ms`."""
    grant, (call_id,) = await journalled(kit, EffectClass.NON_IDEMPOTENT)
    await kit.store.begin(call_id, grant.session_id, grant.fence, act_ms)
    call = await kit.store.complete(call_id, grant.fence, ToolCallState.UNKNOWN, "", "", 1)
    assert (call.state, call.tries) == (ToolCallState.UNKNOWN, 1)
    return grant, call_id, call.quiet_in_ms


async def test_what_was_not_done_runs_again_once_nothing_can_act_any_more(kit: Kit) -> None:
    grant, call_id, quiet_in = await unknown(kit, 60_000)
    assert 50_000 < quiet_in <= 60_000
    call = await kit.store.reconcile(call_id, ToolCallState.INTENT, "", "", 1)
    assert call.state is ToolCallState.UNKNOWN, "the first try may still act"
    await kit.pool.execute(
        "UPDATE session.tool_call SET quiet_at = clock_timestamp() WHERE call_id = $1", call_id
    )
    assert (await kit.store.look(call_id, grant.session_id)).quiet_in_ms == 0
    for tries in (0, 2):
        assert (
            await kit.store.reconcile(call_id, ToolCallState.INTENT, "", "", tries)
        ).state is ToolCallState.UNKNOWN
    assert (await kit.store.reconcile(call_id, ToolCallState.INTENT, "", "", 1)).state is ToolCallState.INTENT
    outcome, call = await kit.store.begin(call_id, grant.session_id, grant.fence, 1)
    assert (outcome, call.tries) == (BeginOutcome.GO, 2)


async def test_what_was_found_about_a_try_counts_for_no_later_one(kit: Kit) -> None:
    grant, call_id, _ = await unknown(kit)
    await kit.store.reconcile(call_id, ToolCallState.INTENT, "", "", 1)
    await kit.store.begin(call_id, grant.session_id, grant.fence)
    # The first try's own word, late, under the same fence.
    late = await kit.store.complete(call_id, grant.fence, ToolCallState.UNKNOWN, "", "", 1)
    assert late.state is ToolCallState.RUNNING
    await kit.store.complete(call_id, grant.fence, ToolCallState.UNKNOWN, "", "", 2)
    for state in (ToolCallState.COMPLETED, ToolCallState.INTENT):
        assert (await kit.store.reconcile(call_id, state, "old", "", 1)).state is ToolCallState.UNKNOWN
    assert (await kit.store.reconcile(call_id, ToolCallState.COMPLETED, "new", "", 2)).content == "new"


async def test_a_try_that_says_it_acted_is_not_run_again(kit: Kit) -> None:
    grant, call_id, _ = await unknown(kit)
    await kit.store.reconcile(call_id, ToolCallState.INTENT, "", "", 1)
    done = await kit.store.complete(call_id, grant.fence, ToolCallState.COMPLETED, "after all", "", 1)
    assert done.state is ToolCallState.COMPLETED
    outcome, call = await kit.store.begin(call_id, grant.session_id, grant.fence)
    assert (outcome, call.content) == (BeginOutcome.DONE, "after all")


async def test_a_turn_that_is_made_anew_does_not_undo_what_was_begun(kit: Kit) -> None:
    grant, call_id, _ = await unknown(kit)
    await kit.store.reconcile(call_id, ToolCallState.INTENT, "", "", 1)
    anew = NewToolCall(call_id, "other", "{}", EffectClass.PURE, "k")
    await kit.step(grant, 4, event("message.completed"), intents=(anew,))
    assert (await kit.store.look(call_id, grant.session_id)).name == "tool"


async def test_a_look_goes_by_the_session(kit: Kit) -> None:
    _, call_id, _ = await unknown(kit)
    other = await kit.started()
    with pytest.raises(NotFoundError):
        await kit.store.look(call_id, other.session_id)


async def test_pending_actions_are_listed_by_page_and_by_tenant(kit: Kit) -> None:
    expected = []
    for _ in range(2):
        grant, call_ids = await waiting(kit, 2)
        expected += call_ids
    grant, (approval,) = await asked(kit)
    await kit.step(grant, 4, event("action.required"), status=RunStatus.REQUIRES_ACTION)
    expected.append(approval)
    await asked(kit)
    found, token = [], ""
    for _ in range(3):
        page = await kit.store.pending_actions(kit.tenant, page_size=2, page_token=token)
        found += page.items
        token = page.next_page_token
    assert token == ""
    assert [action.call.call_id for action in found] == expected
    log = await kit.log(grant.run_id)
    assert found[-1].since_ms == log[-1].time_ms
    assert found[-1].call.needs_approval
    other = await kit.store.ensure_key(f"tenant-{uuid7()}", uuid7().hex * 2, "test")
    assert (await kit.store.pending_actions(other, page_size=10, page_token="")).items == []
    await kit.resolve(grant.run_id, approval, APPROVE)
    page = await kit.store.pending_actions(kit.tenant, page_size=10, page_token="")
    assert [action.call.call_id for action in page.items] == expected[:-1]
    with pytest.raises(InvalidArgumentError):
        await kit.store.pending_actions(kit.tenant, page_size=1, page_token="nonsense")
