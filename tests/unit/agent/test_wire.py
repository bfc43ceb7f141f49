"""The stream's parser: what it knows without parsing is what parsing would have said."""

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.agent.model import wire
from services.agent.model.errors import ModelError
from services.agent.model.port import ReasoningDelta, TextDelta
from tests.examples import examples

TOKENS = st.one_of(
    st.text('ab "\\\n\t/é\x7f\u2028', max_size=4),
    st.sampled_from(["", "plain ", "content", '","content":"', "where the token stands", "}", "\\"]),
)
DELTAS = st.one_of(
    TOKENS.map(lambda token: {"content": token}),
    TOKENS.map(lambda token: {"content": token, "role": "assistant"}),
    TOKENS.map(lambda token: {"reasoning_content": token}),
    TOKENS.map(lambda token: {"content": token, "reasoning_content": "hm"}),
    st.just({}),
    st.just({"content": None}),
)


@st.composite
def chunks(draw: st.DrawFn) -> list[bytes]:
    """Chunks as backends write them: alike but for the token, mostly, with or without blanks between."""
    separators = draw(st.sampled_from([(",", ":"), (", ", ": ")]))
    moving = draw(st.booleans())
    made = []
    for number, delta in enumerate(draw(st.lists(DELTAS, max_size=20))):
        chunk: dict[str, object] = {
            "id": f"c{number}" if moving else "c",
            "note": {"content": draw(st.sampled_from(["plain ", "a"]))},
            "choices": [
                {
                    "index": 0,
                    "delta": delta,
                    "finish_reason": draw(st.sampled_from([None] * 8 + ["stop"])),
                }
            ],
        }
        if draw(st.booleans()):
            chunk["usage"] = draw(st.sampled_from([None, None, {"completion_tokens": number}]))
        text = json.dumps(chunk, separators=separators, ensure_ascii=draw(st.booleans()))
        made.append(b"data: " + text.encode() + b"\n\n")
    return made


def said(data: bytes, cuts: list[int], tries: int) -> tuple[list[object], str]:
    """What a parser makes of the bytes, cut at these places; text in a row is joined."""
    parser = wire.StreamParser()
    parser._tries = tries
    out: list[object] = []
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    for start, end in pairwise(places):
        for event in parser.feed(data[start:end]):
            last = out[-1] if out else None
            for kind in (TextDelta, ReasoningDelta):
                if isinstance(event, kind) and isinstance(last, kind):
                    out[-1] = kind(last.text + event.text)
                    break
            else:
                out.append(event)
    return out, parser.finish_reason


@settings(max_examples=examples(120), deadline=None)
@given(chunks(), st.lists(st.integers(0, 10_000), max_size=6))
def test_what_is_known_without_parsing_is_what_parsing_says(made: list[bytes], cuts: list[int]) -> None:
    data = b"".join(made)
    assert said(data, cuts, wire.TEMPLATE_TRIES) == said(data, cuts, 0)


def chunk(text: str, **more: object) -> bytes:
    body = {"id": "c", "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}], **more}
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


def test_plain_tokens_are_known_without_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = wire.StreamParser()
    assert parser.feed(chunk("one ")) == [TextDelta("one ")]

    def never(payload: bytes, out: object) -> None:
        raise AssertionError("it was parsed")

    monkeypatch.setattr(parser, "_chunk", never)
    assert parser.feed(chunk("two ") + chunk("three ")) == [TextDelta("two three ")]
    with pytest.raises(AssertionError):
        parser.feed(chunk('a "quoted" one'))


def test_a_backend_whose_chunks_all_differ_is_not_tried_for_ever() -> None:
    parser = wire.StreamParser()
    for number in range(wire.TEMPLATE_TRIES * 2):
        assert parser.feed(chunk("a ", created=number)) == [TextDelta("a ")]
    assert parser._tries == 0


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_what_is_too_short_to_be_a_chunk_is_no_empty_token(cut: int) -> None:
    parser = wire.StreamParser()
    parser.feed(chunk("a"))
    whole = chunk("").strip()[6:]
    place = whole.index(b'"content":"') + len(b'"content":"')
    with pytest.raises(ModelError):
        parser.feed(b"data: " + whole[:place] + whole[place + cut :] + b"\n\n")
