"""What the overload bench reads out of its records."""

from __future__ import annotations

from typing import Any

import pytest

from bench.model_script import sequence
from bench.overload import FLOOD, POLITE, Level, arrivals, cells, kept, main, most_memory, rates, read
from bench.target import IncompleteReply

MS = 1_000_000
WHOLE = "".join(sequence(3))


def text(body: bytes) -> str:
    return body.decode()


def row(tenant: str, due_ms: float, took_ms: float, **values: Any) -> dict[str, Any]:
    due = int(due_ms * MS)
    return {
        "tenant": tenant,
        "due": due,
        "began": due,
        "ended": due + int(took_ms * MS),
        "status": 200,
        "retry_after_ms": 0,
        "text": WHOLE,
        "error": "",
    } | values


def test_goodput_is_what_was_whole_in_time() -> None:
    rows = [
        row(FLOOD, 0, 10),
        row(FLOOD, 2500, 100),
        row(FLOOD, 3000, 9000),
        row(POLITE[0], 3500, 200),
        row(FLOOD, 3600, 5, status=429, text="", retry_after_ms=700),
    ]
    found = read(rows, 2.0, 4.0, 5.0, 3, text)
    assert (found["goodput"], found["late"], found["refused"]) == (1.0, 1, 1)
    assert (found["polite_done"], found["polite_asked"], found["polite_p50"]) == (1, 1, 200)
    assert found["retry_after"] == (700, 700, 700)


@pytest.mark.parametrize(
    "bad",
    [
        row(FLOOD, 2500, 10, error="the connection was closed"),
        row(FLOOD, 2500, 10, text=WHOLE[:-1]),
        row(FLOOD, 2500, 10, status=429, text="", retry_after_ms=0),
    ],
)
def test_what_is_not_whole_and_what_does_not_say_when_to_come_back_is_no_result(bad: dict[str, Any]) -> None:
    with pytest.raises(IncompleteReply):
        read([row(FLOOD, 0, 10), bad], 2.0, 4.0, 5.0, 3, text)


def test_arrivals_are_the_same_for_one_seed_and_as_many_as_asked_for() -> None:
    wanted = rates(2.0, 100.0)
    assert sum(wanted.values()) == pytest.approx(200.0)
    found = arrivals(7, wanted, 50.0)
    assert found == arrivals(7, wanted, 50.0)
    assert found == sorted(found)
    assert len(found) == pytest.approx(10_000, rel=0.05)
    assert sum(tenant == POLITE[0] for _, tenant in found) == pytest.approx(250, rel=0.25)


def test_what_is_kept_is_the_worst_past_the_capacity_against_the_best() -> None:
    def level(factor: float, goodput: float) -> Level:
        zero = (0.0, 0.0, 0.0)
        return Level(factor, 0, goodput, 0, 0, 0, zero, 0, 0, 0, 0, 0, 0, 0, {}, 0)

    assert kept([[level(0.5, 60)], [level(1, 120)], [level(2, 108)], [level(3, 115)]]) == pytest.approx(0.9)
    assert kept([[level(1, 0)], [level(2, 0)]]) == 0
    # The median round of each load counts.
    rounds = [
        [level(1, goodput) for goodput in (100, 500, 1)],
        [level(2, goodput) for goodput in (5, 80, 80)],
    ]
    assert kept(rounds) == pytest.approx(0.8)
    assert cells(rounds[0])[2] == "1 / 100 / 500"


def test_the_most_memory_is_that_of_any_round() -> None:
    def level(**memory: int) -> Level:
        zero = (0.0, 0.0, 0.0)
        return Level(1, 0, 0, 0, 0, 0, zero, 0, 0, 0, 0, 0, 0, 0, memory, 0)

    assert most_memory([level(agent=3, envoy=5), level(agent=4)]) == {"agent": 4, "envoy": 5}


@pytest.mark.parametrize(
    "wrong",
    [
        ("--rounds", "0"),
        ("--seconds", "2"),
        ("--seconds", "nan"),
        ("--tokens", "0"),
        ("--bound", "-1"),
        ("--bound", "x"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_starts(
    wrong: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(wrong)
    assert ended.value.code == 2
    assert f"argument {wrong[0]}: " in capsys.readouterr().err
