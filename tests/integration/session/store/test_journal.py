"""The tool journal: what may have acted is never sent again by itself."""

from __future__ import annotations

import asyncio
import json

import pytest

from meshkit.errors import FailedPreconditionError, NotFoundError
from meshkit.ids import uuid7
from services.session.domain import (
    AppendOutcome,
    BeginOutcome,
    EffectClass,
    Grant,
    NewEvent,
    RunStatus,
    ToolCallState,
)
from tests.integration.session.store.kit import Kit, event, intent, ref

COMPLETED, FAILED, RETRY, ABANDON = 1, 2, 3, 4
RESOLVED = [NewEvent("action.resolved", 7, '{"by":"a person"}')]


async def journalled(kit: Kit, *effects: EffectClass) -> tuple[Grant, list[str]]:
    """A held run with intents of these effects."""
    grant = await kit.started()
    intents = tuple(intent(grant.run_id, i, effect) for i, effect in enumerate(effects))
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
        kit.store.resolve(kit.tenant, grant.run_id, "nothing", COMPLETED, "", RESOLVED),
    ):
        with pytest.raises(NotFoundError) as caught:
            await awaited
        assert caught.value.reason == "TOOL_CALL_NOT_FOUND"
    with pytest.raises(NotFoundError) as caught:
        await kit.store.resolve(kit.tenant, uuid7(), call_id, COMPLETED, "", RESOLVED)
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
    kit: Kit, decision: int, state: ToolCallState, content: str
) -> None:
    grant, (call_id,) = await waiting(kit)
    run, call = await kit.store.resolve(kit.tenant, grant.run_id, call_id, decision, content, RESOLVED)
    assert (run.status, call.state, call.content) == (RunStatus.QUEUED, state, content)
    log = await kit.log(grant.run_id)
    assert (log[-1].seq, log[-1].type, log[-1].data) == (5, "action.resolved", '{"by":"a person"}')
    assert run.last_seq == 5
    assert await kit.due() == {grant.run_id}
    claim = await kit.claimed(grant.run_id, "c")
    assert claim.grant is not None
    assert claim.context is not None
    assert claim.grant.next_seq == 6
    assert [e.type for e in claim.context.events][-2:] == ["action.required", "action.resolved"]
    outcome, _ = await kit.store.begin(call_id, grant.session_id, claim.grant.fence)
    assert outcome is (BeginOutcome.GO if decision == RETRY else BeginOutcome.DONE)


async def test_abandon_ends_the_run_and_frees_the_session(kit: Kit) -> None:
    grant, (call_id,) = await waiting(kit)
    later = await kit.submit(grant.session_id)
    run, call = await kit.store.resolve(kit.tenant, grant.run_id, call_id, ABANDON, "no use", RESOLVED)
    assert (run.status, call.state) == (RunStatus.CANCELLED, ToolCallState.UNKNOWN)
    assert (await kit.types(grant.run_id))[-2:] == ["action.resolved", "run.cancelled"]
    assert json.loads((await kit.log(grant.run_id))[-1].data) == {"reason": "no use"}
    assert await kit.due() == {later.run.run_id}


async def test_the_run_waits_until_every_unknown_call_is_settled(kit: Kit) -> None:
    grant, (first, second) = await waiting(kit, 2)
    run, _ = await kit.store.resolve(kit.tenant, grant.run_id, first, COMPLETED, "a", RESOLVED)
    assert run.status is RunStatus.REQUIRES_ACTION
    assert await kit.due() == set()
    run, _ = await kit.store.resolve(kit.tenant, grant.run_id, second, FAILED, "b", RESOLVED)
    assert run.status is RunStatus.QUEUED


async def test_the_same_word_twice_is_one_and_another_comes_too_late(kit: Kit) -> None:
    grant, (call_id,) = await waiting(kit)
    for _ in range(2):
        _, call = await kit.store.resolve(kit.tenant, grant.run_id, call_id, COMPLETED, "a", RESOLVED)
        assert call.content == "a"
    assert (await kit.types(grant.run_id)).count("action.resolved") == 1
    for decision, content in ((COMPLETED, "b"), (FAILED, "a"), (RETRY, ""), (ABANDON, "")):
        with pytest.raises(FailedPreconditionError) as caught:
            await kit.store.resolve(kit.tenant, grant.run_id, call_id, decision, content, RESOLVED)
        assert caught.value.reason == "ACTION_NOT_REQUIRED"


async def test_a_person_may_approve_a_call_that_was_only_intended(kit: Kit) -> None:
    grant, (call_id,) = await journalled(kit, EffectClass.NON_IDEMPOTENT)
    await kit.step(grant, 4, event("action.required", "{}"), status=RunStatus.REQUIRES_ACTION)
    run, call = await kit.store.resolve(kit.tenant, grant.run_id, call_id, RETRY, "", RESOLVED)
    assert (run.status, call.state) == (RunStatus.QUEUED, ToolCallState.INTENT)


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
    (call,) = await kit.store.calls_of_run(kit.tenant, grant.run_id)
    # Of another begin: not its word.
    await kit.store.complete(call_id, call.fence + 1, ToolCallState.COMPLETED, "no", "")
    assert (await kit.store.calls_of_run(kit.tenant, grant.run_id))[0].state is ToolCallState.UNKNOWN
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
    grant, (call_id,) = await journalled(kit, EffectClass.IDEMPOTENT)
    await kit.store.begin(call_id, grant.session_id, grant.fence)
    await kit.step(grant, 4, event("action.required", "{}"), status=RunStatus.REQUIRES_ACTION)
    [call] = await kit.store.calls_of_run(kit.tenant, grant.run_id)
    assert call.state is ToolCallState.UNKNOWN
    run, call = await kit.store.resolve(kit.tenant, grant.run_id, call_id, COMPLETED, "7", RESOLVED)
    assert (run.status, call.state, call.content) == (RunStatus.QUEUED, ToolCallState.COMPLETED, "7")
