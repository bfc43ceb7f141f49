from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshkit.outside_json import (
    MAX_DEPTH,
    JsonError,
    JsonTooDeepError,
    JsonTooLargeError,
    has_nul,
    read_json,
    within_depth,
)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


def nested(levels: int, kind: str = "[") -> bytes:
    if kind == "[":
        return b"[" * levels + b"]" * levels
    return b'{"a":' * levels + b"1" + b"}" * levels


def depth(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth, value.values()), default=0)
    return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0


@pytest.mark.parametrize("kind", ["[", "{"])
def test_the_last_level_that_may_enter_does_and_the_next_is_refused(kind: str) -> None:
    value = read_json(nested(MAX_DEPTH, kind))
    # Whoever writes it into an event, or reads it with the standard library, can.
    assert orjson.dumps({"data": {"value": value}})
    assert json.loads(json.dumps(value)) == value
    for levels in (MAX_DEPTH + 1, 1_000, 1_024, 1_025, 100_000):
        with pytest.raises(JsonTooDeepError, match="at most 249 levels"):
            read_json(nested(levels, kind))


def test_brackets_in_texts_are_no_levels() -> None:
    assert read_json(json.dumps(["[{" * 5_000])) == ["[{" * 5_000]


def test_many_values_side_by_side_are_no_levels() -> None:
    assert len(read_json(b"[" + b"[]," * 9_999 + b"[]]", max_depth=2)) == 10_000


def test_a_text_that_is_too_large_is_not_parsed() -> None:
    with pytest.raises(JsonTooLargeError) as refused:
        read_json("\N{EURO SIGN}not json", max_bytes=10)
    assert (refused.value.limit, refused.value.size) == (10, 11)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"{", "is not JSON"),
        (b"NaN", "is not JSON"),
        (b"[Infinity]", "is not JSON"),
        (b'"\xff"', "byte 1 is wrong"),
        ('"\ud800"', "surrogate"),
        (b'"\\ud800"', "is not JSON"),
        (b"[1] x", "is not JSON"),
    ],
)
def test_what_is_no_json_is_told_without_a_quotation(text: bytes | str, why: str) -> None:
    with pytest.raises(JsonError, match=why):
        read_json(text)


@given(VALUES, st.integers(0, 6))
def test_depth_is_counted_as_a_walk_would(value: Any, limit: int) -> None:
    assert within_depth(value, limit) == (depth(value) <= limit)
    text = orjson.dumps(value)
    if depth(value) <= limit:
        assert read_json(text, max_depth=limit) == value
    else:
        with pytest.raises(JsonTooDeepError):
            read_json(text, max_depth=limit)


@given(VALUES)
def test_nul_is_found_wherever_it_is(value: Any) -> None:
    assert has_nul(value) == ("\\u0000" in json.dumps(value).replace("\\\\", ""))


def test_nul_is_looked_for_without_a_stack() -> None:
    assert has_nul(orjson.loads(nested(1_000).replace(b"[]", b'["\\u0000"]')))
