"""What a token costs when its reader gets it from the agent, and when from the session service.

    python -m bench.relay_cost [--clients 32] [--runs 192] [--tokens 200] [--rate 0]

The same runs twice, over the public gRPC listener of one mesh: read from `AgentService.Run`, which passes on
what the session service has acknowledged; and only submitted, then read with `SessionService.WatchRun`. Turn
about, so that both see the same machine; CPU seconds for 1,000 tokens of each service, the median of three.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence

import grpc.aio
import uvloop
from rich.console import Console
from rich.table import Table

from bench.measure import STORES, kind_of
from bench.mesh import Mesh
from bench.process_cpu import cpu_seconds
from hermesh.agent.v1.agent_service_pb2 import RunRequest
from hermesh.agent.v1.agent_service_pb2_grpc import AgentServiceStub
from hermesh.common.v1.event_pb2 import Event, InputMessage
from hermesh.session.v1.resources_pb2 import RunOptions
from hermesh.session.v1.session_service_pb2 import CreateSessionRequest, SubmitRunRequest, WatchRunRequest
from hermesh.session.v1.session_service_pb2_grpc import SessionServiceStub

Way = Callable[[str, str], Awaitable[int]]
RUN_SECONDS = 120
TRIES = 3
OPTIONS = RunOptions(memory=False)


class Clients:
    """Both ways to read a run, over one channel."""

    def __init__(self, channel: grpc.aio.Channel, key: str) -> None:
        self._agents = AgentServiceStub(channel)
        self._sessions = SessionServiceStub(channel)
        self._key = (("authorization", f"Bearer {key}"),)

    async def session(self) -> str:
        """Creates a session."""
        made = await self._sessions.CreateSession(CreateSessionRequest(), metadata=self._key)
        return str(made.session.session_id)

    async def from_agent(self, session_id: str, prompt: str) -> int:
        """Runs and reads; returns the number of tokens that came."""
        request = RunRequest(
            session_id=session_id, input=[InputMessage(role="user", content=prompt)], options=OPTIONS
        )
        call = self._agents.Run(request, metadata=self._key, timeout=RUN_SECONDS)
        return await _tokens(frame.frame.events async for frame in call)

    async def from_session(self, session_id: str, prompt: str) -> int:
        """Submits, then watches; returns the number of tokens that came."""
        request = SubmitRunRequest(
            session_id=session_id, input=[InputMessage(role="user", content=prompt)], options=OPTIONS
        )
        submitted = await self._sessions.SubmitRun(request, metadata=self._key)
        watch = WatchRunRequest(run_id=submitted.run.run_id)
        call = self._sessions.WatchRun(watch, metadata=self._key, timeout=RUN_SECONDS)
        return await _tokens(frame.frame.events async for frame in call)


async def _tokens(batches: AsyncIterator[Iterable[Event]]) -> int:
    count, last = 0, ""
    async for events in batches:
        for event in events:
            last = event.type
            if last == "text.delta":
                count += len(json.loads(event.data)["text"].split())
    if last != "run.completed":
        raise SystemExit(f"a run ended with {last!r}")
    return count


async def measure(
    way: Way, pids: dict[str, int], ids: Sequence[str], clients: int, tokens: int, rate: float
) -> dict[str, float]:
    """Has `clients` ask in these sessions; returns CPU seconds for 1,000 tokens by service, and `seconds`."""
    pace = f" rate={rate:g}" if rate else ""
    waiting = iter(ids)
    total = 0

    async def one() -> None:
        nonlocal total
        for session_id in waiting:
            count = await way(session_id, f"[[tokens={tokens}{pace}]]")
            total += count

    before, began = {name: cpu_seconds(pid) for name, pid in pids.items()}, time.monotonic()
    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(one())
    used: Counter[str] = Counter()
    for name, pid in pids.items():
        used[kind_of(name)] += (cpu_seconds(pid) - before[name]) / total * 1000  # type: ignore[assignment]
    if total != len(ids) * tokens:
        raise SystemExit(f"incomplete: {total} tokens came where {len(ids) * tokens} were written")
    return {**used, "seconds": time.monotonic() - began}


async def compare(mesh: Mesh, clients: int, runs: int, tokens: int, rate: float) -> None:
    """Measures both ways, turn about, and prints a table."""
    pids = {row.replica: row.pid for row in mesh.status() if row.pid and row.service != "model"}
    found: dict[str, list[dict[str, float]]] = {"agent": [], "session": []}
    async with grpc.aio.insecure_channel(f"127.0.0.1:{mesh.grpc_port}") as channel:
        caller = Clients(channel, mesh.api_key)
        ways: dict[str, Way] = {"agent": caller.from_agent, "session": caller.from_session}
        for number in range(TRIES + 1):
            for name, way in ways.items():
                ids = [await caller.session() for _ in range(runs)]
                result = await measure(way, pids, ids, clients, tokens, rate)
                if number:  # the first try only warms up
                    found[name].append(result)
    pace = f" at {rate:g} tokens/s" if rate else ""
    table = Table(title=f"{clients} clients, {tokens} tokens a reply{pace}: CPU s / 1,000 tokens")
    table.add_column("read from")
    parts = ("agent", "session", "envoy", "postgresql", "valkey")
    for column in (*parts, "without stores", "with stores", "tokens/s"):
        table.add_column(column, justify="right")
    for name, results in found.items():
        medians = {part: statistics.median(one.get(part, 0.0) for one in results) for part in results[0]}
        seconds = medians.pop("seconds")
        stores = sum(value for part, value in medians.items() if part in STORES)
        everything = sum(medians.values())
        shown = [medians.get(part, 0.0) for part in parts] + [everything - stores, everything]
        table.add_row(name, *(f"{value:.4f}" for value in shown), f"{runs * tokens / seconds:,.0f}")
    Console(width=110).print(table)


def main() -> None:
    """Parses the arguments, starts a mesh, compares, stops it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--runs", type=int, default=192, help="replies in each try")
    parser.add_argument("--tokens", type=int, default=200, help="of each reply")
    parser.add_argument("--rate", type=float, default=0.0, help="tokens a second of the model; 0: at once")
    arguments = parser.parse_args()
    with Mesh() as mesh:
        uvloop.run(compare(mesh, arguments.clients, arguments.runs, arguments.tokens, arguments.rate))


if __name__ == "__main__":
    main()
