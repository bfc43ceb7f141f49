"""What a run costs each kind of process, from two measurements that differ in the tokens of a reply."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bench.measure import Run


@dataclass(frozen=True, slots=True)
class Cost:
    """CPU seconds of one kind of process.

    Attributes:
        run: for a run, whatever its length.
        token: for each token.
    """

    run: float
    token: float

    def of(self, tokens: int) -> float:
        """CPU seconds for a whole run."""
        return self.run + self.token * tokens


@dataclass(frozen=True, slots=True)
class Costs:
    """What the simulation is calibrated with, all of it measured.

    Attributes:
        kinds: of each kind of process, the model and the load generator among them.
        idle: CPU seconds a second of each kind while nothing is asked, all its processes together.
        commits: PostgreSQL transactions of a run.
        commands: Redis commands of a run.
        commit_rate: transactions a second that PostgreSQL does when nothing else is asked of it.
        hop: seconds of a run that are neither CPU nor the model: disk, sockets, waking up.
    """

    kinds: Mapping[str, Cost]
    idle: Mapping[str, float]
    commits: float
    commands: float
    commit_rate: float
    hop: float


def solve(short: Run, long: Run, idle: Mapping[str, float]) -> dict[str, Cost]:
    """Splits CPU into what each run and what each token costs.

    Args:
        short: a measurement of short replies.
        long: one of long replies.
        idle: CPU seconds a second of each kind, which are nobody's run.

    Raises:
        ValueError: Both have as many tokens a reply.
    """
    sizes = [run.figures["tokens"] / run.figures["replies"] for run in (short, long)]
    if sizes[0] == sizes[1]:
        raise ValueError("replies of one length tell nothing about what a token costs")
    found = {}
    for kind in short.parts:
        each = [
            max(0.0, run.parts[kind].cpu - idle.get(kind, 0.0) * run.figures["seconds"])
            / run.figures["replies"]
            for run in (short, long)
        ]
        token = max(0.0, (each[1] - each[0]) / (sizes[1] - sizes[0]))
        found[kind] = Cost(max(0.0, each[0] - token * sizes[0]), token)
    return found
