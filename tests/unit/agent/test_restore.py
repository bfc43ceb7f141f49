import json

from services.agent.domain.loop import Call, CallState, Partial
from services.agent.domain.restore import LoggedEvent, StoredMessage, parse_tool_calls, restore
from services.agent.model.port import ToolUse

USER = StoredMessage("r", "user", "hi")
CALLS = json.dumps(
    [
        {"call_id": "r:1:0", "name": "add", "arguments": {"a": 1}},
        {"call_id": "r:1:1", "name": "mul", "arguments": {}},
    ]
)
ASKED = StoredMessage("r", "assistant", "", CALLS)


def log(*events):
    return [LoggedEvent(seq, kind, data) for seq, kind, data in events]


STEP = (3, "step.started", {"step": 1})


def test_a_run_without_a_past_is_its_conversation():
    state = restore("r", [StoredMessage("old", "assistant", "before"), USER])
    assert [message.content for message in state.messages] == ["before", "hi"]
    assert (state.step, state.turns, state.partial, state.calls) == (0, 0, None, ())


def test_a_reply_that_the_caller_handed_in_is_not_the_runs_own():
    handed_in = [USER, StoredMessage("r", "assistant", "an earlier reply"), USER]
    state = restore("r", handed_in)
    assert (state.turns, state.finish_reason) == (0, "")
    answered = restore("r", [*handed_in, StoredMessage("r", "assistant", "Hello")])
    assert (answered.turns, answered.finish_reason) == (1, "stop")


def test_half_a_turn_is_partial_from_its_first_text():
    events = log(STEP, (4, "reasoning.delta", {"text": "hm"}), (5, "text.delta", {"text": "Hel"}))
    state = restore("r", [USER], events)
    assert (state.step, state.turns) == (1, 0)
    assert state.partial == Partial("Hel", 4)


def test_text_that_was_reset_does_not_count():
    events = log(
        STEP,
        (4, "text.delta", {"text": "Hal"}),
        (5, "run.started", {"attempt": 2}),
        (6, "attempt.reset", {"from_seq": 4}),
        (7, "text.delta", {"text": "He"}),
        (8, "text.delta", {"text": "l"}),
    )
    assert restore("r", [USER], events).partial == Partial("Hel", 7)
    assert restore("r", [USER], events[:4]).partial is None


def test_a_whole_reply_only_lacks_the_runs_end():
    events = log(STEP, (4, "text.delta", {"text": "Hello"}), (5, "message.completed", {}))
    state = restore("r", [USER, StoredMessage("r", "assistant", "Hello")], events)
    assert state.finish_reason == "stop"
    assert state.partial is None


def test_calls_come_back_as_the_journal_has_them():
    journal = [
        Call("r:1:0", "add", '{"a":1}', CallState.COMPLETED, "4"),
        Call("r:1:1", "mul", "{}", CallState.RUNNING),
    ]
    events = log(STEP, (4, "message.completed", {}), (5, "tool.result", {"call_id": "r:1:0", "content": "4"}))
    state = restore("r", [USER, ASKED], events, journal)
    assert (state.step, state.turns) == (1, 1)
    assert [(c.state, c.content, c.reported) for c in state.calls] == [
        (CallState.COMPLETED, "4", True),
        (CallState.RUNNING, "", False),
    ]


def test_a_call_that_was_refused_at_once_keeps_its_answer():
    events = log(STEP, (4, "tool.result", {"call_id": "r:1:1", "content": "no such tool"}))
    journal = [Call("r:1:0", "add", '{"a":1}')]
    refused = restore("r", [USER, ASKED], events, journal).calls[1]
    assert (refused.state, refused.content, refused.reported) == (CallState.FAILED, "no such tool", True)


def test_answered_calls_are_history():
    answers = [StoredMessage("r", "tool", "4", "", "r:1:0"), StoredMessage("r", "tool", "9", "", "r:1:1")]
    state = restore("r", [USER, ASKED, *answers], log((9, "step.started", {"step": 2})))
    assert state.calls == ()
    assert (state.step, state.turns, state.finish_reason) == (2, 1, "")


def test_approval_is_asked_once():
    journal = [
        Call("r:1:0", "add", "{}", needs_approval=True),
        Call("r:1:1", "mul", "{}", needs_approval=True),
    ]
    events = log(STEP, (5, "action.required", {"call_id": "r:1:0"}))
    calls = restore("r", [USER, ASKED], events, journal).calls
    assert [(call.needs_approval, call.asked) for call in calls] == [(True, True), (True, False)]


def test_a_call_that_became_unknown_after_it_was_approved_is_asked_about_anew():
    journal = [Call("r:1:0", "add", "{}", CallState.UNKNOWN), Call("r:1:1", "mul", "{}", CallState.FAILED)]
    events = log(
        STEP,
        (5, "action.required", {"call_id": "r:1:0"}),
        (6, "action.resolved", {"call_id": "r:1:0", "decision": "approve"}),
    )
    calls = restore("r", [USER, ASKED], events, journal, {"mul"}).calls
    assert [(call.asked, call.reconcilable) for call in calls] == [(False, True), (False, False)]


def test_unknown_was_not_a_calls_last_word():
    journal = [
        Call("r:1:0", "add", "{}", CallState.COMPLETED, "4"),
        Call("r:1:1", "mul", "{}", CallState.FAILED),
    ]
    events = log(
        STEP,
        (5, "tool.result", {"call_id": "r:1:0", "status": "unknown"}),
        (6, "tool.result", {"call_id": "r:1:1", "status": "failed"}),
    )
    assert [call.reported for call in restore("r", [USER, ASKED], events, journal).calls] == [False, True]


def test_tool_calls_that_cannot_be_read_count_as_none():
    assert parse_tool_calls("") == parse_tool_calls("{oops") == parse_tool_calls('[{"x":1}]') == ()
    assert parse_tool_calls('[{"call_id":"c","name":"n","arguments":"{}"}]') == (ToolUse("c", "n", "{}"),)
