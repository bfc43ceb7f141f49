"""Whether a process grew: its readings at rest before and after, and the whole time between, against bounds.

Counts are compared at rest, without clients and runs: a task, descriptor or connection that a run or a client
leaves behind is there thousands of times after a soak, and the bounds allow for a few. Memory is judged under
load, the first minutes of the soak with the last ones and by a line through all of it: both have to say that
it grows. One alone says less: the peak of a single outage at the end lifts the mean, one at the beginning
tilts the line.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tests.chaos.watch.processes import Reading

BEFORE, LOAD, AFTER = "before", "load", "after"
# The ends of the soak that are compared; less of a short one, so that they do not meet.
END_SECONDS = 120.0
END_SHARE = 0.3


@dataclass(frozen=True, slots=True)
class Bound:
    """By how much a measure may be more at the end and still be called flat.

    Attributes:
        spare: that much in any case.
        share: or that share of what there was.
        loaded: whether it is compared under load; else at rest.
        reason: why so much.
    """

    spare: float
    reason: str
    share: float = 0.0
    loaded: bool = False

    def allows(self, before: float) -> float:
        """By how much it may grow."""
        return max(self.spare, self.share * before)


BOUNDS: dict[str, Bound] = {
    "memory": Bound(8.0, "MiB: allocators keep the peak of an outage's backlog", share=0.10, loaded=True),
    "blocks": Bound(
        15_000,
        "a few for each run of a replica in 20 minutes: caches fill to 10,000, garbage waits to be collected",
        share=0.03,
    ),
    "tasks": Bound(10, "an agent's append stream is three tasks of whichever session replica it is on"),
    "threads": Bound(2, "gRPC's pool starts one when it is behind, and ends it later"),
    "processes": Bound(12, "PostgreSQL has one for each connection"),
    "fds": Bound(12, "what is said of tcp and unix"),
    "tcp": Bound(12, "pools keep, up to their bound, what the last moments of an outage needed"),
    "unix": Bound(12, "the stores' side of those pools"),
    "series": Bound(60, "a few for each method and code that was not seen before"),
    "busy": Bound(0, "nobody is there"),
}


@dataclass(frozen=True, slots=True)
class Measure:
    """One measure of one process.

    Attributes:
        before: at the beginning of the soak.
        after: at its end.
        slope: of a line through all readings under load, an hour; 0 where there are too few.
        allowed: by how much it may grow.
        grows: whether it grew by more.
    """

    before: float
    after: float
    slope: float
    allowed: float
    grows: bool


@dataclass(frozen=True, slots=True)
class Row:
    """One process.

    Attributes:
        measures: by name; empty for one that did not live all the time.
        note: why it is not judged.
    """

    process: str
    pid: int
    seconds: float
    measures: dict[str, Measure]
    note: str = ""

    @property
    def grows(self) -> bool:
        """Whether anything of it does."""
        return any(measure.grows for measure in self.measures.values())


def judge(readings: Sequence[Reading], *, many_lives: Iterable[str] = ()) -> list[Row]:
    """Makes a row of each life of each process.

    Args:
        readings: in the order they were taken.
        many_lives: processes whose lives are one row, because a fault ends them again and again.
    """
    together = set(many_lives)
    lives: dict[tuple[str, int, int], list[Reading]] = {}
    for reading in readings:
        one_life = (reading["pid"], reading["start"])
        key = (reading["process"], *((0, 0) if reading["process"] in together else one_life))
        lives.setdefault(key, []).append(reading)
    return [_row(name, life) for (name, *_), life in sorted(lives.items())]


def _row(name: str, life: Sequence[Reading]) -> Row:
    seconds = life[-1]["t"] - life[0]["t"]
    phases = {reading["phase"] for reading in life}
    missing = [phase for phase in (BEFORE, LOAD, AFTER) if phase not in phases]
    pid = life[-1]["pid"]
    if missing:
        return Row(name, pid, seconds, {}, note=f"not there: {', '.join(missing)}")
    measures = {
        measure: _measure(measure, bound, life)
        for measure, bound in BOUNDS.items()
        if any(measure in reading for reading in life)
    }
    return Row(name, pid, seconds, measures)


def _measure(name: str, bound: Bound, life: Sequence[Reading]) -> Measure:
    def of(phase: str) -> list[tuple[float, float]]:
        return [(one["t"], one[name]) for one in life if one["phase"] == phase and name in one]

    load = of(LOAD)
    slope = _slope(load)
    if bound.loaded:
        begin, end = load[0][0], load[-1][0]
        span = min(END_SECONDS, END_SHARE * (end - begin))
        before = statistics.fmean(value for t, value in load if t <= begin + span)
        after = statistics.fmean(value for t, value in load if t >= end - span)
        grown = min(after - before, slope * (end - begin))
    else:
        before = statistics.median(value for _, value in of(BEFORE))
        after = statistics.median(value for _, value in of(AFTER))
        grown = after - before
    allowed = bound.allows(before)
    return Measure(before, after, slope * 3600, allowed, grown > allowed)


def _slope(points: Sequence[tuple[float, float]]) -> float:
    if len(points) < 3 or points[0][0] == points[-1][0]:
        return 0.0
    return statistics.linear_regression([t for t, _ in points], [value for _, value in points]).slope


def table(rows: Iterable[Row], say: Callable[[str], None] = print) -> None:
    """Prints a table a process."""
    for row in rows:
        note = f": {row.note}" if row.note else ""
        say(f"\n{row.process} (pid {row.pid}, {row.seconds / 60:.1f} min){note}")
        if not row.measures:
            continue
        say(f"  {'':8} {'before':>10} {'after':>10} {'an hour':>10} {'allowed':>8}  verdict")
        for name, measure in row.measures.items():
            verdict = "GROWS" if measure.grows else "flat"
            say(
                f"  {name:8} {measure.before:10,.1f} {measure.after:10,.1f} {measure.slope:+10,.1f}"
                f" {measure.allowed:8,.1f}  {verdict}"
            )
