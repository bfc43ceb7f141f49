"""What happens past capacity: goodput, refusals, memory, and what other tenants see of one that floods.

    python -m bench.overload [--rounds 3] [--seconds 12] [--tokens 20] [--bound 5] [--write]

It starts a mesh of its own on the zero-delay model server and finds its capacity: the runs a second that 32
clients get done, one question after the other. Then it sends an open load, requests at random times whatever
became of those before, at 0.5, 1, 2 and 3 times that: two tenants ask for a twentieth of the capacity each, a
third one for the rest. Goodput counts the runs that were whole within the bound. The loads take turns for
some rounds and the median of each counts: a machine's own speed changes by more than what is looked for.
Every run that was accepted must come to its end with all of its tokens, or there is no result.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import httpx
import orjson
import uvloop
from rich.console import Console
from rich.table import Table

from bench.command import FAILURES, more_than, whole
from bench.facts import ROOT, facts
from bench.load import load, started
from bench.measure import by_kind
from bench.mesh import Mesh
from bench.model_script import sequence
from bench.process_cpu import usage
from bench.report import machine, table, write_section
from bench.target import Ask, IncompleteReply
from bench.targets import MeshTarget

FACTORS = (0.5, 1.0, 2.0, 3.0)
CALIBRATION_CLIENTS = 32
CALIBRATION_SECONDS = 6.0
POLITE_SHARE = 0.05
POLITE = ("polite-1", "polite-2")
FLOOD = "flood"
SESSIONS = {FLOOD: 3000, **dict.fromkeys(POLITE, 300)}
# The first arrivals of a level find the mesh as the level before left it.
SETTLING_SECONDS = 2.0
SAMPLE_SECONDS = 1.0
KEPT = 0.9
RESULTS = ROOT / "bench" / "results" / "overload.json"
PAGE = ROOT / "docs" / "overload.md"
NAME = "overload"
REFUSED = 429


@dataclass(frozen=True, slots=True)
class Level:
    """What one load came to; times in milliseconds, rates a second, memory in MiB.

    Attributes:
        factor: the load as a multiple of the capacity.
        offered: requests a second.
        goodput: runs that were whole within the bound.
        tokens: their tokens.
        refused: runs that were refused with 429, in all.
        late: runs that were whole, but after the bound, in all.
        retry_after: least, median and most of what the refused were told.
        flood_p50: from when a run of the flood was due to its end; 0 where none was done.
        polite: how many runs of the polite tenants were asked for, and how many were whole in time.
        memory: the most resident bytes of each kind of process, pages that they share counted once.
        generator_cpu: cores that the load generator took.
    """

    factor: float
    offered: float
    goodput: float
    tokens: float
    refused: int
    late: int
    retry_after: tuple[float, float, float]
    flood_p50: float
    flood_p99: float
    polite_asked: int
    polite_done: int
    polite_p50: float
    polite_p99: float
    refusal_p50: float
    memory: Mapping[str, int]
    generator_cpu: float


def arrivals(seed: int, rates: Mapping[str, float], seconds: float) -> list[tuple[float, str]]:
    """Returns requests at random times (Poisson), each with its tenant, in order."""
    rng = random.Random(seed)
    found = []
    for tenant, rate in rates.items():
        at = rng.expovariate(rate)
        while at < seconds:
            found.append((at, tenant))
            at += rng.expovariate(rate)
    return sorted(found)


def rates(factor: float, capacity: float) -> dict[str, float]:
    """Returns each tenant's requests a second."""
    polite = dict.fromkeys(POLITE, POLITE_SHARE * capacity)
    return polite | {FLOOD: max(0.1, factor * capacity - sum(polite.values()))}


