"""Leases beside appends: renewing, re-attaching, releasing, cutting; cancels; and what is due."""

from __future__ import annotations

import asyncio

from meshkit.ids import uuid7
from services.session.domain import AppendOutcome, ClaimOutcome, Cut, LeaseRef, RunAppend, RunStatus
from tests.integration.session.store.kit import Kit, event, ref


async def until(kit: Kit, session_id: object) -> float:
    """Milliseconds that a session's lease has left."""
    left: float = await kit.pool.fetchval(
        "SELECT extract(epoch FROM lease_until - clock_timestamp())::float8 * 1000 FROM session.lease"
        " WHERE session_id = $1",
        session_id,
    )
    return left


async def test_a_lease_lasts_its_ttl_and_renewing_starts_it_anew(kit: Kit) -> None:
    grant = await kit.started()
    assert grant.ttl_ms == 10_000
    assert 5_000 < await until(kit, grant.session_id) <= 10_000
    await kit.expire(grant.session_id)
    # Nobody took it meanwhile.
    assert (await kit.store.renew([ref(grant)])).lost == []
    assert 5_000 < await until(kit, grant.session_id) <= 10_000


async def test_renewing_says_which_are_lost_and_which_to_cancel(kit: Kit) -> None:
    kept, lost, cancelled, done = [await kit.started() for _ in range(4)]
    await kit.expire(lost.session_id)
    await kit.claimed(lost.run_id, "b")
    await kit.store.cancel(kit.tenant, cancelled.run_id, "")
    await kit.finish(done, 2)
    unknown = LeaseRef(uuid7(), uuid7(), 1)
    renewal = await kit.store.renew([ref(kept), ref(lost), ref(cancelled), ref(done), unknown])
    assert set(renewal.lost) == {lost.run_id, done.run_id, unknown.run_id}
    assert list(renewal.cancelled) == [cancelled.run_id]
    assert (await kit.store.renew([])).lost == ()


async def test_grants_that_are_good_no_more_are_told_apart(kit: Kit) -> None:
    kept, expired, taken, moved, released, done = grants = [await kit.started() for _ in range(6)]
    await kit.expire(expired.session_id)
    await kit.expire(taken.session_id)
    await kit.claimed(taken.run_id, "b")
    newer = await kit.store.reattach(ref(moved), "a")
    assert newer is not None
    await kit.store.release(ref(released))
    await kit.finish(done, 2)
    unknown = LeaseRef(uuid7(), uuid7(), 1)
    lost = await kit.store.lost_leases([*map(ref, grants), ref(newer), unknown])
    # Of the one that moved both are asked about; one that nobody took may be renewed yet.
    assert lost == {taken.run_id, moved.run_id, released.run_id, done.run_id, unknown.run_id}
    assert await kit.store.lost_leases([ref(kept), ref(expired), ref(newer)]) == set()
    assert await kit.store.lost_leases([]) == set()


async def test_reattach_fences_what_was_sent_before(kit: Kit) -> None:
    grant = await kit.started()
    await kit.append(grant, 2)
    again = await kit.store.reattach(ref(grant), "a")
    assert again is not None
    assert (again.fence, again.attach, again.next_seq) == (grant.fence + 1, 1, 3)
    assert (await kit.append(grant, 3)).outcome is AppendOutcome.FENCED
    assert (await kit.append(again, 3)).outcome is AppendOutcome.COMMITTED


async def test_reattach_whose_answer_was_lost_is_asked_for_again_with_the_old_fence(kit: Kit) -> None:
    grant = await kit.started()
    await kit.store.reattach(ref(grant), "a")
    again = await kit.store.reattach(ref(grant), "a")
    assert again is not None
    assert (again.fence, again.attach) == (grant.fence + 2, 2)
    assert await kit.store.reattach(ref(grant), "another") is None


async def test_what_an_owner_was_granted_unheard_is_its_own(kit: Kit) -> None:
    """A claim and a re-attach that PostgreSQL carried out long after whoever asked had given up on them."""
    grant = await kit.started()
    await kit.claimed(grant.run_id, "a")
    await kit.store.reattach(ref(grant), "a")
    renewal = await kit.store.renew([ref(grant)], "a")
    assert (renewal.lost, renewal.busy) == ([], [])
    assert (await kit.store.renew([ref(grant)], "b")).lost == [grant.run_id]
    again = await kit.store.reattach(ref(grant), "a")
    assert again is not None
    assert (await kit.append(again, grant.next_seq)).outcome is AppendOutcome.COMMITTED
    assert not await kit.store.release(ref(grant), "b")
    assert await kit.store.release(ref(grant), "a")


