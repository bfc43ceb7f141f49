"""How drills of many rounds measure a silence, judge it, and tell of it."""

from pathlib import Path
from typing import Any

import pytest

from tests.chaos.drills.load import Load, Run, Script
from tests.chaos.drills.report import Report, Series
from tests.chaos.drills.rounds import WINDOW_SECONDS, Struck, silences
from tests.chaos.report.drills import main

NOTHING: Any = None


def seen(**arrivals: list[float]) -> Load:
    """A load whose clients, by session, each had a run with events at these times."""
    load = Load(NOTHING, list)
    for session, times in arrivals.items():
        load.runs.append(Run(Script(1, 1), session_id=session, arrivals=times))
    return load


def every(seconds: float, start: float, end: float) -> list[float]:
    return [start + step * seconds for step in range(int((end - start) / seconds))]


def test_a_silence_begins_when_the_cause_is_gone() -> None:
    load = seen(a=[80.0, *every(0.1, 102.0, 120.0)])
    assert silences(load, Struck("x", 100.0)) == [pytest.approx(2.0)]


def test_a_stream_that_stops_again_counts_by_its_longest_pause() -> None:
    load = seen(a=[*every(0.1, 100.1, 101.0), *every(0.1, 108.0, 120.0)])
    assert silences(load, Struck("x", 100.0)) == [pytest.approx(7.1)]


def test_a_stream_that_never_comes_back_is_as_silent_as_the_window_is_long() -> None:
    load = seen(a=[99.0], b=every(0.1, 99.0, 120.0))
    assert silences(load, Struck("x", 100.0)) == pytest.approx([0.1, WINDOW_SECONDS])


def test_the_time_between_two_runs_of_a_client_counts() -> None:
    load = seen(a=every(0.1, 99.0, 103.0))
    load.runs.append(Run(Script(1, 1), session_id="a", arrivals=every(0.1, 104.0, 120.0)))
    assert silences(load, Struck("x", 100.0)) == [pytest.approx(1.1)]


def test_only_the_sessions_asked_for_count() -> None:
    load = seen(a=[99.0], b=every(0.1, 99.0, 120.0))
    assert silences(load, Struck("x", 100.0, frozenset("b"))) == [pytest.approx(0.1)]


def test_a_series_beyond_its_bounds_breaks_the_drill() -> None:
    report = Report("x")
    report.series(Series("quick", [[0.1, 0.2], [0.1, 2.9]]), p50=1.5, longest=3.0)
    assert not report.broken
    report.series(Series("slow", [[0.1, 3.1]]), p50=1.5, longest=3.0)
    assert report.broken == ["slow, p50", "slow, max"]


@pytest.mark.parametrize(("longest", "status"), [(2.0, 0), (4.0, 1)])
def test_what_drills_found_goes_into_the_page(tmp_path: Path, longest: float, status: int) -> None:
    report = Report("x", "something is broken")
    report.series(Series("silence after it", [[0.1, 0.2, 0.3], [0.4, 0.5, longest]]), p50=1.5, longest=3.0)
    report.series(Series("how long it took", [[5.0], [6.0]]))
    report.save(tmp_path)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- drills -->\nold\n<!-- /drills -->\nafter\n")
    assert main([str(tmp_path), "--into", str(page)]) == status
    text = page.read_text()
    assert "old" not in text
    assert "- `x`: something is broken." in text
    assert "| `x` | silence after it | 2 | 6 | 0.40 s (<= 1.5) |" in text
    assert "| `x` | how long it took | 2 | 2 | 6.00 s | 6.00 s | 5.00 to 6.00 s |" in text
    assert ("**4.00 s (<= 3)**" in text) == bool(status)


def test_a_page_without_drills_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    assert main([str(tmp_path / "none"), "--into", str(page)]) == 2
