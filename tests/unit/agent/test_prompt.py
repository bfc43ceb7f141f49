import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.agent.domain.loop import CallState
from services.agent.domain.prompt import Background, RunSpec, build_prompt, fit, system_prompt
from services.agent.domain.turn import BAD_ARGUMENTS, LONG_ARGUMENTS, MAX_CALLS, TurnBuilder
from services.agent.model import wire
from services.agent.model.errors import ModelProtocolError
from services.agent.model.port import (
    ChatMessage,
    Finished,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    ToolOffer,
    ToolUse,
    Usage,
)
from services.agent.model.request import encode_request

SPEC = RunSpec("r", "s", "t", "m", instructions="Be brief.")
USER = ChatMessage("user", "hi")
ADD = ToolOffer("add", "Adds.", {"type": "object", "properties": {"a": {"type": "number"}}})
MUL = ToolOffer("mul", "Multiplies.", {"type": "object"})


def prompt(spec=SPEC, messages=(USER,), tools=(ADD, MUL), mode="native", first_turn=True, **more):
    return build_prompt(spec, messages, Background(), tools, mode=mode, first_turn=first_turn, **more)


def spec(**changes):
    return RunSpec("r", "s", "t", "m", **changes)


def test_the_system_prompt_comes_first_and_the_prefix_last():
    messages = prompt(prefix="Hel").request.messages
    assert [(m.role, m.content) for m in messages] == [
        ("system", "Be brief."),
        ("user", "hi"),
        ("assistant", "Hel"),
    ]


def test_nothing_to_say_means_no_system_prompt():
    assert prompt(spec()).request.messages == [USER]


def test_preferences_and_memories_are_told():
    text = system_prompt("Be brief.", Background({"b": "2", "a": "1"}, ["likes tea"]))
    assert text.startswith("Be brief.")
    assert text.index("- a: 1") < text.index("- b: 2") < text.index("- likes tea")


def test_native_tools_are_offered_and_the_choice_binds_the_first_turn_only():
    asked = spec(tool_choice="add")
    assert prompt(asked).request.tool_choice == "add"
    assert prompt(asked, first_turn=False).request.tool_choice == "auto"
    assert prompt(spec(tool_choice="none"), first_turn=False).request.tools == ()


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_a_model_without_tools_is_only_constrained_when_a_tool_is_asked_for(choice):
    made = prompt(spec(tool_choice=choice), mode="json")
    assert (made.constrained, made.request.tools, made.request.response_schema) == (False, (), None)


def test_a_tool_that_is_asked_for_becomes_a_grammar():
    made = prompt(spec(tool_choice="add"), mode="json")
    assert made.constrained
    assert made.request.tools == ()
    assert made.request.response_schema["properties"]["name"] == {"const": "add"}
    assert "add(a): Adds." in made.request.messages[0].content
    any_of = prompt(spec(tool_choice="required"), mode="json").request.response_schema["anyOf"]
    assert [one["properties"]["name"]["const"] for one in any_of] == ["add", "mul"]
    assert not prompt(spec(tool_choice="add"), mode="json", first_turn=False).constrained


def test_calls_become_text_for_a_model_without_tools():
    messages = [
        USER,
        ChatMessage("assistant", "", (ToolUse("r:1:0", "add", '{"a":1}'),)),
        ChatMessage("tool", "4", (), "r:1:0"),
    ]
    sent = prompt(spec(), messages, mode="none").request.messages
    assert [m.role for m in sent] == ["user", "assistant", "user"]
    assert orjson.loads(sent[1].content) == {"name": "add", "arguments": {"a": 1}}
    assert "4" in sent[2].content


def test_calls_of_an_earlier_run_that_was_cut_off_are_left_out():
    messages = [
        ChatMessage("user", "before"),
        ChatMessage("assistant", "", (ToolUse("old:1:0", "add", "{}"),)),
        ChatMessage("tool", "x", (), "other:1:0"),
        USER,
    ]
    assert [m.content for m in prompt(spec(), messages).request.messages] == ["before", "hi"]


def test_a_call_id_is_short_on_the_wire_and_the_same_in_call_and_result():
    long = "0" * 36 + ":12:3"
    messages = [
        USER,
        ChatMessage("assistant", "", (ToolUse(long, "add", "{}"),)),
        ChatMessage("tool", "4", (), long),
    ]
    body = orjson.loads(encode_request(prompt(spec(), messages).request))
    assert body["messages"][1]["tool_calls"][0]["id"] == body["messages"][2]["tool_call_id"] == "call00000"
    assert body["stream_options"] == {"include_usage": True}


def test_only_what_is_set_is_sent():
    body = orjson.loads(encode_request(prompt(spec(), tools=()).request))
    assert set(body) == {"model", "messages", "stream", "stream_options"}


