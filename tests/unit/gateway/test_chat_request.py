from __future__ import annotations

from typing import Any

import pytest

from gateway.openai.chat_request import parse_chat
from gateway.problems import OpenAIError
from hermesh.session.v1 import resources_pb2 as resources

HELLO = [{"role": "user", "content": "hello"}]


def body(**more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": HELLO, **more}


def test_all_parameters_reach_the_run() -> None:
    chat = parse_chat(
        body(
            temperature=0.5,
            top_p=0.9,
            max_tokens=10,
            stop=["a", "b"],
            seed=7,
            user="ada",
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chat.options.temperature == 0.5
    assert chat.options.top_p == 0.9
    assert chat.options.max_output_tokens == 10
    assert list(chat.options.stop) == ["a", "b"]
    assert chat.options.seed == 7
    assert (chat.user, chat.stream, chat.include_usage) == ("ada", True, True)


@pytest.mark.parametrize("name", ["", "enqueue", "reject", "interrupt", "rollback"])
def test_the_header_says_what_happens_when_the_session_is_busy(name: str) -> None:
    expected = f"CONCURRENCY_POLICY_{name.upper() or 'UNSPECIFIED'}"
    chat = parse_chat(body(), None, name or None)
    assert resources.ConcurrencyPolicy.Name(chat.concurrency) == expected


def test_a_policy_that_is_none_is_refused() -> None:
    with pytest.raises(OpenAIError) as caught:
        parse_chat(body(), None, "fight")
    assert (caught.value.status, caught.value.param) == (400, "X-Hermesh-Concurrency")


def test_max_completion_tokens_goes_before_the_old_name() -> None:
    assert parse_chat(body(max_tokens=10, max_completion_tokens=5)).options.max_output_tokens == 5


def test_what_is_left_out_is_not_set() -> None:
    options = parse_chat(body()).options
    assert not options.HasField("temperature")
    assert not options.HasField("seed")
    assert options.max_output_tokens == 0


def test_roles_and_parts_are_translated() -> None:
    chat = parse_chat(
        body(
            messages=[
                {"role": "developer", "content": "be brief"},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": "c"},
            ]
        )
    )
    assert [(m.role, m.content) for m in chat.messages] == [
        ("system", "be brief"),
        ("user", "ab"),
        ("assistant", "c"),
    ]


def test_the_header_names_the_session_before_the_body_does() -> None:
    one, two = "01890000-0000-7000-8000-00000000000a", "01890000-0000-7000-8000-00000000000b"
    assert parse_chat(body(session_id=one)).session_id == one
    assert parse_chat(body(session_id=one), two).session_id == two


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ([], None),
        ({"messages": HELLO}, "model"),
        (body(model=""), "model"),
        (body(model=7), "model"),
        (body(messages=[]), "messages"),
        (body(messages="hello"), "messages"),
        (body(messages=HELLO * 300), "messages"),
        (body(messages=["hello"]), "messages[0]"),
        (body(messages=[{"role": "wizard", "content": "x"}]), "messages[0].role"),
        (body(messages=[{"role": "tool", "content": "x", "tool_call_id": "1"}]), "messages[0].role"),
        (body(messages=[{"role": "user", "content": None}]), "messages[0].content"),
        (
            body(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
            "messages[0].content[0]",
        ),
        (body(n=2), "n"),
        (body(n=True), "n"),
        (body(tools=[{"type": "function"}]), "tools"),
        (body(functions=[{"name": "f"}]), "functions"),
        (body(logprobs=True), "logprobs"),
        (body(response_format={"type": "json_object"}), "response_format"),
        (body(temperature=3), "temperature"),
        (body(temperature="hot"), "temperature"),
        (body(temperature=True), "temperature"),
        (body(top_p=0), "top_p"),
        (body(max_tokens=0), "max_tokens"),
        (body(max_completion_tokens=1.5), "max_completion_tokens"),
        (body(seed="x"), "seed"),
        (body(stop=[1]), "stop"),
        (body(stop=["x"] * 17), "stop"),
        (body(stream="yes"), "stream"),
        (body(stream_options={"include_usage": True}), "stream_options"),
        (body(user=7), "user"),
        (body(session_id="x"), "session_id"),
        (body(session_id=7), "session_id"),
    ],
)
def test_a_wrong_parameter_is_named(value: Any, param: str | None) -> None:
    with pytest.raises(OpenAIError) as refused:
        parse_chat(value)
    assert refused.value.status == 400
    assert refused.value.param == param
