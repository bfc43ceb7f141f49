"""What a balancing policy costs under heavy-tailed runs: `make bench-lb`.

A whole mesh whose agents have a bounded number of slots each (connections to the model; a run waits in its
agent for one) gets an open load of runs, most of them short and some twenty times as long. Who chooses the
agent is all that changes: Envoy by each of its policies, nginx and HAProxy where they are installed. Then the
same with one agent that gets a tenth of the time.

Every reply is checked; one that is not whole ends the bench without a result.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import grpc.aio
import uvloop

from bench.arrivals import TOKENS, Arrival, Shape, arrivals
from bench.command import FAILURES, clock, new_console
from bench.facts import facts
from bench.fronts import FRONTS, Front
from bench.histogram import Times
from bench.load import started
from bench.measure import MODEL, Run, by_kind
from bench.mesh import Mesh
from bench.model_script import sequence
from bench.process_cpu import machine_cpu_seconds, usage
from bench.results import Result
from bench.slowed import Slowed
from bench.target import IncompleteReply
from bench.targets import MeshTarget
from hermesh.session.v1.session_service_pb2 import CreateSessionRequest
from hermesh.session.v1.session_service_pb2_grpc import SessionServiceStub
from launcher.envoy import Policy

HEALTHY, SLOW = "healthy", "slow"
TITLES = {HEALTHY: "all agents well", SLOW: "one agent gets a tenth of the time"}
SLOWED_REPLICA = "agent-1"
SHAPE = Shape()
SEED = 1
SESSIONS_AT_ONCE = 16
SETTLE_SECONDS = 1.0
PATIENCE_SECONDS = 180.0
Balancer = Policy | Front


def name_of(balancer: Balancer) -> str:
    """How tables name a policy."""
    return f"Envoy {balancer.value}" if isinstance(balancer, Policy) else balancer.name


def balancers() -> list[Balancer]:
    """Everything that can be compared, in the order of the tables."""
    return [*Policy, *FRONTS]


def settings(balancer: Balancer, shape: Shape) -> dict[str, str]:
    """The mesh's settings for a policy: bounded slots, and nobody refused for lack of them."""
    policy = balancer if isinstance(balancer, Policy) else Policy.LEAST_REQUEST
    return {
        "HERMESH_AGENT_LB": policy.value,
        "HERMESH_LLM_CONNECTIONS": str(shape.slots),
        "HERMESH_LLM_CONNECT_TIMEOUT": "300",
        "HERMESH_MAX_ACTIVE_RUNS": "100000",
    }


async def new_sessions(mesh: Mesh, count: int) -> list[str]:
    """Creates sessions, unmeasured."""
    gate = asyncio.Semaphore(SESSIONS_AT_ONCE)
    metadata = (("authorization", f"Bearer {mesh.api_key}"),)
    async with grpc.aio.insecure_channel(mesh.grpc_address) as channel:
        sessions = SessionServiceStub(channel)

        async def one() -> str:
            async with gate:
                answer = await sessions.CreateSession(CreateSessionRequest(), metadata=metadata, timeout=30)
                return str(answer.session.session_id)

        return await asyncio.gather(*(one() for _ in range(count)))


async def measure(mesh: Mesh, where: str, plan: Sequence[Arrival], name: str, slowed: int | None) -> Run:
    """Plays the load once against a load balancer's address.

    Args:
        mesh: whose agents are behind it.
        where: its address, host:port.
        plan: the runs.
        name: of the policy.
        slowed: pid of the agent that gets a tenth of the time, None for nobody.

    Raises:
        IncompleteReply: A reply lacks something, or failed.
        LoadError: The load generator failed.
    """
    assert mesh.model is not None
    async with MeshTarget(mesh) as target:
        processes = dict(target.processes()) | {MODEL: mesh.model.process.pid}
    ids = await new_sessions(mesh, len(plan))
    runs = [
        {"at": one.at, "session": session, "prompt": one.prompt}
        for one, session in zip(plan, ids, strict=True)
    ]
    job = {
        "target": where,
        "watch": mesh.grpc_address,
        "key": mesh.api_key,
        "runs": runs,
        "patience": PATIENCE_SECONDS,
    }
    async with started("bench.run_generator", job) as generator:
        machine, before = machine_cpu_seconds(), usage(processes)
        with Slowed(slowed, plan[-1].at) if slowed is not None else contextlib.nullcontext():
            window = await generator.go()
        await asyncio.sleep(SETTLE_SECONDS)
        after, machine = usage(processes), machine_cpu_seconds() - machine
        records = await generator.written()
    for record in records:
        if record["error"] or record["text"] != "".join(sequence(TOKENS)):
            raise IncompleteReply(f"{name}: {record['error'] or record['text']!r}")
    if len(records) != len(plan):
        raise IncompleteReply(f"{name}: {len(records)} runs ended where {len(plan)} began")
    took = [record["ended"] - record["due"] for record in records]
    short = [ns for ns, one in zip(took, plan, strict=True) if one.service == plan_short(plan)]
    times = {"run": Times(took), "short": Times(short)}
    shares = Counter(record["replica"] for record in records)
    parts = by_kind(before, after)
    used = sum(part.cpu for part in parts.values())
    figures = {
        "runs": float(len(plan)),
        "seconds": window.seconds,
        "mean_ms": statistics.fmean(took) / 1e6,
        **{f"p{percent}_ms": times["run"].ms(percent) for percent in (50, 90, 99)},
        "max_ms": max(took) / 1e6,
        "short_mean_ms": statistics.fmean(short) / 1e6,
        "busiest_share": max(shares.values()) / len(plan),
        "slowed_share": shares[SLOWED_REPLICA] / len(plan),
        "reconnects": float(sum(record["reconnects"] for record in records)),
        "cpu_ms_per_run": used / len(plan) * 1000,
        "cores": (used + window.cpu) / (window.seconds + SETTLE_SECONDS),
        "others_cores": max(0.0, machine - used - window.cpu) / (window.seconds + SETTLE_SECONDS),
    }
    return Run(name, figures, parts, times)


