"""What the simulation says: of the measured points, and of meshes that no one machine holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from bench.costs import Costs
from bench.scale_data import MODEL_SECONDS, SLOTS, TOKENS, Measured, Point
from bench.simulated_mesh import NOTHING, Layout, Observed, SimulatedMesh, Work

# What was measured: tokens of a reply, each a portion of its own.
POINT_WORK = Work(tokens=TOKENS, seconds=MODEL_SECONDS, portions=TOKENS)
POINT_SPREAD = 1.0
# What is looked at beyond: 200 tokens at 50 a second.
WORK = Work(tokens=200, seconds=4.0, portions=8)
TARGET = 0.7
# How busy the stores and proxies may be, if nothing came in company.
ROOM = 0.7
# Share of what is asked for; runs take a little longer than the model.
ENOUGH = 0.95
SESSIONS_AN_AGENT = 1000
SIZES = (1, 10, 100, 1000)
POSTGRES_CORES = 16
WARM_UP_SECONDS = 8.0
SECONDS = 4.0
SHARED = ("gateway", "envoy", "session", "postgresql", "commits", "valkey")
NAMES = {
    "agent": "agents' CPU",
    "slots": "agents' slots",
    "cores": "the machine's cores",
    "gateway": "gateway",
    "envoy": "Envoy worker",
    "session": "session replica",
    "writes": "session replica's writes",
    "postgresql": f"PostgreSQL's {POSTGRES_CORES} cores",
    "commits": "PostgreSQL's commits",
    "valkey": "Valkey",
    "model": "model",
    "generator": "load generator",
}


@dataclass(frozen=True, slots=True)
class Prediction:
    """A measured point and what the simulation says of it."""

    point: Point
    observed: Observed

    @property
    def error(self) -> float:
        """How far the simulated throughput is off, as a share of the measured one."""
        return self.observed.rate / self.point.rate - 1

    @property
    def latency_error(self) -> float:
        """The same of the median time of a run."""
        return self.observed.percentile(0.5) / self.point.p50 - 1


def predictions(measured: Measured, costs: Costs) -> list[Prediction]:
    """Simulates every measured point: the same clients, on as many cores, beside the same other load."""
    found = []
    for point in measured.points:
        layout = Layout(point.agents, SLOTS, machine_cores=measured.facts["cores"])
        mesh = SimulatedMesh(layout, costs, POINT_WORK)
        mesh.background(dict(measured.idle) | {"others": point.others})
        found.append(Prediction(point, mesh.closed(point.clients, point.asks, POINT_SPREAD)))
    return found


def demand(costs: Costs, *, gathered: bool = False) -> dict[str, float]:
    """Seconds of one whole gateway, Envoy worker, PostgreSQL, ... that a run takes.

    Args:
        costs: what is known.
        gathered: whether each portion finds so much company that waking up costs nothing: what a busy process
            comes near. Else each portion has a wake-up, a write and a transaction of its own.
    """
    wakes = 0 if gathered else WORK.portions + 2
    shares = {}
    for kind in SHARED:
        cost = costs.kinds.get(kind, NOTHING)
        shares[kind] = cost.run + cost.wake * wakes + cost.token * WORK.tokens
    shares["postgresql"] /= POSTGRES_CORES
    shares["commits"] = (costs.run_commits + wakes) / costs.commit_rate
    return shares


def offered(agents: int) -> float:
    """Runs a second that so many agents are asked for."""
    return agents * SLOTS / WORK.seconds * TARGET


def single(agents: int) -> Layout:
    """One of each store and proxy, and two session replicas."""
    return Layout(agents, SLOTS, postgres_cores=POSTGRES_CORES, users=agents * SESSIONS_AN_AGENT)


def needed(costs: Costs, agents: int) -> Mapping[str, int]:
    """How many of each are wanted so that none is busier than `ROOM`."""
    rate = offered(agents)
    counts = {kind: max(1, math.ceil(rate * each / ROOM)) for kind, each in demand(costs).items()}
    return {
        "gateways": counts["gateway"],
        "envoys": counts["envoy"],
        "sessions": max(2, counts["session"]),
        "postgres": max(counts["postgresql"], counts["commits"]),
        "valkeys": counts["valkey"],
    }


def simulate(costs: Costs, layout: Layout) -> Observed:
    """Has as many clients as `TARGET` of the slots ask again and again; every part has cores of its own."""
    clients = max(1, round(layout.agents * layout.slots * TARGET))
    counts = (
        layout.gateways,
        layout.envoys,
        layout.sessions,
        layout.postgres,
        layout.postgres,
        layout.valkeys,
    )
    each = demand(costs)
    slowest = max(each[kind] / count for kind, count in zip(SHARED, counts, strict=True))
    # Where a queue holds most of the clients, a turn takes as long as it takes to serve them all.
    turn = max(WORK.seconds, clients * slowest)
    return SimulatedMesh(layout, costs, WORK).steady(
        clients, max(WARM_UP_SECONDS, 2 * turn), max(SECONDS, turn)
    )


@dataclass(frozen=True, slots=True)
class Curve:
    """One size of mesh: with one of each store and proxy, and with as many as are needed."""

    agents: int
    offered: float
    single: Observed
    sharded: Observed
    shards: Mapping[str, int]

    @property
    def layout(self) -> str:
        """How many of each the sharded one has."""
        return " / ".join(
            str(self.shards[name]) for name in ("gateways", "envoys", "sessions", "postgres", "valkeys")
        )

    def added(self, share: float) -> float:
        """Seconds of a run that are not the model's, at a share of the runs; the sharded one's."""
        return max(0.0, self.sharded.percentile(share) - WORK.seconds)

    @property
    def hottest(self) -> str:
        """Which single store or proxy of the sharded one was busiest."""
        hot = {kind: self.sharded.hottest[kind] for kind in SHARED}
        kind = max(hot, key=lambda one: hot[one])
        return f"{NAMES[kind]} ({hot[kind]:.0%})"


def curves(costs: Costs) -> list[Curve]:
    """Simulates every size."""
    found = []
    for agents in SIZES:
        shards = needed(costs, agents)
        alone = simulate(costs, single(agents))
        sharded = simulate(costs, replace(single(agents), **shards))
        found.append(Curve(agents, offered(agents), alone, sharded, shards))
    return found


@dataclass(frozen=True, slots=True)
class Step:
    """A layout in which one more part was given as many as it needs; `full` is what was fullest then."""

    what: str
    offered: float
    observed: Observed
    full: str

    @property
    def limit(self) -> str:
        """What was fullest, and how full."""
        return f"{NAMES[self.full]} ({self.observed.used[self.full]:.0%})"


# By what a kind of station is widened.
_WIDENED = {
    "gateway": "gateways",
    "envoy": "envoys",
    "session": "sessions",
    "writes": "sessions",
    "postgresql": "postgres",
    "commits": "postgres",
    "valkey": "valkeys",
}


def ladder(costs: Costs, agents: int = SIZES[-1]) -> list[Step]:
    """Begins with one of each and widens what is fullest, until what is asked for is done or all is wide."""
    wanted, layout = needed(costs, agents), single(agents)
    what, steps = "one of each, two session replicas", []
    while True:
        seen = simulate(costs, layout)
        full = seen.fullest
        # A session replica's writes wait for the stores: where replicas are enough, the stores are full.
        for kind in sorted(_WIDENED, key=lambda one: -seen.used[one]):
            if getattr(layout, _WIDENED[kind]) < wanted[_WIDENED[kind]]:
                break
        else:
            kind = ""
        done = seen.rate >= ENOUGH * offered(agents)
        steps.append(Step(what, offered(agents), seen, full if done or not kind else kind))
        if done or not kind:
            return steps
        name = _WIDENED[kind]
        layout = replace(layout, **{name: wanted[name]})
        what = f"and {wanted[name]:,} {_PLURAL[name]}"


_PLURAL = {
    "gateways": "gateways",
    "envoys": "Envoy workers",
    "sessions": "session replicas",
    "postgres": "PostgreSQL shards",
    "valkeys": "Valkeys",
}
