"""A mesh as stations: what a run passes, what each part of it costs there, and who chooses the agent."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from bench.costs import Cost, Costs
from bench.fewest import Fewest
from bench.simulation import Clock, Done, Flusher, Loop, Station

NOTHING = Cost(0.0, 0.0, 0.0)
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
        wakes: how often the processes of each kind found something to do, a run.
        commits: transactions, a run.
    """

    rate: float
    latencies: list[float] = field(repr=False)
    used: Mapping[str, float]
    hottest: Mapping[str, float]
    wakes: Mapping[str, float]
    commits: float

    @property
    def fullest(self) -> str:
        """The kind that is busiest."""
        return max(self.used, key=lambda kind: self.used[kind])

    def percentile(self, share: float) -> float:
        """Seconds at a share of the runs in order; 0 when none ended."""
        if len(self.latencies) < 2:
            return 0.0
        return statistics.quantiles(self.latencies, n=1000)[min(998, round(share * 1000) - 1)]


@dataclass(frozen=True, slots=True)
class Way:
    """What a run passes beside its agent; `session` is a replica's number."""

    gateway: Loop | None
    envoy: Loop | None
    session: int
    client: Loop | None
    model: Loop | None


class SimulatedMesh:
    """Stations of one layout, with measured costs. Everything random comes from `seed`."""

    def __init__(self, layout: Layout, costs: Costs, work: Work, seed: int = 1) -> None:
        self.clock = Clock()
        self._layout, self._costs, self._work = layout, costs, work
        self._chance = random.Random(seed)
        self._ended: list[tuple[float, float]] = []
        clock = self.clock
        self.machine = Station(clock, layout.machine_cores) if layout.machine_cores else None
        counts = {
            "gateway": layout.gateways,
            "envoy": layout.envoys,
            "agent": layout.agents,
            "session": layout.sessions,
            "valkey": layout.valkeys,
        }
        if self.machine is not None:
            counts |= dict.fromkeys(OUTSIDE, 1)
        self.loops = {kind: [self._loop(kind) for _ in range(count)] for kind, count in counts.items()}
        self.stations = {
            "postgresql": [
                Station(clock, layout.postgres_cores, self.machine) for _ in range(layout.postgres)
            ],
            "commits": [Station(clock, 1) for _ in range(layout.postgres)],
            "slots": [Station(clock, layout.slots) for _ in range(layout.agents)],
        }
        self._flushers = [Flusher(clock, self._writer(number)) for number in range(layout.sessions)]
        self._fewest = Fewest(layout.agents, self._chance)
        self._transactions = 0.0

    def _loop(self, kind: str) -> Loop:
        cost = self._costs.kinds.get(kind, NOTHING)
        return Loop(self.clock, cost.wake, cost.token, self.machine)

    def _writer(self, session: int) -> Callable[[float, Done], None]:
        """One session replica's write: its own work, one transaction, then Valkey."""
        thread = self.loops["session"][session]
        shard = session % self._layout.postgres
        valkeys = self.loops["valkey"]
        valkey = valkeys[session % len(valkeys)]

        def write(tokens: float, done: Done) -> None:
            thread.visit(
                tokens,
                0.0,
                lambda: self._commit(shard, tokens, 0.0, 1.0, lambda: valkey.visit(tokens, 0.0, done)),
            )

        return write

    def _commit(self, shard: int, tokens: float, seconds: float, transactions: float, done: Done) -> None:
        cost = self._costs.kinds.get("postgresql", NOTHING)
        work = cost.wake * transactions + cost.token * tokens + seconds
        self._transactions += transactions
        disk = transactions / self._costs.commit_rate
        self.stations["postgresql"][shard].visit(
            work, lambda: self.stations["commits"][shard].visit(disk, done)
        )

    # A run

    def begin(self, ended: Done | None = None) -> None:
        """A run arrives now, of a session that chance picks."""
        chance, layout = self._chance, self._layout
        arrived = self.clock.now
        # A session's rows are all on one shard, and so is the session replica that writes them.
        user = chance.randrange(layout.users)
        shard = user * 2654435761 % 2**32 % layout.postgres
        replicas = range(shard, layout.sessions, layout.postgres) or range(layout.sessions)
        way = Way(
            self._pick("gateway"),
            self._pick("envoy"),
            replicas[chance.randrange(len(replicas))],
            self._pick("generator"),
            self._pick("model"),
        )

        def choose() -> None:
            number = self._fewest.take()
            agent, slots = self.loops["agent"][number], self.stations["slots"][number]

            def over() -> None:
                self._fewest.over(number)
                self._ended.append((arrived, self.clock.now))
                if ended is not None:
                    ended()

            self._half(
                way,
                agent,
                lambda: slots.take(
                    lambda: self.clock.after(hop, lambda: self._write(way, agent, slots, over))
                ),
            )

        hop = self._costs.hop / 2
        self._out(way, 0.0, self._share, lambda: self.clock.after(hop, choose))

    def _pick(self, kind: str) -> Loop | None:
        loops = self.loops.get(kind)
        return self._chance.choice(loops) if loops else None

    @property
    def _share(self) -> float:
        """At the beginning and at the end of a run each part does half of what it does for a run."""
        return 0.5

    def _run_cost(self, kind: str, share: float) -> float:
        return self._costs.kinds.get(kind, NOTHING).run * share

    def _half(self, way: Way, agent: Loop, done: Done) -> None:
        """What agent, session and stores do where a run begins or ends: transactions of its own."""
        share = self._share
        shard = way.session % self._layout.postgres
        valkeys = self.loops["valkey"]
        valkey = valkeys[way.session % len(valkeys)]
        session = self.loops["session"][way.session]
        transactions = self._costs.run_commits * share

        def stored() -> None:
            valkey.visit(0.0, self._run_cost("valkey", share), done)

        def known() -> None:
            self._commit(shard, 0.0, self._run_cost("postgresql", share), transactions, stored)

        agent.visit(
            0.0,
            self._run_cost("agent", share),
            lambda: session.visit(0.0, self._run_cost("session", share), known),
        )

    def _out(self, way: Way, tokens: float, share: float, done: Done) -> None:
        """Between agent and client, either way: Envoy, gateway, and on one machine the client itself."""
        self._pass(
            (("envoy", way.envoy), ("gateway", way.gateway), ("generator", way.client)), tokens, share, done
        )

    def _pass(
        self, places: Sequence[tuple[str, Loop | None]], tokens: float, share: float, done: Done
    ) -> None:
        def step(number: int) -> None:
            if number == len(places):
                done()
                return
            kind, loop = places[number]
            if loop is None:
                step(number + 1)
            else:
                loop.visit(tokens, self._run_cost(kind, share), lambda: step(number + 1))

        step(0)

    def _write(self, way: Way, agent: Loop, slots: Station, over: Done) -> None:
        """The model writes while the slot is held; every portion is written down and goes to the client."""
        work = self._work
        began = self.clock.now
        each = work.tokens / work.portions
        flusher = self._flushers[way.session]

        def portion(number: int) -> None:
            last = number == work.portions

            def read() -> None:
                if last:
                    slots.give(self.clock.now - began)
                flusher.add(each, written)

            def written() -> None:
                if last:
                    self._half(way, agent, lambda: self._out(way, each, self._share, over))
                else:
                    self._out(way, each, 0.0, lambda: None)

            share = 1.0 if number == 1 else 0.0
            self._pass((("model", way.model),), each, share, lambda: agent.visit(each, 0.0, read))
            if not last:
                self.clock.after(work.seconds / work.portions, lambda: portion(number + 1))

        self.clock.after(work.seconds / work.portions, lambda: portion(1))

    def background(self, shares: Mapping[str, float]) -> None:
        """Has each kind work by itself, so many seconds a second, its processes in turn."""

        def step(number: int) -> None:
            for kind, share in shares.items():
                if kind == "others" and self.machine is not None:
                    self.machine.visit(share * IDLE_STEP, lambda: None)
                elif loops := self.loops.get(kind):
                    loops[number % len(loops)].visit(0.0, share * IDLE_STEP, lambda: None)
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
        before = self._worked()
        self.clock.run(warm_up + seconds)
        return self._observed(warm_up, warm_up + seconds, before)

    def _everything(self) -> dict[str, Sequence[Station | Loop | Flusher]]:
        found: dict[str, Sequence[Station | Loop | Flusher]] = {**self.stations, **self.loops}
        found["writes"] = self._flushers
        return found | ({"cores": [self.machine]} if self.machine else {})

    def _worked(self) -> dict[str, list[float]]:
        return {kind: [one.worked for one in row] for kind, row in self._everything().items()}

    def _observed(self, begin: float, end: float, before: Mapping[str, Sequence[float]]) -> Observed:
        ended = [(arrived, at) for arrived, at in self._ended if begin <= at <= end]
        used, hottest = {}, {}
        for kind, row in self._everything().items():
            was = before.get(kind, [0.0] * len(row))
            shares = [
                (one.worked - start) / (one.servers * (end - begin))
                for one, start in zip(row, was, strict=True)
            ]
            used[kind], hottest[kind] = statistics.fmean(shares), max(shares)
        runs = max(1, len(self._ended))
        wakes = {kind: sum(loop.wakes for loop in row) / runs for kind, row in self.loops.items()}
        wakes["postgresql"] = self._transactions / runs
        latencies = [at - arrived for arrived, at in ended]
        return Observed(
            len(ended) / (end - begin), latencies, used, hottest, wakes, self._transactions / runs
        )
