"""Streams in every legal form: the text, the reasoning, the calls and the usage that come out are what went in."""

import json
import random
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.agent.domain.loop import CallState
from services.agent.domain.turn import TurnBuilder, mended_arguments
from services.agent.model.calls import CallPieces
from services.agent.model.errors import ModelError, ModelProtocolError, ModelRejectedError
from services.agent.model.port import Kept, ReasoningDelta, TextDelta, Usage
from services.agent.model.profiles import TOLERANT, built_in
from services.agent.model.torn import mended, whole
from services.agent.model.wire import StreamParser
from tests.examples import examples

TEXTS = st.one_of(
    st.text('ab "\\\n\r\t/é\u2028😀\x7f', min_size=1, max_size=8),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1, max_size=8),
    st.sampled_from(["plain ", "data: x\n\n", "[DONE]", "{}", '","content":"', "👩‍👩‍👧"]),
)
VALUES = st.recursive(
    st.one_of(st.integers(-(2**70), 2**70), st.text('a"\\é😀\n', max_size=5), st.booleans(), st.none()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2), st.dictionaries(st.text("xy", max_size=2), inner, max_size=2)
    ),
    max_leaves=4,
)
OBJECTS = st.dictionaries(st.text("ab", min_size=1, max_size=3), VALUES, max_size=3)
NAMES = st.sampled_from(["add", "mul", "get_weather", "weather"])
STYLES = (
    "index",
    "ids",
    "index 0",
    "whole",
    "object",
    "snapshot",
    "two names",
    "same name",
    "new ids",
    "text index",
)


@dataclass
class Written:
    """A reply, before it is written down."""

    said: list[tuple[str, str]]
    calls: list[tuple[str, dict]]
    usage: tuple[int, int] | None
    finish: str


