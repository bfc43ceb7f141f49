"""JSON Schema as its specification says, where Python's own rules differ, and within bounds."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshkit.errors import StartupError
from meshkit.outside_json import MAX_DEPTH
from services.tool.schemas import (
    MAX_ARGUMENT_BYTES,
    ArgumentSchema,
    ArgumentsError,
    SchemaError,
    parse_object,
)
from tests.unit.tool.test_registry import make


def fits(rule: dict[str, Any], value: Any) -> bool:
    schema = ArgumentSchema({"type": "object", "properties": {"v": rule}})
    try:
        return schema.parse(json.dumps({"v": value})) == {"v": value}
    except ArgumentsError as error:
        return not str(error).startswith("v")


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        ({"multipleOf": 0.01}, [0.07, 4.02, 19.99, 123456789.01, 10**30], [1.005, 0.075]),
        ({"multipleOf": 0.1}, [0.3, 1.1], [0.35]),
        ({"multipleOf": 7}, [7 * 10**30], [7 * 10**30 + 1]),
        ({"type": "integer"}, [1, 1.0, 2**70, -(2**70)], [1.5, True]),
        ({"maximum": 2**64}, [2**64], [2**64 + 1]),
        ({"const": 2**70}, [2**70], [2**70 + 1]),
        ({"enum": [1, "a"]}, [1, 1.0, "a"], [True]),
        ({"uniqueItems": True}, [[1, True], [0, False]], [[1, 1.0]]),
        ({"maxLength": 1}, ["\N{GRINNING FACE}"], ["e\u0301"]),
        ({"format": "email"}, ["an annotation, not a rule"], []),
    ],
)
def test_numbers_and_texts_are_compared_as_json_does(
    rule: dict[str, Any], good: list[Any], bad: list[Any]
) -> None:
    assert [value for value in good if not fits(rule, value)] == []
    assert [value for value in bad if fits(rule, value)] == []


@pytest.mark.parametrize(
    ("pattern", "good", "bad"),
    [
        (r"^a$", ["a"], ["a\n", "b"]),
        (r"^\p{L}+$", ["\u00e4b", "\u03b1"], ["a1", ""]),
        (r"^\p{Script=Greek}+$", ["\u03b1\u03b2"], ["ab"]),
        (
            r"^(?<year>\d{4})-(?<month>\d\d)$",
            ["2026-11"],
            ["2026-1", "\u0662\u0660\u0662\u0660-01", "2026-11\n"],
        ),
        (r"^\w$", ["a", "_"], ["\u00e9"]),
        (r"^\s$", ["\ufeff", "\u2028", " "], ["\x85"]),
        (r"^.$", ["\N{GRINNING FACE}"], ["\n", "\r", "\u2028"]),
        (r"^\cA\x41\u00e9$", ["\x01A\u00e9"], []),
        (r"^a\/b$", ["a/b"], []),
        ("b", ["abc"], ["ac"]),
    ],
)
def test_patterns_are_those_of_ecma_262(pattern: str, good: list[str], bad: list[str]) -> None:
    assert [text for text in good if not fits({"pattern": pattern}, text)] == []
    assert [text for text in bad if fits({"pattern": pattern}, text)] == []
    for text in good:
        assert fits({"patternProperties": {pattern: {"type": "integer"}}}, {text: 1})
        assert not fits({"patternProperties": {pattern: {"type": "integer"}}}, {text: "x"})
        assert fits({"propertyNames": {"pattern": pattern}}, {text: 1})


@pytest.mark.parametrize("pattern", [r"^(a+)+$", r"^(a|a)*$", r"^(([a-z])+.)+[A-Z]([a-z])+$", r"(x+x+)+y"])
def test_no_pattern_takes_more_time_than_its_text_is_long(pattern: str) -> None:
    # A matcher that backtracks would not come back from this in a lifetime; here it is a few milliseconds.
    for letter in "ax":
        fits({"pattern": pattern}, letter * 500_000 + "!")


@pytest.mark.parametrize(
    "pattern", [r"a(?=b)", r"(?!a)b", r"(?<=a)b", r"(a)\1", "(", r"a{1000}{1000}{1000}", r"\p{Nonsense}"]
)
def test_a_pattern_that_cannot_be_kept_in_bounds_stops_the_start_and_is_named(pattern: str) -> None:
    for rule in ({"pattern": pattern}, {"patternProperties": {pattern: {}}}):
        with pytest.raises(StartupError, match=r"the pattern .* is refused: .*ECMA-262") as refused:
            make(schema={"type": "object", "properties": {"v": rule}})
        assert repr(pattern) in str(refused.value)


@pytest.mark.parametrize(
    "more",
    [
        {"properties": {"v": {"type": "nope"}}},
        {"required": "v"},
        {"minProperties": -1},
        {"$schema": "http://127.0.0.1:1/schema"},
        {"$dynamicRef": "http://127.0.0.1:1/schema"},
        {"properties": {"v": {"const": float("nan")}}},
        {"default": json.loads('{"a":' * 900 + "1" + "}" * 900)},
    ],
)
def test_what_is_no_schema_is_refused_with_its_reason(more: dict[str, Any]) -> None:
    with pytest.raises(SchemaError) as refused:
        ArgumentSchema({"type": "object", **more})
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[]", "must be a JSON object"),
        ("{", "not valid JSON"),
        ('{"a": NaN}', "not valid JSON"),
        ('{"a": 1e400}', "not valid JSON"),
        ('{"a": "\\ud800"}', "not valid JSON"),
        ('{"a": %s}' % ("[" * MAX_DEPTH + "]" * MAX_DEPTH), "nested too deeply: at most 249 levels"),
        ('{"a": %s}' % ("[" * 100_000 + "]" * 100_000), "nested too deeply: at most 249 levels"),
        ('{"a": "%s"}' % ("\N{EURO SIGN}" * (MAX_ARGUMENT_BYTES // 3)), "larger than 1048576 bytes"),
        ('{"a": %s}' % ("9" * 5_000), "not valid JSON"),
    ],
)
def test_what_is_no_object_of_json_is_told_to_the_model(text: str, why: str) -> None:
    with pytest.raises(ArgumentsError, match=why) as refused:
        make(schema={"type": "object"}).parse(text)
    assert len(str(refused.value)) < 500


def test_the_deepest_arguments_that_may_enter_are_validated() -> None:
    schema = {"type": "object", "properties": {"a": {"$ref": "#"}}}
    text = '{"a":' * (MAX_DEPTH - 1) + "%s" + "}" * (MAX_DEPTH - 1)
    assert make(schema=schema).parse(text % "{}")
    with pytest.raises(ArgumentsError, match="is not of type"):
        make(schema=schema).parse(text % "1")


def test_of_many_problems_a_few_are_told_shortly() -> None:
    schema = ArgumentSchema(
        {"type": "object", "properties": {"v": {"items": {"type": "integer"}}}, "maxProperties": 0}
    )
    with pytest.raises(ArgumentsError) as refused:
        schema.parse(json.dumps({"v": ["x" * 1_000] * 1_000}))
    assert len(str(refused.value)) < 2_000


@pytest.mark.parametrize(("length", "told"), [(100, 5), (400_000, 1)])
def test_long_arguments_are_not_searched_for_more_than_one_problem(length: int, told: int) -> None:
    # To find all of them would hold up every other call for seconds.
    schema = ArgumentSchema({"type": "object", "properties": {"v": {"items": {"type": "string"}}}})
    with pytest.raises(ArgumentsError) as refused:
        schema.parse(json.dumps({"v": [1] * length}, separators=(",", ":")))
    assert str(refused.value).count("is not of type") == told


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=3),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers(-(2**200), 2**200)
            | st.floats(allow_nan=False, allow_infinity=False),
            lambda inner: st.lists(inner, max_size=3),
            max_leaves=5,
        ),
        max_size=4,
    )
)
def test_an_object_is_read_as_it_was_written(value: dict[str, Any]) -> None:
    assert parse_object(json.dumps(value)) == value
