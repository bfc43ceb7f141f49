"""Invariants 4 and 5: a side effect is never silently repeated; an idempotent call has one key."""

from __future__ import annotations

import pytest

from tests.chaos.traffic.tools import TIMEOUT
from tests.unit.chaos.support import assert_clean, assert_found, drop, of
from tests.unit.chaos.world import Call, World


def begun(effect: str = "non_idempotent") -> tuple[World, Call]:
    """A call that acted, and whose agent is gone."""
    world = World()
    run = world.submit(world.session())
    world.claim(run)
    call = world.call(run, effect)
    world.begin(call)
    world.act(call)
    return world, call


def settled(decision: str = "completed", **how: int | None) -> tuple[World, Call]:
    """A call of which nobody knew whether it had acted, until a person said so."""
    world, call = begun()
    world.fault()
    world.claim(call.run, "agent-2")
    world.park(call.run)
    world.resolve(call, decision, **how)
    if decision == "retry":
        world.claim(call.run, "agent-2")
        world.begin(call)
        world.act(call)
        world.complete(call)
        world.finish(call.run)
    elif decision != "abandon":
        world.claim(call.run, "agent-2")
        world.finish(call.run)
    assert_clean(world)
    return world, call


def once(effect: str = "non_idempotent") -> tuple[World, Call]:
    """A call without incident."""
    world, call = begun(effect)
    world.complete(call)
    world.finish(call.run)
    assert_clean(world)
    return world, call


def again(world: World, done: Call, **changes: object) -> None:
    """The call acts once more, after everything else."""
    world.history()
    act = of(world, "act", call=done.name)[0]
    world.note("act", **{key: act[key] for key in act if key not in ("t", "n", "kind")} | changes)


# what passes


@pytest.mark.parametrize("decision", ["completed", "failed", "retry", "abandon"])
def test_a_person_may_settle_what_nobody_knows(decision: str) -> None:
    settled(decision)


def test_a_word_whose_answer_was_lost_counts() -> None:
    settled("retry", status=None)
    settled("completed", status=None)


def asked(world: World) -> None:
    """A word is written down when it is given, before its answer."""
    answer = of(world, "resolve")[0]
    world.records.insert(world.records.index(answer), answer | {"status": "asked"})
    answer["status"] = "accepted"


def test_a_word_and_its_answer_are_one_word() -> None:
    world, call = settled("retry")
    asked(world)
    assert_clean(world)
    again(world, call)
    assert_found(world, 4, "acted 3 times, 1 more than it may")


def test_a_word_that_was_refused_at_last_may_have_been_taken_before() -> None:
    world, _ = settled("retry")
    asked(world)
    of(world, "resolve")[1]["status"] = "ACTION_NOT_REQUIRED"
    assert_clean(world)


def test_an_idempotent_call_may_act_again_with_its_key() -> None:
    world, call = begun("idempotent")
    world.fault()
    world.claim(call.run, "agent-2")
    world.begin(call)
    world.act(call)
    world.complete(call)
    world.act(call)  # the former try was slow
    world.finish(call.run)
    assert_clean(world)


def test_a_call_that_was_begun_and_never_acted_may_be_looked_up_and_run() -> None:
    world = World()
    run = world.submit(world.session())
    world.claim(run)
    call = world.call(run)
    world.begin(call)
    world.claim(run, "agent-2")
    world.park(run)
    world.move(call, 1)  # the tool was asked, and had done nothing
    world.unheld(run, "action.resolved")
    run.status = 1
    world.claim(run, "agent-2")
    world.begin(call)
    world.act(call)
    world.complete(call)
    world.finish(run)
    assert_clean(world)


def test_a_call_that_failed_without_an_act_after_one_that_acted() -> None:
    world, call = begun()
    world.claim(call.run, "agent-2")
    world.park(call.run)
    world.resolve(call, "retry")
    world.claim(call.run, "agent-2")
    world.begin(call)
    world.complete(call, 4)
    world.finish(call.run)
    assert_clean(world)


@pytest.mark.parametrize("decision", ["approve", "deny"])
def test_a_call_that_asks_first(decision: str) -> None:
    world = World()
    run = world.submit(world.session())
    world.claim(run)
    call = world.call(run, approval=True)
    world.park(run)
    world.resolve(call, decision)
    if decision == "deny":
        world.move(call, 4)
    world.claim(run)
    if decision == "approve":
        world.begin(call)
        world.act(call)
        world.complete(call)
    world.finish(run)
    assert_clean(world)


def test_a_late_outcome_of_the_tool_itself_settles_an_unknown_call() -> None:
    world, call = begun()
    world.claim(call.run, "agent-2")
    world.park(call.run)
    world.move(call, 3)
    world.unheld(call.run, "action.resolved")
    call.run.status = 1
    world.claim(call.run)
    world.finish(call.run)
    assert_clean(world)


