from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.agent.domain.loop import (
    MAX_LOOKS,
    AskApproval,
    AwaitAction,
    Call,
    CallModel,
    CallState,
    CallTools,
    Fail,
    FindOut,
    Finish,
    Limits,
    LoopState,
    Partial,
    ReportCalls,
    Turn,
    calls_asked,
    calls_done,
    calls_reported,
    decide,
    turn_begun,
    turn_broken,
    turn_done,
)
from services.agent.model.port import ChatMessage, Usage

USER = ChatMessage("user", "hi")
START = LoopState((USER,))
LIMITS = Limits(max_turns=3, max_output_tokens=100, max_breaks=1)
BROKEN = Fail("UNAVAILABLE", "MODEL_STREAM_TRUNCATED", "cut", True)


def next_of(state, limits=LIMITS, seconds_left=60.0, can_prefill=False):
    return decide(state, limits, seconds_left=seconds_left, can_prefill=can_prefill)


def test_a_new_run_calls_the_model():
    assert next_of(START) == CallModel(1, "fresh", max_tokens=100)


def test_a_reply_without_calls_finishes():
    state = turn_done(turn_begun(START, next_of(START)), Turn("Hello", (), "stop", Usage(1, 2)))
    assert next_of(state) == Finish("stop")
    assert state.messages[-1] == ChatMessage("assistant", "Hello")


def test_calls_are_made_then_reported_then_the_model_is_asked_again():
    call = Call("r:1:0", "add", "{}")
    state = turn_done(turn_begun(START, next_of(START)), Turn("", (call,), "tool_calls", Usage(1, 2)))
    assert next_of(state) == CallTools(1, (call,))
    state = calls_done(state, [replace(call, state=CallState.COMPLETED, content="4")])
    decision = next_of(state)
    assert isinstance(decision, ReportCalls)
    state = calls_reported(state)
    assert state.messages[-1] == ChatMessage("tool", "4", (), "r:1:0")
    assert next_of(state) == CallModel(2, "fresh", max_tokens=98)


def test_only_calls_without_an_outcome_are_made():
    done = Call("r:1:0", "add", "{}", CallState.COMPLETED, "4")
    running = Call("r:1:1", "add", "{}", CallState.RUNNING)
    assert next_of(replace(START, step=1, turns=1, calls=(done, running))) == CallTools(1, (running,))


def test_an_unknown_call_waits_until_the_others_are_done():
    other, waiting = Call("r:1:0", "add", "{}"), Call("r:1:1", "pay", "{}", CallState.UNKNOWN)
    state = replace(START, step=1, turns=1, calls=(other, waiting))
    assert next_of(state) == CallTools(1, (other,))
    state = calls_done(state, [replace(other, state=CallState.COMPLETED)])
    assert next_of(state) == AwaitAction((waiting,))


def test_approvals_are_asked_for_all_at_once_while_the_others_run():
    other = Call("r:1:0", "add", "{}")
    first, second = (Call(f"r:1:{i}", "pay", "{}", needs_approval=True) for i in (1, 2))
    state = replace(START, step=1, turns=1, calls=(first, other, second))
    assert next_of(state) == AskApproval((first, second))
    state = calls_asked(state, (first, second))
    assert next_of(state) == CallTools(1, (other,))
    state = calls_done(state, [replace(other, state=CallState.COMPLETED)])
    assert next_of(state) == AwaitAction((replace(first, asked=True), replace(second, asked=True)))
    # Nothing else to do: they are asked for as the run stops.
    assert next_of(replace(state, calls=(first, second))) == AwaitAction((first, second))


def test_a_tool_that_can_find_out_is_asked_before_a_person():
    unclear = Call("r:1:0", "pay", "{}", CallState.UNKNOWN, reconcilable=True)
    plain = Call("r:1:1", "pay", "{}", CallState.UNKNOWN)
    approval = Call("r:1:2", "pay", "{}", needs_approval=True)
    state = replace(START, step=1, turns=1, calls=(unclear, plain, approval))
    assert next_of(state) == AskApproval((approval,))
    state = calls_asked(state, (approval,))
    assert next_of(state) == FindOut((unclear,))
    again = calls_done(state, [replace(unclear, state=CallState.INTENT, looks=1)])
    assert next_of(again) == CallTools(1, (replace(unclear, state=CallState.INTENT, looks=1),))
    left = replace(unclear, looks=MAX_LOOKS)
    assert next_of(calls_done(state, [left])) == AwaitAction((left, plain, replace(approval, asked=True)))