def torn(text, where, how):
    """Cut a text in two, within a character if it hits one: as bytes or as UTF-16."""
    if how == "bytes":
        raw = text.encode()
        at = where % (len(raw) + 1)
        return [part.decode("utf-8", "surrogateescape") for part in (raw[:at], raw[at:])]
    if how == "utf-16":
        raw = text.encode("utf-16-le")
        at = where % (len(raw) // 2 + 1) * 2
        return [part.decode("utf-16-le", "surrogatepass") for part in (raw[:at], raw[at:])]
    at = where % (len(text) + 1)
    return [text[:at], text[at:]]


class Forms:
    """Chooses among legal forms; of one seed always the same, as drawing each would take minutes."""

    def __init__(self, seed):
        self._random = random.Random(seed)

    def one(self, *forms):
        return self._random.choice(forms)

    def maybe(self):
        return self._random.random() < 0.5

    def number(self, below):
        return self._random.randrange(below)


def call(index, function, **more):
    return {"tool_calls": [{**index, **more, "function": function}]}


def call_deltas(calls, style, forms):
    """Write calls down in one of the ways that servers have."""
    for number, (name, value) in enumerate(calls):
        text = json.dumps(value, ensure_ascii=forms.maybe())
        identity = f"id-{number}"
        index = {"index": number} if style in ("index", "same name", "two names", "new ids") else {}
        if style == "text index":
            index = {"index": str(number)}
        if style in ("index 0", "whole", "object", "snapshot"):
            index = forms.one({"index": 0}, {})
        if style in ("whole", "object"):
            yield call(index, {"name": name, "arguments": value if style == "object" else text}, id=identity)
            continue
        empty = "{}" if style == "snapshot" else forms.one("", None, " ")
        if style == "two names":
            yield call(index, {"name": name[:2], "arguments": ""}, id=identity, type="function")
            yield call(index, {"name": name[2:]})
        else:
            yield call(index, {"name": name, "arguments": empty}, id=identity, type="function")
        for place, piece in enumerate([text] if style == "snapshot" else torn(text, forms.number(50), "no")):
            function = {"arguments": piece} | ({"name": name} if style == "same name" else {})
            more = {}
            if style in ("index 0", "ids"):
                more["id"] = forms.one(identity, identity, "", None)
            if style == "new ids":
                more["id"] = f"id-{number}-{place}"
            yield call(index, function, **more)


def said_deltas(kind, text, forms):
    """Write text or reasoning down: in two pieces, perhaps cut within a character."""
    for piece in torn(text, forms.number(60), forms.one("bytes", "utf-16", "no")):
        part = {"type": "text", "text": piece}
        if kind == "text":
            yield {"content": forms.one(piece, piece, [part], part)}
        elif forms.maybe():
            yield {forms.one("reasoning", "reasoning_content"): piece, "content": forms.one("", None)}
        else:
            yield {"content": [{"type": "thinking", "thinking": forms.one(piece, [part])}]}


def halves(value):
    """All halves of characters in a chunk."""
    if isinstance(value, str):
        return [one for one in value if "\ud800" <= one <= "\udfff"]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [one for part in parts for one in halves(part)]


def event(chunk, forms, newline, head):
    """Write a chunk down as an event."""
    fields = [b": comment", b"event: message", b"id: 7", b"retry: 5", b"other: x"]
    lines = [forms.one(*fields)] if forms.maybe() else []
    form = forms.one({}, {"separators": (",", ":")}, {"indent": 1})
    # Halves of bytes cannot be written as escapes, halves of UTF-16 only so.
    found = halves(chunk)
    raw = bool(found) and all("\udc80" <= one <= "\udcff" for one in found)
    data = json.dumps(chunk, ensure_ascii=(bool(found) and not raw) or (not found and forms.maybe()), **form)
    lines += [head + line for line in data.encode("utf-8", "surrogateescape").split(b"\n")]
    return newline.join(lines) + newline * 2


def stream(reply, forms):
    """Write a reply down as a stream, in one of the forms that the SSE standard allows."""
    newline, head = forms.one(b"\n", b"\r\n", b"\r"), forms.one(b"data: ", b"data:")
    out = forms.one(b"\xef\xbb\xbf", b"")
    deltas = [{"role": "assistant"}]
    for kind, text in reply.said:
        deltas += said_deltas(kind, text, forms)
    deltas += call_deltas(reply.calls, forms.one(*STYLES), forms)
    for number, delta in enumerate(deltas):
        choice = {"index": 0, "delta": delta, "finish_reason": None}
        choice |= forms.one({}, {"logprobs": float("nan")})
        body = {"id": forms.one("c", f"c{number}"), "choices": [choice], **forms.one({}, {"usage": None})}
        out += event(body, forms, newline, head)
    usage = None
    if reply.usage:
        usage = {"prompt_tokens": reply.usage[0], "completion_tokens": reply.usage[1]}
    choice = {"index": 0, "delta": forms.one({}, None, {"content": ""}), "finish_reason": reply.finish}
    if forms.maybe():
        out += event({"choices": [choice], "usage": usage}, forms, newline, head)
    else:
        out += event({"choices": [choice]}, forms, newline, head)
        out += event({"choices": [], "usage": usage}, forms, newline, head)
    if forms.maybe():
        out += head + b"[DONE]" + newline * 2
    return out.rstrip(b"\r\n") if forms.maybe() else out


REPLIES = st.builds(
    Written,
    st.lists(st.tuples(st.sampled_from(["text", "reasoning"]), TEXTS), max_size=5),
    st.lists(st.tuples(NAMES, OBJECTS), max_size=3),
    st.none() | st.tuples(st.integers(0, 2**31 - 1), st.integers(1, 2**31 - 1)),
    st.sampled_from(["stop", "length", "eos"]),
)


def read(data, cuts, profile=TOLERANT):
    """What the parser and the turn make of the bytes, cut at these places."""
    parser = StreamParser(profile)
    events = []
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    for start, end in pairwise(places):
        events += parser.feed(data[start:end])
        assert parser.failed is None
    events += parser.close()
    builder = TurnBuilder("run", 1)
    builder.add([*events, *parser.end()])
    joined = {
        kind: "".join(one.text for one in events if isinstance(one, kind))
        for kind in (TextDelta, ReasoningDelta)
    }
    return joined[TextDelta], joined[ReasoningDelta], builder.build(), parser


@settings(max_examples=examples(150), deadline=None)
@given(REPLIES, st.integers(0, 2**32), st.lists(st.integers(0, 100_000), max_size=8))
def test_what_went_into_a_stream_of_any_legal_form_comes_out(reply, seed, cuts):
    text, reasoning, turn, _ = read(stream(reply, Forms(seed)), cuts)
    assert text == "".join(said for kind, said in reply.said if kind == "text")
    assert reasoning == "".join(said for kind, said in reply.said if kind == "reasoning")
    assert [(call.name, json.loads(call.arguments)) for call in turn.calls] == reply.calls
    assert all(call.state is CallState.INTENT for call in turn.calls)
    assert turn.usage == (Usage(*reply.usage) if reply.usage else Usage())
    assert turn.finish_reason == ("length" if reply.finish == "length" else "stop")


@settings(max_examples=examples(100), deadline=None)
@given(st.text(max_size=20), st.lists(st.integers(0, 200), max_size=6), st.sampled_from(["utf-8", "utf-16"]))
def test_a_text_torn_anywhere_is_put_together(text, cuts, how):
    codec, errors, unit = (
        ("utf-8", "surrogateescape", 1) if how == "utf-8" else ("utf-16-le", "surrogatepass", 2)
    )
    raw = text.encode(codec)
    places = [0, *sorted(cut % (len(raw) // unit + 1) * unit for cut in cuts), len(raw)]
    out, half = "", ""
    for start, end in pairwise(places):
        piece, half = mended(half + raw[start:end].decode(codec, errors))
        out += piece
    assert (out, half) == (text, "")


@given(st.text(st.characters(categories=["Cs", "Lu"]), max_size=6))
def test_halves_that_stay_alone_never_reach_a_store(text):
    piece, half = mended(text)
    (piece + whole(half)).encode()


def chunk(delta=None, finish=None, **more):
    return {"choices": [{"index": 0, "delta": delta or {}, "finish_reason": finish}], **more}


def sse(*chunks):
    return b"".join(
        b"data: " + (one if isinstance(one, bytes) else json.dumps(one).encode()) + b"\n\n" for one in chunks
    )


@pytest.mark.parametrize(
    "after",
    [
        b"data: {broken\n\n",
        b"data: {broken",
        b'data: {"choices": 5}\n\n',
        b'data: {"choices": [], "usage": "none"}\n\n',
        b'data: {"error": "the counter failed"}\n\n',
        b"event: error\ndata: late\n\n",
        b"error: {}\n\n",
        b"{oops",
    ],
)
def test_nothing_after_its_end_fails_a_finished_reply(after):
    text, _, turn, parser = read(sse(chunk({"content": "whole"}), chunk(finish="stop")) + after, [])
    assert (text, turn.finish_reason, parser.finish_reason) == ("whole", "stop", "stop")


@pytest.mark.parametrize(
    "more",
    [b"data: ping\n\n", b": ping\n\n", b"event: ping\ndata: {}\n\n", b"data:\n\n", b"data\n\n", b"x\n"],
)
def test_signs_of_life_are_no_text(more):
    assert (
        read(more + sse(chunk({"content": "a"})) + more + sse(chunk({"content": "b"}, "stop")), [])[0] == "ab"
    )


def test_lines_may_end_in_three_ways_within_one_stream():
    data = b'data: {"choices":[{"delta":{"content":"a"}}]}\r\rdata: {"choices":[\rdata: {"delta":{"content":"b"}}]}\r\n\r\n'
    data += b'data: {"choices":[\r\ndata: {"delta":{"content":"c"}}]}\n\ndata: {"choices":[{"delta":{},"finish_reason":"stop"}]}\r'
    for cut in range(len(data)):
        text, _, _, parser = read(data, [cut])
        assert (text, parser.finish_reason) == ("abc", "stop")


def test_a_reply_that_is_not_streamed_is_read_all_the_same():
    body = {
        "object": "chat.completion",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "Hé",
                    "reasoning_content": "hm",
                    "tool_calls": [{"id": "x", "function": {"name": "add", "arguments": "{}"}}],
                },
                "finish_reason": "tool_calls",
            }
        ],
        "usage": {"prompt_tokens": 1, "completion_tokens": 2},
    }
    for data in (
        json.dumps(body).encode(),
        json.dumps(body, indent=2).encode() + b"\n",
        json.dumps(body).encode() + b"\n",
    ):
        text, reasoning, turn, _ = read(data, [3, 30])
        assert (text, reasoning, turn.calls[0].name, turn.usage) == ("Hé", "hm", "add", Usage(1, 2))


def test_a_last_message_that_repeats_the_reply_is_not_read_twice():
    whole_again = {"choices": [{"delta": {}, "message": {"content": "ab"}, "finish_reason": "stop"}]}
    assert read(sse(chunk({"content": "a"}), chunk({"content": "b"}), whole_again), [])[0] == "ab"


def test_the_old_function_call_is_a_call():
    data = sse(
        chunk({"function_call": {"name": "add", "arguments": ""}}),
        chunk({"function_call": {"arguments": '{"a":'}}),
        chunk({"function_call": {"arguments": "1}"}}),
        chunk(finish="function_call"),
    )
    turn = read(data, [])[2]
    assert [(call.name, call.arguments) for call in turn.calls] == [("add", '{"a":1}')]
    assert turn.finish_reason == "tool_calls"


def test_arguments_as_an_object_are_kept_as_they_were_written():
    arguments = b'{"a": %d, "b":1.10, "c": "\\u00e9"}' % 2**70
    data = (
        b'data: {"choices":[{"delta":{"tool_calls":[{"function":{"name":"add","arguments":%b}}]}}]}\n\n'
        % arguments
    )
    assert read(data, [])[2].calls[0].arguments == arguments.decode()


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("", "{}"),
        (" ", "{}"),
        ("null", "{}"),
        ('""', "{}"),
        ("{}", "{}"),
        ('{}{"a":1}', '{"a":1}'),
        ('{"a":1}{"a":1}', '{"a":1}'),
        ('"{\\"a\\":1}"', '{"a":1}'),
        ('{ "a" : 1.10 }', '{ "a" : 1.10 }'),
        ("[1]", "[1]"),
        ('"text"', '"text"'),
        ('{"a":', '{"a":'),
    ],
)
def test_arguments_are_mended_only_where_it_is_known_what_was_meant(written, meant):
    assert mended_arguments(written) == meant


