import asyncio
import json

import pytest

from hermesh.session.v1.resources_pb2 import (
    EFFECT_CLASS_NON_IDEMPOTENT,
    RUN_STATUS_CANCELLED,
    RUN_STATUS_COMPLETED,
    RUN_STATUS_FAILED,
    RUN_STATUS_REQUIRES_ACTION,
    RunOptions,
)
from meshkit.errors import UnavailableError
from services.agent.clients.memory import Recalled
from services.agent.model.errors import ModelAuthError, ModelRateLimitedError, ModelTruncatedError
from services.agent.model.openai import OpenAIModel
from services.agent.model.port import (
    Finished,
    Kept,
    ReasoningDelta,
    RefusalDelta,
    TextDelta,
    ToolCallDelta,
    Usage,
)
from services.agent.model.profiles import built_in
from services.agent.runs.subscription import Subscription
from tests.fakes.dialects import DIALECTS, DialectServer, Reply
from tests.unit.agent.fakes import FakeModel

HELLO = [[TextDelta("Hel")], [TextDelta("lo")], [Usage(3, 2, 1), Finished("stop")]]


def call(index, name, arguments="{}"):
    return ToolCallDelta(index, name, arguments)


def seqs(run):
    return [event.seq for event in run.events]


async def test_a_reply_is_stored_as_events_a_message_and_a_terminal_event(make_bench):
    bench = make_bench(FakeModel(HELLO))
    run = await bench.finish(bench.store.new_claim("hi"))
    assert bench.outcome == "completed"
    assert run.status == RUN_STATUS_COMPLETED
    assert run.text() == "Hello"
    assert run.types()[:3] == ["run.created", "run.started", "step.started"]
    assert run.types()[-3:] == ["message.completed", "usage", "run.completed"]
    assert seqs(run) == list(range(1, len(run.events) + 1))
    assert [(m.role, m.content) for m in run.messages] == [("user", "hi"), ("assistant", "Hello")]
    completed = run.data("message.completed")[0]
    assert (
        completed["message_id"] == run.messages[-1].message_id == run.data("run.completed")[0]["message_id"]
    )
    usage = run.data("usage")[0]
    assert (usage["input_tokens"], usage["output_tokens"], usage["cached_tokens"]) == (3, 2, 1)
    assert usage["ttft_ms"] >= 1
    assert bench.memory.kept == [(run.run_id, "User: hi\nAssistant: Hello")]


async def test_text_that_arrives_while_an_append_is_in_flight_becomes_one_event(make_bench):
    gate = asyncio.Event()
    bench = make_bench(FakeModel([[TextDelta("a")], gate, *([[TextDelta("b")]] * 50), [Finished("stop")]]))
    claim = bench.store.new_claim("hi")
    active = bench.supervisor.begin(claim)
    run = bench.store.runs[claim.run.run_id]
    await bench.store.until(lambda: "text.delta" in run.types())
    bench.store.hold = True
    gate.set()
    await bench.store.until(lambda: len(bench.store.held) == 1)
    await asyncio.sleep(0)
    bench.store.release_held()
    await active.done.wait()
    deltas = [data["text"] for data in run.data("text.delta")]
    assert "".join(deltas) == "a" + "b" * 50
    assert len(deltas) <= 4


