"""Invariant 8: every run ends, or says that it needs action, within the bound."""

from __future__ import annotations

import pytest

from tests.unit.chaos.support import assert_clean, assert_found, drop, of
from tests.unit.chaos.world import Call, World


@pytest.fixture
def world() -> World:
    """Three runs that ended, each in another way."""
    world = World()
    session = world.session()
    world.whole(world.submit(session))
    failed = world.submit(session)
    world.claim(failed)
    world.finish(failed, "run.failed")
    cancelled = world.submit(session)
    world.claim(cancelled)
    world.cancel(cancelled)
    assert_clean(world)
    return world


def waiting(*, approval: bool = False, calls: int = 1) -> tuple[World, list[Call]]:
    """A run that waits for a person."""
    world = World()
    run = world.submit(world.session())
    world.claim(run)
    made = [world.call(run, approval=approval) for _ in range(calls)]
    for call in made:
        if not approval:
            world.begin(call)
    world.park(run)
    return world, made


# what passes


@pytest.mark.parametrize("approval", [True, False])
def test_a_run_may_wait_for_a_person(approval: bool) -> None:
    world, _ = waiting(approval=approval)
    assert_clean(world)


def test_a_run_may_wait_for_the_rest_of_what_it_asked() -> None:
    world, (one, _) = waiting(calls=2)
    world.resolve(one, "completed")
    assert_clean(world)


def test_a_run_may_have_asked_long_before_it_waits() -> None:
    world = World()
    run = world.submit(world.session())
    world.claim(run)
    call = world.call(run, approval=True)
    world.ask(call)
    world.tool(run)
    world.fault()
    world.claim(run, "agent-2")
    world.append(run, "tool.progress")
    world.park(run)
    assert len(of(world, "log", type="action.required")) == 1
    assert_clean(world)


def test_a_run_may_wait_again() -> None:
    world, (call,) = waiting()
    world.resolve(call, "retry")
    world.claim(call.run)
    world.begin(call)
    world.park(call.run)
    assert_clean(world)


@pytest.mark.parametrize("policy", ["interrupt", "rollback"])
def test_later_input_may_end_a_run(policy: str) -> None:
    world, _ = waiting()
    world.whole(world.submit(world.sessions[0], policy=policy))
    assert_clean(world)


def test_a_cancel_whose_answer_was_lost_counts(world: World) -> None:
    of(world, "cancel")[0]["status"] = None
    assert_clean(world)


def test_a_run_may_end_by_itself_although_it_was_cancelled(world: World) -> None:
    world.cancel(world.runs[0])
    assert_clean(world)


# what must not


def test_an_episode_that_did_not_settle(world: World) -> None:
    of(world, "end")[0]["settled"] = False
    assert_found(world, 8, "not everything came to rest within 12.5 s")


def test_an_episode_without_an_end(world: World) -> None:
    drop(world, *of(world, "end"))
    assert_found(world, 8, "the episode ended 0 times")


@pytest.mark.parametrize(("status", "word"), [(1, "queued"), (2, "running")])
def test_a_run_that_is_stuck(world: World, status: int, word: str) -> None:
    of(world, "run_row")[0]["status"] = status
    assert_found(world, 8, f"is {word} at the end")


@pytest.mark.parametrize(("run", "status"), [(0, 5), (0, 6), (1, 4), (2, 5)])
def test_a_run_whose_status_is_not_that_of_its_log(world: World, run: int, status: int) -> None:
    of(world, "run_row")[run]["status"] = status
    assert_found(world, 8, f"has status {status}, its log ends with")


def test_a_run_that_ended_without_saying_so(world: World) -> None:
    run = world.runs[0]
    drop(world, *of(world, "log", run=run.name, seq=run.last_seq))
    of(world, "run_row")[0]["last_seq"] -= 1
    assert_found(world, 8, "its log ends with usage")


@pytest.mark.parametrize("by", [-1, 1])
def test_a_run_whose_last_seq_is_not_that_of_its_log(world: World, by: int) -> None:
    of(world, "run_row")[0]["last_seq"] += by
    assert_found(world, 8, "its log ends at")


def test_a_log_with_a_gap(world: World) -> None:
    drop(world, *of(world, "log", run=world.runs[0].name, seq=3))
    assert_found(world, 8, "has 4 where 3 was to come")


def test_a_log_with_an_entry_twice(world: World) -> None:
    world.records.append(dict(of(world, "log", run=world.runs[0].name, seq=3)[0]))
    assert_found(world, 8, "has 3 where 4 was to come")


def test_a_log_of_a_run_that_is_not_there(world: World) -> None:
    world.records.append(of(world, "log", seq=1)[0] | {"run": "run-x"})
    assert_found(world, 8, "of which there is no row")


def test_entries_of_a_foreign_session(world: World) -> None:
    of(world, "log", seq=2)[0]["session"] = "session-of-another"
    assert_found(world, 8, "are of another session")


@pytest.mark.parametrize("reason", ["INTERNAL", "DATA_CORRUPT"])
def test_a_run_that_failed_by_a_bug(world: World, reason: str) -> None:
    of(world, "log", type="run.failed")[0]["reason"] = "MODEL_UNAVAILABLE"
    assert_clean(world)
    of(world, "log", type="run.failed")[0]["reason"] = reason
    assert_found(world, 8, f"failed for the reason {reason}")