def test_the_time_limit_does_not_pass_over_a_call_that_may_have_run():
    unclear = Call("r:1:0", "pay", "{}", CallState.UNKNOWN, reconcilable=True)
    todo = Call("r:1:1", "add", "{}")
    state = replace(START, step=1, turns=1, calls=(unclear, todo))
    assert next_of(state, seconds_left=0) == AwaitAction((unclear,))
    approval = Call("r:1:2", "pay", "{}", needs_approval=True)
    assert isinstance(next_of(replace(state, calls=(approval, todo)), seconds_left=0), Fail)


def test_the_limits_on_turns_tokens_and_time():
    failed = next_of(replace(START, step=3, turns=3))
    assert isinstance(failed, Fail)
    assert failed.reason == "TURN_LIMIT"
    assert next_of(replace(START, step=1, turns=1, usage=Usage(0, 100))) == Finish("length")
    timed_out = next_of(START, seconds_left=0)
    assert isinstance(timed_out, Fail)
    assert timed_out.reason == "RUN_TIMEOUT"


def test_a_finished_reply_is_not_failed_by_the_time_limit():
    assert next_of(replace(START, finish_reason="stop"), seconds_left=-1) == Finish("stop")


@pytest.mark.parametrize(
    ("partial", "can_prefill", "expected"),
    [
        (None, True, CallModel(1, "again", max_tokens=100)),
        (Partial("Hel", 5), True, CallModel(1, "prefill", "Hel", 5, 100)),
        (Partial("Hel", 5), False, CallModel(1, "reset", from_seq=5, max_tokens=100)),
        (Partial("", 5), True, CallModel(1, "reset", from_seq=5, max_tokens=100)),
    ],
)
def test_a_step_that_was_begun_is_taken_up_under_its_number(partial, can_prefill, expected):
    state = replace(START, step=1, turns=0, partial=partial)
    assert next_of(state, can_prefill=can_prefill) == expected


def test_a_broken_turn_is_taken_up_so_often_and_no_more():
    begun = turn_begun(START, next_of(START))
    once = turn_broken(begun, Partial("Hel", 4), BROKEN, LIMITS)
    assert isinstance(once, LoopState)
    assert next_of(once) == CallModel(1, "reset", from_seq=4, max_tokens=100)
    assert turn_broken(once, Partial("Hel", 4), BROKEN, LIMITS) == BROKEN


def test_a_turn_that_wrote_nothing_or_cannot_succeed_fails_at_once():
    assert turn_broken(START, None, BROKEN, LIMITS) == BROKEN
    final = replace(BROKEN, retryable=False)
    assert turn_broken(START, Partial("Hel", 4), final, LIMITS) == final


@given(st.lists(st.integers(0, 3), max_size=12), st.integers(1, 5))
def test_every_run_ends_within_its_turns(turns, max_turns):
    """Whatever the model asks for: a model is called at most `max_turns` times."""
    limits = Limits(max_turns=max_turns)
    state, asked = START, 0
    script = iter(turns)
    while True:
        decision = next_of(state, limits)
        if isinstance(decision, Finish | Fail):
            break
        if isinstance(decision, CallModel):
            asked += 1
            count = next(script, 0)
            calls = tuple(Call(f"r:{decision.step}:{i}", "add", "{}") for i in range(count))
            state = turn_done(turn_begun(state, decision), Turn("x", calls, "stop", Usage()))
        elif isinstance(decision, CallTools):
            state = calls_done(state, [replace(c, state=CallState.COMPLETED) for c in decision.calls])
        else:
            state = calls_reported(state)
    assert asked <= max_turns
    assert state.turns == asked