def test_a_run_may_be_cancelled_while_its_call_acts() -> None:
    world, call = begun()
    world.cancel(call.run)
    assert_clean(world)


# acts


@pytest.mark.parametrize("decision", ["completed", "failed", "abandon"])
def test_a_second_act(decision: str) -> None:
    world, call = settled(decision)
    again(world, call)
    assert_found(world, 4, "acted 2 times, 1 more than it may")


def test_a_second_act_of_a_call_without_incident() -> None:
    world, call = once()
    again(world, call)
    assert_found(world, 4, "1 more than it may")


def test_a_third_act_on_one_word() -> None:
    world, call = settled("retry")
    again(world, call)
    assert_found(world, 4, "acted 3 times, 1 more than it may")


def test_a_second_act_that_no_person_asked_for() -> None:
    world, _ = settled("retry")
    drop(world, *of(world, "resolve"))
    assert_found(world, 4, "1 more than it may")
    assert_found(world, 4, "was to run again 1 times, on 0 words")


def test_a_call_that_had_acted_and_was_to_run_again_by_itself() -> None:
    """The journal let go of it; that it did not act again was luck."""
    world, call = settled("retry")
    drop(world, *of(world, "resolve"))
    drop(world, of(world, "act", call=call.name)[1])
    assert_found(world, 4, "was to run again 1 times, on 0 words")


def test_a_second_act_on_a_word_that_was_refused() -> None:
    world, _ = settled("retry")
    of(world, "resolve")[0]["status"] = 409
    assert_found(world, 4, "1 more than it may")


def test_a_second_act_on_a_word_about_another_call() -> None:
    world, _ = settled("retry")
    of(world, "resolve")[0]["call"] = "another"
    assert_found(world, 4, "1 more than it may")


def test_a_second_act_on_another_word() -> None:
    world, _ = settled("retry")
    of(world, "resolve")[0]["decision"] = "completed"
    assert_found(world, 4, "1 more than it may")


def test_a_second_act_under_the_same_begin_though_a_word_would_allow_it() -> None:
    world, call = settled("retry")
    second = of(world, "call", call=call.name, to=2)[1]
    drop(world, second)
    of(world, "call", call=call.name, to=3)[0]["from"] = 1
    assert_found(world, 4, "acted 2 times and was begun 1 times")


def test_a_tool_that_says_it_must_not_repeat_is_believed() -> None:
    """The journal has the call as idempotent, the tool itself knows better."""
    world, call = once("idempotent")
    again(world, call)
    world.records.sort(key=lambda record: record["t"])
    assert_clean(world)
    for act in of(world, "act"):
        act["effect"] = "non_idempotent"
    assert_found(world, 4, "1 more than it may")


def test_a_running_call_that_was_begun_again() -> None:
    world, call = begun()
    call.effect = "idempotent"  # what the journal took it for
    world.claim(call.run, "agent-2")
    world.begin(call)
    call.effect = "non_idempotent"
    world.complete(call)
    world.finish(call.run)
    world.history()
    assert_found(world, 4, "was begun again while it ran")


def test_an_act_that_was_never_begun() -> None:
    world, call = once()
    made = of(world, "call", call=call.name)[0]
    drop(world, *of(world, "call", to=2))
    of(world, "call", to=3)[0]["from"] = made["to"]
    assert_found(world, 4, "acted before it was begun")


def test_an_act_before_its_begin() -> None:
    world, call = once()
    of(world, "act")[0]["t"] = of(world, "call", call=call.name, to=2)[0]["t"] - 0.2
    assert_found(world, 4, "acted before it was begun")


def test_an_act_at_the_time_of_its_begin_is_good() -> None:
    world, call = once()
    of(world, "act")[0]["t"] = of(world, "call", call=call.name, to=2)[0]["t"] - 0.05
    assert_clean(world)


@pytest.mark.parametrize("decision", ["completed", "failed"])
def test_an_act_after_a_person_had_settled_the_call(decision: str) -> None:
    world, call = settled(decision)
    # While the try may act a person knows that it may, and speaks all the same.
    of(world, "act")[0]["t"] = of(world, "call", call=call.name, to=2)[0]["t"] + TIMEOUT
    assert_clean(world)
    of(world, "act")[0]["t"] += 0.2
    assert_found(world, 4, f"acted after it was settled as {decision}")


def test_an_act_of_a_call_that_the_journal_does_not_know() -> None:
    world, call = once()
    again(world, call, call="nobody:1:0", key="idem-nobody")
    assert_found(world, 4, "call nobody:1:0 is not in the journal")


def test_an_act_for_another_run() -> None:
    world, _ = once()
    of(world, "act")[0]["run"] = "run-x"
    assert_found(world, 4, "acted for another run")


# results