def read(
    rows: Sequence[Mapping[str, Any]],
    factor: float,
    seconds: float,
    bound: float,
    tokens: int,
    text: Any,
) -> dict[str, Any]:
    """Reads a level's records; `text` gets the text out of a body.

    Raises:
        IncompleteReply: A run was accepted and did not come to its end, or lacks tokens.
    """
    expected = "".join(sequence(tokens))
    began = min(row["due"] for row in rows)
    counted = [row for row in rows if row["due"] - began >= SETTLING_SECONDS * 1e9]
    done: dict[str, list[float]] = {FLOOD: [], "polite": []}
    good = late = polite = 0
    refused: list[Mapping[str, Any]] = []
    for row in rows:
        if row["error"]:
            raise IncompleteReply(f"a request failed: {row['error']}")
        if row["status"] == REFUSED:
            continue
        if text(row["text"].encode()) != expected:
            raise IncompleteReply(f"a reply lacks tokens: {row['text'][-600:]!r}")
    for row in counted:
        kind = FLOOD if row["tenant"] == FLOOD else "polite"
        polite += kind == "polite"
        if row["status"] == REFUSED:
            refused.append(row)
            continue
        took = (row["ended"] - row["due"]) / 1e6
        done[kind].append(took)
        good += took <= bound * 1000
        late += took > bound * 1000
    span = seconds - SETTLING_SECONDS
    waits = [row["retry_after_ms"] for row in refused]
    if refused and not all(waits):
        raise IncompleteReply("a refusal does not say when to come back")
    return {
        "factor": factor,
        "offered": len(counted) / span,
        "goodput": good / span,
        "tokens": good * tokens / span,
        "refused": len(refused),
        "late": late,
        "retry_after": (min(waits), statistics.median(waits), max(waits)) if waits else (0, 0, 0),
        "flood_p50": _percentile(done[FLOOD], 50),
        "flood_p99": _percentile(done[FLOOD], 99),
        "polite_asked": polite,
        "polite_done": sum(took <= bound * 1000 for took in done["polite"]),
        "polite_p50": _percentile(done["polite"], 50),
        "polite_p99": _percentile(done["polite"], 99),
        "refusal_p50": _percentile([(row["ended"] - row["due"]) / 1e6 for row in refused], 50),
    }


def _percentile(values: Sequence[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)] if ordered else 0.0


