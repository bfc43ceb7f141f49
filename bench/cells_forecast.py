"""What the simulation says of cells: whole meshes behind an edge, and tenants of unequal size in them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from bench.costs import Costs
from bench.forecast import (
    NAMES,
    ROOM,
    SESSIONS_AN_AGENT,
    SHARED,
    WORK,
    demand,
    needed,
    offered,
    simulate,
    single,
)
from bench.simulated_mesh import NOTHING, Observed

# Agents in all, and over how many cells.
SPREADS = ((1000, 1), (1000, 4), (1000, 10), (10_000, 10), (10_000, 40))
TENANTS = 2000
NEAR = 1.1
SEED = 31


@dataclass(frozen=True, slots=True)
class Spread:
    """So many agents over so many cells.

    Attributes:
        agents: of all cells.
        cells: how many.
        edge_workers: of the Envoys before them.
        layout: of each cell: gateways / Envoy workers / sessions / PostgreSQL / Valkey.
        one: what one cell was seen to do; they have nothing in common.
    """

    agents: int
    cells: int
    edge_workers: int
    layout: str
    one: Observed

    @property
    def sessions(self) -> int:
        """Of all cells."""
        return self.agents * SESSIONS_AN_AGENT

    @property
    def rate(self) -> float:
        """Runs a second of all cells."""
        return self.one.rate * self.cells

    def added(self, share: float) -> float:
        """Seconds of a run that are not the model's."""
        return max(0.0, self.one.percentile(share) - WORK.seconds)

    @property
    def hottest(self) -> str:
        """Which single part of a cell was busiest."""
        kind = max(SHARED, key=lambda one: self.one.hottest[one])
        return f"{NAMES[kind]} ({self.one.hottest[kind]:.0%})"


def spreads(costs: Costs) -> list[Spread]:
    """Simulates a cell of each spread; the edge is one more Envoy on a run's way."""
    envoy = costs.kinds.get("envoy", NOTHING)
    # An edge that is as busy as the other parts may be: what it does, and as long a wait again.
    way = (envoy.run + envoy.wake * 2) / (1 - ROOM)
    behind = replace(costs, hop=costs.hop + way)
    found = []
    for agents, cells in SPREADS:
        each = agents // cells
        counts = needed(costs, each)
        observed = simulate(behind, replace(single(each), **counts))
        names = ("gateways", "envoys", "sessions", "postgres", "valkeys")
        found.append(
            Spread(
                agents,
                cells,
                max(1, math.ceil(offered(agents) * demand(costs)["envoy"] / ROOM)),
                " / ".join(str(counts[name]) for name in names),
                observed,
            )
        )
    return found


@dataclass(frozen=True, slots=True)
class Placement:
    """Tenants of unequal size in cells.

    Attributes:
        cells: how many.
        largest: the largest tenant's share of all sessions.
        hashed: sessions of the fullest cell, as a share of the mean, where a hash places tenants.
        moves: how many tenants have to be moved until the fullest is near the mean, or the largest tenant.
        moved: sessions of the fullest cell then, as a share of the mean.
    """

    cells: int
    largest: float
    hashed: float
    moves: int
    moved: float


def placements(cells: Sequence[int] = (4, 10, 40)) -> list[Placement]:
    """Places tenants whose sizes fall as one over their rank, and moves some from full cells."""
    return [placement(number) for number in cells]


def placement(cells: int, seed: int = SEED) -> Placement:
    """See `placements`."""
    chance = random.Random(seed)
    weights = [1 / rank for rank in range(1, TENANTS + 1)]
    total = sum(weights)
    held: list[list[float]] = [[] for _ in range(cells)]
    for weight in weights:
        held[chance.randrange(cells)].append(weight / total)
    mean = 1 / cells
    hashed = max(map(sum, held)) / mean
    moves = 0
    while True:
        loads = [sum(cell) for cell in held]
        full, empty = loads.index(max(loads)), loads.index(min(loads))
        # No cell can hold less than the largest tenant of all.
        if loads[full] <= NEAR * max(mean, weights[0] / total):
            break
        # The largest whose way out makes the fuller of the two less full than the fullest was.
        fitting = [one for one in held[full] if loads[empty] + one < loads[full]]
        if not fitting:
            break
        going = max(fitting, key=lambda one: min(one, loads[full] - loads[empty] - one))
        held[full].remove(going)
        held[empty].append(going)
        moves += 1
        if moves >= TENANTS:
            break
    return Placement(cells, weights[0] / total, hashed, moves, max(map(sum, held)) / mean)