async def test_reattach_after_a_takeover_or_the_end_is_lost(kit: Kit) -> None:
    grant = await kit.started()
    await kit.expire(grant.session_id)
    newer = (await kit.claimed(grant.run_id, "b")).grant
    assert newer is not None
    assert await kit.store.reattach(ref(grant), "a") is None
    await kit.finish(newer, 2)
    assert await kit.store.reattach(ref(newer), "a") is None
    assert await kit.store.reattach(LeaseRef(uuid7(), uuid7(), 1), "a") is None


async def test_a_released_run_is_due_at_once_and_its_holder_fenced(kit: Kit) -> None:
    grant = await kit.started()
    await kit.append(grant, 2)
    assert await kit.store.release(ref(grant))
    assert not await kit.store.release(ref(grant))
    assert (await kit.append(grant, 3)).outcome is AppendOutcome.FENCED
    assert await kit.due() == {grant.run_id}
    claim = await kit.claimed(grant.run_id, "b")
    assert claim.grant is not None
    assert claim.grant.next_seq == 3


async def test_cutting_a_lease_needs_fence_and_attach_to_match(kit: Kit) -> None:
    grant, moved = await kit.started(), await kit.started()
    attached = await kit.store.reattach(ref(moved), "a")
    assert attached is not None
    assert await kit.store.shorten([ref(grant), ref(moved)], 500) == {grant.run_id}
    assert await until(kit, grant.session_id) <= 500
    assert await until(kit, moved.session_id) > 5_000
    # Never longer than it was.
    assert await kit.store.shorten([ref(grant)], 60_000) == {grant.run_id}
    assert await until(kit, grant.session_id) <= 500
    assert await kit.store.shorten([ref(attached)], 500) == {moved.run_id}
    assert await kit.store.shorten([], 500) == set()


async def test_claims_that_nobody_wrote_under_are_cut_by_their_owner(kit: Kit) -> None:
    mine, another = f"a-{uuid7()}", f"b-{uuid7()}"
    fresh, written, moved, other = [await kit.started(owner) for owner in (mine, mine, mine, another)]
    await kit.append(written, 2)
    assert await kit.store.reattach(ref(moved), mine) is not None
    assert await kit.store.shorten_claims(mine, 0, 60_000) == Cut()
    assert await kit.store.shorten_claims(mine, 0) == Cut(1)
    assert (await kit.store.claim(fresh.run_id, "c")).outcome is ClaimOutcome.CLAIMED
    for grant in (written, moved, other):
        assert (await kit.store.claim(grant.run_id, "c")).outcome is ClaimOutcome.ALREADY_CLAIMED


async def test_a_process_ends_what_its_former_ones_held_and_nothing_else(kit: Kit) -> None:
    name = f"a-{uuid7()}"
    former, before, own, other, longer = [
        await kit.started(owner)
        for owner in (
            f"{name}~00000001",
            f"{name}~00000002",
            f"{name}~00000003",
            "b~00000001",
            f"{name}0~00000001",
        )
    ]
    assert await kit.store.end_former(f"{name}~00000003") == Cut(2)
    assert await kit.store.end_former(f"{name}~00000003") == Cut()
    for grant in (former, before):
        assert (await kit.store.claim(grant.run_id, "c")).outcome is ClaimOutcome.CLAIMED
    for grant in (own, other, longer):
        assert (await kit.store.claim(grant.run_id, "c")).outcome is ClaimOutcome.ALREADY_CLAIMED
    assert [one.run_id for one in await kit.store.leases_of(f"{name}~00000003")] == [own.run_id]


