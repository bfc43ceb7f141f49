"""Deleting a session whose tools act, in the store and by the operation."""

from __future__ import annotations

import asyncio
import time
from typing import Any
from uuid import UUID

import pytest

from meshkit.errors import FailedPreconditionError, NotFoundError
from services.session.domain import BeginOutcome, EffectClass, Event, Run, ToolCallState
from services.session.operations.delete import delete_session
from tests.integration.session.store.kit import Kit
from tests.integration.session.store.test_journal import journalled

REFUND = EffectClass.NON_IDEMPOTENT
ACT_MS = 60_000


class Told:
    """What a replica's other parts are told, in place of `Commits`."""

    def __init__(self) -> None:
        self.gone: list[UUID] = []
        self.ended: list[Event | None] = []

    def deleted(self, session_id: UUID) -> None:
        self.gone.append(session_id)

    def cancelled(self, run: Run, event: Event | None) -> None:
        self.ended.append(event)


async def delete(kit: Kit, session_id: UUID, seconds: float, told: Told | None = None) -> None:
    commits: Any = told or Told()
    await delete_session(kit.store, commits, kit.tenant, session_id, seconds=seconds)


@pytest.mark.parametrize("effect", [REFUND, EffectClass.IDEMPOTENT])
async def test_a_session_is_not_deleted_while_a_call_of_it_acts(kit: Kit, effect: EffectClass) -> None:
    grant, (call_id,) = await journalled(kit, effect)
    await kit.store.begin(call_id, grant.session_id, grant.fence, ACT_MS)
    (acting,) = await kit.store.delete_session(kit.tenant, grant.session_id)
    assert acting.call_id == call_id
    assert await kit.store.get_session(kit.tenant, grant.session_id)
    # Whatever came of it: it has ended.
    await kit.store.complete(call_id, grant.fence, ToolCallState.UNKNOWN, "cut", "", 1)
    assert await kit.store.delete_session(kit.tenant, grant.session_id) == []
    with pytest.raises(NotFoundError):
        await kit.store.get_session(kit.tenant, grant.session_id)


async def test_what_cannot_act_or_changes_nothing_is_not_waited_for(kit: Kit) -> None:
    effects = (REFUND, REFUND, EffectClass.PURE, REFUND)
    grant, (done, past, pure, intended) = await journalled(kit, *effects)
    await kit.store.begin(done, grant.session_id, grant.fence, ACT_MS)
    await kit.store.complete(done, grant.fence, ToolCallState.COMPLETED, "42", "", 1)
    # Its time is over: it must have ended, though nobody said so.
    await kit.store.begin(past, grant.session_id, grant.fence, 0)
    await kit.store.begin(pure, grant.session_id, grant.fence, ACT_MS)
    assert await kit.store.delete_session(kit.tenant, grant.session_id) == []
    with pytest.raises(NotFoundError):
        await kit.store.begin(intended, grant.session_id, grant.fence, ACT_MS)


async def test_a_try_that_did_not_stop_when_told_to_is_still_waited_for(kit: Kit) -> None:
    grant, (call_id,) = await journalled(kit, REFUND)
    await kit.store.begin(call_id, grant.session_id, grant.fence, ACT_MS)
    await kit.store.complete(call_id, grant.fence, ToolCallState.UNKNOWN, "late", "", 1, acts=True)
    assert len(await kit.store.delete_session(kit.tenant, grant.session_id)) == 1


async def test_a_call_of_a_run_that_ended_may_still_act(kit: Kit) -> None:
    """An agent tells its calls to stop and ends its run; it does not wait for them."""
    grant, (call_id,) = await journalled(kit, REFUND)
    await kit.store.begin(call_id, grant.session_id, grant.fence, ACT_MS)
    await kit.finish(grant, 4)
    assert (await kit.store.look(call_id, grant.session_id)).state is ToolCallState.UNKNOWN
    assert len(await kit.store.delete_session(kit.tenant, grant.session_id)) == 1
    await kit.store.complete(call_id, grant.fence, ToolCallState.UNKNOWN, "cut", "", 1)
    assert await kit.store.delete_session(kit.tenant, grant.session_id) == []


