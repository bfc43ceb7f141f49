"""Results: what the runs of each scenario came to, as JSON and back."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson

from bench.histogram import Times
from bench.measure import Part, Run

VERSION = 1


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over several runs."""

    least: float
    median: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Returns the spread of at least one value."""
        return cls(min(values), statistics.median(values), max(values))

    def shown(self, form: str) -> str:
        """Returns the three in a format such as `.0f`, as tables show them."""
        return " / ".join(format(value, form) for value in (self.least, self.median, self.most))


@dataclass(slots=True)
class Result:
    """All runs of one scenario.

    Attributes:
        name: of the scenario.
        title: of the scenario.
        facts: of the machine before its first run, see `bench.facts`.
        runs: of all targets, in the order in which they were measured.
    """

    name: str
    title: str
    facts: dict[str, Any]
    runs: list[Run] = field(default_factory=list)

    @property
    def targets(self) -> list[str]:
        """The targets that were measured, in that order."""
        return list(dict.fromkeys(run.target for run in self.runs))

    def of(self, target: str) -> list[Run]:
        """The runs of one target."""
        return [run for run in self.runs if run.target == target]

    def spreads(self, target: str) -> dict[str, Spread]:
        """Each figure of a target over its runs."""
        runs = self.of(target)
        names = dict.fromkeys(name for run in runs for name in run.figures)
        return {name: Spread.of([run.figures[name] for run in runs if name in run.figures]) for name in names}

    def kinds(self, target: str) -> list[str]:
        """The kinds of process that a target has."""
        return list(dict.fromkeys(kind for run in self.of(target) for kind in run.parts))

    def cpu_of(self, target: str, kind: str) -> Spread:
        """CPU seconds for 1,000 tokens of one kind of process."""
        runs = [run for run in self.of(target) if run.figures.get("tokens")]
        return Spread.of([run.parts[kind].cpu / run.figures["tokens"] * 1000 for run in runs])

    def times(self, target: str, name: str) -> Times:
        """One histogram of all runs together; empty where there is none."""
        together = Times()
        for run in self.of(target):
            if name in run.times:
                together.merge(run.times[name])
        return together


def encode(results: Sequence[Result]) -> bytes:
    """Returns results as JSON."""
    rows = [
        {
            "name": result.name,
            "title": result.title,
            "facts": result.facts,
            "runs": [
                {
                    "target": run.target,
                    "figures": run.figures,
                    "parts": {kind: asdict(part) for kind, part in run.parts.items()},
                    "times": {name: times.encode() for name, times in run.times.items()},
                }
                for run in result.runs
            ],
        }
        for result in results
    ]
    return orjson.dumps({"version": VERSION, "results": rows}, option=orjson.OPT_INDENT_2) + b"\n"


def decode(data: bytes) -> list[Result]:
    """Reads what `encode` wrote. Raises ValueError when it is something else."""
    found = orjson.loads(data)
    if found.get("version") != VERSION:
        raise ValueError(f"the results have version {found.get('version')!r}, not {VERSION}")
    return [
        Result(
            row["name"],
            row["title"],
            row["facts"],
            [
                Run(
                    run["target"],
                    run["figures"],
                    {kind: Part(**part) for kind, part in run["parts"].items()},
                    {name: Times.decode(text) for name, text in run["times"].items()},
                )
                for run in row["runs"]
            ],
        )
        for row in found["results"]
    ]


def merge(path: Path, new: Sequence[Result], order: Sequence[str]) -> list[Result]:
    """Returns the results in a file with new ones in the place of theirs, in the scenarios' order."""
    kept = {result.name: result for result in decode(path.read_bytes())} if path.exists() else {}
    kept |= {result.name: result for result in new}
    return [kept[name] for name in order if name in kept]