async def test_a_locked_lease_is_skipped_and_not_taken_for_lost(kit: Kit) -> None:
    mine = f"a-{uuid7()}~00000001"
    locked, free = await kit.started(mine), await kit.started(mine)
    both = [ref(locked), ref(free)]
    async with kit.pool.acquire() as connection, connection.transaction():
        await connection.execute(
            "SELECT FROM session.lease WHERE session_id = $1 FOR UPDATE", locked.session_id
        )
        async with asyncio.timeout(1.5):  # far below the limit on the wait for a lock
            appends = [RunAppend(one.session_id, one.run_id, one.fence, 2, [event()]) for one in both]
            results = await kit.store.append(appends)
            renewal = await kit.store.renew(both, mine)
            assert await kit.store.shorten(both, 60_000) == {free.run_id}
            assert await kit.store.shorten_claims(mine, 60_000) == Cut(0, 1)
            assert await kit.store.end_former(f"{mine[:-1]}2") == Cut(1, 1)
            step = await kit.step(locked, 2, event())
    assert [result.outcome for result in results] == [AppendOutcome.RETRY, AppendOutcome.COMMITTED]
    assert (renewal.lost, renewal.busy) == ([], [locked.run_id])
    assert step.outcome is AppendOutcome.RETRY
    assert (await kit.step(locked, 2, event())).outcome is AppendOutcome.COMMITTED


async def test_a_locked_run_keeps_no_other_from_its_end(kit: Kit) -> None:
    locked, other = await kit.started(), await kit.started()
    for grant in (locked, other):
        await kit.store.cancel(kit.tenant, grant.run_id, "enough")
        await kit.expire(grant.session_id)
    async with kit.pool.acquire() as connection, connection.transaction():
        await connection.execute(
            "SELECT FROM session.session WHERE session_id = $1 FOR UPDATE", locked.session_id
        )
        async with asyncio.timeout(1.5):
            await kit.store.end_orphans(64)
    assert (await kit.store.get_run(kit.tenant, other.run_id)).status is RunStatus.CANCELLED
    assert (await kit.store.get_run(kit.tenant, locked.run_id)).status is RunStatus.RUNNING
    await kit.store.end_orphans(64)
    assert (await kit.store.get_run(kit.tenant, locked.run_id)).status is RunStatus.CANCELLED


async def test_fences_are_read_for_many_sessions(kit: Kit) -> None:
    grant = await kit.started()
    session = await kit.session()
    assert await kit.store.fences([grant.session_id, session.session_id, uuid7()]) == {
        grant.session_id: grant.fence,
        session.session_id: 0,
    }


async def test_due_gives_each_run_to_one_sweeper_and_again_only_later(kit: Kit) -> None:
    runs = {(await kit.submit((await kit.session()).session_id)).run.run_id for _ in range(40)}
    found = await asyncio.gather(*(kit.store.due(8) for _ in range(8)))
    taken = [run_id for batch in found for run_id in batch if run_id in runs]
    assert len(taken) == len(set(taken))
    taken += [run_id for run_id in await kit.store.due(10_000) if run_id in runs]
    assert sorted(taken) == sorted(runs)
    assert await kit.due() == set()
    await kit.make_due()
    assert await kit.due() == runs


async def test_due_finds_queued_heads_and_orphans_and_nothing_else(kit: Kit) -> None:
    held, orphan, waiting, done = [await kit.started() for _ in range(4)]
    behind = await kit.submit(held.session_id)
    queued = (await kit.submit((await kit.session()).session_id)).run
    await kit.expire(orphan.session_id)
    await kit.step(waiting, 2, event(), status=RunStatus.REQUIRES_ACTION)
    await kit.finish(done, 2)
    assert await kit.due() == {orphan.run_id, queued.run_id}
    await kit.finish(held, 2)
    assert await kit.due() == {behind.run.run_id}


async def test_cancel_of_a_queued_run_ends_it_and_leaves_the_holder_alone(kit: Kit) -> None:
    grant = await kit.started("a", "first")
    queued = await kit.submit(grant.session_id, "never")
    after = await kit.submit(grant.session_id, "after")
    run, terminal = await kit.store.cancel(kit.tenant, queued.run.run_id, 'a "reason"')
    assert run.status is RunStatus.CANCELLED
    assert terminal is not None
    assert (terminal.seq, terminal.type, terminal.data) == (2, "run.cancelled", '{"reason":"a \\"reason\\""}')
    assert await kit.log(run.run_id) == [queued.created, terminal]
    assert (await kit.append(grant, 2)).outcome is AppendOutcome.COMMITTED
    await kit.finish(grant, 3)
    await kit.claimed(after.run.run_id)
    # It was accepted: its input is in the conversation, at its turn.
    texts = [text for _, _, text in await kit.messages(grant.session_id)]
    assert texts == ["first", "done", "never", "after"]