class Bench:
    """The bench on a mesh that runs."""

    def __init__(self, mesh: Mesh, options: argparse.Namespace, console: Console) -> None:
        self._mesh = mesh
        self._options = options
        self._console = console
        self._target = MeshTarget(mesh)
        self._keys = {FLOOD: mesh.api_key} | {name: mesh.new_tenant(name) for name in POLITE}
        self._asks: dict[str, list[Ask]] = {}

    async def run(self) -> tuple[float, list[list[Level]]]:
        """Returns the capacity and, for each load, what each of its rounds came to."""
        await self._renew()
        await self._calibrate(1.5)
        capacity = await self._calibrate(CALIBRATION_SECONDS)
        self._console.print(f"capacity: {capacity:.0f} runs/s of {self._options.tokens} tokens")
        levels: list[list[Level]] = [[] for _ in FACTORS]
        for turn in range(self._options.rounds):
            for number, factor in enumerate(FACTORS):
                await self._renew()
                level = await self._level(turn * len(FACTORS) + number, factor, capacity)
                levels[number].append(level)
                show(self._console, [[level]], self._options.bound)
        return capacity, levels

    async def _renew(self) -> None:
        """Begins with new sessions: turns cost more the more came before them."""
        for tenant, count in SESSIONS.items():
            self._asks[tenant] = await self._sessions(tenant, count)

    async def _sessions(self, tenant: str, count: int) -> list[Ask]:
        headers = {"Authorization": f"Bearer {self._keys[tenant]}"}
        gate = asyncio.Semaphore(16)
        async with httpx.AsyncClient(base_url=self._mesh.url, headers=headers, trust_env=False) as client:

            async def one() -> Ask:
                async with gate:
                    answer = await client.post("/v1/sessions", json={}, timeout=60)
                    answer.raise_for_status()
                session = answer.json()["session_id"]
                body = {
                    "input": f"[[tokens={self._options.tokens}]]",
                    "stream": True,
                    "options": {"memory": False},
                }
                return Ask(f"{self._mesh.url}/v1/sessions/{session}/runs", body, headers)

            return await asyncio.gather(*(one() for _ in range(count)))

    async def _calibrate(self, seconds: float) -> float:
        """Returns the runs a second of some clients that ask without a pause."""
        # About as many as fit; what is measured is how long they take.
        each = max(2, int(seconds * 4))
        flood = self._asks[FLOOD]
        clients = [[flood[number]] * each for number in range(CALIBRATION_CLIENTS)]
        async with load(clients) as generator:
            window = await generator.go()
            replies = await generator.replies()
        for reply in replies:
            if reply.error:
                raise IncompleteReply(reply.error)
        return len(replies) / window.seconds

    async def _level(self, number: int, factor: float, capacity: float) -> Level:
        seconds = self._options.seconds
        job = {
            "arrivals": arrivals(self._options.seed + number, rates(factor, capacity), seconds),
            "tenants": {
                tenant: [{"url": a.url, "headers": dict(a.headers), "body": dict(a.body)} for a in asks]
                for tenant, asks in self._asks.items()
            },
        }
        processes = self._target.processes()
        start = usage(processes)
        most: dict[str, int] = {}
        async with started("bench.open_loop", job) as generator, asyncio.TaskGroup() as group:
            watching = group.create_task(self._watch(processes, most))
            began = time.monotonic()
            window = await generator.go()
            rows = await generator.written()
            watching.cancel()
        self._console.print(f"{factor:g} times: {len(rows)} requests, {time.monotonic() - began:.0f} s")
        for kind, part in by_kind(start, usage(processes)).items():
            most[kind] = max(most.get(kind, 0), part.pss or part.rss)
        figures = read(rows, factor, seconds, self._options.bound, self._options.tokens, self._target.text)
        return Level(**figures, memory=most, generator_cpu=window.cpu / window.seconds)

    async def _watch(self, processes: Mapping[str, int], most: dict[str, int]) -> None:
        while True:
            now = usage(processes)
            for kind, part in by_kind(now, now).items():
                most[kind] = max(most.get(kind, 0), part.pss or part.rss)
            await asyncio.sleep(SAMPLE_SECONDS)


