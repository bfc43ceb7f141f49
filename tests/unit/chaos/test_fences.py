"""Invariants 2, 3 and 7: fences never decrease, stale ones write nothing, Redis holds what the log does."""

from __future__ import annotations

import pytest

from tests.unit.chaos.support import assert_clean, assert_found, drop, of
from tests.unit.chaos.world import Run, World


@pytest.fixture
def world() -> World:
    """A run that was re-attached and taken over, and the session's next one."""
    world = World()
    session = world.session()
    run = world.submit(session)
    world.claim(run, "agent-1")
    world.append(run, "step.started", "text.delta")
    world.reattach(run)
    world.append(run, "text.delta")
    world.fault()
    world.claim(run, "agent-2")
    world.tool(run)
    world.live(run)
    world.finish(run)
    world.whole(world.submit(session))
    world.live(world.runs[1])
    assert_clean(world)
    return world


def entry(world: World, run: Run, seq: int) -> dict[str, object]:
    return of(world, "log", run=run.name, seq=seq)[0]


# what passes


def test_runs_that_end_before_their_turn_may_do_so_under_any_fence() -> None:
    world = World()
    session = world.session()
    first, waiting, last = world.submit(session), world.submit(session), world.submit(session)
    world.claim(first)
    world.cancel(last)  # under the fence of the first
    world.reattach(first)
    world.finish(first)
    world.cancel(waiting)  # under a fence of its own
    fourth, fifth = world.submit(session), world.submit(session)
    world.cancel(fifth)  # takes the lease before the fourth does
    world.whole(fourth)
    ends = {run.name: of(world, "log", run=run.name)[-1]["fence"] for run in (fourth, fifth)}
    assert ends[fifth.name] < ends[fourth.name]
    assert_clean(world)


def test_redis_may_forget_its_fences_with_its_data(world: World) -> None:
    session = world.sessions[0]
    world.note("live_fence", session=session.name, fence=session.fence)
    world.note("fault", fault="flushall", target="valkey", detail="")
    world.note("live_fence", session=session.name, fence=1)
    assert_clean(world)


# fences that fall


def test_a_fence_that_was_granted_twice(world: World) -> None:
    third = of(world, "grant", fence=3)[0]
    third["fence"] = 2
    assert_found(world, 2, "fence 2 of session session-1 was granted after 2")


def test_a_fence_that_fell(world: World) -> None:
    of(world, "grant", fence=4)[0]["fence"] = 1
    assert_found(world, 2, "was granted after 3")


def test_a_takeover_that_left_the_fence_as_it_was(world: World) -> None:
    """Nobody noted a grant, for the fence did not change."""
    drop(world, *of(world, "grant", fence=3))
    for record in of(world, "log", fence=3):
        record["fence"] = 2
    assert_found(world, 2, "was claimed 2 times, under 1 grants")


def test_a_re_attachment_that_was_not_recorded(world: World) -> None:
    drop(world, *of(world, "grant", fence=2))
    assert_found(world, 2, "fence 3 of session session-1 was granted after 1")


def test_a_first_grant_that_was_not_recorded(world: World) -> None:
    drop(world, *of(world, "grant", fence=1))
    assert_found(world, 2, "fence 2 of session session-1 was granted after 0")


def test_a_re_attachment_to_a_lease_of_another_run(world: World) -> None:
    of(world, "grant", fence=4)[0]["attach"] = 1
    assert_found(world, 2, "re-attaches to what was not held")


def test_a_re_attachment_that_skips_one(world: World) -> None:
    of(world, "grant", fence=2)[0]["attach"] = 2
    assert_found(world, 2, "re-attaches to what was not held")


def test_a_log_whose_fences_fall(world: World) -> None:
    entry(world, world.runs[0], 8)["fence"] = 2
    assert_found(world, 2, "goes from fence 3 to 2 at 8")


def test_a_run_submitted_under_a_fence(world: World) -> None:
    entry(world, world.runs[0], 1)["fence"] = 1
    assert_found(world, 2, "was submitted under a fence")


def test_a_run_under_a_fence_of_the_run_before_it(world: World) -> None:
    for record in of(world, "log", run=world.runs[1].name):
        record["fence"] = min(record["fence"], 3)
    assert_found(world, 2, "begins under fence 3")


