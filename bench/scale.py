"""Throughput by replicas: measured on this machine, and simulated beyond it. `make bench-scale`.

(a) A whole mesh with 1, 2, 4, ... agents, each with a bounded number of slots, before a model that takes its
time: what bounds the throughput is waiting, until something on this machine is full; the command says what.

(b) A discrete-event simulation, calibrated by measurements of their own (what runs, wake-ups and tokens cost
each kind of process), compared with every point of (a), and carried on to 1,000 agents and a million
sessions.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import uvloop

from bench.calibration import Sample
from bench.command import FAILURES, clock, new_console
from bench.counters import commit_rate, counts, url_of
from bench.facts import facts
from bench.measure import MODEL, Run, by_kind, measure
from bench.mesh import Mesh
from bench.process_cpu import usage
from bench.scale_data import AGENTS, RATE, SLOTS, TOKENS, Measured, Point
from bench.scenarios import Replies
from bench.target import Ask
from bench.targets import MeshTarget

SETTINGS = {
    "HERMESH_LLM_CONNECTIONS": str(SLOTS),
    "HERMESH_LLM_CONNECT_TIMEOUT": "300",
    "HERMESH_MAX_ACTIVE_RUNS": "100000",
}
# About a second of the model a run; half as many clients again as slots keep every slot taken.
POINT = Replies("scale", "", clients=0, asks=8, tokens=TOKENS, rate=RATE, baseline=False, spread=1.0)
CLIENTS_A_SLOT = 1.5
CALIBRATED_WITH = 4
# What costs are found from: little to write, much, and much at a pace that keeps everything busy.
SAMPLES = (
    replace(POINT, name="short", clients=24, asks=16, tokens=4),
    replace(POINT, name="long", clients=24, asks=3, tokens=60),
    replace(POINT, name="dense", clients=48, asks=5, tokens=120, rate=120.0),
)
ALONE = replace(POINT, name="alone", clients=1, asks=8)
IDLE_SECONDS = 5.0
COMMIT_SECONDS = 3.0


class Prepared(MeshTarget):
    """The mesh, with sessions that were made beforehand: what they cost is no run's."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__(mesh)
        self._ready: list[str] = []

    async def make(self, count: int) -> None:
        """Creates sessions."""
        for _ in range(count):
            self._ready.append(await self.new_session())

    async def prepare(self, prompt: str) -> Ask:
        """Returns the question in one of them."""
        return self.ask(self._ready.pop(), prompt)


async def _measure(mesh: Mesh, scenario: Replies) -> Run:
    """Measures once; figures beside the usual: `replies`, `commits` and `commands` a reply."""
    assert mesh.model is not None
    database, cache = await asyncio.to_thread(
        lambda: (url_of(mesh, "HERMESH_DATABASE_URL"), url_of(mesh, "HERMESH_REDIS_URL"))
    )
    replies = scenario.clients * scenario.asks
    target = Prepared(mesh)
    async with target:
        await target.make(replies)
        before = await counts(database, cache)
        run = await measure(target, scenario, (mesh.model.url, mesh.model.process.pid))
        after = await counts(database, cache)
    run.figures["replies"] = replies
    run.figures["commits"] = (after.commits - before.commits) / replies
    run.figures["commands"] = (after.commands - before.commands) / replies
    return run


async def _idle(mesh: Mesh) -> dict[str, float]:
    """CPU seconds a second of each kind of process while nothing is asked."""
    assert mesh.model is not None
    async with MeshTarget(mesh) as target:
        processes = dict(target.processes()) | {MODEL: mesh.model.process.pid}
    before, began = usage(processes), time.monotonic()
    await asyncio.sleep(IDLE_SECONDS)
    seconds = time.monotonic() - began
    return {kind: part.cpu / seconds for kind, part in by_kind(before, usage(processes)).items()}