# a person is awaited


def test_a_run_that_waits_for_nothing() -> None:
    world, (call,) = waiting()
    of(world, "call_row")[0]["state"] = 3
    assert_found(world, 8, "and no call of it does")
    drop(world, *of(world, "call_row"))
    assert_found(world, 8, "and no call of it does")
    assert call.waits


def test_a_run_that_waits_while_a_call_is_under_way() -> None:
    world, _ = waiting(calls=2)
    of(world, "call_row")[0]["state"] = 2
    assert_found(world, 8, "is under way")


def test_a_run_may_wait_while_a_call_that_may_run_again_is_left_as_it_is() -> None:
    world, (_, other) = waiting(calls=2)
    of(world, "call_row", call=other.name)[0].update(state=2, effect=2)
    drop(world, of(world, "call", call=other.name)[-1])
    drop(world, of(world, "log", type="action.required")[1])
    run = other.run
    of(world, "run_row")[0]["last_seq"] = run.last_seq - 1
    of(world, "lease_row")[0]["next_seq"] = run.last_seq
    assert_clean(world)


def test_a_run_that_waits_and_does_not_say_so() -> None:
    world, _ = waiting()
    of(world, "log", type="action.required")[0]["type"] = "tool.progress"
    assert_found(world, 8, "does not say so")


def test_a_run_that_waits_and_says_nothing_at_all() -> None:
    world, (call,) = waiting()
    drop(world, *of(world, "log", run=call.run.name))
    assert_found(world, 8, "does not say so")


def test_a_run_that_waits_again_and_does_not_say_so_again() -> None:
    world, (call,) = waiting()
    world.resolve(call, "retry")
    world.claim(call.run)
    world.begin(call)
    world.park(call.run)
    assert_clean(world)
    of(world, "log", type="action.required")[-1]["type"] = "tool.progress"
    assert_found(world, 8, "does not say so")


def test_a_run_that_waits_for_a_call_it_did_not_ask_about() -> None:
    """It asked about another one."""
    world, (_, other) = waiting(calls=2)
    assert_clean(world)
    of(world, "log", type="action.required")[1]["call"] = of(world, "log", type="action.required")[0]["call"]
    assert_found(world, 8, "does not say so")
    assert other.waits


def test_a_run_that_waits_for_approval_and_asked_about_nothing() -> None:
    world, _ = waiting(approval=True)
    entry = of(world, "log", type="action.required")[0]
    entry["call"] = "another"
    assert_found(world, 8, "does not say so")


def forget_calls(world: World) -> None:
    """What entries are about may not be recorded."""
    for entry in of(world, "log"):
        entry.pop("call", None)


def test_where_calls_are_not_named_questions_and_answers_are_counted() -> None:
    world, (call,) = waiting()
    world.resolve(call, "retry")
    world.claim(call.run)
    world.begin(call)
    world.park(call.run)
    world.history()
    forget_calls(world)
    assert_clean(world)
    of(world, "log", type="action.required")[-1]["type"] = "tool.progress"
    assert_found(world, 8, "does not say so")


def test_a_run_that_waits_although_it_was_cancelled() -> None:
    world, _ = waiting()
    of(world, "run_row")[0]["cancel_requested"] = True
    assert_found(world, 8, "although it was cancelled")


# cancels


def test_a_run_that_was_cancelled_by_itself(world: World) -> None:
    drop(world, *of(world, "cancel"))
    assert_found(world, 8, "nobody asked for it")


def test_a_run_that_was_cancelled_on_a_refused_wish(world: World) -> None:
    of(world, "cancel")[0]["status"] = 404
    assert_found(world, 8, "nobody asked for it")


def test_a_run_that_was_cancelled_on_a_wish_about_another(world: World) -> None:
    of(world, "cancel")[0]["run"] = world.runs[0].name
    assert_found(world, 8, "nobody asked for it")


def test_a_run_that_was_cancelled_with_no_cancel_noted(world: World) -> None:
    of(world, "run_row", status=6)[0]["cancel_requested"] = False
    assert_found(world, 8, "no cancel is noted")


def test_a_run_that_later_input_ended_without_the_wish_to() -> None:
    world, _ = waiting()
    world.whole(world.submit(world.sessions[0], policy="interrupt"))
    assert_clean(world)
    of(world, "submit", policy="interrupt")[0]["policy"] = "enqueue"
    assert_found(world, 8, "nobody asked for it")


def test_a_run_that_earlier_input_cannot_have_ended() -> None:
    world = World()
    session = world.session()
    world.whole(world.submit(session, policy="interrupt"))
    run = world.submit(session)
    world.claim(run)
    world.cancel(run)
    assert_clean(world)
    drop(world, *of(world, "cancel"))
    assert_found(world, 8, "nobody asked for it")


def test_a_run_that_was_abandoned_by_nobody() -> None:
    world, (call,) = waiting()
    world.resolve(call, "abandon")
    assert_clean(world)
    of(world, "resolve")[0]["decision"] = "failed"
    assert_found(world, 8, "nobody asked for it")
