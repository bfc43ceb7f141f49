"""Results against their goals. What was missed is said to be missed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.results import Result, Spread
from bench.scenarios import SCENARIOS, Goal


@dataclass(frozen=True, slots=True)
class Outcome:
    """A goal and what was measured; the median counts."""

    goal: Goal
    spread: Spread

    @property
    def met(self) -> bool:
        """Whether it is met."""
        return self.goal.met(self.spread.median)

    @property
    def word(self) -> str:
        """Says so."""
        return "met" if self.met else "missed"


def outcomes(results: Sequence[Result], target: str) -> list[Outcome]:
    """Returns the goals of all scenarios of which there are figures, in the scenarios' order."""
    measured = {result.name: result.spreads(target) for result in results}
    return [
        Outcome(goal, measured[scenario.name][goal.figure])
        for scenario in SCENARIOS
        for goal in scenario.goals
        if goal.figure in measured.get(scenario.name, {})
    ]