@pytest.mark.parametrize("effect", ["idempotent", "non_idempotent"])
def test_a_result_that_nothing_produced(effect: str) -> None:
    world, _ = once(effect)
    drop(world, *of(world, "act"))
    assert_found(world, 4, "is completed, and nothing acted")


def test_a_result_that_nothing_produced_of_a_pure_tool_that_acts_elsewhere() -> None:
    world = World()
    run = world.submit(world.session())
    world.claim(run)
    world.tool(run, "pure")
    call = world.tool(run, "pure")
    world.finish(run)
    assert_clean(world)
    drop(world, *of(world, "act", call=call.name))
    assert_found(world, 4, "is completed, and nothing acted")


def test_a_pure_tool_that_tells_the_ledger_nothing_is_not_asked_for_acts() -> None:
    world, _ = once("pure")
    drop(world, *of(world, "act"))
    assert_clean(world)


def test_an_act_whose_call_is_told_to_have_failed() -> None:
    """The model reads it and makes the call anew."""
    world, call = begun()
    world.complete(call, 4)
    world.finish(call.run)
    world.history()
    assert_found(world, 4, "acted and is told to have failed")


def test_an_act_of_which_a_person_says_that_it_failed_is_that_persons_business() -> None:
    settled("failed")


def test_a_result_found_by_nobody() -> None:
    world, _ = settled("completed")
    drop(world, *of(world, "act"), *of(world, "resolve"))
    assert_found(world, 4, "is completed, and nothing acted")


@pytest.mark.parametrize("status", [200, "accepted"])
def test_a_word_that_was_taken_and_lost(status: int | str) -> None:
    world, _ = settled("completed")
    of(world, "resolve")[0]["status"] = status
    of(world, "call_row")[0]["state"] = 4
    of(world, "call", to=3)[0]["to"] = 4
    assert_found(world, 4, "was settled as completed and is failed")


def test_a_complete_run_with_a_call_that_is_not_settled() -> None:
    world, call = begun()
    world.claim(call.run, "agent-2")
    world.finish(call.run)
    world.history()
    assert_found(world, 4, "is unknown")


# moves


@pytest.mark.parametrize(
    ("before", "after"), [(3, 1), (3, 4), (4, 3), (4, 2), (3, 5), (1, 5), (2, 1), (5, 2)]
)
def test_a_move_that_is_not_allowed(before: int, after: int) -> None:
    world = World()
    run = world.submit(world.session())
    world.claim(run)
    call = world.call(run)
    ways = {1: [], 2: [2], 3: [2, 3], 4: [2, 4], 5: [2, 5]}
    for state in ways[before]:
        call.fence = run.session.fence
        world.move(call, state)
    world.move(call, after)
    world.cancel(run)
    world.history()
    names = ("made", "intent", "running", "completed", "failed", "unknown")
    assert_found(world, 4, f"went from {names[before]} to {names[after]}")


def test_a_move_from_where_the_call_was_not() -> None:
    world, call = once()
    drop(world, *of(world, "call", call=call.name, to=2))
    assert_found(world, 4, "was intent and then went from running to completed")


def test_a_call_that_came_from_nowhere() -> None:
    world, call = once()
    drop(world, *of(world, "call", call=call.name))
    assert_found(world, 4, "went as far as made and is completed")


def test_a_row_that_says_something_else_than_its_moves() -> None:
    world, _ = once()
    of(world, "call_row")[0]["state"] = 4
    assert_found(world, 4, "went as far as completed and is failed")


def test_moves_of_a_call_without_a_row() -> None:
    world, call = once()
    drop(world, *of(world, "call_row"))
    assert_found(world, 4, f"call {call.name} is not in the journal")


# keys


def test_an_idempotent_call_with_two_keys() -> None:
    world, call = once("idempotent")
    again(world, call, key="another")
    assert_found(world, 5, "used 2 keys")


def test_an_idempotent_call_with_another_key_than_the_journal_has() -> None:
    world, _ = once("idempotent")
    of(world, "act")[0]["key"] = "another"
    assert_found(world, 5, "used 2 keys")


@pytest.mark.parametrize("key", ["", None])
def test_an_idempotent_call_without_a_key(key: str | None) -> None:
    world, _ = once("idempotent")
    of(world, "act")[0]["key"] = key
    of(world, "call_row")[0]["key"] = key
    assert_found(world, 5, "in place of one")


def test_two_calls_with_one_key() -> None:
    """The outside takes the second for a repetition of the first."""
    world = World()
    run = world.submit(world.session())
    world.claim(run)
    one, other = world.tool(run, "idempotent"), world.tool(run, "idempotent")
    world.finish(run)
    assert_clean(world)
    of(world, "act", call=other.name)[0]["key"] = f"idem-{one.name}"
    of(world, "call_row", call=other.name)[0]["key"] = f"idem-{one.name}"
    assert_found(world, 5, "is that of 2 calls")
