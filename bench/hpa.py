"""The agents' autoscaler on the real metric, under a load that rises and falls. `make bench-hpa`.

    python -m bench.hpa [--speed 6] [--peak 400] [--quick] [--write]

A mesh of its own gets streamed runs at random times (Poisson), so that about so many of them are under way
as a profile says: few, many, few again, never steady. What Prometheus and the metrics adapter would do is
done here, each in its own rhythm: the agents' `/metrics` are scraped, and the autoscaler's formula
(`bench.autoscaler`) looks at the last scrape, by the chart's own HorizontalPodAutoscaler. What it decides is
done with `hermesh scale`: agents are started, and drained. Every run must come to its end with all of its
tokens, or there is no result.

`--speed` is how much faster than in a cluster the scrapes, the looks, the windows and the policies' periods
are; runs, agents' starts and drains take their own time, and so weigh that much more than there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import httpx
import uvloop
import yaml

from bench.autoscaler import CPU, SYNC_SECONDS, Autoscaler, Spec
from bench.command import FAILURES, clock, more_than, new_console, whole
from bench.exported import exported
from bench.facts import ROOT, facts
from bench.load import LONGEST_SECONDS, started
from bench.mesh import Mesh
from bench.model_script import sequence
from bench.open_loop import REFUSED
from bench.process_cpu import cpu_seconds
from bench.target import IncompleteReply
from bench.targets import MeshTarget, events

SCALERS = ROOT / "deploy/kubernetes/kustomize/components/autoscaling/autoscaling.yaml"
METRIC = "hermes_active_sessions"
# Prometheus' interval in the chart, and what an agent requests there.
SCRAPE_SECONDS = 15.0
REQUESTED_CORES = 0.5
# Real seconds, as the model writes: most replies end within a drain, some are handed over by it.
RATE = 2.0
KINDS = {"short": (24, 0.9), "long": (120, 0.1)}
DRAIN_SECONDS = 20
SETTINGS = {
    "HERMESH_DRAIN_SECONDS": str(DRAIN_SECONDS),
    # A reply that is handed over is continued, as vLLM does it.
    "HERMESH_LLM_PREFILL": "true",
    "HERMESH_LLM_CONNECTIONS": "2000",
}
SPARE_SESSIONS = 1.6
WOBBLE = 0.15
WOBBLE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Profile:
    """How many runs are to be under way, by the seconds of the autoscaler's clock."""

    least: int
    peak: int
    rise: float
    high: float
    fall: float
    tail: float

    @property
    def points(self) -> list[tuple[float, float]]:
        """Its corners."""
        at, found = 0.0, [(0.0, float(self.least))]
        for seconds, number in (
            (2 * SYNC_SECONDS, self.least),
            (self.rise, self.peak),
            (self.high, self.peak),
            (self.fall, self.least),
            (self.tail, self.least),
        ):
            at += seconds
            found.append((at, float(number)))
        return found

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.points[-1][0]

    def at(self, seconds: float) -> float:
        """Returns the number, which is never steady."""
        for (began, first), (ended, last) in pairwise(self.points):
            if seconds <= ended:
                base = first + (last - first) * (seconds - began) / (ended - began)
                return base * (1 + WOBBLE * math.sin(2 * math.pi * seconds / WOBBLE_SECONDS))
        return self.points[-1][1]


@dataclass(frozen=True, slots=True)
class Moment:
    """What one look of the autoscaler saw and decided.

    Attributes:
        at: seconds of its clock.
        asked: runs that the profile has under way.
        sessions: what all agents exported together.
        replicas: that were set when it looked.
        exporting: agents that were scraped.
        by_metric: what each metric asked for.
        decided: replicas that it set.
    """

    at: float
    asked: float
    sessions: float
    replicas: int
    exporting: int
    by_metric: Mapping[str, int]
    decided: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """One measurement.

    Attributes:
        facts: of the machine.
        speed: how much faster the autoscaler's clock was.
        target: sessions an agent that the autoscaler aims at.
        moments: what it saw and did.
        runs: how many there were; all of them came to their end, whole.
        refused: requests beside them that were told to come back later.
        moved: runs that went on in another agent.
        reset: runs of which text was taken back and written again.
        late: how much longer than its model's time the slowest run took, in seconds.
    """

    facts: Mapping[str, Any]
    speed: float
    target: float
    moments: Sequence[Moment]
    runs: int
    refused: int
    moved: int
    reset: int
    late: float

    @property
    def steps(self) -> list[int]:
        """Each change of the replicas, in order."""
        return [one.decided - one.replicas for one in self.moments if one.decided != one.replicas]

    @property
    def turns(self) -> int:
        """How often it changed its direction; up and then down is one."""
        return sum((before > 0) != (after > 0) for before, after in pairwise(self.steps))


