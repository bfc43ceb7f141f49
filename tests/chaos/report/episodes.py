"""Episodes as they lie in a folder: a history, and what was said of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.model.history import History


@dataclass(frozen=True)
class Verdict:
    """What became of an episode.

    Attributes:
        folder: where it lies.
        seed: what it was drawn from.
        seconds: how long it took, with its settling and its check.
        violations: each with `invariant`, `text` and `records`.
        mutation: the bug that the code was given; empty for the code as it is.
    """

    folder: Path
    seed: int
    seconds: float
    violations: Sequence[dict[str, Any]] = field(default_factory=tuple)
    mutation: str = ""

    @property
    def invariants(self) -> list[int]:
        """The invariants that did not hold."""
        return sorted({violation["invariant"] for violation in self.violations})

    def history(self) -> History:
        """Reads what was recorded, by every process that did."""
        return History.load(*sorted(self.folder.glob("*.jsonl")))


def verdicts(folder: Path) -> Iterator[Verdict]:
    """Yields the verdicts below a folder by seed.

    Raises:
        ValueError: A file is not a verdict.
    """
    found = []
    for path in folder.rglob("verdict.json"):
        try:
            said = json.loads(path.read_text())
            found.append(
                Verdict(
                    path.parent,
                    int(said["seed"]),
                    float(said["seconds"]),
                    said["violations"],
                    said.get("mutation") or "",
                )
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a verdict: {error!r}") from error
    yield from sorted(found, key=lambda verdict: (verdict.seed, str(verdict.folder)))
