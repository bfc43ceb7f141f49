from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from gateway.openai.chat_fold import DONE, ChatChunks, Reply, completion

RUN = "01890000-0000-7000-8000-00000000000a"


@dataclass(frozen=True)
class E:
    seq: int
    type: str
    data: str
    run_id: str = RUN
    time_ms: int = 1_700_000_000_999


def log(*entries: tuple[str, dict[str, Any]]) -> list[E]:
    first = ("run.created", {"session_id": "s", "ordinal": 1, "model": "m", "input": []})
    return [E(n, kind, json.dumps(data)) for n, (kind, data) in enumerate([first, *entries], 1)]


def delta(text: str) -> tuple[str, dict[str, Any]]:
    return "text.delta", {"text": text}


COMPLETED = ("run.completed", {"message_id": "x", "finish_reason": "stop"})
USAGE = ("usage", {"input_tokens": 7, "output_tokens": 5, "cached_tokens": 2, "ttft_ms": 1})


def stream(events: list[E], **options: Any) -> bytes:
    chunks = ChatChunks("asked", **options)
    return b"".join(chunks.feed(event) for event in events)


def parse(body: bytes) -> list[dict[str, Any]]:
    return [json.loads(part[6:]) for part in body.decode().split("\n\n") if part and part != "data: [DONE]"]


def text_of(chunks: list[dict[str, Any]]) -> str:
    return "".join(c["delta"].get("content") or "" for chunk in chunks for c in chunk["choices"])


ENTRIES = st.one_of(
    st.text(max_size=8).map(delta),
    st.text(max_size=8).map(lambda text: ("reasoning.delta", {"text": text})),
    st.integers(1, 5).map(lambda step: ("step.started", {"step": step})),
    st.integers(1, 30).map(lambda seq: ("attempt.reset", {"from_seq": seq, "reason": "takeover"})),
    st.just(("run.started", {"attempt": 2, "replica": "agent-2"})),
    st.just(USAGE),
    st.just(("tool.call", {"call_id": "c", "name": "n", "arguments": {}, "effect": "pure"})),
)


@given(st.lists(ENTRIES, max_size=25), st.integers(0, 30))
def test_folding_again_from_the_start_gives_the_same_bytes(
    entries: list[tuple[str, dict[str, Any]]], cut: int
) -> None:
    """A resume folds the whole log again and skips what was sent: so the prefix must be the same."""
    events = log(*entries, COMPLETED)
    whole = stream(events, include_usage=True)
    first = stream(events[:cut], include_usage=True)
    assert whole.startswith(first)
    assert stream(events, include_usage=True) == whole


@given(st.lists(ENTRIES, max_size=25))
def test_the_streamed_text_is_the_whole_replys_text(entries: list[tuple[str, dict[str, Any]]]) -> None:
    events = log(*entries, COMPLETED)
    reply = Reply()
    for event in events:
        reply.feed(event)
    chunks = parse(stream(events))
    if not any("error" in chunk for chunk in chunks):
        assert text_of(chunks) == reply.text
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


@given(st.lists(st.text(max_size=6), max_size=12), st.integers(2, 15))
def test_a_reset_discards_exactly_what_came_from_its_seq_on(texts: list[str], from_seq: int) -> None:
    entries = [delta(text) for text in texts]
    events = log(*entries, ("attempt.reset", {"from_seq": from_seq}), delta("again"), COMPLETED)
    reply = Reply()
    for event in events:
        reply.feed(event)
    kept = "".join(text for n, text in enumerate(texts, 2) if n < from_seq)
    assert reply.text == kept + "again"


def test_chunks_have_the_shape_of_the_real_thing() -> None:
    body = stream(
        log(("step.started", {"step": 1}), delta("Hi"), delta(" you"), USAGE, COMPLETED), include_usage=True
    )
    chunks = parse(body)
    assert body.endswith(DONE)
    assert {chunk["id"] for chunk in chunks} == {f"chatcmpl-{RUN}"}
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert {chunk["created"] for chunk in chunks} == {1_700_000_000}
    assert {chunk["model"] for chunk in chunks} == {"m"}
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert text_of(chunks) == "Hi you"
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 12
    assert chunks[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}


