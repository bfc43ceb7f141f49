"""A mesh as stations: what a run passes, what each part of it costs there, and who chooses the agent."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from bench.costs import Cost, Costs
from bench.simulation import Clock, Done, Station

NOTHING = Cost(0.0, 0.0)
# The way of what the model writes, and of a run's end; its beginning goes the other way.
DOWN = ("agent", "session", "postgresql", "valkey", "envoy", "gateway")
UP = tuple(reversed(DOWN))
OUTSIDE = ("model", "generator")
IDLE_STEP = 0.05


@dataclass(frozen=True, slots=True)
class Layout:
    """How many there are of each.

    Attributes:
        agents: replicas.
        slots: runs of each at once; further ones wait in it.
        sessions: session replicas.
        gateways: replicas of one thread each.
        envoys: workers of Envoy, of one thread each.
        postgres: primaries; a session's rows are all on one, by the hash of its id.
        valkeys: servers of one thread each, chosen the same way.
        postgres_cores: of each primary.
        machine_cores: cores that everything shares; None when each has its own.
        users: sessions that ask.
    """

    agents: int
    slots: int
    sessions: int = 2
    gateways: int = 1
    envoys: int = 1
    postgres: int = 1
    valkeys: int = 1
    postgres_cores: int = 2
    machine_cores: int | None = None
    users: int = 1_000_000


@dataclass(frozen=True, slots=True)
class Work:
    """One run: tokens of its reply, seconds in which the model writes them, portions that it comes in."""

    tokens: int
    seconds: float
    portions: int


@dataclass(slots=True)
class Observed:
    """What came of a simulation.

    Attributes:
        rate: runs that ended, a second.
        latencies: seconds from arrival to end of those that ended.
        used: share of the time in which a server of each kind was busy, over all of the kind.
        hottest: the same of the busiest one of each kind.
    """

    rate: float
    latencies: list[float] = field(repr=False)
    used: Mapping[str, float]
    hottest: Mapping[str, float]

    @property
    def fullest(self) -> str:
        """The kind that is busiest."""
        return max(self.used, key=lambda kind: self.used[kind])

    def percentile(self, share: float) -> float:
        """Seconds at a share of the runs in order; 0 when none ended."""
        if len(self.latencies) < 2:
            return 0.0
        return statistics.quantiles(self.latencies, n=1000)[min(998, round(share * 1000) - 1)]


class SimulatedMesh:
    """Stations of one layout, with measured costs. Everything random comes from `seed`."""

    def __init__(self, layout: Layout, costs: Costs, work: Work, seed: int = 1) -> None:
        self.clock = Clock()
        self._layout, self._costs, self._work = layout, costs, work
        self._chance = random.Random(seed)
        self._ended: list[tuple[float, float]] = []
        clock = self.clock
        self.machine = Station(clock, layout.machine_cores) if layout.machine_cores else None
        sizes = {
            "agent": (layout.agents, 1),
            "session": (layout.sessions, 1),
            "gateway": (layout.gateways, 1),
            "envoy": (layout.envoys, 1),
            "postgresql": (layout.postgres, layout.postgres_cores),
            "valkey": (layout.valkeys, 1),
        }
        if self.machine is not None:
            sizes |= dict.fromkeys(OUTSIDE, (1, 1))
        self.stations = {
            kind: [Station(clock, servers, self.machine) for _ in range(count)]
            for kind, (count, servers) in sizes.items()
        }
        self.stations["slots"] = [Station(clock, layout.slots) for _ in range(layout.agents)]
        self.stations["commits"] = [Station(clock, 1) for _ in range(layout.postgres)]
        self._load = [0] * layout.agents

    # A run

    def begin(self, ended: Done | None = None) -> None:
        """A run arrives now, of a session that chance picks."""
        arrived = self.clock.now
        session = hash((self._chance.randrange(self._layout.users), 7919))
        way = self._way(session)
        first, second = self._chance.randrange(len(self._load)), self._chance.randrange(len(self._load))

        def choose() -> None:
            number = first if self._load[first] <= self._load[second] else second
            self._load[number] += 1
            way["agent"] = self.stations["agent"][number]
            slots = self.stations["slots"][number]

            def over() -> None:
                self._load[number] -= 1
                self._ended.append((arrived, self.clock.now))
                if ended is not None:
                    ended()

            self._chain(way, UP[2:], 0.5, 0, lambda: slots.take(lambda: self._write(way, slots, over)))

        self._chain(way, UP[:2], 0.5, 0, lambda: self.clock.after(self._costs.hop, choose))

    def _way(self, session: int) -> dict[str, Station]:
        """The stations of a run but its agent: stores by the session, the others by chance."""
        way = {}
        for kind, stations in self.stations.items():
            if kind in ("postgresql", "commits", "valkey"):
                way[kind] = stations[session % len(stations)]
            elif kind not in ("agent", "slots"):
                way[kind] = (
                    stations[self._chance.randrange(len(stations))] if len(stations) > 1 else stations[0]
                )
        return way

    def _chain(
        self, way: Mapping[str, Station], kinds: tuple[str, ...], share: float, tokens: float, done: Done
    ) -> None:
        """Passes stations one after the other.

        Args:
            way: which ones.
            kinds: in which order; only agents are not known from the beginning.
            share: of what a run costs there.
            tokens: whose cost is added.
            done: called at the end.
        """
        costs, commits = self._costs, self._costs.commits * share / self._costs.commit_rate

        def step(place: int) -> None:
            if place == len(kinds):
                done()
                return
            kind = kinds[place]
            cost = costs.kinds.get(kind, NOTHING)
            seconds = cost.run * share + cost.token * tokens
            if kind == "postgresql" and commits:
                way[kind].visit(seconds, lambda: way["commits"].visit(commits, lambda: step(place + 1)))
            elif kind in way:
                way[kind].visit(seconds, lambda: step(place + 1))
            else:
                step(place + 1)

        step(0)

    def _write(self, way: Mapping[str, Station], slots: Station, over: Done) -> None:
        """The model writes while the slot is held; every portion goes down to the client."""
        work = self._work
        began = self.clock.now
        each = work.tokens / work.portions

        def portion(number: int) -> None:
            if number < work.portions:
                self._chain(way, ("model", *DOWN, "generator"), 0.0, each, lambda: None)
                self.clock.after(work.seconds / work.portions, lambda: portion(number + 1))
                return

            def last() -> None:
                slots.give(self.clock.now - began)
                self._chain(
                    way, ("session", "postgresql", "valkey", "envoy", "gateway", "generator"), 0.5, each, over
                )

            self._chain(way, ("model", "agent"), 0.5, each, last)

        self.clock.after(work.seconds / work.portions, lambda: portion(1))

    def background(self, shares: Mapping[str, float]) -> None:
        """Has each kind work by itself, so many seconds a second, its stations in turn."""

        def step(number: int) -> None:
            for kind, share in shares.items():
                stations = [self.machine] if kind == "others" else self.stations.get(kind, [])
                if stations and stations[number % len(stations)] is not None:
                    station = stations[number % len(stations)]
                    assert station is not None
                    station.visit(share * IDLE_STEP, lambda: None)
            self.clock.after(IDLE_STEP, lambda: step(number + 1))

        step(0)

    # Loads

    def closed(self, clients: int, asks: int, spread: float) -> Observed:
        """Clients that each ask so often, one after the other; they begin spread over seconds."""
        left = clients * asks

        def client(more: int) -> Callable[[], None]:
            def ended() -> None:
                nonlocal left
                left -= 1
                if more > 1:
                    self.begin(client(more - 1))

            return ended

        for number in range(clients):
            self.clock.after(spread * number / clients, lambda: self.begin(client(asks)))
        while left:
            self.clock.run(self.clock.now + IDLE_STEP)
        return self._observed(0.0, max(end for _, end in self._ended), {})

    def steady(self, clients: int, warm_up: float, seconds: float) -> Observed:
        """Clients that ask again and again; what happens after the warm-up is observed."""

        def ask() -> None:
            self.begin(ask)

        for number in range(clients):
            self.clock.after(min(warm_up, self._work.seconds) * number / clients, ask)
        self.clock.run(warm_up)
        before = {kind: [one.worked for one in row] for kind, row in self.stations.items()}
        self.clock.run(warm_up + seconds)
        return self._observed(warm_up, warm_up + seconds, before)

    def _observed(self, begin: float, end: float, before: Mapping[str, list[float]]) -> Observed:
        ended = [(arrived, at) for arrived, at in self._ended if begin <= at <= end]
        used, hottest = {}, {}
        everything = dict(self.stations) | ({"cores": [self.machine]} if self.machine else {})
        for kind, stations in everything.items():
            was = before.get(kind, [0.0] * len(stations))
            shares = [
                (one.worked - start) / (one.servers * (end - begin))
                for one, start in zip(stations, was, strict=True)
            ]
            used[kind], hottest[kind] = statistics.fmean(shares), max(shares)
        return Observed(len(ended) / (end - begin), [at - arrived for arrived, at in ended], used, hottest)
