"""What a drill found: a small table, and the bounds that it broke."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.chaos.drills.load import Load


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value that `share` of an ordered sequence is not above; 0 of an empty one."""
    if not ordered:
        return 0.0
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@dataclass(slots=True)
class Series:
    """One figure of a drill that breaks the same thing again and again.

    Attributes:
        what: whose time it is, from which moment on.
        rounds: of each round the times that were found, in seconds, sorted.
    """

    what: str
    rounds: list[list[float]] = field(default_factory=list)

    @property
    def last(self) -> str:
        """The last round, for a person."""
        times = self.rounds[-1]
        return f"p50 {percentile(times, 0.5):.2f} s, max {percentile(times, 1.0):.2f} s of {len(times)}"

    @property
    def all(self) -> list[float]:
        """The times of every round, sorted."""
        return sorted(seconds for times in self.rounds for seconds in times)


@dataclass(slots=True)
class Held:
    """A series and what it is held to, if to anything, as the page of figures needs it; times in seconds."""

    what: str
    rounds: list[tuple[float, float]]
    times: int
    p50: float
    max: float
    p50_bound: float | None
    max_bound: float | None


@dataclass(slots=True)
class Report:
    """Lines of a table, each a name, what was found, and the bound it is held to, if any.

    With `whole` the page of figures has all of them, and not only series.
    """

    name: str
    about: str = ""
    rows: list[tuple[str, str, str]] = field(default_factory=list)
    held: list[Held] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    whole: bool = False

    def note(self, name: str, found: object) -> None:
        """Adds what is only told."""
        self.rows.append((name, str(found), ""))

    def at_most(self, name: str, found: float, bound: float, unit: str = "") -> None:
        """Adds a figure that must not be above a bound."""
        digits = 0 if isinstance(found, int) else 2
        ok = found <= bound
        self.rows.append((name, f"{found:.{digits}f}{unit}", f"<= {bound:g}{unit}{'' if ok else '  BROKEN'}"))
        if not ok:
            self.broken.append(name)

    def at_least(self, name: str, found: float, bound: float) -> None:
        """Adds a figure that must not be below a bound: a drill in which nothing happened proves nothing."""
        ok = found >= bound
        self.rows.append((name, f"{found:g}", f">= {bound:g}{'' if ok else '  BROKEN'}"))
        if not ok:
            self.broken.append(name)

    def say(self, text: str) -> None:
        """Tells a person who waits how far it is."""
        print(f"{self.name}: {text}", flush=True)

    def series(self, series: Series, *, p50: float | None = None, longest: float | None = None) -> None:
        """Adds a figure of many rounds: its median and its longest time, in seconds, and their bounds."""
        times = series.all
        middle, most = percentile(times, 0.5), percentile(times, 1.0)
        for name, found, bound in (("p50", middle, p50), ("max", most, longest)):
            if bound is None:
                self.note(f"{series.what}, {name}", f"{found:.2f} s")
            else:
                self.at_most(f"{series.what}, {name}", found, bound, " s")
        self.note("  rounds, times", f"{len(series.rounds)}, {len(times)}")
        each = [(percentile(found, 0.5), percentile(found, 1.0)) for found in series.rounds]
        self.held.append(Held(series.what, each, len(times), middle, most, p50, longest))

    def save(self, folder: Path) -> None:
        """Writes the series down, or the whole table, for the page of figures; nothing if there are none."""
        if self.held or self.whole:
            folder.mkdir(parents=True, exist_ok=True)
            record = {
                "name": self.name,
                "about": self.about,
                "broken": self.broken,
                "series": [asdict(held) for held in self.held],
                "rows": self.rows if self.whole else [],
            }
            (folder / f"{self.name}.json").write_text(json.dumps(record, indent=1) + "\n")

    def streams(self, load: Load, *, refused: int | None = 0, errors: int | None = 0, asked: int = 0) -> None:
        """Adds what every drill asks of its clients.

        Args:
            load: what they saw.
            errors: how often a stream may break under its client; None where that is told and not bounded.
            refused: how often new input may be refused; None where that is told and not bounded.
            asked: how many streams must have been asked to come back: none if the drill is no drain.
        """
        self.at_least("runs completed", load.completed, 1)
        self.at_most("runs that ended otherwise", len(load.runs) - load.completed, 0)
        self.at_most("gaps, duplicates, replies not whole", len(load.wrong), 0)
        for name, found, bound in (
            ("client errors", load.errors, errors),
            ("input refused, sent again", load.refused, refused),
        ):
            if bound is None:
                self.note(name, len(found))
            else:
                self.at_most(name, len(found), bound)
            self.notes += [
                f"{name}: {many} x {what}" for what, many in Counter(e[1] for e in found).most_common(5)
            ]
        self.at_least("came back by cursor when asked", load.reconnects, asked)
        self.notes += load.wrong[:10]

    def waits(self, load: Load, phases: Sequence[tuple[str, float, float]]) -> None:
        """Adds the time between two events at a client, by phase."""
        for name, start, end in phases:
            waits = load.waits(start, end)
            figures = [f"{percentile(waits, share) * 1000:.0f}" for share in (0.5, 0.99)]
            longest = waits[-1] * 1000 if waits else 0
            self.note(f"between events {name}: p50 / p99 / max", f"{' / '.join(figures)} / {longest:.0f} ms")

    def show(self) -> bool:
        """Prints the table; returns whether every bound holds."""
        widths = [max(len(row[column]) for row in self.rows) for column in (0, 1)]
        print(f"\ndrill {self.name}{': ' if self.about else ''}{self.about}")
        for name, found, bound in self.rows:
            print(f"  {name:<{widths[0]}}  {found:>{widths[1]}}  {bound}".rstrip())
        for text in self.notes:
            print(f"  - {text}")
        print(f"  {'BROKEN: ' + ', '.join(self.broken) if self.broken else 'every bound holds'}", flush=True)
        return not self.broken
