from __future__ import annotations

import sys

import pytest

from meshkit.tracebacks import MAX_CHARS, bounded, exception_text


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


def recursed() -> RecursionError:
    def down(levels: int) -> int:
        return up(levels)

    def up(levels: int) -> int:
        return down(levels + 1) + 1

    with pytest.raises(RecursionError) as hit:
        down(0)
    return hit.value


def test_an_error_is_told_with_where_it_happened() -> None:
    text = exception_text(raised(ValueError("no such thing")))
    assert text.splitlines()[-1] == "ValueError: no such thing"
    assert "test_tracebacks.py" in text
    assert "in raised" in text


def test_two_functions_that_call_each_other_for_ever_are_told_in_few_lines() -> None:
    text = exception_text(recursed())
    assert "RecursionError: maximum recursion depth exceeded" in text
    assert "frames left out" in text
    assert len(text.splitlines()) < 50
    assert len(text) <= MAX_CHARS


def test_causes_come_before_what_they_caused_and_are_few() -> None:
    error: BaseException = ValueError("0")
    for number in range(1, 100):
        following = ValueError(str(number))
        following.__cause__ = error
        error = following
    lines = exception_text(error).splitlines()
    assert lines[0] == "[earlier causes are left out]"
    assert [line for line in lines if line.startswith("ValueError")] == [
        f"ValueError: {n}" for n in range(96, 100)
    ]


def test_a_context_is_told_unless_it_was_suppressed() -> None:
    error = ValueError("second")
    error.__context__ = KeyError("first")
    assert "KeyError: 'first'" in exception_text(error)
    error.__suppress_context__ = True
    assert "KeyError" not in exception_text(error)


def test_causes_that_go_in_a_circle_end() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert exception_text(first).count("ValueError") == 2


def test_a_groups_members_are_few() -> None:
    inner = [raised(OSError(number)) for number in range(1_000)]
    text = exception_text(BaseExceptionGroup("many", inner))
    assert "  1 of 1000:" in text
    assert text.count("OSError") == 3


def test_an_error_that_cannot_be_a_text_is_told_all_the_same() -> None:
    class Odd(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert exception_text(Odd()).endswith("Odd: [its text cannot be made]")


def test_what_it_holds_does_not_make_it_long() -> None:
    error = ValueError("x" * 10_000_000)
    error.add_note("y" * 10_000_000)
    assert len(exception_text(error)) < 2_000
    assert len(bounded("z" * 10_000, 100)) < 200
    assert sys.getrecursionlimit() >= 1_000