def test_without_include_usage_no_chunk_speaks_of_it() -> None:
    assert all("usage" not in chunk for chunk in parse(stream(log(delta("a"), USAGE, COMPLETED))))


def test_a_reset_of_sent_text_ends_the_stream_with_an_error() -> None:
    body = stream(log(delta("half a"), ("attempt.reset", {"from_seq": 2}), delta("whole"), COMPLETED))
    chunks = parse(body)
    assert chunks[-1]["error"]["code"] == "attempt_reset"
    assert b"whole" not in body
    assert DONE not in body


def test_a_reset_of_nothing_is_not_noticed() -> None:
    chunks = parse(stream(log(("attempt.reset", {"from_seq": 2}), delta("whole"), COMPLETED)))
    assert text_of(chunks) == "whole"


def test_texts_of_two_turns_do_not_run_together() -> None:
    events = log(
        ("step.started", {"step": 1}),
        delta("Let me see."),
        ("message.completed", {"content": "Let me see.", "tool_calls": [{"call_id": "c"}]}),
        ("tool.result", {"call_id": "c", "status": "completed", "content": "4"}),
        ("step.started", {"step": 2}),
        delta("It is "),
        delta("4."),
        ("message.completed", {"content": "It is 4.", "tool_calls": []}),
        COMPLETED,
    )
    assert text_of(parse(stream(events))) == "Let me see.\n\nIt is 4."


def test_a_message_that_came_without_deltas_is_sent_whole() -> None:
    events = log(("step.started", {"step": 1}), ("message.completed", {"content": "All at once."}), COMPLETED)
    assert text_of(parse(stream(events))) == "All at once."


def test_a_message_longer_than_its_deltas_is_completed() -> None:
    events = log(
        ("step.started", {"step": 1}),
        delta("All "),
        ("message.completed", {"content": "All of it."}),
        COMPLETED,
    )
    assert text_of(parse(stream(events))) == "All of it."


def test_a_failed_run_ends_with_its_reason() -> None:
    failed = ("run.failed", {"code": "UNAVAILABLE", "reason": "MODEL_UNAVAILABLE", "message": "gone"})
    chunks = parse(stream(log(delta("a"), failed)))
    assert chunks[-1]["error"] == {
        "message": "gone",
        "type": "server_error",
        "param": None,
        "code": "model_unavailable",
    }


def test_the_length_finish_reason_is_kept() -> None:
    events = log(delta("a"), ("run.completed", {"finish_reason": "length"}))
    assert parse(stream(events))[-1]["choices"][0]["finish_reason"] == "length"


def test_a_whole_completion_has_the_shape_of_the_real_thing() -> None:
    reply = Reply()
    for event in log(("reasoning.delta", {"text": "hm"}), delta("a"), USAGE, COMPLETED):
        reply.feed(event)
    assert completion(reply) == {
        "id": f"chatcmpl-{RUN}",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "a", "refusal": None, "reasoning_content": "hm"},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 7,
            "completion_tokens": 5,
            "total_tokens": 12,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
    }


def test_a_refusal_is_the_refusal_and_not_the_content() -> None:
    events = log(delta("I will"), delta(" not."), ("run.completed", {"finish_reason": "refusal"}))
    reply = Reply()
    for event in events:
        reply.feed(event)
    (choice,) = completion(reply)["choices"]
    assert (choice["message"]["content"], choice["message"]["refusal"]) == (None, "I will not.")
    assert choice["finish_reason"] == "stop"
    # Of a stream it is known at the end only.
    last = parse(stream(events))[-1]["choices"][0]
    assert (last["delta"], last["finish_reason"]) == ({"refusal": "I will not."}, "stop")