def arrivals(profile: Profile, speed: float, seed: int) -> list[tuple[float, str]]:
    """Returns when runs come, in real seconds, and of which kind each is."""
    chance = random.Random(seed)
    mean = sum(tokens / RATE * share for tokens, share in KINDS.values())
    most = profile.peak * (1 + WOBBLE) / mean
    names, shares = list(KINDS), [share for _, share in KINDS.values()]
    found, at = [], 0.0
    while (at := at + chance.expovariate(most)) * speed < profile.seconds:
        # As many as the profile has of the most, by chance.
        if chance.random() * most < profile.at(at * speed) / mean:
            found.append((at, chance.choices(names, shares)[0]))
    return found


def agents_spec() -> Spec:
    """What the chart asks of the agents' autoscaler."""
    (scaler,) = (
        one
        for one in yaml.safe_load_all(SCALERS.read_text())
        if one["spec"]["scaleTargetRef"]["name"].endswith("-agent")
    )
    return Spec.read(scaler["spec"])


@dataclass(slots=True)
class _Scraped:
    """What Prometheus would know."""

    sessions: dict[int, float] = field(default_factory=dict)
    cpu: dict[int, float] = field(default_factory=dict)
    used: dict[int, tuple[float, float]] = field(default_factory=dict)


class Cluster:
    """The mesh as the autoscaler's cluster: it scrapes, looks and scales."""

    def __init__(self, mesh: Mesh, profile: Profile, speed: float, said: Callable[[str], None]) -> None:
        self.spec = agents_spec()
        self.moments: list[Moment] = []
        self._autoscaler = Autoscaler(self.spec)
        self._mesh = mesh
        self._profile = profile
        self._speed = speed
        self._said = said
        self._replicas = self.spec.least
        self._changed = asyncio.Event()
        self._scraped = _Scraped()
        self._began = 0.0

    async def run(self) -> None:
        """Goes on until it is cancelled. Raises MeshError when the mesh cannot be scaled."""
        self._began = time.monotonic()
        async with httpx.AsyncClient(timeout=10, trust_env=False) as client:
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._every(SCRAPE_SECONDS, lambda: self._scrape(client)))
                    group.create_task(self._every(SYNC_SECONDS, self._look))
                    group.create_task(self._scale())
            except ExceptionGroup as failed:
                # The first has ended the others.
                raise failed.exceptions[0] from None

    async def _every(self, seconds: float, act: Callable[[], Any]) -> None:
        due = time.monotonic()
        while True:
            due = max(due + seconds / self._speed, time.monotonic())
            await asyncio.sleep(due - time.monotonic())
            await act()

    async def _scrape(self, client: httpx.AsyncClient) -> None:
        found = _Scraped()

        async def one(number: int, facts: Mapping[str, Any]) -> None:
            # First whether it lives at all: its port may be another's by now.
            used, now = cpu_seconds(facts["pid"]), time.monotonic()
            found.sessions[number] = await exported(client, facts["metrics_address"], METRIC)
            found.used[number] = (used, now)
            if number in self._scraped.used:
                before, then = self._scraped.used[number]
                found.cpu[number] = 100 * (used - before) / (now - then) / REQUESTED_CORES

        # One that is on its way out, or was just started, may be gone or not be there yet.
        ready = self._ready().items()
        await asyncio.gather(*(one(*each) for each in ready), return_exceptions=True)
        self._scraped = found

    def _ready(self) -> dict[int, dict[str, Any]]:
        found = (self._mesh.data_dir / "ready").glob("agent-*.json")
        return {int(path.stem.partition("-")[2]): json.loads(path.read_text()) for path in found}

    async def _look(self) -> None:
        now = (time.monotonic() - self._began) * self._speed
        pods = range(1, self._replicas + 1)
        samples = {
            METRIC: [self._scraped.sessions.get(number) for number in pods],
            CPU: [self._scraped.cpu.get(number) for number in pods],
        }
        decision = self._autoscaler.decide(now, self._replicas, samples)
        sessions = sum(self._scraped.sessions.values())
        self.moments.append(
            Moment(
                now,
                self._profile.at(now),
                sessions,
                self._replicas,
                len(self._scraped.sessions),
                decision.by_metric,
                decision.replicas,
            )
        )
        if decision.replicas != self._replicas:
            self._said(f"{sessions:.0f} sessions: {self._replicas} -> {decision.replicas} agents")
            self._replicas = decision.replicas
            self._changed.set()

    async def _scale(self) -> None:
        """Does what was decided, the last decision at a time, as a Deployment does."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            await asyncio.to_thread(self._mesh.command, "scale", f"agent={self._replicas}", seconds=300)


async def measure(
    mesh: Mesh, profile: Profile, speed: float, seed: int, said: Callable[[str], None]
) -> Outcome:
    """Puts the load on the mesh and scales it.

    Raises:
        IncompleteReply: A run did not come to its end, or lacks tokens.
    """
    found = facts()
    target = MeshTarget(mesh)
    runs = arrivals(profile, speed, seed)
    async with target:
        said("making sessions")
        asks = {}
        for name, (tokens, share) in KINDS.items():
            count = math.ceil(profile.peak * SPARE_SESSIONS * max(share, 0.5))
            asks[name] = [await target.prepare(f"[[tokens={tokens} rate={RATE:g}]]") for _ in range(count)]
    job = {
        "arrivals": runs,
        "tenants": {
            name: [{"url": ask.url, "headers": dict(ask.headers), "body": dict(ask.body)} for ask in those]
            for name, those in asks.items()
        },
    }
    cluster = Cluster(mesh, profile, speed, said)
    said(f"{len(runs)} runs in {profile.seconds / speed:.0f} s")
    async with started("bench.open_loop", job) as generator:
        scaling = asyncio.create_task(cluster.run())
        load = asyncio.create_task(generator.go(profile.seconds / speed + LONGEST_SECONDS))
        try:
            # What goes wrong in either ends both.
            done, _ = await asyncio.wait({load, scaling}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            rows = await generator.written()
        finally:
            load.cancel()
            scaling.cancel()
            await asyncio.gather(load, scaling, return_exceptions=True)
    accepted = [row for row in rows if row.get("status") != REFUSED]
    moved, reset = read(accepted, target)
    return Outcome(
        facts=found,
        speed=speed,
        target=cluster.spec.targets[METRIC],
        moments=cluster.moments,
        runs=len(accepted),
        refused=len(rows) - len(accepted),
        moved=moved,
        reset=reset,
        late=max((row["ended"] - row["began"]) / 1e9 - KINDS[row["tenant"]][0] / RATE for row in accepted),
    )


def read(rows: Sequence[Mapping[str, Any]], target: MeshTarget) -> tuple[int, int]:
    """Makes sure that every run is whole; returns how many moved, and of how many text was written again.

    Raises:
        IncompleteReply: One is not.
    """
    expected = {name: "".join(sequence(tokens)) for name, (tokens, _) in KINDS.items()}
    moved = reset = 0
    for row in rows:
        if row["error"] or row["status"] != 200:
            raise IncompleteReply(
                f"a run was cut: {row['error'] or row['status']}: {row.get('text', '')[-600:]!r}"
            )
        body = row["text"].encode()
        text = ""
        kinds = [event["type"] for event in events(body)]
        moved += kinds.count("run.started") > 1
        reset += "attempt.reset" in kinds
        if "attempt.reset" not in kinds:
            text = target.text(body)
        elif kinds[-1] == "run.completed":
            text = _after_resets(body)
        if text != expected[row["tenant"]]:
            raise IncompleteReply(f"a reply lacks tokens or its end: {row['text'][-600:]!r}")
    return moved, reset


def _after_resets(body: bytes) -> str:
    """The text that stands once what a reset takes back is gone."""
    pieces: list[tuple[int, str]] = []
    for event in events(body):
        if event["type"] == "attempt.reset":
            pieces = [piece for piece in pieces if piece[0] < event["data"]["from_seq"]]
        elif event["type"] == "text.delta":
            pieces.append((event["seq"], event["data"]["text"]))
    return "".join(text for _, text in pieces)


def encode(outcome: Outcome) -> dict[str, Any]:
    """Returns it as what JSON holds."""
    return asdict(outcome)


def decode(found: Mapping[str, Any]) -> Outcome:
    """Reads what `encode` made."""
    return Outcome(**{**found, "moments": [Moment(**one) for one in found["moments"]]})


def profile_of(options: argparse.Namespace) -> Profile:
    """Returns the load that the options ask for."""
    if options.quick:
        return Profile(least=20, peak=160, rise=90, high=120, fall=60, tail=480)
    # What is left after the fall: the window, and one agent a minute.
    tail = 300 + 60 * (options.peak / 50 + 2)
    return Profile(least=40, peak=options.peak, rise=180, high=480, fall=120, tail=tail)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--speed", type=more_than(0), default=6.0, help="of the autoscaler's clock")
    parser.add_argument("--peak", type=whole(100), default=400, help="runs at once, the most")
    parser.add_argument("--seed", type=int, default=1, help="of the runs' times")
    parser.add_argument("--quick", action="store_true", help="a smaller load for a short time")
    parser.add_argument("--write", action="store_true", help="write results, plot and page")
    parser.add_argument("--render", action="store_true", help="measure nothing; write the page again")
    options = parser.parse_args(arguments)
    console = new_console()

    from bench.hpa_page import publish, section, stored

    try:
        if options.render:
            outcome = stored()
        else:
            said = clock(console)
            said("starting a mesh")
            with Mesh(settings=SETTINGS, replicas=f"agent={agents_spec().least},session=2") as mesh:
                outcome = uvloop.run(measure(mesh, profile_of(options), options.speed, options.seed, said))
        console.print(section(outcome, ""), highlight=False, markup=False)
        if options.write or options.render:
            for path in publish(outcome):
                console.print(f"written: {path}", highlight=False, soft_wrap=True)
    except FAILURES as error:
        print(f"no result: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
