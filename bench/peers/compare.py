"""The mesh against each peer: ratios of runs that were measured turn about, and the goals on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.results import Result, Spread
from bench.targets import MESH

FLOOD = "32 clients"


@dataclass(frozen=True, slots=True)
class Ratio:
    """A figure that is compared; the ratio is above 1 where the mesh is better.

    Attributes:
        figure: its name in the results.
        label: the table's.
        more_is_better: whether a larger value is.
    """

    figure: str
    label: str
    more_is_better: bool = False

    def of(self, result: Result) -> Spread | None:
        """Returns how many times better the mesh was, over pairs of runs; None where there are none."""
        pairs = zip(result.of(MESH), result.of(result.facts["target"]), strict=True)
        values = []
        for ours, theirs in pairs:
            mine, other = ours.figures.get(self.figure), theirs.figures.get(self.figure)
            if not mine or not other:
                return None
            values.append(mine / other if self.more_is_better else other / mine)
        return Spread.of(values) if values else None


RATIOS = (
    Ratio("tokens_per_second", "tokens/s", more_is_better=True),
    Ratio("cpu_per_1000", "CPU a token"),
    Ratio("cpu_with_stores_per_1000", "CPU a token, with stores"),
    Ratio("ttft_p50_ms", "first token, p50"),
    Ratio("ttft_p99_ms", "first token, p99"),
    Ratio("gap_p99_ms", "between tokens, p99"),
    Ratio("added_p99_ms", "behind the model's schedule, p99"),
)


@dataclass(frozen=True, slots=True)
class PeerGoal:
    """A goal against the best of some peers.

    Attributes:
        what: how tables name it.
        ratio: what is compared.
        durable: among which peers.
        bound: the least ratio.
    """

    what: str
    ratio: Ratio
    durable: bool
    bound: float


@dataclass(frozen=True, slots=True)
class PeerOutcome:
    """A goal, the peer that came closest, and how many times better than it the mesh was."""

    goal: PeerGoal
    peer: str
    ratio: Spread

    @property
    def met(self) -> bool:
        """Whether it is met; the median counts."""
        return self.ratio.median >= self.goal.bound


GOALS = (
    PeerGoal("Tokens a second at 32 clients, times the best durable peer's", RATIOS[0], True, 5),
    PeerGoal("The best durable peer's CPU a token at 32 clients, times ours", RATIOS[1], True, 5),
    PeerGoal(
        "CPU a token at 32 clients of the best peer without durability, times ours", RATIOS[1], False, 1
    ),
)


def outcomes(results: Sequence[Result]) -> list[PeerOutcome]:
    """Returns the goals of which there are figures."""
    found = []
    for goal in GOALS:
        ratios = [
            (spread, result.facts["target"])
            for result in results
            if result.title == FLOOD and result.facts["durable"] == goal.durable
            if (spread := goal.ratio.of(result)) is not None
        ]
        if ratios:
            spread, peer = min(ratios, key=lambda one: one[0].median)
            found.append(PeerOutcome(goal, peer, spread))
    return found


def wins(result: Result) -> list[str]:
    """Returns what a peer was better at, by the median."""
    spreads = [(one.label, one.of(result)) for one in RATIOS]
    return [label for label, spread in spreads if spread is not None and spread.median < 1]
