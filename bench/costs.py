"""What work costs each kind of process: for a run, for each time that it wakes up, for each token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_SWEEPS = 2000


@dataclass(frozen=True, slots=True)
class Cost:
    """CPU seconds of one kind of process.

    A process that is busy finds more waiting each time it looks, so what a token costs falls with the load.
    What it does once for all that waits (a wake-up, a system call, a statement, a commit) is `wake`.

    Attributes:
        run: for a run, whatever its length.
        wake: for each time that it finds something to do.
        token: for each token, beside.
    """

    run: float
    wake: float
    token: float


@dataclass(frozen=True, slots=True)
class Costs:
    """What the simulation is calibrated with.

    Attributes:
        kinds: of each kind of process, the model and the load generator among them.
        idle: CPU seconds a second of each kind while nothing is asked, all its processes together.
        run_commits: PostgreSQL transactions of a run beside those that write its tokens.
        commit_rate: transactions a second that PostgreSQL does when nothing else is asked of it.
        hop: seconds of a run that are neither CPU nor the model: disk, sockets, waking up.
    """

    kinds: Mapping[str, Cost]
    idle: Mapping[str, float]
    run_commits: float
    commit_rate: float
    hop: float


@dataclass(frozen=True, slots=True)
class Equation:
    """Of one kind of process: so many runs, wake-ups and tokens took so many CPU seconds."""

    run: float
    wake: float
    token: float
    cpu: float


def fit(equations: Sequence[Equation]) -> Cost:
    """Returns the costs, none below zero, whose relative errors over all equations are least (squares).

    Equations without CPU are left out; without any, everything is free.
    """
    rows = [(one.run / one.cpu, one.wake / one.cpu, one.token / one.cpu) for one in equations if one.cpu > 0]
    found = [0.0, 0.0, 0.0]
    # Coordinate descent: each unknown in turn takes its best value, the others being what they are.
    for _ in range(_SWEEPS):
        for place in range(3):
            square = sum(row[place] ** 2 for row in rows)
            if not square:
                continue
            rest = [
                1.0 - sum(row[other] * found[other] for other in range(3) if other != place) for row in rows
            ]
            best = sum(row[place] * left for row, left in zip(rows, rest, strict=True)) / square
            found[place] = max(0.0, best)
    return Cost(*found)
