"""What a balancing policy costs under heavy-tailed runs: `make bench-lb`.

A whole mesh whose agents have a bounded number of slots each (connections to the model; a run waits in its
agent for one) gets an open load of runs, most of them short and some twenty times as long. Who chooses the
agent is all that changes: Envoy by each of its policies, nginx and HAProxy where they are installed. Then the
same with one agent that gets a tenth of the time.

And what stands before the gateways: HTTP through nginx and HAProxy as deploy/ has them, by fewest connections
and in turn, beside the mesh's own Envoy; all gateways well, and one that gets a tenth of the time.

Every reply is checked; one that is not whole ends the bench without a result.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
import httpx
import uvloop

from bench.arrivals import TOKENS, Arrival, Shape, arrivals
from bench.command import FAILURES, clock, new_console
from bench.edges import GATEWAY_PORTS, Program, gateway_port, serving
from bench.facts import facts
from bench.fronts import FRONTS, Front, binary_of
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
from launcher.envoy import BINARY, Policy

HEALTHY, SLOW = "healthy", "slow"
EDGE_HEALTHY, EDGE_SLOW = "edge-healthy", "edge-slow"
TITLES = {
    HEALTHY: "all agents well",
    SLOW: "one agent gets a tenth of the time",
    EDGE_HEALTHY: "before the gateways: all gateways well",
    EDGE_SLOW: "before the gateways: one gateway gets a tenth of the time",
}
SLOWED = {HEALTHY: "", SLOW: "agent-1", EDGE_HEALTHY: "", EDGE_SLOW: "gateway-1"}
SHAPE = Shape()
SEED = 1
SESSIONS_AT_ONCE = 16
SETTLE_SECONDS = 1.0
PATIENCE_SECONDS = 180.0
RUNS_ROUTE = 'route="/v1/sessions/{session_id}/runs"'


@dataclass(frozen=True, slots=True)
class EdgePolicy:
    """How the gateway of a request is chosen.

    Attributes:
        name: how tables name it.
        program: who chooses; None for the mesh's Envoy.
        changes: what of its files in deploy/ is another.
    """

    name: str
    program: Program | None = None
    changes: tuple[tuple[str, str], ...] = ()

    @property
    def binary(self) -> Path | None:
        """Where it is installed; None for nowhere."""
        return BINARY if self.program is None else binary_of(self.program)


EDGES = (
    EdgePolicy("edge: Envoy"),
    EdgePolicy("edge: nginx round robin", "nginx", (("  least_conn;\n", ""),)),
    EdgePolicy("edge: nginx least_conn", "nginx"),
    EdgePolicy("edge: HAProxy roundrobin", "haproxy", (("balance leastconn", "balance roundrobin"),)),
    EdgePolicy("edge: HAProxy leastconn", "haproxy"),
)
Balancer = Policy | Front | EdgePolicy


def name_of(balancer: Balancer) -> str:
    """How tables name a policy."""
    return f"Envoy {balancer.value}" if isinstance(balancer, Policy) else balancer.name


def balancers() -> list[Balancer]:
    """Everything that can be compared, in the order of the tables."""
    return [*Policy, *FRONTS, *EDGES]


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


def gateways_answered(mesh: Mesh) -> Counter[str]:
    """How many runs each gateway has taken so far, by its own count."""
    found: Counter[str] = Counter()
    with httpx.Client(timeout=10, trust_env=False) as client:
        for gateway in mesh.of("gateway"):
            for line in client.get(f"http://{gateway.address}/metrics").text.splitlines():
                if line.startswith("hermesh_http_requests_total{") and RUNS_ROUTE in line:
                    found[gateway.replica] += int(float(line.rpartition(" ")[2]))
    return found


async def measure(
    mesh: Mesh, where: Mapping[str, str], plan: Sequence[Arrival], name: str, slowed: str
) -> Run:
    """Plays the load once against a load balancer's address.

    Args:
        mesh: whose agents or gateways are behind it.
        where: `target` and `authority` of `bench.run_generator`.
        plan: the runs.
        name: of the policy.
        slowed: the replica that gets a tenth of the time, empty for nobody.

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
    by_http = "://" in where["target"]
    pid = next((row.pid for row in mesh.status() if row.replica == slowed), None)
    job = {
        **where,
        "watch": mesh.grpc_address,
        "key": mesh.api_key,
        "runs": runs,
        "patience": PATIENCE_SECONDS,
    }
    async with started("bench.run_generator", job) as generator:
        earlier: Counter[str] = gateways_answered(mesh) if by_http else Counter()
        machine, before = machine_cpu_seconds(), usage(processes)
        with Slowed(pid, plan[-1].at) if pid is not None else contextlib.nullcontext():
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
    if by_http:
        shares = gateways_answered(mesh) - earlier
    else:
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
        "slowed_share": shares[slowed] / len(plan),
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
def _front(balancer: Balancer, mesh: Mesh) -> Iterator[dict[str, str]]:
    """Yields where the load goes."""
    if isinstance(balancer, Policy):
        yield {"target": mesh.grpc_address}
    elif isinstance(balancer, Front):
        with balancer.running(mesh.data_dir, [agent.address for agent in mesh.of("agent")]) as address:
            yield {"target": address}
    elif balancer.program is None:
        yield {"target": mesh.url}
    else:
        with serving(balancer.program, "gateways", mesh, dict(balancer.changes)) as edge:
            yield {"target": edge.url, "authority": str(edge.authority)}


def _mesh(balancer: Balancer, shape: Shape) -> Mesh:
    """A mesh to compare a policy in."""
    if not isinstance(balancer, EdgePolicy):
        return Mesh(settings=settings(balancer, shape), replicas=f"agent={shape.agents},session=1")
    ports = {"HERMESH_GATEWAY_PORT": str(gateway_port())}
    # What is compared is the gateways: nothing waits behind them.
    plenty = dataclasses.replace(shape, slots=256)
    replicas = f"gateway={len(GATEWAY_PORTS)},agent=2,session=1"
    return Mesh(settings=settings(Policy.LEAST_REQUEST_FULL_SCAN, plenty) | ports, replicas=replicas)


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
        with _mesh(balancer, shape) as mesh, _front(balancer, mesh) as at:
            uvloop.run(measure(mesh, at, arrivals(Shape(seconds=3), 0), name, ""))
            for number in range(rounds):
                plan = arrivals(shape, SEED + number)
                edge = isinstance(balancer, EdgePolicy)
                for key in (EDGE_HEALTHY, EDGE_SLOW) if edge else (HEALTHY, SLOW):
                    run = uvloop.run(measure(mesh, at, plan, name, SLOWED[key]))
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
    missing = [one.name for one in chosen if not isinstance(one, Policy) and one.binary is None]
    there = [one for one in chosen if name_of(one) not in missing]
    from bench.balance_page import publish, show

    shape = Shape(load=options.load, seconds=options.seconds)
    try:
        results = {} if options.render else compare(there, shape, options.rounds, said)
        for result in results.values():
            if result.runs:
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