@given(
    st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text(max_size=200)), max_size=20),
    st.integers(0, 400),
)
def test_history_is_cut_from_its_beginning_and_keeps_the_last_input(turns, room):
    messages = [*(ChatMessage(role, text) for role, text in turns), USER]
    kept = fit("", messages, room)
    assert kept == messages[len(messages) - len(kept) :]
    assert kept[-1] == USER
    assert kept[0].role == "user"


def test_all_of_it_stays_where_there_is_room():
    messages = [USER, ChatMessage("assistant", "a"), USER]
    assert fit("s", messages, 10_000) == messages


def build(*events, **options):
    builder = TurnBuilder("r", 2, **options)
    seen = [builder.add([event]) for event in events]
    return builder.build(), "".join(text for text, _ in seen), "".join(thought for _, thought in seen)


def test_a_turn_is_put_together():
    turn, text, thought = build(
        ReasoningDelta("hm"), TextDelta("Hel"), TextDelta("lo"), Usage(1, 2), Finished("length")
    )
    assert (turn.text, turn.calls, turn.finish_reason, turn.usage) == ("Hello", (), "length", Usage(1, 2))
    assert (text, thought) == ("Hello", "hm")


def test_a_continued_turn_starts_with_its_prefix():
    turn, text, _ = build(TextDelta("lo"), prefix="Hel")
    assert (turn.text, text) == ("Hello", "lo")


def test_calls_get_their_ids_from_run_step_and_place():
    turn, _, _ = build(
        ToolCallDelta(0, "add", '{"a"'),
        ToolCallDelta(3, "mul", ""),
        ToolCallDelta(0, "", ":1}"),
        Finished("tool_calls"),
    )
    assert [(c.call_id, c.name, c.arguments) for c in turn.calls] == [
        ("r:2:0", "add", '{"a":1}'),
        ("r:2:1", "mul", "{}"),
    ]


def test_arguments_that_are_not_an_object_fail_the_call_only():
    turn, _, _ = build(ToolCallDelta(0, "add", "[1]"))
    assert turn.calls[0].content == BAD_ARGUMENTS
    assert turn.calls[0].arguments == "{}"


def test_a_constrained_reply_is_a_call_and_not_text():
    turn, text, _ = build(TextDelta('{"name":"add",'), TextDelta('"arguments":{}}'), constrained=True)
    assert (turn.text, text, turn.calls[0].name) == ("", "", "add")


@pytest.mark.parametrize("text", ["", "{oops", "[]", '{"name":1,"arguments":{}}', '{"name":"a"}'])
def test_a_constrained_reply_that_is_no_call_is_an_error(text):
    with pytest.raises(ModelProtocolError):
        build(TextDelta(text), constrained=True)


def test_what_cannot_be_stored_is_left_out():
    turn, text, thought = build(
        TextDelta("a\x00b"), ReasoningDelta("\x00"), ToolCallDelta(0, "ad\x00d", "{}")
    )
    assert (turn.text, text, thought, turn.calls[0].name) == ("ab", "ab", "", "add")


def test_endless_arguments_fail_the_call_and_tell_the_model():
    turn, _, _ = build(*[ToolCallDelta(0, "add", "{}"), *[ToolCallDelta(1, "sub", "x" * 100_000)] * 20])
    first, second = turn.calls
    assert (first.state, first.arguments) == (CallState.INTENT, "{}")
    assert (second.state, second.arguments, second.content) == (CallState.FAILED, "{}", LONG_ARGUMENTS)
    assert turn.finish_reason == "length"


def test_of_a_flood_of_calls_the_first_are_run_and_the_model_is_told():
    turn, _, _ = build(*(ToolCallDelta(index, "add", "{}") for index in range(1000)))
    assert len(turn.calls) == MAX_CALLS + 1
    assert {call.state for call in turn.calls[:MAX_CALLS]} == {CallState.INTENT}
    assert turn.calls[-1].state is CallState.FAILED
    assert "1000 calls" in turn.calls[-1].content


@given(st.integers(1, 60))
def test_a_stream_is_read_the_same_however_it_is_cut(size):
    stream = (
        b': hi\n\ndata: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
        b'data: {"choices":[{"delta":{"content":"H\xc3\xa9"}}]}\r\n\r\n'
        b'data:{"choices":[{"delta":{"content":"llo"},"finish_reason":"stop"}]}\n\n'
        b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\ndata: [DONE]\n\n'
    )
    parser = wire.StreamParser()
    events = [e for at in range(0, len(stream), size) for e in parser.feed(stream[at : at + size])]
    assert "".join(e.text for e in events if isinstance(e, TextDelta)) == "Héllo"
    assert events[-1] == Usage(3, 2, 0)
    assert parser.done
    assert parser.end() == (Finished("stop"),)