def middle(rounds: Sequence[Level]) -> Level:
    """Returns the round of a load whose goodput is the median."""
    return sorted(rounds, key=lambda level: level.goodput)[len(rounds) // 2]


def kept(levels: Sequence[Sequence[Level]]) -> float:
    """Returns the least goodput past the capacity as a part of the best; 0 where nothing was done in time."""
    medians = [middle(rounds) for rounds in levels]
    past = [level.goodput for level in medians if level.factor > 1]
    best = max(level.goodput for level in medians)
    return min(past) / best if best else 0.0


COLUMNS = (
    "load",
    "offered runs/s",
    "goodput runs/s: min / median / max",
    "tokens/s",
    "refused",
    "Retry-After ms",
    "too late",
    "flood p50 / p99 ms",
    "polite in time",
    "polite p50 / p99 ms",
    "refusal p50 ms",
)


def cells(rounds: Sequence[Level]) -> list[str]:
    """Returns a load's rounds as a table's row: of the median round, where nothing else is said."""
    level = middle(rounds)
    goodput = sorted(each.goodput for each in rounds)
    least, usual, most = level.retry_after
    return [
        f"{level.factor:g} x",
        f"{level.offered:.0f}",
        f"{goodput[0]:.0f} / {level.goodput:.0f} / {goodput[-1]:.0f}",
        f"{level.tokens:,.0f}",
        f"{level.refused}",
        f"{least:.0f} / {usual:.0f} / {most:.0f}" if level.refused else "-",
        f"{level.late}",
        f"{level.flood_p50:.0f} / {level.flood_p99:.0f}",
        f"{level.polite_done} of {level.polite_asked}",
        f"{level.polite_p50:.0f} / {level.polite_p99:.0f}",
        f"{level.refusal_p50:.0f}" if level.refused else "-",
    ]


def show(console: Console, levels: Sequence[Sequence[Level]], bound: float) -> None:
    """Prints loads."""
    shown = Table(title=f"in time: whole within {bound:g} s")
    for column in COLUMNS:
        shown.add_column(column, justify="right")
    for rounds in levels:
        shown.add_row(*cells(rounds))
    console.print(shown)
    for rounds in levels:
        memory = ", ".join(f"{kind} {size >> 20}" for kind, size in sorted(most_memory(rounds).items()))
        console.print(f"most MiB: {memory}")


def most_memory(rounds: Sequence[Level]) -> dict[str, int]:
    """Returns the most bytes that each kind of process held in any round."""
    kinds = {kind for level in rounds for kind in level.memory}
    return {kind: max(level.memory.get(kind, 0) for level in rounds) for kind in kinds}


def section(found: Mapping[str, Any], levels: Sequence[Sequence[Level]]) -> str:
    """Returns the page's section."""
    verdict = "met" if kept(levels) >= KEPT else "**missed**"
    most = [most_memory(rounds) for rounds in levels]
    kinds = sorted({kind for each in most for kind in each})
    memory = [[kind, *(f"{each.get(kind, 0) >> 20}" for each in most)] for kind in kinds]
    factors = [f"{rounds[0].factor:g} x" for rounds in levels]
    capacity = (
        f"Capacity by {CALIBRATION_CLIENTS} clients in a closed loop: {found['capacity']:.0f} runs/s of "
        f"{found['tokens']} tokens. In time is what was whole within {found['bound']:g} s of when it was "
        f"due. The row is the round with the median goodput of {len(levels[0])}."
    )
    goodput = (
        f"Past the capacity goodput is at least {kept(levels):.0%} of its peak "
        f"(goal: {KEPT:.0%}; {verdict}). Every accepted run came to its end with all of its tokens."
    )
    return "\n\n".join(
        [
            capacity,
            table(COLUMNS, [cells(rounds) for rounds in levels]),
            goodput,
            "Most resident memory, MiB, of all processes of a kind; pages that they share count once:",
            table(["", *factors], memory),
            machine(found["facts"]),
        ]
    )


def write(found: Mapping[str, Any], levels: Sequence[Sequence[Level]]) -> None:
    """Writes the results and the page. Raises ReportError."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    document = dict(found) | {"levels": [[asdict(level) for level in rounds] for rounds in levels]}
    RESULTS.write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2) + b"\n")
    write_section(PAGE, NAME, section(found, levels))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 1 without a result, or where goodput was not kept."""
    parser = argparse.ArgumentParser(
        prog="bench.overload", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=whole(1), default=3, help="how often each load is sent")
    parser.add_argument(
        "--seconds",
        type=more_than(SETTLING_SECONDS),
        default=12.0,
        help=f"how long each load lasts; its first {SETTLING_SECONDS:g} s are not counted",
    )
    parser.add_argument("--tokens", type=whole(1), default=20, help="tokens a reply")
    parser.add_argument(
        "--bound", type=more_than(0), default=5.0, help="seconds within which a run must be whole"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the arrivals")
    parser.add_argument("--write", action="store_true", help="write bench/results and docs/overload.md")
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 160)
    found = {"facts": facts(), "tokens": options.tokens, "bound": options.bound, "seconds": options.seconds}
    try:
        with Mesh() as mesh:
            capacity, levels = uvloop.run(Bench(mesh, options, console).run())
        found["capacity"] = capacity
        if options.write:
            write(found, levels)
    except FAILURES as error:
        print(f"no result: {error}", file=sys.stderr)
        return 1
    show(console, levels, options.bound)
    console.print(f"least goodput past the capacity: {kept(levels):.0%} of its peak")
    return 0 if kept(levels) >= KEPT else 1


if __name__ == "__main__":
    sys.exit(main())