def placed(*calls):
    """The calls that these pieces make."""
    pieces = CallPieces(("extra_content",))
    builder = TurnBuilder("run", 1)
    builder.add([pieces.piece(call) for call in calls])
    return [(call.name, call.arguments) for call in builder.build().calls]


def piece(name=None, arguments=None, **more):
    return {"function": {"name": name, "arguments": arguments}, **more}


@pytest.mark.parametrize(
    "calls",
    [
        # without index and id, one whole call after the other
        [piece("add", '{"a":1}'), piece("add", '{"a":2}')],
        # all with the same index, and with the same id
        [piece("add", '{"a":1}', index=0, id=""), piece("add", '{"a":2}', index=0, id="")],
        [piece("add", '{"a":1}', index=0, id="0"), piece("add", '{"a":2}', index=0, id="0")],
        # the same id under two indexes
        [piece("add", '{"a":1}', index=0, id="x"), piece("add", '{"a":2}', index=1, id="x")],
        # pieces of two calls, turn about
        [
            piece("add", "", index=0, id="x"),
            piece("add", "", index=0, id="y"),
            piece(None, '{"a":1}', index=0, id="x"),
            piece(None, '{"a":2}', index=0, id="y"),
        ],
        # a new id with each piece
        [
            piece("add", "", index=0, id="r1"),
            piece(None, '{"a":', index=0, id="r2"),
            piece(None, "1}", index=0, id="r3"),
            piece("add", '{"a":2}', index=0, id="r4"),
        ],
        # arguments that are sent whole once more at the end
        [
            piece("add", '{"a":1}', index=0),
            piece("add", '{"a":1}', index=0),
            piece("add", '{"a":2}', index=1),
        ],
    ],
)
def test_pieces_find_their_call(calls):
    assert placed(*calls) == [("add", '{"a":1}'), ("add", '{"a":2}')]


