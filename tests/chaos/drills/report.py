"""What a drill found: a small table, and the bounds that it broke."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.chaos.drills.load import Load


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value that `share` of an ordered sequence is not above; 0 of an empty one."""
    if not ordered:
        return 0.0
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@dataclass(slots=True)
class Report:
    """Lines of a table, each a name, what was found, and the bound it is held to, if any."""

    name: str
    rows: list[tuple[str, str, str]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

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

    def streams(self, load: Load, *, refused: int | None = 0, asked: int = 0) -> None:
        """Adds what every drill asks of its clients.

        Args:
            load: what they saw.
            refused: how often new input may be refused; None where that is told and not bounded.
            asked: how many streams must have been asked to come back: none if the drill is no drain.
        """
        self.at_least("runs completed", load.completed, 1)
        self.at_most("runs that ended otherwise", len(load.runs) - load.completed, 0)
        self.at_most("gaps, duplicates, replies not whole", len(load.wrong), 0)
        for name, found, bound in (
            ("client errors", load.errors, 0),
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
        print(f"\ndrill {self.name}")
        for name, found, bound in self.rows:
            print(f"  {name:<{widths[0]}}  {found:>{widths[1]}}  {bound}".rstrip())
        for text in self.notes:
            print(f"  - {text}")
        print(f"  {'BROKEN: ' + ', '.join(self.broken) if self.broken else 'every bound holds'}", flush=True)
        return not self.broken