def _sample(scenario: Replies, run: Run, idle: Mapping[str, float]) -> Sample:
    figures = run.figures
    replies, seconds = figures["replies"], figures["seconds"]
    cpu = {
        kind: max(0.0, part.cpu - idle.get(kind, 0.0) * seconds) / replies for kind, part in run.parts.items()
    }
    cpu["generator"] = figures["generator_cpu_per_1000"] / 1000 * scenario.tokens
    return Sample(
        agents=CALIBRATED_WITH,
        slots=SLOTS,
        clients=scenario.clients,
        tokens=scenario.tokens,
        rate=scenario.rate,
        replies=figures["replies_per_second"],
        cpu=cpu,
        commits=figures["commits"],
        others=figures["others_cores"],
    )


def _samples(mesh: Mesh, said: Callable[[str], None]) -> tuple[list[Sample], dict[str, float], float, float]:
    """What costs are found from: samples, and `idle`, `commit_rate` and `alone` of `Measured`."""
    said("idle")
    idle = uvloop.run(_idle(mesh))
    said("PostgreSQL's commits")
    rate = uvloop.run(commit_rate(url_of(mesh, "HERMESH_DATABASE_URL"), COMMIT_SECONDS))
    said("one client")
    alone = uvloop.run(_measure(mesh, ALONE))
    samples = []
    for scenario in SAMPLES:
        said(f"{scenario.name} replies")
        samples.append(_sample(scenario, uvloop.run(_measure(mesh, scenario)), idle))
    return samples, idle, rate, alone.figures["reply_p50_ms"] / 1000


def _point(mesh: Mesh, agents: int) -> Point:
    mesh.command("scale", f"agent={agents}")
    scenario = replace(POINT, clients=round(agents * SLOTS * CLIENTS_A_SLOT))
    run = uvloop.run(_measure(mesh, scenario))
    figures, seconds = run.figures, run.figures["seconds"]
    cores = {kind: part.cpu / seconds for kind, part in run.parts.items()}
    cores["generator"] = figures["generator_cpu_per_1000"] / 1000 * figures["tokens"] / seconds
    return Point(
        agents=agents,
        clients=scenario.clients,
        asks=scenario.asks,
        rate=figures["replies_per_second"],
        p50=figures["reply_p50_ms"] / 1000,
        p99=figures["reply_p99_ms"] / 1000,
        cores=cores,
        others=figures["others_cores"],
        commits=figures["commits"],
        commands=figures["commands"],
    )


def run_measurements(agents: Sequence[int], said: Callable[[str], None]) -> Measured:
    """Measures (a) and what (b) is calibrated with.

    Raises:
        IncompleteReply, LoadError, MeshError: There is no result.
    """
    found = facts()
    said("starting a mesh")
    with Mesh(settings=SETTINGS, replicas=f"agent={CALIBRATED_WITH},session=2") as mesh:
        uvloop.run(_measure(mesh, replace(SAMPLES[0], asks=2)))
        samples, idle, rate, alone = _samples(mesh, said)
        points = []
        for number in agents:
            said(f"{number} agents")
            points.append(_point(mesh, number))
            full = points[-1].fullest(found["cores"])
            said(f"{number} agents: {points[-1].rate:.1f} runs/s, fullest: {full}")
    return Measured(found, samples, idle, rate, alone, points)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = _parse(arguments)
    console = new_console()
    said = clock(console)

    from bench.scale_page import keep, publish, read

    try:
        measured = read() if options.render else run_measurements(options.agents, said)
        keep(measured)
        if options.only_measure:
            return 0
        said("simulating")
        for path in publish(measured, far=not options.near):
            console.print(f"written: {path}", highlight=False, soft_wrap=True)
    except FAILURES as error:
        print(f"no result: {error}", file=sys.stderr)
        return 1
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--agents",
        type=int,
        nargs="+",
        default=list(AGENTS),
        metavar="N",
        help="numbers of agents to measure",
    )
    parser.add_argument(
        "--render", action="store_true", help="measure nothing; simulate again from the results there are"
    )
    parser.add_argument(
        "--only-measure", action="store_true", help="write the results; simulations and page: --render"
    )
    parser.add_argument(
        "--near", action="store_true", help="leave out the simulations of 1,000 agents, which take minutes"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
