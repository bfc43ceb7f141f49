"""Appends: whole and in place or not at all, whatever happens at the same time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import pytest

from meshkit.errors import InvalidArgumentError, OutOfRangeError
from meshkit.ids import uuid7, uuid7_from_ms
from services.session.domain import (
    AppendOutcome,
    ClaimOutcome,
    EffectClass,
    Grant,
    NewMessage,
    RunAppend,
    RunError,
    RunStatus,
    ToolCallState,
    Usage,
)
from tests.integration.session.store.kit import Kit, event, intent, ref


async def test_appended_events_come_back_as_they_were(kit: Kit) -> None:
    grant = await kit.started()
    events = [event("text.delta", '{"text": "é☃ \\u0041",  "a" : 1}'), event("usage", "{}")]
    result = await kit.append(grant, 2, *events)
    assert (result.outcome, result.next_seq) == (AppendOutcome.COMMITTED, 4)
    log = await kit.log(grant.run_id)
    assert [(e.type, e.time_ms, e.data) for e in log[1:]] == [(e.type, e.time_ms, e.data) for e in events]
    assert (await kit.store.heads([grant.run_id]))[grant.run_id] == 3
    assert (await kit.store.get_run(kit.tenant, grant.run_id)).last_seq == 3


async def test_each_append_of_a_batch_is_won_or_refused_by_itself(kit: Kit) -> None:
    grants = [await kit.started() for _ in range(5)]
    later = await kit.started()
    await kit.finish(later, 2)

    def write(grant: Grant, first_seq: int, fence: int) -> RunAppend:
        return RunAppend(grant.session_id, grant.run_id, fence, first_seq, [event(), event()])

    results = await kit.store.append(
        [
            write(grants[0], 2, grants[0].fence),
            write(grants[1], 3, grants[1].fence),  # leaves a gap
            write(grants[2], 2, grants[2].fence + 1),  # a fence of the future
            RunAppend(uuid7(), uuid7(), 1, 2, [event()]),  # no such session
            write(grants[3], 1, grants[3].fence),  # overwrites
            write(later, 3, later.fence),  # after the end
            RunAppend(grants[4].session_id, later.run_id, grants[4].fence, 2, [event()]),  # another's run
        ]
    )
    assert [r.outcome for r in results] == [
        AppendOutcome.COMMITTED,
        AppendOutcome.GAP,
        AppendOutcome.FENCED,
        AppendOutcome.FENCED,
        AppendOutcome.GAP,
        AppendOutcome.FENCED,
        AppendOutcome.FENCED,
    ]
    assert [results[i].next_seq for i in (0, 1, 4)] == [4, 2, 2]
    for grant in grants[1:]:
        assert await kit.types(grant.run_id) == ["run.created"]
    assert (await kit.types(later.run_id))[-1] == "run.completed"


async def test_an_append_that_is_sent_again_is_a_gap_that_says_where_the_log_stands(kit: Kit) -> None:
    grant = await kit.started()
    await kit.append(grant, 2, event(), event())
    again = await kit.append(grant, 2, event(), event())
    assert (again.outcome, again.next_seq) == (AppendOutcome.GAP, 4)
    assert len(await kit.log(grant.run_id)) == 3


async def test_a_refusal_that_is_over_by_the_time_it_is_explained_asks_for_the_same_again(kit: Kit) -> None:
    grant = await kit.started()
    row = await kit.pool.fetchrow(
        "SELECT outcome, next_seq FROM session.refusal($1, $2, $3, 2, 1)",
        grant.session_id,
        grant.run_id,
        grant.fence,
    )
    assert (AppendOutcome(row["outcome"]), row["next_seq"]) == (AppendOutcome.RETRY, 2)


async def test_sessions_of_one_append_must_be_distinct(kit: Kit) -> None:
    grant = await kit.started()
    append = RunAppend(grant.session_id, grant.run_id, grant.fence, 2, [event()])
    with pytest.raises(InvalidArgumentError):
        await kit.store.append([append, append])
    assert await kit.store.append([]) == []


async def test_one_bad_text_refuses_the_whole_batch(kit: Kit) -> None:
    good, bad = await kit.started(), await kit.started()
    with pytest.raises(InvalidArgumentError):
        await kit.store.append(
            [
                RunAppend(good.session_id, good.run_id, good.fence, 2, [event()]),
                RunAppend(bad.session_id, bad.run_id, bad.fence, 2, [event("text.delta", '"\x00"')]),
            ]
        )
    assert await kit.types(good.run_id) == ["run.created"]


async def test_two_flushers_that_share_sessions_never_deadlock_nor_leave_a_gap(kit: Kit) -> None:
    """Flushers on the same runs in other orders, beside renewals, cuts, steps and submits."""
    grants = [await kit.started() for _ in range(12)]
    shuffle = random.Random(7)
    committed = [0] * len(grants)
    refused = 0

    async def flush() -> None:
        nonlocal refused
        for _ in range(60):
            order = shuffle.sample(range(len(grants)), 9)
            heads = await kit.store.heads([grants[i].run_id for i in order])
            results = await kit.store.append(
                [
                    RunAppend(
                        grants[i].session_id,
                        grants[i].run_id,
                        grants[i].fence,
                        heads[grants[i].run_id] + 1,
                        [event()] * shuffle.randint(1, 3),
                    )
                    for i in order
                ]
            )
            for i, result in zip(order, results, strict=True):
                if result.outcome is AppendOutcome.COMMITTED:
                    committed[i] += result.next_seq - result.first_seq
                else:
                    assert result.outcome in (AppendOutcome.GAP, AppendOutcome.RETRY)
                    refused += 1

    async def hold() -> None:
        for _ in range(60):
            refs = [ref(grant) for grant in shuffle.sample(grants, 8)]
            assert (await kit.store.renew(refs)).lost == []
            await kit.store.shorten(shuffle.sample(refs, 4), 60_000)

    async def step() -> None:
        for _ in range(40):
            i = shuffle.randrange(len(grants))
            head = (await kit.store.heads([grants[i].run_id]))[grants[i].run_id]
            message = NewMessage(uuid7(), "assistant", "x")
            result = await kit.step(grants[i], head + 1, event(), messages=(message,))
            committed[i] += result.outcome is AppendOutcome.COMMITTED
            await kit.submit(grants[i].session_id, owner="b")

    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        for work in (flush, flush, flush, hold, step):
            tasks.create_task(work())
    assert refused > 0, "the flushers never met"
    for i, grant in enumerate(grants):
        assert len(await kit.types(grant.run_id)) == 1 + committed[i]
        ordinals = [ordinal for ordinal, _, _ in await kit.messages(grant.session_id)]
        assert ordinals == list(range(1, len(ordinals) + 1))


async def test_takeovers_under_appends_leave_no_gap_and_no_write_of_an_old_fence(kit: Kit) -> None:
    sessions = [await kit.started("a0") for _ in range(6)]
    stop = asyncio.Event()
    holders: list[Grant] = list(sessions)
    took = 0

    async def write(i: int, name: str) -> None:
        """Writes as long as it holds the lease; takes it when it is free."""
        nonlocal took
        run_id = sessions[i].run_id
        grant: Grant | None = sessions[i] if name == "a0" else None
        seq = 2
        while not stop.is_set():
            if grant is None:
                claim = await kit.store.claim(run_id, name)
                if claim.outcome is not ClaimOutcome.CLAIMED:
                    await asyncio.sleep(0)
                    continue
                assert claim.grant is not None
                grant, seq = claim.grant, claim.grant.next_seq
                assert grant.fence > holders[i].fence
                holders[i] = grant
                took += 1
            result = await kit.append(grant, seq)
            if result.outcome is AppendOutcome.COMMITTED:
                seq += 1
            elif result.outcome is not AppendOutcome.RETRY:
                assert result.outcome is AppendOutcome.FENCED
                grant = None

    async def expire() -> None:
        for _ in range(60):
            await kit.expire(sessions[random.randrange(6)].session_id)
            await asyncio.sleep(0.002)
        stop.set()

    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        for i in range(6):
            for name in ("a0", "a1"):
                tasks.create_task(write(i, name))
        tasks.create_task(expire())
    assert took > 10
    rows = await kit.pool.fetch(
        "SELECT run_id, array_agg(seq ORDER BY seq) seqs, array_agg(fence ORDER BY seq) fences"
        " FROM session.event WHERE run_id = ANY($1) GROUP BY run_id",
        [grant.run_id for grant in sessions],
    )
    for row in rows:
        assert row["seqs"] == list(range(1, len(row["seqs"]) + 1))
        assert row["fences"] == sorted(row["fences"])


async def test_a_step_commits_events_messages_and_intents_together(kit: Kit) -> None:
    grant = await kit.started("a", "question")
    message = NewMessage(uuid7(), "assistant", "", '[{"call_id":"c"}]')
    result = await kit.step(
        grant,
        2,
        event("message.completed", "{}"),
        event("tool.call", "{}"),
        messages=(message,),
        intents=(intent(grant.run_id, 0), intent(grant.run_id, 1, EffectClass.IDEMPOTENT)),
    )
    assert (result.outcome, result.next_seq) == (AppendOutcome.COMMITTED, 4)
    stored = (await kit.store.list_messages(kit.tenant, grant.session_id, page_size=5, page_token="")).items
    assert [(m.ordinal, m.role, m.tool_calls, m.run_id) for m in stored] == [
        (1, "user", "", grant.run_id),
        (2, "assistant", '[{"call_id":"c"}]', grant.run_id),
    ]
    assert stored[1].message_id == message.message_id
    assert (await kit.store.get_session(kit.tenant, grant.session_id)).message_count == 2
    calls = await kit.calls(grant.run_id)
    assert [(c.call_id, c.state) for c in calls] == [
        (f"{grant.run_id}:1:0", ToolCallState.INTENT),
        (f"{grant.run_id}:1:1", ToolCallState.INTENT),
    ]
    # And the same once more changes nothing.
    again = await kit.step(grant, 2, event(), event(), messages=(message,))
    assert (again.outcome, again.next_seq) == (AppendOutcome.GAP, 4)
    assert len(await kit.messages(grant.session_id)) == 2


async def test_a_step_that_cannot_be_stored_leaves_nothing(kit: Kit) -> None:
    grant = await kit.started()
    with pytest.raises(InvalidArgumentError):
        await kit.step(grant, 2, event(), event(), messages=(NewMessage(uuid7(), "assistant", "a\x00b"),))
    assert await kit.types(grant.run_id) == ["run.created"]
    assert (await kit.append(grant, 2)).outcome is AppendOutcome.COMMITTED


async def test_a_step_without_events_may_be_sent_twice(kit: Kit) -> None:
    grant = await kit.started()
    message = NewMessage(uuid7(), "assistant", "x")
    for _ in range(2):
        assert (await kit.step(grant, 2, messages=(message,))).outcome is AppendOutcome.COMMITTED
    assert len(await kit.messages(grant.session_id)) == 2
    assert (await kit.store.get_session(kit.tenant, grant.session_id)).message_count == 2


async def test_a_terminal_step_ends_the_run_and_frees_the_session(kit: Kit) -> None:
    grant = await kit.started()
    later = await kit.submit(grant.session_id)
    assert await kit.due() == set()
    error = RunError("UNAVAILABLE", "MODEL_UNAVAILABLE", "the model is away", True)
    await kit.step(
        grant, 2, event("run.failed", "{}"), status=RunStatus.FAILED, error=error, usage=Usage(4, 5, 6)
    )
    run = await kit.store.get_run(kit.tenant, grant.run_id)
    assert (run.status, run.error, run.usage, run.last_seq) == (RunStatus.FAILED, error, Usage(4, 5, 6), 2)
    assert run.finish_time_ms >= run.create_time_ms
    assert (await kit.append(grant, 3)).outcome is AppendOutcome.FENCED
    assert (await kit.store.renew([ref(grant)])).lost == [grant.run_id]
    assert await kit.due() == {later.run.run_id}
    assert (await kit.store.get_session(kit.tenant, grant.session_id)).active_run_id == later.run.run_id


async def test_a_terminal_step_sent_again_is_a_gap_even_after_the_next_run_began(kit: Kit) -> None:
    grant = await kit.started()
    later = await kit.submit(grant.session_id)

    async def end() -> tuple[AppendOutcome, int]:
        result = await kit.step(grant, 2, event("run.completed", "{}"), status=RunStatus.COMPLETED)
        return result.outcome, result.next_seq

    assert await end() == (AppendOutcome.COMMITTED, 3)
    assert await end() == (AppendOutcome.GAP, 3)
    await kit.claimed(later.run.run_id)
    assert await end() == (AppendOutcome.GAP, 3)
    assert await kit.types(grant.run_id) == ["run.created", "run.completed"]


async def test_a_terminal_step_of_a_writer_that_lost_its_lease_is_fenced(kit: Kit) -> None:
    grant = await kit.started()
    await kit.expire(grant.session_id)
    newer = (await kit.claimed(grant.run_id, "b")).grant
    assert newer is not None
    stale = await kit.step(grant, 2, event("run.completed", "{}"), status=RunStatus.COMPLETED)
    assert stale.outcome is AppendOutcome.FENCED
    await kit.finish(newer, 2)
    # The log ends where the stale write would have, but it is not that write.
    stale = await kit.step(grant, 2, event("run.completed", "{}"), status=RunStatus.COMPLETED)
    assert stale.outcome is AppendOutcome.FENCED


async def test_an_intent_that_was_not_acted_on_may_change_and_no_other(kit: Kit) -> None:
    grant = await kit.started()
    await kit.step(grant, 2, event(), intents=(intent(grant.run_id, 0, EffectClass.PURE),))
    await kit.step(grant, 3, event(), intents=(intent(grant.run_id, 0, EffectClass.IDEMPOTENT),))
    (call,) = await kit.calls(grant.run_id)
    assert call.effect is EffectClass.IDEMPOTENT
    await kit.store.begin(call.call_id, grant.session_id, grant.fence)
    await kit.step(grant, 4, event(), intents=(intent(grant.run_id, 0, EffectClass.PURE),))
    (call,) = await kit.calls(grant.run_id)
    assert (call.effect, call.state) == (EffectClass.IDEMPOTENT, ToolCallState.RUNNING)
    # Another run cannot touch it.
    other = await kit.started()
    await kit.step(other, 2, event(), intents=(intent(grant.run_id, 0, EffectClass.PURE),))
    assert len(await kit.calls(other.run_id)) == 0


@pytest.mark.parametrize("limit", [1, 3, 100])
async def test_pages_of_the_log_join_without_gap(kit: Kit, limit: int) -> None:
    grant = await kit.started()
    await kit.append(grant, 2, *(event() for _ in range(9)))
    seen: Sequence[int] = []
    while page := await kit.store.events_after(kit.tenant, grant.run_id, len(seen), limit):
        seen = [*seen, *(e.seq for e in page)]
    assert seen == list(range(1, 11))
    assert await kit.store.events_after(kit.tenant, grant.run_id, 10, limit) == []


async def test_a_cursor_older_than_what_is_kept_has_expired(kit: Kit) -> None:
    grant = await kit.started()
    await kit.append(grant, 2, event(), event())
    await kit.pool.execute("DELETE FROM session.event WHERE run_id = $1 AND seq <= 2", grant.run_id)
    for cursor in (0, 1):
        with pytest.raises(OutOfRangeError) as caught:
            await kit.store.events_after(kit.tenant, grant.run_id, cursor, 10)
        assert caught.value.reason == "CURSOR_EXPIRED"
    assert [e.seq for e in await kit.store.events_after(kit.tenant, grant.run_id, 2, 10)] == [3]
    await kit.pool.execute("DELETE FROM session.event WHERE run_id = $1", grant.run_id)
    with pytest.raises(OutOfRangeError):
        await kit.store.events_after(kit.tenant, grant.run_id, 2, 10)
    # Past the end there is nothing that could have expired.
    assert await kit.store.events_after(kit.tenant, grant.run_id, 3, 10) == []
    # Its next claim goes on where the log was.
    await kit.expire(grant.session_id)
    claim = await kit.claimed(grant.run_id, "b")
    assert claim.grant is not None
    assert claim.grant.next_seq == 4


async def test_ids_of_any_time_find_a_partition(kit: Kit) -> None:
    for ms in (0, 10**12, 2**48 - 1):
        run_id = uuid7_from_ms(ms)
        table = await kit.pool.fetchval(
            "WITH e AS (INSERT INTO session.event VALUES ($1, 1, 0, $2, $2, 0, 't', '{}') RETURNING tableoid)"
            " SELECT tableoid::regclass::text FROM e",
            run_id,
            kit.tenant,
        )
        assert table == "session.event_default"
    await kit.pool.execute("DELETE FROM session.event_default")