def test_a_lease_whose_fence_fell(world: World) -> None:
    of(world, "lease_row")[0]["fence"] = 3
    assert_found(world, 2, "has fence 3, granted was 4")


def test_a_lease_whose_fence_nobody_granted(world: World) -> None:
    of(world, "lease_row")[0]["fence"] = 5
    assert_found(world, 2, "has fence 5, granted was 4")


def test_a_fence_that_redis_lowered(world: World) -> None:
    world.note("live_fence", session=world.sessions[0].name, fence=3)
    assert_found(world, 2, "Redis had fence 4")


# stale writes in PostgreSQL


def test_a_stale_owner_that_writes_after_a_takeover() -> None:
    """The log of the stale owner's own making has falling fences nowhere: it wrote the last entries."""
    world = World()
    run = world.submit(world.session())
    world.claim(run, "agent-1")
    world.claim(run, "agent-2")
    world.finish(run)
    assert_clean(world)
    for record in of(world, "log", run=run.name):
        record["fence"] = min(record["fence"], 1)
    assert_found(world, 3, "though 2 was granted from 3 on")


def test_one_stale_entry_among_good_ones(world: World) -> None:
    grant = of(world, "grant", fence=3)[0]
    entry(world, world.runs[0], grant["next_seq"])["fence"] = 2
    assert_found(world, 3, "though 3 was granted")


def test_an_entry_just_before_a_takeover_is_not_stale(world: World) -> None:
    grant = of(world, "grant", fence=3)[0]
    assert entry(world, world.runs[0], grant["next_seq"] - 1)["fence"] == 2


def test_an_entry_that_was_written_again_under_a_newer_fence(world: World) -> None:
    grant = of(world, "grant", fence=3)[0]
    entry(world, world.runs[0], grant["next_seq"] - 1)["fence"] = 3
    assert_found(world, 3, "was written again")


def test_an_entry_under_a_fence_that_nobody_was_granted(world: World) -> None:
    run = world.runs[1]
    entry(world, run, run.last_seq)["fence"] = 9
    assert_found(world, 3, "which nobody was granted")


def test_grants_that_were_not_recorded(world: World) -> None:
    drop(world, *of(world, "grant"))
    assert_found(world, 3, "which nobody was granted")
    assert_found(world, 2, "under 0 grants")


def test_an_entry_without_a_lease(world: World) -> None:
    run = world.runs[0]
    entry(world, run, 2)["fence"] = 0
    assert_found(world, 3, "without a lease")


def test_a_run_that_writes_under_the_lease_of_the_next(world: World) -> None:
    run = world.runs[0]
    entry(world, run, run.last_seq)["fence"] = 4
    assert_found(world, 3, f"under the fence of run {world.runs[1].name}")


def test_a_run_that_waits_and_writes_more_than_its_end() -> None:
    world = World()
    session = world.session()
    first, waiting = world.submit(session), world.submit(session)
    world.claim(first)
    world.cancel(waiting)
    world.finish(first)
    assert_clean(world)
    of(world, "log", run=waiting.name, seq=2)[0]["type"] = "text.delta"
    assert_found(world, 3, "under the fence of run")


def resolved() -> World:
    """A run that waited for a person, and went on."""
    world = World()
    run = world.submit(world.session())
    world.claim(run)
    call = world.call(run)
    world.begin(call)
    world.act(call)
    world.park(run)
    world.resolve(call, "completed")
    world.claim(run)
    world.finish(run)
    assert_clean(world)
    return world


def test_a_write_though_nobody_held_the_lease() -> None:
    world = resolved()
    of(world, "log", type="action.resolved")[0]["type"] = "text.delta"
    assert_found(world, 3, "though nobody held the lease")


def test_a_persons_word_that_an_owner_wrote() -> None:
    world = resolved()
    of(world, "log", type="action.resolved")[0]["fence"] = 1
    assert_found(world, 3, "and the run's owner wrote it")
    assert_found(world, 3, "and nothing written under it")


def test_a_grant_that_goes_back_in_the_log(world: World) -> None:
    of(world, "grant", fence=3)[0]["next_seq"] = 1
    assert_found(world, 3, "and then at 1")


