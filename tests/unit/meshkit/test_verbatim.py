"""JSON whose parts are kept as they were written."""

from __future__ import annotations

import json

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshkit import verbatim

HUGE = 2**64
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**80), 2**80)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def nested(levels: int) -> str:
    return '{"a":' * levels + "1" + "}" * levels


def test_members_and_elements_are_the_text_that_stands_there() -> None:
    text = (
        f' {{"a": {HUGE} , "b":[1.10, 1e5,"\\u0000]"],"a":{{"x": 0.1000000000000000055511151231257827 }}}} '
    )
    assert verbatim.members(text) == {
        "a": '{"x": 0.1000000000000000055511151231257827 }',
        "b": '[1.10, 1e5,"\\u0000]"]',
    }
    assert verbatim.elements('[1.10, "é" ,{"a":1}]') == ["1.10", '"é"', '{"a":1}']


@pytest.mark.parametrize("text", ["", "[1]", "1", "{", '{"a":1}x', "[" * 100_000, '{"a":' * 100_000])
def test_what_is_no_object_has_no_members(text: str) -> None:
    with pytest.raises(ValueError, match="not a JSON object"):
        verbatim.members(text)
    if not text.startswith("[1"):
        with pytest.raises(ValueError, match="not a JSON array"):
            verbatim.elements(text)


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("{}", True),
        (' {"a": [{}]}\n', True),
        (f'{{"a":{HUGE}}}', True),
        (f'{{"a":{10**300}}}', True),
        (f'{{"a":{10**400}}}', False),
        ('{"a":1e400}', False),
        ('{"a":NaN}', False),
        ('{"a":"\\ud800"}', False),
        ("[]", False),
        ("null", False),
        ("", False),
        ("{", False),
        (nested(249), True),
        (nested(250), False),
        (nested(2000), False),
        (nested(200_000), False),
        ('{"a":"' + "[{" * 1000 + '"}', True),
        ('{"a":"\\\\' + "[" * 300 + '\\""}', True),
        ('{"a":[' + "{}," * 500 + "{}]}", True),
    ],
)
def test_an_object_that_all_can_read_and_pass_on(text: str, good: bool) -> None:
    assert verbatim.is_object(text) is good


def test_what_is_an_object_can_be_put_into_others_and_rendered_again() -> None:
    deep = nested(verbatim.MAX_DEPTH)
    document = orjson.dumps({"messages": [{"tool_calls": [{"arguments": orjson.Fragment(deep)}]}]})
    assert orjson.dumps(orjson.loads(document)) == document


def test_a_fragment_of_what_is_no_json_is_the_default() -> None:
    assert (
        orjson.dumps({"a": verbatim.fragment(f'{{"x":{HUGE}}}', "{}")}) == b'{"a":{"x":18446744073709551616}}'
    )
    assert orjson.dumps({"a": verbatim.fragment("{oops", "{}")}) == b'{"a":{}}'
    assert orjson.dumps({"a": verbatim.fragment("", "{}")}) == b'{"a":{}}'


@given(st.dictionaries(st.text(), JSON, max_size=5))
def test_every_member_is_found_as_it_was_written(value: dict[str, object]) -> None:
    text = json.dumps(value, ensure_ascii=False)
    try:
        found = verbatim.members(text)
    except ValueError:
        # Half a character, which no JSON text holds.
        assert not text.isascii()
        return
    assert found == {name: json.dumps(member, ensure_ascii=False) for name, member in value.items()}


def _deep(value: object) -> int:
    if isinstance(value, dict):
        return 1 + max((_deep(one) for one in value.values()), default=0)
    if isinstance(value, list):
        return 1 + max((_deep(one) for one in value), default=0)
    return 0


@given(JSON)
def test_the_depth_is_that_of_the_value(value: object) -> None:
    assert verbatim.depth(json.dumps(value, ensure_ascii=False)) == _deep(value)