def test_the_calls_of_different_names_with_empty_arguments_are_two():
    assert placed(piece("add", "{}", index=0), piece("mul", "{}", index=0)) == [("add", "{}"), ("mul", "{}")]


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b'data: {"error":{"message":"m","code":"401"}}\n\n', "MODEL_UNAUTHENTICATED"),
        (b'data: {"error":{"message":"m","code":"400"}}\n\n', "MODEL_REQUEST_REJECTED"),
        (b'data: {"error":{"message":"m","code":"429"}}\n\n', "MODEL_RATE_LIMITED"),
        (b'data: {"error":{"message":"m","code":"rate_limit_exceeded"}}\n\n', "MODEL_RATE_LIMITED"),
        (
            b'data: {"error":{"message":"m","code":"context_length_exceeded","type":"invalid_request_error"}}\n\n',
            "MODEL_REQUEST_REJECTED",
        ),
        (b'data: {"error":{"message":"m","type":"insufficient_quota"}}\n\n', "MODEL_RATE_LIMITED"),
        (b'data: {"error":{"message":"m","type":"overloaded_error"}}\n\n', "MODEL_UNAVAILABLE"),
        (b'data: {"error":"m"}\n\n', "MODEL_UNAVAILABLE"),
        (b'data: {"error":true,"message":"m","status_code":400}\n\n', "MODEL_REQUEST_REJECTED"),
        (b'data: {"error":{"error":{"message":"m","code":429}}}\n\n', "MODEL_RATE_LIMITED"),
        (b'data: {"object":"error","message":"m","code":400}\n\n', "MODEL_REQUEST_REJECTED"),
        (
            b'data: {"object":"error","message":"m","type":"BadRequestError","code":40001}\n\n',
            "MODEL_REQUEST_REJECTED",
        ),
        (
            b'data: {"type":"error","error":{"type":"authentication_error","message":"m"}}\n\n',
            "MODEL_UNAUTHENTICATED",
        ),
        (b'data: {"detail":"m"}\n\n', "MODEL_UNAVAILABLE"),
        (b'data: {"detail":[{"loc":["body"],"msg":"m","type":"invalid"}]}\n\n', "MODEL_UNAVAILABLE"),
        (b'data: {"message":"m","code":"invalid_api_key"}\n\n', "MODEL_UNAUTHENTICATED"),
        (b'data: [{"error":{"message":"m","status":"UNAVAILABLE"}}]\n\n', "MODEL_UNAVAILABLE"),
        (b'event: error\ndata: {"message":"m","type":"rate_limit_error"}\n\n', "MODEL_RATE_LIMITED"),
        (b"event: error\ndata: m\n\n", "MODEL_UNAVAILABLE"),
        (b'event: error\ndata: {"message":\ndata: "m"}\n\n', "MODEL_UNAVAILABLE"),
        (b'{"error":{"message":"m","code":"404"}}\n', "MODEL_REQUEST_REJECTED"),
        (b'{\n  "error": {\n    "message": "m",\n    "code": 429\n  }\n}', "MODEL_RATE_LIMITED"),
        (b'error: {"message":"m","code":400}\n\n', "MODEL_REQUEST_REJECTED"),
        (
            b'data: {"choices":[{"delta":{},"finish_reason":"error"}],"error":{"message":"m","code":429}}\n\n',
            "MODEL_RATE_LIMITED",
        ),
        (b'data: {"x_groq":{"error":"m"},"choices":[]}\n\n', "MODEL_UNAVAILABLE"),
        (b'data: {"choices":[{"delta":{},"finish_reason":"abort m"}]}\n\n', None),
        (b'data: {"choices":[{"delta":{},"finish_reason":"abort"}]}\n\n', "MODEL_STREAM_TRUNCATED"),
        (
            b'data: {"choices":[{"delta":{},"finish_reason":"function_call_filter: m"}]}\n\n',
            "MODEL_UNAVAILABLE",
        ),
    ],
)
def test_an_error_in_any_form_has_its_reason(data, error):
    parser = StreamParser()
    if error is None:
        parser.feed(data)
        assert parser.finish_reason == "stop"
        return
    with pytest.raises(ModelError) as caught:
        _ = (parser.feed(data), parser.close())
    assert caught.value.reason == error
    assert error == "MODEL_STREAM_TRUNCATED" or "m" in str(caught.value).rpartition("backend")[2]