async def test_cancel_of_a_held_run_is_the_holders_to_carry_out(kit: Kit) -> None:
    grant = await kit.started()
    for _ in range(2):
        run, terminal = await kit.store.cancel(kit.tenant, grant.run_id, "stop")
        assert (run.status, run.cancel_requested, terminal) == (RunStatus.RUNNING, True, None)
    assert run.cancel_reason == "stop"
    assert (await kit.append(grant, 2)).outcome is AppendOutcome.COMMITTED


async def test_cancel_of_an_orphan_ends_it_and_fences_its_writer(kit: Kit) -> None:
    grant = await kit.started()
    await kit.append(grant, 2)
    await kit.expire(grant.session_id)
    run, terminal = await kit.store.cancel(kit.tenant, grant.run_id, "")
    assert run.status is RunStatus.CANCELLED
    assert terminal is not None
    assert terminal.seq == 3
    assert (await kit.append(grant, 3)).outcome is AppendOutcome.FENCED
    assert await kit.store.reattach(ref(grant), "a") is None
    assert await kit.types(grant.run_id) == ["run.created", "text.delta", "run.cancelled"]


async def test_cancel_too_late_changes_nothing(kit: Kit) -> None:
    grant = await kit.started()
    await kit.finish(grant, 2)
    run, terminal = await kit.store.cancel(kit.tenant, grant.run_id, "late")
    assert (run.status, run.cancel_requested, terminal) == (RunStatus.COMPLETED, False, None)


async def test_cancels_and_claims_of_one_run_end_it_once(kit: Kit) -> None:
    for _ in range(10):
        session = await kit.session()
        run_id = (await kit.submit(session.session_id)).run.run_id
        cancels = [kit.store.cancel(kit.tenant, run_id, "x") for _ in range(3)]
        *cancelled, claim = await asyncio.gather(*cancels, kit.store.claim(run_id, "a"))
        if claim.outcome is ClaimOutcome.CLAIMED:
            assert claim.grant is not None
            assert all(terminal is None for _, terminal in cancelled)
            assert (await kit.store.renew([ref(claim.grant)])).cancelled == [run_id]
        else:
            assert sum(terminal is not None for _, terminal in cancelled) == 1
            assert await kit.types(run_id) == ["run.created", "run.cancelled"]


async def test_lists_of_runs_page_newest_first(kit: Kit) -> None:
    session = await kit.session()
    ids = [(await kit.submit(session.session_id)).run.run_id for _ in range(5)]
    seen, token = [], ""
    while True:
        page = await kit.store.list_runs(kit.tenant, session.session_id, page_size=2, page_token=token)
        seen += [run.run_id for run in page.items]
        token = page.next_page_token
        if not token:
            break
    assert seen == ids[::-1]
    runs = await kit.store.runs_from(kit.tenant, session.session_id, 2, 3)
    assert [run.run_id for run in runs] == ids[1:4]
    assert await kit.store.last_ordinals([session.session_id]) == {session.session_id: 5}


async def test_a_clock_that_went_back_keeps_no_session_and_no_run_waiting(kit: Kit) -> None:
    held, queued = await kit.started(), (await kit.submit((await kit.session()).session_id)).run.run_id
    # As they stand when PostgreSQL's clock was an hour ahead and is right again.
    await kit.pool.execute(
        "UPDATE session.lease SET lease_until = clock_timestamp() + interval '1 hour' WHERE session_id = $1",
        held.session_id,
    )
    await kit.pool.execute(
        "UPDATE session.run SET dispatch_after = now() + interval '1 hour' WHERE run_id = ANY($1)",
        [held.run_id, queued],
    )
    assert {held.run_id, queued} <= await kit.due()
    assert not {held.run_id, queued} & await kit.due()
    claim = await kit.claimed(held.run_id, "b")
    assert claim.grant is not None
    assert (await kit.append(held, 2)).outcome is AppendOutcome.FENCED
    # Whoever is alive renews, and is safe again.
    assert (await kit.store.renew([ref(claim.grant)])).lost == []
    assert (await kit.store.claim(held.run_id, "c")).outcome is ClaimOutcome.ALREADY_CLAIMED
