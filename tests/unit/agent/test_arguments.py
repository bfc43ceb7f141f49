"""A call's arguments are what the model wrote: in the log, to a person, to the tool, in the next prompt."""

import json

import pytest

from hermesh.session.v1.resources_pb2 import RUN_STATUS_COMPLETED, RunOptions
from services.agent.domain.loop import Call, CallState
from services.agent.domain.prompt import plain
from services.agent.domain.restore import parse_tool_calls, stored_tool_calls
from services.agent.domain.turn import BAD_ARGUMENTS, TurnBuilder, storable
from services.agent.model.port import ChatMessage, Finished, TextDelta, ToolCallDelta, ToolUse
from tests.unit.agent.fakes import FakeModel

# What no parser that makes floats of numbers gives back: long numbers, 1.10, names that come twice, escapes.
ODD = (
    '{"id": 18446744073709551616, "n":-12345678901234567890123, "price":1.10, '
    '"x":0.1000000000000000055511151, "e":1E2, "a":1,"a":2, "s":"\\u00e9\\/\\u0000" }'
)
HELLO = [[TextDelta("Hello")], [Finished("stop")]]


def turn_with(arguments):
    return [[ToolCallDelta(0, "pay", arguments)], [Finished("tool_calls")]]


def arguments_in(data, name="arguments"):
    """The text of a member called `arguments`, as it stands in an event."""
    start = data.index(f'"{name}":') + len(name) + 3
    depth = 0
    for end in range(start, len(data)):
        depth += (data[end] == "{") - (data[end] == "}")
        if not depth:
            return data[start : end + 1]
    raise AssertionError(data)


async def test_they_are_kept_shown_run_and_read_back_as_they_were_written(make_bench):
    bench = make_bench(FakeModel(turn_with(ODD), HELLO))
    bench.tools.answers = {"pay": "ok"}
    bench.tools.approval = {"pay"}
    claim = bench.store.new_claim("pay")
    run = await bench.finish(claim, timeout=30)
    assert bench.outcome == "requires_action"
    shown = {
        event.type: arguments_in(event.data)
        for event in run.events
        if event.type in ("message.completed", "tool.call", "action.required")
    }
    assert shown == {"message.completed": ODD, "tool.call": ODD, "action.required": ODD}
    assert run.data("action.required")[0]["arguments_text"] == ODD
    [journalled] = run.calls.values()
    assert journalled.arguments == ODD
    # Another replica goes on once a person has agreed.
    journalled.needs_approval = False
    ran = []
    execute = bench.tools.execute

    async def executed(spec, call, *rest):
        ran.append(call.arguments)
        return await execute(spec, call, *rest)

    bench.tools.execute = executed
    done = await bench.finish(bench.store.take_over(run.run_id), timeout=30)
    assert done.status == RUN_STATUS_COMPLETED
    assert ran == [ODD]
    [use] = bench.model.requests[1].messages[1].tool_calls
    assert use.arguments == ODD


async def test_a_grammar_constrained_call_keeps_its_arguments(make_bench):
    text = f'{{"name": "pay", "arguments": {ODD}}}'
    bench = make_bench(
        FakeModel([[TextDelta(text)], [Finished("stop")]], HELLO), llm_tool_mode="json", llm_spare_requests=0
    )
    bench.tools.answers = {"pay": "ok"}
    run = await bench.finish(bench.store.new_claim("pay", RunOptions(tool_choice="pay")), timeout=30)
    [journalled] = run.calls.values()
    assert journalled.arguments == ODD
    # Such a model reads its call as text.
    assert ODD in bench.model.requests[1].messages[1].content


@pytest.mark.parametrize("levels", [1, 100, 249])
async def test_nested_arguments_are_run(make_bench, levels):
    nested = '{"a":' * levels + "1" + "}" * levels
    bench = make_bench(FakeModel(turn_with(nested), HELLO))
    bench.tools.answers = {"pay": "ok"}
    run = await bench.finish(bench.store.new_claim("pay"), timeout=30)
    assert run.status == RUN_STATUS_COMPLETED
    assert [call.arguments for call in run.calls.values()] == [nested]


@pytest.mark.parametrize(
    "arguments",
    [
        '{"a":' * 250 + "1" + "}" * 250,
        '{"a":' + "[" * 5000 + "]" * 5000 + "}",
        '{"a":' * 100_000,
        '{"a":1e999}',
        '{"a":"\\ud83d"}',
        '{"a":NaN}',
    ],
)
async def test_arguments_that_cannot_be_passed_on_are_told_to_the_model(make_bench, arguments):
    bench = make_bench(FakeModel(turn_with(arguments), HELLO))
    bench.tools.answers = {"pay": "ok"}
    run = await bench.finish(bench.store.new_claim("pay"), timeout=30)
    assert run.status == RUN_STATUS_COMPLETED
    assert bench.tools.executed == []
    [result] = run.data("tool.result")
    assert (result["status"], result["content"]) == ("failed", BAD_ARGUMENTS)
    assert bench.model.requests[1].messages[2].content == BAD_ARGUMENTS


def test_what_is_stored_of_a_call_is_read_back_to_the_letter():
    calls = [
        Call("r:1:0", "pay", ODD, provider='{"id":"abc","fields":{"n":1.10}}'),
        Call("r:1:1", "nö", "{}", CallState.FAILED),
    ]
    stored = stored_tool_calls(calls, "")
    json.loads(stored)
    assert parse_tool_calls(stored) == (
        ToolUse("r:1:0", "pay", ODD, '{"id":"abc","fields":{"n":1.10}}'),
        ToolUse("r:1:1", "nö", "{}"),
    )


def test_arguments_that_were_stored_as_a_text_are_that_text():
    stored = '[{"call_id":"r:1:0","name":"pay","arguments":"{\\"a\\":1.10}"}]'
    assert parse_tool_calls(stored) == (ToolUse("r:1:0", "pay", '{"a":1.10}'),)


@pytest.mark.parametrize("stored", ["{}", "[1]", '[{"name":"x"}]', "oops", '[{"call_id":1,"name":'])
def test_what_is_no_list_of_calls_counts_as_none(stored):
    assert parse_tool_calls(stored) == ()


def test_a_call_as_text_is_the_models_own():
    message = ChatMessage("assistant", "", (ToolUse("r:1:0", "pay", ODD),))
    assert plain(message).content == f'{{"name":"pay","arguments":{ODD}}}'


def test_what_cannot_be_stored_is_left_out_of_texts():
    assert storable("a\x00b") == "ab"
    assert storable("a\ud83db") == "a?b"
    assert storable("aé😀") == "aé😀"
    builder = TurnBuilder("r", 1)
    assert builder.add([TextDelta("x\ud800\x00y")]) == ("x?y", "")