def plan_short(plan: Sequence[Arrival]) -> float:
    """The model's seconds for a short run."""
    return min(one.service for one in plan)


@contextlib.contextmanager
def _front(balancer: Balancer, mesh: Mesh) -> Iterator[str]:
    if isinstance(balancer, Policy):
        yield mesh.grpc_address
        return
    with balancer.running(mesh.data_dir, [agent.address for agent in mesh.of("agent")]) as address:
        yield address


def compare(
    chosen: Sequence[Balancer], shape: Shape, rounds: int, said: Callable[[str], None]
) -> dict[str, Result]:
    """Measures policies, each in a mesh of its own; returns one result for each of TITLES.

    Raises:
        IncompleteReply, LoadError, MeshError: There is no result.
    """
    results = {key: Result(key, title, facts()) for key, title in TITLES.items()}
    for balancer in chosen:
        name = name_of(balancer)
        said(f"{name}: starting a mesh")
        replicas = f"agent={shape.agents},session=1"
        with (
            Mesh(settings=settings(balancer, shape), replicas=replicas) as mesh,
            _front(balancer, mesh) as at,
        ):
            slowed = next(agent.pid for agent in mesh.of("agent") if agent.replica == SLOWED_REPLICA)
            uvloop.run(measure(mesh, at, arrivals(Shape(seconds=3), 0), name, None))
            for number in range(rounds):
                plan = arrivals(shape, SEED + number)
                for key, pid in ((HEALTHY, None), (SLOW, slowed)):
                    run = uvloop.run(measure(mesh, at, plan, name, pid))
                    run.figures["load"] = shape.load
                    results[key].runs.append(run)
                    said(
                        f"{name}, {TITLES[key]}: mean {run.figures['mean_ms']:.0f} ms, "
                        f"p99 {run.figures['p99_ms']:.0f} ms, {run.figures['cores']:.2f} cores"
                    )
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = _parse(arguments)
    console = new_console()
    said = clock(console)

    named = {name_of(one): one for one in balancers()}
    unknown = [name for name in options.only if name not in named]
    if unknown:
        print(f"there is no {unknown[0]!r}, only: {', '.join(named)}", file=sys.stderr)
        return 2
    chosen = [named[name] for name in options.only or named]
    missing = [one.name for one in chosen if isinstance(one, Front) and one.binary is None]
    there = [one for one in chosen if name_of(one) not in missing]
    from bench.balance_page import publish, show

    shape = Shape(load=options.load, seconds=options.seconds)
    try:
        results = {} if options.render else compare(there, shape, options.rounds, said)
        for result in results.values():
            show(console, result)
        for name in missing:
            print(f"{name}: not installed here")
        if options.write or options.render or not options.only:
            for path in publish(results, shape):
                console.print(f"written: {path}", highlight=False, soft_wrap=True)
    except FAILURES as error:
        print(f"no result: {error}", file=sys.stderr)
        return 1
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(f'"{name_of(one)}"' for one in balancers())
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help=f"one policy, may be repeated: {names}"
    )
    parser.add_argument("--rounds", type=int, default=1, help="how often each is measured, each its own load")
    parser.add_argument("--seconds", type=float, default=SHAPE.seconds, help="how long runs arrive")
    parser.add_argument("--load", type=float, default=SHAPE.load, help="share of the slots that is asked for")
    parser.add_argument("--write", action="store_true", help="write a selection into the page, too")
    parser.add_argument("--render", action="store_true", help="measure nothing; write plot and page again")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