@pytest.mark.parametrize(
    "secret", ["sk-proj-abcdefgh12345678", "Bearer eyJhbGciOi", "abcd****wxyz", "A1b2C3d4E5f6G7h8"]
)
def test_no_error_tells_a_key(secret):
    body = json.dumps(
        {"error": {"message": f"Incorrect API key provided: {secret}. See the docs.", "code": "401"}}
    )
    with pytest.raises(ModelError) as caught:
        StreamParser().feed(f"data: {body}\n\n".encode())
    assert secret.split()[-1] not in str(caught.value)
    assert "See the docs" in str(caught.value)


def test_what_is_no_stream_is_told():
    for data in (
        b"<html>busy</html>\n",
        b"data: [] \n\n",
        b"data: {broken\n\n",
        b'data: {"choices":[{"delta":{"content":5}}]}\n\n',
    ):
        with pytest.raises(ModelProtocolError):
            StreamParser().feed(data)


def test_an_error_after_text_comes_after_the_text():
    parser = StreamParser()
    assert parser.feed(sse(chunk({"content": "half"}), {"error": {"message": "no", "code": 400}})) == [
        TextDelta("half")
    ]
    assert isinstance(parser.failed, ModelRejectedError)


def test_reasoning_that_goes_back_is_kept_within_a_bound():
    parser = StreamParser(built_in()["deepseek"])
    for _ in range(300):
        parser.feed(sse(chunk({"reasoning_content": "r" * 10_000})))
    kept = parser.end()[0]
    assert isinstance(kept, Kept)
    assert 200_000 < len(kept.fields["reasoning_content"]) <= 256 * 1024
    assert StreamParser(built_in()["openai"]).end()[0] != kept
