"""A process that grows is found, one that merely breathes is not."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from tests.chaos.watch.growth import AFTER, BEFORE, BOUNDS, LOAD, Row, judge, table
from tests.chaos.watch.processes import Reading

SECONDS = 1200
REST = {
    "memory": 90.0,
    "blocks": 300_000.0,
    "tasks": 40.0,
    "threads": 12.0,
    "processes": 1.0,
    "fds": 30.0,
    "tcp": 12.0,
    "unix": 4.0,
    "series": 450.0,
    "busy": 0.0,
}
# What traffic adds, and by how much that varies.
LOADED = {"memory": 6.0, "blocks": 40_000.0, "tasks": 30.0, "fds": 10.0, "tcp": 10.0, "busy": 8.0}


def soak(
    change: Callable[[float], dict[str, float]] = lambda share: {},
    *,
    process: str = "session-1",
    pid: int = 7,
    begin: float = 0.0,
    end: float = 1.0,
) -> list[Reading]:
    """Readings of one process; `change` adds to its figures, by what share of the soak is over."""
    rng = random.Random(pid)

    def reading(t: float, phase: str, share: float, loaded: bool) -> Reading:
        values: dict[str, Any] = dict(REST)
        for name, more in LOADED.items() if loaded else ():
            values[name] += more * rng.uniform(0.5, 1.5)
        for name, more in change(share).items():
            values[name] += more
        return {"t": t, "phase": phase, "process": process, "pid": pid, "start": pid} | values

    rest = [reading(-20.0 + i, BEFORE, 0.0, False) for i in range(7)]
    load = [reading(float(t), LOAD, t / SECONDS, True) for t in range(0, SECONDS, 10)]
    rest += [reading(SECONDS + 20.0 + i, AFTER, 1.0, False) for i in range(7)]
    kept = [one for one in [*rest, *load] if begin * SECONDS - 60 <= one["t"] <= end * SECONDS + 60]
    return sorted(kept, key=lambda one: float(one["t"]))


def only(readings: list[Reading]) -> Row:
    (row,) = judge(readings)
    return row


def growing(row: Row) -> set[str]:
    return {name for name, measure in row.measures.items() if measure.grows}


def test_a_process_that_is_as_it_was_is_flat() -> None:
    row = only(soak())
    assert set(row.measures) == set(BOUNDS)
    assert not row.grows
    assert not row.note


@pytest.mark.parametrize("name", sorted(BOUNDS))
def test_whatever_grows_beyond_its_bound_is_named(name: str) -> None:
    more = 1.3 * BOUNDS[name].allows(REST[name]) + 1
    row = only(soak(lambda share: {name: more * share}))
    assert growing(row) == {name}
    assert row.measures[name].after > row.measures[name].before


def test_a_slope_is_of_an_hour() -> None:
    row = only(soak(lambda share: {"memory": 6.0 * share}))
    assert row.measures["memory"].slope == pytest.approx(18.0, abs=5)
    assert not row.grows


@pytest.mark.parametrize("at", [0.05, 0.97])
def test_one_peak_at_an_end_is_no_growth(at: float) -> None:
    def peak(share: float) -> dict[str, float]:
        return {"memory": 20.0 if abs(share - at) < 0.03 else 0.0}

    assert not only(soak(peak)).grows


def test_a_peak_whose_memory_stays_is_growth() -> None:
    assert growing(only(soak(lambda share: {"memory": 30.0 if share > 0.5 else 0.0}))) == {"memory"}


def test_what_shrinks_does_not_grow() -> None:
    assert not only(soak(lambda share: {name: -REST[name] / 2 * share for name in REST})).grows


def test_each_life_is_a_row_and_only_whole_ones_are_judged() -> None:
    first = soak(end=0.4)
    second = soak(lambda share: {"tasks": 500 * share}, pid=8, begin=0.45)
    rows = judge([*first, *second])
    assert [(row.pid, row.note) for row in rows] == [(7, f"not there: {AFTER}"), (8, f"not there: {BEFORE}")]
    assert not any(row.measures for row in rows)


def test_lives_that_faults_end_are_one_row() -> None:
    lives = [
        *soak(process="valkey", end=0.4),
        *soak(lambda share: {"unix": 500 * share}, process="valkey", pid=8, begin=0.45),
    ]
    (row,) = judge(lives, many_lives=["valkey"])
    assert growing(row) == {"unix"}


def test_a_process_without_metrics_is_judged_by_the_rest() -> None:
    readings = soak(lambda share: {"fds": 100 * share})
    for reading in readings:
        del reading["tasks"], reading["blocks"], reading["series"], reading["busy"], reading["processes"]
    row = only(readings)
    assert set(row.measures) == {"memory", "threads", "fds", "tcp", "unix"}
    assert growing(row) == {"fds"}


def test_one_that_was_stopped_when_it_was_read_is_judged_by_its_other_readings() -> None:
    readings = soak()
    for reading in readings[10:30]:
        del reading["tasks"], reading["blocks"]
    assert not only(readings).grows


def test_the_table_has_every_figure() -> None:
    lines: list[str] = []
    table(judge(soak(lambda share: {"tasks": 500 * share})), lines.append)
    text = "\n".join(lines)
    assert "session-1 (pid 7" in text
    (tasks,) = [line.split() for line in lines if line.split()[:1] == ["tasks"]]
    assert tasks[0:3] == ["tasks", "40.0", "540.0"]
    assert tasks[-1] == "GROWS"
    assert text.count("flat") == len(BOUNDS) - 1