@pytest.mark.parametrize("order", [(1, 2, 3), (2, 1, 3), (3, 1, 2), (3, 2, 1)])
async def test_each_try_that_acts_is_waited_for_in_whatever_order_they_end(
    kit: Kit, order: tuple[int, ...]
) -> None:
    """Of a call that may run again another replica begins a try while the first one's still acts."""
    grant, (call_id,) = await journalled(kit, EffectClass.IDEMPOTENT)
    for _ in order:
        await kit.store.begin(call_id, grant.session_id, grant.fence, ACT_MS)
    for number in order:
        assert len(await kit.store.delete_session(kit.tenant, grant.session_id)) == 1
        for _ in range(2):
            # Said twice, as when its answer got lost; the first outcome stays.
            call = await kit.store.complete(
                call_id, grant.fence, ToolCallState.COMPLETED, str(number), "", number
            )
            assert (call.state, call.content) == (ToolCallState.COMPLETED, str(order[0]))
    assert await kit.store.delete_session(kit.tenant, grant.session_id) == []


@pytest.mark.parametrize("effect", list(EffectClass)[1:])
async def test_no_call_of_a_cancelled_run_begins(kit: Kit, effect: EffectClass) -> None:
    grant, (call_id,) = await journalled(kit, effect)
    await kit.store.cancel(kit.tenant, grant.run_id, "enough")
    outcome, call = await kit.store.begin(call_id, grant.session_id, grant.fence, ACT_MS)
    assert (outcome, call.state, call.tries) == (BeginOutcome.DONE, ToolCallState.FAILED, 0)
    assert "was not begun" in call.content


async def test_of_a_call_that_was_begun_before_its_run_was_cancelled_nobody_says_that_it_was_not(
    kit: Kit,
) -> None:
    grant, (call_id,) = await journalled(kit, EffectClass.IDEMPOTENT)
    await kit.store.begin(call_id, grant.session_id, grant.fence, ACT_MS)
    await kit.store.cancel(kit.tenant, grant.run_id, "enough")
    outcome, call = await kit.store.begin(call_id, grant.session_id, grant.fence, ACT_MS)
    assert (outcome, call.state, call.tries) == (BeginOutcome.DONE, ToolCallState.FAILED, 1)
    assert "not begun again" in call.content


async def test_begin_and_cancel_at_once_agree(kit: Kit) -> None:
    """A call either began before its run's cancel was promised, or never does."""
    for _ in range(20):
        grant, (call_id,) = await journalled(kit, REFUND)
        (outcome, call), _ = await asyncio.gather(
            kit.store.begin(call_id, grant.session_id, grant.fence, ACT_MS),
            kit.store.cancel(kit.tenant, grant.run_id, "enough"),
        )
        began = outcome is BeginOutcome.GO
        assert began == (call.state is ToolCallState.RUNNING)
        assert bool(await kit.store.delete_session(kit.tenant, grant.session_id)) is began


async def test_deleting_cancels_what_acts_and_waits_for_its_end(kit: Kit) -> None:
    grant, (call_id, other) = await journalled(kit, REFUND, REFUND)
    await kit.store.begin(call_id, grant.session_id, grant.fence, ACT_MS)
    told = Told()

    async def act_until_cancelled() -> float:
        async with asyncio.timeout(10):
            while not (await kit.store.get_run(kit.tenant, grant.run_id)).cancel_requested:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        outcome, _ = await kit.store.begin(other, grant.session_id, grant.fence, ACT_MS)
        assert outcome is BeginOutcome.DONE
        ended = time.monotonic()
        await kit.store.complete(call_id, grant.fence, ToolCallState.UNKNOWN, "cut", "", 1)
        return ended

    async with asyncio.TaskGroup() as group:
        acting = group.create_task(act_until_cancelled())
        deleting = group.create_task(delete(kit, grant.session_id, 10, told))
        await deleting
        assert acting.result() < time.monotonic()
    assert told.gone == [grant.session_id]
    assert told.ended == [None]


async def test_deleting_says_what_still_acts_and_may_be_repeated(kit: Kit) -> None:
    grant, (call_id,) = await journalled(kit, REFUND)
    await kit.store.begin(call_id, grant.session_id, grant.fence, ACT_MS)
    told = Told()
    for _ in range(2):
        with pytest.raises(FailedPreconditionError) as refused:
            await delete(kit, grant.session_id, 0.1, told)
        assert refused.value.reason == "CALLS_UNDER_WAY"
        assert call_id in refused.value.metadata["calls"]
        assert refused.value.retry_after_ms
    assert told.gone == []
    await kit.store.complete(call_id, grant.fence, ToolCallState.COMPLETED, "42", "", 1)
    await delete(kit, grant.session_id, 0.1, told)
    assert told.gone == [grant.session_id]