def test_a_call_that_was_begun_under_a_stale_fence(world: World) -> None:
    of(world, "call", to=2)[0]["fence"] = 2
    assert_found(world, 3, "which was not the current one")


def test_a_call_that_was_begun_after_the_takeover_by_the_former_owner(world: World) -> None:
    begun = of(world, "call", to=2)[0]
    for grant in of(world, "grant"):
        if grant["fence"] == 4:
            grant["order"] = begun["order"] - 0.5
    assert_found(world, 3, "which was not the current one")


def test_a_call_that_was_begun_before_a_re_attachment_came_through_is_good() -> None:
    world = World()
    run = world.submit(world.session())
    world.claim(run)
    call = world.call(run)
    world.reattach(run)
    call.fence = 1
    world.move(call, 2)
    world.act(call)
    world.complete(call)
    world.finish(run)
    assert_clean(world)


# leases


def test_a_lease_whose_place_is_not_the_end_of_the_log(world: World) -> None:
    of(world, "lease_row")[0]["next_seq"] += 1
    assert_found(world, 3, "goes on at")


def test_a_finished_run_that_still_holds_its_lease(world: World) -> None:
    of(world, "lease_row")[0]["owner"] = "agent-2"
    assert_found(world, 3, "which is not running")


def test_a_run_that_waits_for_a_person_and_holds_its_lease() -> None:
    world = World()
    run = world.submit(world.session())
    world.claim(run)
    world.begin(world.call(run))
    world.park(run)
    assert_clean(world)
    of(world, "lease_row")[0]["owner"] = "agent-1"
    assert_found(world, 3, "which is not running")


def test_a_session_without_a_lease(world: World) -> None:
    drop(world, *of(world, "lease_row"))
    assert_found(world, 3, "has 0 leases")


def test_a_lease_that_is_not_the_last_granted(world: World) -> None:
    of(world, "lease_row")[0]["run"] = world.runs[0].name
    assert_found(world, 3, "is not the last granted")


# Redis


def test_an_entry_of_redis_that_is_not_in_the_log(world: World) -> None:
    last = of(world, "live")[-1]
    world.note(
        "live", **{key: last[key] for key in ("session", "run", "type", "digest")}, seq=last["seq"] + 1
    )
    assert_found(world, 7, "the log has not")


def test_a_run_in_redis_of_which_the_log_knows_nothing(world: World) -> None:
    of(world, "live")[0]["run"] = "run-x"
    assert_found(world, 7, "the log has not")


@pytest.mark.parametrize(("field", "value"), [("digest", "0" * 16), ("type", "run.failed")])
def test_an_entry_of_redis_that_a_stale_writer_made(world: World, field: str, value: str) -> None:
    of(world, "live")[2][field] = value
    assert_found(world, 3, "than the log")
    assert_found(world, 7, "is not the log's")


def test_an_entry_that_redis_had_before_its_commit(world: World) -> None:
    live = of(world, "live")[0]
    logged = of(world, "log", run=live["run"], seq=live["seq"])[0]
    logged["committed"] = live["t"]
    assert_clean(world)
    logged["committed"] = live["t"] + 0.002
    assert_found(world, 7, "before it was committed")


def test_an_entry_of_redis_in_a_foreign_session(world: World) -> None:
    of(world, "live")[0]["session"] = "session-of-another"
    assert_found(world, 7, "is not the log's")


def test_a_fence_of_redis_ahead_of_postgresql(world: World) -> None:
    of(world, "live_fence")[-1]["fence"] = 5
    assert_found(world, 3, "PostgreSQL none so high")


def test_a_fence_of_redis_for_a_session_that_is_not_there(world: World) -> None:
    of(world, "live_fence")[-1]["session"] = "session-x"
    assert_found(world, 3, "PostgreSQL none so high")


def test_redis_may_leave_out_the_data_of_a_large_entry_but_not_its_type() -> None:
    world = World()
    run = world.submit(world.session())
    world.cancel(run)
    [created] = of(world, "log", run=run.name, seq=1)
    live = {"session": run.session.name, "run": run.name, "seq": 1, "type": created["type"], "digest": ""}
    world.records.append({"t": world.now, "n": 0, "kind": "live"} | live)
    assert_clean(world)
    world.records[-1]["type"] = "text.delta"
    assert_found(world, 7, "is not the log's")
