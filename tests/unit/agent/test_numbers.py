"""What model servers send as counts of tokens, and what is made of it."""

from __future__ import annotations

import orjson
import pytest

from hermesh.session.v1.resources_pb2 import Usage as UsageProto
from services.agent.model.numbers import usage_of, whole
from services.agent.model.port import MAX_COUNT, Usage
from services.agent.model.wire import StreamParser

INT32 = 2**31 - 1
ODD = [
    (7, 7),
    (0, 0),
    (-1, 0),
    (4.5, 4),
    (-0.5, 0),
    ("4.0", 4),
    ("12", 12),
    (" 12 ", 12),
    ("many", 0),
    ("", 0),
    ("nan", 0),
    ("-inf", 0),
    ("inf", INT32),
    ("9" * 100_000, INT32),
    (None, 0),
    (True, 0),
    ([], 0),
    ([5], 0),
    ({"n": 5}, 0),
    (99_999_999_999, INT32),
    (INT32, INT32),
    (INT32 + 1, INT32),
    (1e300, INT32),
    (10**400, INT32),
    (-(10**400), 0),
    (float("nan"), 0),
]


@pytest.mark.parametrize(("sent", "counted"), ODD)
def test_a_count_is_a_whole_number_that_fits(sent: object, counted: int) -> None:
    assert whole(sent) == counted
    usage = usage_of(
        {"prompt_tokens": sent, "completion_tokens": sent, "prompt_tokens_details": {"cached_tokens": sent}}
    )
    assert usage == Usage(counted, counted, counted)


@pytest.mark.parametrize("usage", [None, [], [1, 2], "12", 12, {}, {"prompt_tokens_details": [3]}])
def test_a_usage_that_is_none_counts_nothing(usage: object) -> None:
    assert usage_of(usage) == Usage()


def test_the_sum_of_many_turns_fits_where_it_is_stored() -> None:
    most = Usage(MAX_COUNT, MAX_COUNT, MAX_COUNT)
    total = sum([most] * 3, Usage())
    assert total == most
    UsageProto(
        input_tokens=total.input_tokens,
        output_tokens=total.output_tokens,
        cached_tokens=total.cached_tokens,
    )


@pytest.mark.parametrize("sent", [99_999_999_999, -1, 4.5, "4.0", [4], {"a": 1}])
def test_a_finished_reply_is_not_lost_to_its_counts(sent: object) -> None:
    parser = StreamParser()
    chunks = [
        {"choices": [{"index": 0, "delta": {"content": "Paris"}}]},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
        {"choices": [], "usage": {"prompt_tokens": sent, "completion_tokens": sent}},
    ]
    data = b"".join(b"data: " + orjson.dumps(chunk) + b"\n\n" for chunk in chunks) + b"data: [DONE]\n\n"
    events = parser.feed(data)
    assert parser.done
    assert parser.finish_reason == "stop"
    counted = whole(sent)
    assert events[-1] == Usage(counted, counted, 0)


def huge(digits: int, *, apart: bool) -> bytes:
    """A finished reply with a count of so many digits, in the chunk of its finish or in the next."""
    usage = b'{"prompt_tokens":3,"completion_tokens":%s}' % (b"9" * digits)
    text = b'data: {"choices":[{"index":0,"delta":{"content":"Paris"}}]}\n\n'
    end = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]%s}\n\n'
    more = b',"usage":' + usage
    tail = b'data: {"choices":[]%s}\n\n' % more if apart else b""
    return text + end % (b"" if apart else more) + tail + b"data: [DONE]\n\n"


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("digits", [30, 308, 309, 400, 4300, 4301, 100_000])
def test_a_finished_reply_is_not_lost_to_a_count_of_many_digits(digits: int, *, apart: bool) -> None:
    parser = StreamParser()
    events = parser.feed(huge(digits, apart=apart))
    assert parser.failed is None
    assert parser.finish_reason == "stop"
    assert events[-1] == Usage(3, INT32, 0)


@pytest.mark.parametrize("digits", [309, 4301])
def test_a_number_that_nobody_reads_fails_no_reply(digits: int) -> None:
    parser = StreamParser()
    number = b"9" * digits
    parser.feed(
        b'data: {"created":%s,"choices":[{"index":0,"delta":{"content":"Par"}}]}\n\n' % number
        + b'data: {"created":%s,"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n' % number
    )
    assert (parser.failed, parser.finish_reason) == (None, "stop")