async def test_tools_run_side_by_side_after_their_intents_are_stored(make_bench):
    model = FakeModel([[call(0, "add", '{"a":1}'), call(1, "mul")], [Finished("tool_calls")]], HELLO)
    bench = make_bench(model)
    bench.tools.answers = {"add": "3", "mul": "9"}
    run = await bench.finish(bench.store.new_claim("sum"))
    assert run.status == RUN_STATUS_COMPLETED
    assert set(run.calls) == {f"{run.run_id}:1:0", f"{run.run_id}:1:1"}
    types = run.types()
    assert types.index("tool.call") < types.index("tool.result")
    assert types.count("tool.progress") == 2
    assert [m.role for m in run.messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert json.loads(run.messages[1].tool_calls) == [
        {"call_id": f"{run.run_id}:1:0", "name": "add", "arguments": {"a": 1}},
        {"call_id": f"{run.run_id}:1:1", "name": "mul", "arguments": {}},
    ]
    second = model.requests[1].messages
    assert [m.role for m in second] == ["user", "assistant", "tool", "tool"]
    assert [m.content for m in second[2:]] == ["3", "9"]
    assert [data["step"] for data in run.data("step.started")] == [1, 2]


async def test_a_call_of_an_unknown_tool_or_with_broken_arguments_is_told_to_the_model(make_bench):
    model = FakeModel([[call(0, "nope"), call(1, "add", "{oops")], [Finished("tool_calls")]], HELLO)
    bench = make_bench(model)
    bench.tools.answers = {"add": "3"}
    run = await bench.finish(bench.store.new_claim("sum"))
    assert run.status == RUN_STATUS_COMPLETED
    assert bench.tools.executed == []
    assert run.calls == {}
    assert [data["status"] for data in run.data("tool.result")] == ["failed", "failed"]
    assert "no tool named" in model.requests[1].messages[2].content
    assert "JSON" in model.requests[1].messages[3].content


async def test_an_unknown_outcome_stops_the_run_until_a_person_decides(make_bench):
    model = FakeModel([[call(0, "pay"), call(1, "add")], [Finished("tool_calls")]])
    bench = make_bench(model)
    bench.tools.answers = {"pay": "unknown", "add": "3"}
    run = await bench.finish(bench.store.new_claim("pay"))
    assert bench.outcome == "requires_action"
    assert run.status == RUN_STATUS_REQUIRES_ACTION
    required = run.data("action.required")
    assert [(data["call_id"], data["kind"]) for data in required] == [(f"{run.run_id}:1:0", "unknown")]


async def test_a_tool_that_needs_approval_is_not_run_before_it(make_bench):
    bench = make_bench(FakeModel([[call(0, "pay")], [Finished("tool_calls")]]))
    bench.tools.answers = {"pay": "ok"}
    bench.tools.approval = {"pay"}
    run = await bench.finish(bench.store.new_claim("pay"))
    assert bench.outcome == "requires_action"
    assert bench.tools.executed == []
    assert run.data("action.required")[0]["kind"] == "approval"


async def test_all_approvals_of_a_step_are_asked_at_once_and_the_rest_runs_meanwhile(make_bench):
    model = FakeModel([[call(0, "pay"), call(1, "add"), call(2, "mail")], [Finished("tool_calls")]], HELLO)
    bench = make_bench(model)
    bench.tools.answers = {"pay": "paid", "add": "3", "mail": "sent"}
    bench.tools.approval = {"pay"}
    claim = bench.store.new_claim("pay")
    claim.context.approval_tools.append("mail")
    run = await bench.finish(claim)
    assert bench.outcome == "requires_action"
    assert bench.tools.executed == [f"{run.run_id}:1:1"]
    required = run.data("action.required")
    assert [(data["name"], data["kind"]) for data in required] == [("pay", "approval"), ("mail", "approval")]
    types = run.types()
    assert types.index("action.required") < types.index("tool.result")
    assert [run.calls[f"{run.run_id}:1:{i}"].needs_approval for i in range(3)] == [True, False, True]
    # As the store has it after a person's words.
    for index in (0, 2):
        run.calls[f"{run.run_id}:1:{index}"].needs_approval = False
    run.calls[f"{run.run_id}:1:1"].state, run.calls[f"{run.run_id}:1:1"].content = 3, "3"
    run = await bench.finish(bench.store.take_over(run.run_id))
    assert run.status == RUN_STATUS_COMPLETED
    assert len(run.data("action.required")) == 2
    assert [m.content for m in model.requests[1].messages[2:]] == ["paid", "3", "sent"]


async def test_a_tool_finds_out_what_became_of_its_call_and_the_run_goes_on(make_bench):
    model = FakeModel([[call(0, "pay")], [Finished("tool_calls")]], HELLO)
    bench = make_bench(model)
    bench.tools.answers = {"pay": "unknown"}
    bench.tools.findings = {"pay": ["it was paid"]}
    run = await bench.finish(bench.store.new_claim("pay"))
    assert run.status == RUN_STATUS_COMPLETED
    assert "action.required" not in run.types()
    assert run.data("tool.reconciled") == [{"call_id": f"{run.run_id}:1:0", "finding": "completed"}]
    assert [data["status"] for data in run.data("tool.result")] == ["unknown", "completed"]
    assert model.requests[1].messages[-1].content == "it was paid"


async def test_a_takeover_that_finds_no_tool_service_still_asks_what_became_of_a_call(make_bench):
    model = FakeModel([[call(0, "pay")], [Finished("tool_calls")]], HELLO)
    bench = make_bench(model)
    bench.tools.answers, bench.tools.findings = {"pay": "never"}, {"pay": ["it was paid"]}
    claim = bench.store.new_claim("pay")
    bench.supervisor.begin(claim)
    await bench.tools.started.wait()
    run = bench.store.runs[claim.run.run_id]
    run.calls[f"{run.run_id}:1:0"].state = 5
    bench.tools.error = UnavailableError("SERVICE_UNAVAILABLE", "no tool service answers")
    await bench.finish(bench.store.take_over(run.run_id))
    assert run.status == RUN_STATUS_COMPLETED
    assert [data["part"] for data in run.data("context.degraded")] == ["tools"]
    assert run.data("tool.reconciled")[0]["finding"] == "completed"


async def test_what_was_not_done_runs_again(make_bench):
    bench = make_bench(FakeModel([[call(0, "pay")], [Finished("tool_calls")]], HELLO))
    bench.tools.answers = {"pay": ["unknown", "paid"]}
    bench.tools.findings = {"pay": ["not done"]}
    run = await bench.finish(bench.store.new_claim("pay"))
    assert run.status == RUN_STATUS_COMPLETED
    assert len(bench.tools.executed) == 2
    assert run.data("tool.reconciled")[0]["finding"] == "not_done"


async def test_what_no_tool_can_tell_waits_for_a_person(make_bench):
    bench = make_bench(FakeModel([[call(0, "pay")], [Finished("tool_calls")]]))
    bench.tools.answers = {"pay": "unknown"}
    bench.tools.findings = {"pay": ["cannot tell"]}
    run = await bench.finish(bench.store.new_claim("pay"))
    assert bench.outcome == "requires_action"
    assert run.data("tool.reconciled")[0]["finding"] == "unknown"
    assert run.data("action.required")[0]["kind"] == "unknown"


async def test_a_call_that_is_never_done_is_not_tried_for_ever(make_bench):
    bench = make_bench(FakeModel([[call(0, "pay")], [Finished("tool_calls")]]))
    bench.tools.answers = {"pay": "unknown"}
    bench.tools.findings = {"pay": ["not done"] * 9}
    await bench.finish(bench.store.new_claim("pay"))
    assert bench.outcome == "requires_action"
    assert len(bench.tools.executed) == 4


async def test_the_time_limit_leaves_a_call_that_may_have_run_to_a_person(make_bench):
    bench = make_bench(FakeModel([[call(0, "pay"), call(1, "mail")], [Finished("tool_calls")]]))
    bench.tools.answers = {"pay": "never", "mail": "unknown"}
    bench.tools.findings = {"mail": ["never"]}
    bench.tools.effect = EFFECT_CLASS_NON_IDEMPOTENT
    run = await bench.finish(bench.store.new_claim("pay", RunOptions(timeout_ms=100)))
    assert bench.outcome == "requires_action"
    assert bench.tools.cancelled == [f"{run.run_id}:1:0"]
    assert [data["name"] for data in run.data("action.required")] == ["pay", "mail"]


async def test_a_call_of_a_tool_that_is_not_listed_now_is_still_asked_for(make_bench):
    model = FakeModel([[call(0, "gone"), call(1, "slow")], [Finished("tool_calls")]], HELLO)
    bench = make_bench(model)
    bench.tools.answers = {"gone": "never", "slow": "never"}
    claim = bench.store.new_claim("hi")
    bench.supervisor.begin(claim)
    run = bench.store.runs[claim.run.run_id]
    await bench.tools.started.wait()
    bench.tools.answers = {"slow": "late"}
    bench.tools.unlisted = {"gone": "after all"}
    await bench.finish(bench.store.take_over(run.run_id))
    assert run.status == RUN_STATUS_COMPLETED
    assert [m.content for m in model.requests[1].messages[2:]] == ["after all", "late"]


async def test_cancelling_closes_the_model_at_once_and_keeps_the_partial_text(make_bench):
    bench = make_bench(FakeModel([[TextDelta("Hel")], asyncio.Event()]))
    claim = bench.store.new_claim("hi")
    active = bench.supervisor.begin(claim)
    run = bench.store.runs[claim.run.run_id]
    await bench.store.until(lambda: "text.delta" in run.types())
    bench.store.say_cancelled(run.run_id)
    async with asyncio.timeout(2):
        await active.done.wait()
    assert active.outcome == "cancelled"
    assert bench.model.closed == 1
    assert run.status == RUN_STATUS_CANCELLED
    assert run.types()[-1] == "run.cancelled"
    assert run.data("run.cancelled") == [{"reason": "no longer needed"}]
    assert run.messages[-1].content == "Hel"


async def test_cancelling_reaches_running_tools(make_bench):
    bench = make_bench(FakeModel([[call(0, "slow")], [Finished("tool_calls")]]))
    bench.tools.answers = {"slow": "never"}
    claim = bench.store.new_claim("hi")
    active = bench.supervisor.begin(claim)
    await bench.tools.started.wait()
    active.runner.cancel()
    async with asyncio.timeout(2):
        await active.done.wait()
    assert bench.tools.cancelled == [f"{claim.run.run_id}:1:0"]
    assert bench.store.runs[claim.run.run_id].types()[-1] == "run.cancelled"


async def test_a_model_error_before_the_first_token_fails_the_run_with_its_reason(make_bench):
    bench = make_bench(FakeModel([ModelAuthError("refused")]))
    run = await bench.finish(bench.store.new_claim("hi"))
    assert bench.outcome == "failed"
    assert run.status == RUN_STATUS_FAILED
    assert run.data("run.failed") == [
        {
            "code": "UNAUTHENTICATED",
            "reason": "MODEL_UNAUTHENTICATED",
            "message": "refused",
            "retryable": False,
        }
    ]


async def test_a_stream_that_breaks_midway_is_taken_up_again_with_a_reset(make_bench):
    broken = [[TextDelta("Hal")], ModelTruncatedError("cut")]
    bench = make_bench(FakeModel(broken, HELLO))
    run = await bench.finish(bench.store.new_claim("hi"))
    assert run.status == RUN_STATUS_COMPLETED
    assert run.text() == "Hello"
    reset = run.data("attempt.reset")[0]
    first = next(event.seq for event in run.events if event.type == "text.delta")
    assert reset["from_seq"] == first
    assert run.types().count("step.started") == 1


async def test_a_stream_that_breaks_midway_is_continued_where_the_backend_can(make_bench):
    broken = [[TextDelta("Hel")], ModelTruncatedError("cut")]
    model = FakeModel(broken, [[TextDelta("lo")], [Finished("stop")]])
    bench = make_bench(model, llm_prefill=True)
    run = await bench.finish(bench.store.new_claim("hi"))
    assert run.text() == "Hello"
    assert run.messages[-1].content == "Hello"
    assert "attempt.reset" not in run.types()
    last = model.requests[1].messages[-1]
    assert (last.role, last.content) == ("assistant", "Hel")


async def test_a_stream_that_always_breaks_fails_the_run(make_bench):
    broken = [[TextDelta("Hel")], ModelTruncatedError("cut")]
    bench = make_bench(FakeModel(broken, broken, broken))
    run = await bench.finish(bench.store.new_claim("hi"))
    assert run.data("run.failed")[0]["reason"] == "MODEL_STREAM_TRUNCATED"


async def test_an_endless_reply_is_cut_off(make_bench):
    bench = make_bench(FakeModel([[TextDelta("x" * 100_000)]] * 100))
    run = await bench.finish(bench.store.new_claim("hi"))
    assert run.data("run.completed")[0]["finish_reason"] == "length"
    assert run.messages[-1].content == run.text()
    assert 1024 * 1024 < len(run.text()) < 1_200_000
    assert bench.model.closed == 1


async def test_the_turn_limit_fails_the_run(make_bench):
    turn = [[call(0, "add")], [Finished("tool_calls")]]
    bench = make_bench(FakeModel(turn, turn, turn))
    bench.tools.answers = {"add": "3"}
    run = await bench.finish(bench.store.new_claim("hi", RunOptions(max_turns=2)))
    assert run.data("run.failed")[0]["reason"] == "TURN_LIMIT"
    assert len(bench.model.requests) == 2


async def test_the_time_limit_ends_a_silent_model(make_bench):
    bench = make_bench(FakeModel([asyncio.Event()]))
    run = await bench.finish(bench.store.new_claim("hi", RunOptions(timeout_ms=50)))
    assert run.data("run.failed")[0]["reason"] == "RUN_TIMEOUT"
    assert bench.model.closed == 1


async def test_the_limit_of_a_turn_fails_a_run_whose_model_says_nothing(make_bench):
    bench = make_bench(FakeModel([asyncio.Event()]))
    run = await bench.finish(bench.store.new_claim("hi", RunOptions(turn_timeout_ms=50)))
    failed = run.data("run.failed")[0]
    assert (failed["code"], failed["reason"], failed["retryable"]) == (
        "DEADLINE_EXCEEDED",
        "MODEL_TIMEOUT",
        True,
    )
    assert bench.model.closed == 1


async def test_a_turn_that_talks_past_its_limit_is_written_anew_once(make_bench):
    slow = [[TextDelta("Hal")], asyncio.Event()]
    bench = make_bench(FakeModel(slow, HELLO), llm_turn_timeout=0.05)
    run = await bench.finish(bench.store.new_claim("hi"))
    assert bench.outcome == "completed"
    assert (run.text(), len(run.data("attempt.reset"))) == ("Hello", 1)
    assert bench.model.closed == 2
    again = make_bench(FakeModel(slow, slow), llm_turn_timeout=0.05)
    run = await again.finish(again.store.new_claim("hi"))
    assert run.data("run.failed")[0]["reason"] == "MODEL_TIMEOUT"
    assert len(run.data("attempt.reset")) == 1


async def test_the_runs_limit_comes_before_that_of_a_turn(make_bench):
    bench = make_bench(FakeModel([[TextDelta("Hal")], asyncio.Event()]), llm_turn_timeout=60)
    run = await bench.finish(bench.store.new_claim("hi", RunOptions(timeout_ms=50)))
    assert run.data("run.failed")[0]["reason"] == "RUN_TIMEOUT"


async def test_a_turn_has_its_limit_for_itself_and_not_with_the_turns_before(make_bench):
    gates = [asyncio.Event(), asyncio.Event()]
    turns = [[[TextDelta("x")], gate, [call(0, "add")], [Finished("tool_calls")]] for gate in gates]
    bench = make_bench(FakeModel(*turns, HELLO), llm_turn_timeout=0.2)
    bench.tools.answers = {"add": "3"}
    loop = asyncio.get_running_loop()
    loop.call_later(0.12, gates[0].set)
    loop.call_later(0.25, gates[1].set)
    run = await bench.finish(bench.store.new_claim("hi"))
    assert bench.outcome == "completed"
    assert not run.data("attempt.reset")


async def test_memories_and_preferences_reach_the_model(make_bench):
    model = FakeModel(HELLO)
    bench = make_bench(model)
    bench.memory.found = [Recalled("m1", "likes tea", 0.9, "another-session")]
    bench.memory.preferences = {"tone": "short"}
    run = await bench.finish(bench.store.new_claim("hi", user="ada"))
    system = model.requests[0].messages[0]
    assert system.role == "system"
    assert "likes tea" in system.content
    assert "tone: short" in system.content
    assert run.data("memory.recalled")[0]["memories"][0]["memory_id"] == "m1"


async def test_a_run_goes_on_without_memory_and_says_so(make_bench):
    bench = make_bench(FakeModel(HELLO))
    bench.memory.error = UnavailableError("SERVICE_UNAVAILABLE", "memory is away")
    run = await bench.finish(bench.store.new_claim("hi"))
    assert run.status == RUN_STATUS_COMPLETED
    assert run.data("context.degraded") == [
        {"part": "memory", "detail": "memory is away"},
        {"part": "preferences", "detail": "memory is away"},
    ]


async def test_a_run_goes_on_without_tools_and_says_so(make_bench):
    model = FakeModel(HELLO)
    bench = make_bench(model)
    bench.tools.error = UnavailableError("SERVICE_UNAVAILABLE", "the tool service is away")
    run = await bench.finish(bench.store.new_claim("hi", RunOptions(tools=["add"])))
    assert run.status == RUN_STATUS_COMPLETED
    assert run.data("context.degraded") == [{"part": "tools", "detail": "the tool service is away"}]
    assert model.requests[0].tools == []


async def test_a_run_that_wants_no_memory_uses_none(make_bench):
    bench = make_bench(FakeModel(HELLO))
    bench.memory.error = AssertionError("not to be called")
    run = await bench.finish(bench.store.new_claim("hi", RunOptions(memory=False)))
    assert run.status == RUN_STATUS_COMPLETED


async def test_a_takeover_resets_half_written_text(make_bench):
    gate = asyncio.Event()
    model = FakeModel([[ReasoningDelta("hm")], [TextDelta("Hal")], gate], HELLO)
    bench = make_bench(model)
    claim = bench.store.new_claim("hi")
    first = bench.supervisor.begin(claim)
    run = bench.store.runs[claim.run.run_id]
    await bench.store.until(lambda: "text.delta" in run.types())
    second = bench.store.take_over(run.run_id)
    await bench.finish(second)
    assert first.outcome == "lost"
    assert run.text() == "Hello"
    reset = run.data("attempt.reset")[0]
    assert reset["from_seq"] == next(e.seq for e in run.events if e.type == "reasoning.delta")
    assert run.fences == sorted(run.fences)
    assert seqs(run) == list(range(1, len(run.events) + 1))


async def test_a_takeover_continues_half_written_text_where_the_backend_can(make_bench):
    model = FakeModel([[TextDelta("Hel")], asyncio.Event()], [[TextDelta("lo")], [Finished("stop")]])
    bench = make_bench(model, llm_prefill=True)
    claim = bench.store.new_claim("hi")
    bench.supervisor.begin(claim)
    run = bench.store.runs[claim.run.run_id]
    await bench.store.until(lambda: "text.delta" in run.types())
    await bench.finish(bench.store.take_over(run.run_id))
    assert "attempt.reset" not in run.types()
    assert run.text() == "Hello"
    assert run.messages[-1].content == "Hello"


async def test_a_takeover_reuses_what_tools_have_done(make_bench):
    model = FakeModel([[call(0, "add"), call(1, "slow")], [Finished("tool_calls")]], HELLO)
    bench = make_bench(model)
    bench.tools.answers = {"add": "3", "slow": "never"}
    claim = bench.store.new_claim("hi")
    bench.supervisor.begin(claim)
    run = bench.store.runs[claim.run.run_id]
    await bench.store.until(lambda: "tool.result" in run.types())
    entry = run.calls[f"{run.run_id}:1:0"]
    entry.state, entry.content = 3, "3"
    bench.tools.answers["slow"] = "late"
    await bench.finish(bench.store.take_over(run.run_id))
    assert run.status == RUN_STATUS_COMPLETED
    assert bench.tools.executed.count(f"{run.run_id}:1:0") == 1
    assert [data["content"] for data in run.data("tool.result")] == ["3", "late"]
    assert [m.content for m in model.requests[1].messages[2:]] == ["3", "late"]
    assert [m.role for m in run.messages] == ["user", "assistant", "tool", "tool", "assistant"]


async def test_a_caller_gets_every_event_after_it_was_stored(make_bench):
    bench = make_bench(FakeModel(HELLO))
    claim = bench.store.new_claim("hi")
    subscription = Subscription()
    bench.supervisor.begin(claim, subscription)
    got = []
    while events := await subscription.next():
        stored = bench.store.runs[claim.run.run_id].events
        assert events[-1].seq <= stored[-1].seq
        got += events
    assert got == bench.store.runs[claim.run.run_id].events[1:]
    assert subscription.reconnect == ""


async def test_a_constrained_call_is_made_when_a_tool_is_asked_for(make_bench):
    answer = '{"name":"add","arguments":{"a":1}}'
    model = FakeModel([[TextDelta(answer[:10])], [TextDelta(answer[10:])], [Finished("stop")]], HELLO)
    bench = make_bench(model, llm_tool_mode="json")
    bench.tools.answers = {"add": "3"}
    run = await bench.finish(bench.store.new_claim("sum", RunOptions(tool_choice="add")))
    assert run.status == RUN_STATUS_COMPLETED
    assert model.requests[0].response_schema is not None
    assert model.requests[1].response_schema is None
    assert run.text() == "Hello"
    assert [m.role for m in model.requests[1].messages] == ["user", "assistant", "user"]
    assert run.data("tool.call")[0]["arguments"] == {"a": 1}


async def test_an_unknown_tool_choice_fails_the_run(make_bench):
    bench = make_bench(FakeModel())
    run = await bench.finish(bench.store.new_claim("sum", RunOptions(tool_choice="nope")))
    assert run.data("run.failed")[0]["reason"] == "TOOL_NOT_FOUND"


async def test_a_failure_says_how_long_the_backend_asked_to_wait(make_bench):
    bench = make_bench(FakeModel([ModelRateLimitedError("the model backend's rate limit was reached", 20.0)]))
    run = await bench.finish(bench.store.new_claim("hi"))
    assert run.data("run.failed") == [
        {
            "code": "RESOURCE_EXHAUSTED",
            "reason": "MODEL_RATE_LIMITED",
            "message": "the model backend's rate limit was reached",
            "retryable": True,
            "retry_after_ms": 20_000,
        }
    ]


async def test_a_refused_write_ends_the_run_with_an_internal_error(make_bench):
    bench = make_bench(FakeModel(HELLO))
    bench.store.script = ["invalid"]
    run = await bench.finish(bench.store.new_claim("hi"))
    assert bench.outcome == "failed"
    assert run.data("run.failed")[0]["reason"] == "INTERNAL"


async def test_what_a_backend_wants_back_survives_a_takeover_and_is_in_no_event(make_bench):
    signed = {"extra_content": {"google": {"thought_signature": "s"}}}
    opening = [
        ReasoningDelta("I need a sum."),
        ToolCallDelta(0, "add", "{}", "functions.add:0", signed),
        ToolCallDelta(1, "slow", "{}", "functions.slow:1"),
    ]
    end = [Kept({"reasoning_content": "I need a sum."}), Finished("tool_calls")]
    model = FakeModel([opening, end], HELLO)
    bench = make_bench(model)
    bench.tools.answers = {"add": "3", "slow": "never"}
    claim = bench.store.new_claim("hi")
    bench.supervisor.begin(claim)
    run = bench.store.runs[claim.run.run_id]
    await bench.store.until(lambda: "tool.result" in run.types())
    entry = run.calls[f"{run.run_id}:1:0"]
    entry.state, entry.content = 3, "3"
    bench.tools.answers["slow"] = "late"
    await bench.finish(bench.store.take_over(run.run_id))
    assert run.status == RUN_STATUS_COMPLETED
    message = model.requests[1].messages[1]
    assert json.loads(message.provider) == {"reasoning_content": "I need a sum."}
    assert [json.loads(use.provider) for use in message.tool_calls] == [
        {"id": "functions.add:0", "fields": signed},
        {"id": "functions.slow:1"},
    ]
    told = [*run.data("message.completed"), *run.data("tool.call")]
    assert "functions.add" not in json.dumps(told)
    assert "provider" not in json.dumps(told)


@pytest.mark.parametrize("name", ["mistral", "deepseek", "kimi", "gemini", "vllm", "openrouter"])
async def test_a_run_with_calls_goes_through_its_takeover_in_strict_dialects(make_bench, name):
    calls = (("add", '{"a":1}'), ("slow", "{}"))
    script = [Reply("", "Let me see.", calls), Reply("Hello")]
    async with DialectServer(DIALECTS[name](), script) as server:
        model = OpenAIModel(server.base_url, profile=built_in()[name])
        bench = make_bench(model)
        bench.tools.answers = {"add": "3", "slow": "never"}
        claim = bench.store.new_claim("hi")
        bench.supervisor.begin(claim)
        run = bench.store.runs[claim.run.run_id]
        await bench.store.until(lambda: "tool.result" in run.types())
        entry = run.calls[f"{run.run_id}:1:0"]
        entry.state, entry.content = 3, "3"
        bench.tools.answers["slow"] = "late"
        await bench.finish(bench.store.take_over(run.run_id))
        assert (run.status, run.text()) == (RUN_STATUS_COMPLETED, "Hello")
        assert server.refused == []
        await model.aclose()


async def test_a_reply_that_is_cut_here_reports_an_estimate_of_its_usage(make_bench):
    bench = make_bench(FakeModel([[TextDelta("x" * 100_000)]] * 100))
    run = await bench.finish(bench.store.new_claim("hi"))
    usage = run.data("usage")[0]
    assert usage["input_tokens"] > 0
    assert 250_000 < usage["output_tokens"] < 400_000
    bench = make_bench(FakeModel([[Usage(7, 9)], *[[TextDelta("x" * 100_000)]] * 100]))
    usage = (await bench.finish(bench.store.new_claim("hi"))).data("usage")[0]
    assert (usage["input_tokens"], usage["output_tokens"]) == (7, 9)  # the backend's own, where it said so


async def test_endless_reasoning_is_cut_off(make_bench):
    bench = make_bench(FakeModel([[ReasoningDelta("x" * 100_000)]] * 100))
    run = await bench.finish(bench.store.new_claim("hi"))
    assert run.data("run.completed")[0]["finish_reason"] == "length"
    assert bench.model.closed == 1


async def test_a_refusal_is_the_reply_and_the_reason(make_bench):
    bench = make_bench(FakeModel([[RefusalDelta("I cannot.")], [Finished("stop")]]))
    run = await bench.finish(bench.store.new_claim("hi"))
    assert (run.text(), run.messages[-1].content) == ("I cannot.", "I cannot.")
    assert run.data("run.completed")[0]["finish_reason"] == "refusal"


async def test_a_refusal_in_place_of_a_constrained_call_is_a_reply(make_bench):
    model = FakeModel([[RefusalDelta("I cannot.")], [Finished("stop")]])
    bench = make_bench(model, llm_tool_mode="json")
    bench.tools.answers = {"add": "3"}
    run = await bench.finish(bench.store.new_claim("sum", RunOptions(tool_choice="add")))
    assert run.status == RUN_STATUS_COMPLETED
    assert run.messages[-1].content == "I cannot."


async def test_too_many_and_too_long_calls_are_told_to_the_model(make_bench):
    flood = [ToolCallDelta(index, "add", "{}") for index in range(70)]
    model = FakeModel([flood, [Finished("tool_calls")]], HELLO)
    bench = make_bench(model)
    bench.tools.answers = {"add": "3"}
    run = await bench.finish(bench.store.new_claim("hi"))
    assert (run.status, run.text()) == (RUN_STATUS_COMPLETED, "Hello")
    results = [one.content for one in model.requests[1].messages if one.role == "tool"]
    assert results[:64] == ["3"] * 64
    assert "70 calls" in results[64]
    assert len(bench.tools.executed) == 64
