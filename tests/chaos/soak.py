"""Breaks a mesh for a long time without ending most of its processes, and looks whether any of them grows.

python -m tests.chaos.soak --minutes 20

Steady traffic and one fault after the other; before and after it the mesh is brought to rest. What is
measured is in `watch.processes`, what is allowed in `watch.growth`. Readings and verdicts are in the folder
as JSON beside the history, which must keep the suite's invariants, too: `python -m tests.chaos --check`.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg

from tests.chaos.faults import faults
from tests.chaos.faults.audit import Audit
from tests.chaos.faults.cluster import ROOT, Cluster
from tests.chaos.faults.faults import Fault, Stage
from tests.chaos.model.history import History, Recorder
from tests.chaos.running import run
from tests.chaos.traffic.clients import Client
from tests.chaos.traffic.onlookers import Onlooker
from tests.chaos.traffic.transport import Grpc, Http, Transport
from tests.chaos.validate import check
from tests.chaos.watch.growth import AFTER, BEFORE, LOAD, Row, judge, table
from tests.chaos.watch.processes import Reading, Watch, of_cluster

CLIENTS = 10
ONLOOKERS = 3
WARM_UP_SECONDS = 180.0
# How long a client lives before another one takes its place, with a session and connections of its own.
CLIENT_SECONDS = (10.0, 60.0)
SAMPLE_SECONDS = 10.0
# From the last fault's end until every run must be over, and from there until nothing moves any more:
# connections that a pool keeps for a while, replies that linger for a client that might come back.
SETTLE_SECONDS = 60.0
STILL_SECONDS = 90.0
# Readings at rest, of which the middle one counts.
REST_READINGS = 7
REST_PERIOD = 2.0
FAULT_PAUSE = (1.0, 4.0)
GRPC_SHARE = 0.3

# The only ones that are ever killed: most of each service live from the beginning to the end.
VICTIMS = ("agent-3", "session-2", "gateway-2", "tool-2")
# PostgreSQL and Valkey are stopped by faults; all their lives are one row.
STORES = ("postgres", "valkey")


async def kill_victim(stage: Stage) -> None:
    """kill -9 of one of the few that are meant to die."""
    name = stage.rng.choice(VICTIMS)
    living = [one for one in stage.cluster.of(name.rpartition("-")[0]) if one.replica == name]
    if living:
        await faults.kill_this(stage, living[0])


FAULTS: dict[Fault, int] = {
    faults.pause: 4,
    faults.freeze: 1,
    faults.network: 5,
    faults.partition: 2,
    faults.flush: 2,
    faults.valkey_down: 2,
    faults.postgres_down: 2,
    faults.disk_full: 1,
    faults.clock: 2,
    kill_victim: 1,
}


class CountingRecorder(Recorder):
    """A recorder that knows how many records of each kind there are, and which faults."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.kinds: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()

    def write(self, kind: str, **fields: Any) -> None:
        self.kinds[kind] += 1
        if kind == "fault":
            self.faults[fields["fault"]] += 1
        super().write(kind, **fields)


class UneasyError(Exception):
    """The mesh did not come to rest."""


@dataclass
class Soak:
    """One soak on a running cluster."""

    cluster: Cluster
    recorder: CountingRecorder
    rng: random.Random
    folder: Path
    readings: list[Reading] = field(default_factory=list)
    sessions: list[str] = field(default_factory=list)
    left: Counter[str] = field(default_factory=Counter)
    clients: int = 0

    def __post_init__(self) -> None:
        self.audit = Audit(self.cluster.postgres.url)
        self.stage = Stage(self.cluster, self.audit, self.recorder, self.rng)
        self.watch = Watch()

    async def run(self, warm_up: float, seconds: float) -> None:
        """Warms up, rests, soaks, rests. Raises UneasyError."""
        try:
            await self._load("warm-up", warm_up)
            await self._rest(BEFORE)
            await self._load(LOAD, seconds)
            await self._rest(AFTER)
            await self.audit.record(self.recorder, self.sessions)
        finally:
            await self.watch.close()

    async def _load(self, phase: str, seconds: float) -> None:
        """Traffic and faults for so long, and until all of it has ended."""
        self._say(phase)
        stopping = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            slots = [group.create_task(self._clients(number, stopping)) for number in range(CLIENTS)]
            slots += [group.create_task(self._onlooker(stopping)) for _ in range(ONLOOKERS)]
            breaking = group.create_task(self._break(stopping))
            sampling = group.create_task(self._sample(phase))
            await asyncio.sleep(seconds)
            stopping.set()
            sampling.cancel()
            await breaking
            _, late = await asyncio.wait(slots, timeout=SETTLE_SECONDS)
            for task in late:
                task.cancel()
        if late:
            raise UneasyError(f"{len(late)} clients still wait {SETTLE_SECONDS:.0f} s after the last fault")

    async def _clients(self, number: int, stopping: asyncio.Event) -> None:
        """Client after client in one place."""
        mesh = self.cluster.mesh
        while not stopping.is_set():
            self.clients += 1
            name = f"s{self.clients}-c{number}"
            rng = random.Random(f"{self.rng.random()}-{name}")
            transport: Transport = (
                Grpc(mesh.grpc_address, mesh.api_key)
                if rng.random() < GRPC_SHARE
                else Http(mesh.url, mesh.headers)
            )
            enough = asyncio.Event()
            client = Client(
                name, transport, rng, self.recorder, enough, self.sessions.append, lambda *_: None
            )
            async with asyncio.TaskGroup() as group:
                ending = group.create_task(_end(enough, stopping, rng.uniform(*CLIENT_SECONDS)))
                await self._guarded(client)
                ending.cancel()

    async def _guarded(self, client: Client) -> None:
        try:
            await client.run()
        except Exception as error:
            # A bug of the suite must be seen, and must not look like one of the mesh.
            trace = "".join(traceback.format_exception(error))
            self.recorder.write("error", client=client.name, where="suite", detail=trace)

    async def _onlooker(self, stopping: asyncio.Event) -> None:
        mesh = self.cluster.mesh
        onlooker = Onlooker(mesh.url, mesh.headers, random.Random(self.rng.random()), self.sessions)
        await onlooker.run(stopping)
        self.left.update(onlooker.left)

    async def _break(self, stopping: asyncio.Event) -> None:
        """Fault after fault; each is put right before the next."""
        while not stopping.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(self.rng.uniform(*FAULT_PAUSE)):
                    await stopping.wait()
            if not stopping.is_set():
                await self.rng.choices(list(FAULTS), list(FAULTS.values()))[0](self.stage)

    async def _sample(self, phase: str) -> None:
        while True:
            await asyncio.sleep(SAMPLE_SECONDS)
            await self._read(phase)

    async def _read(self, phase: str) -> None:
        taken = await self.watch.take(of_cluster(self.cluster), phase)
        self.readings += taken
        with (self.folder / "readings.jsonl").open("a") as file:
            file.writelines(json.dumps(reading) + "\n" for reading in taken)

    async def _rest(self, phase: str) -> None:
        """Waits until nothing works or moves any more, and measures."""
        self._say(f"rest {phase}")
        if not await self.cluster.healthy():
            raise UneasyError("the mesh is not healthy")
        await self._until(self._runs_over, SETTLE_SECONDS, "runs are not over")
        await self._until(self._nobody_there, STILL_SECONDS, "somebody is still there")
        # Valkey is compared with the same contents: none.
        await faults.flush(self.stage)
        for _ in range(REST_READINGS):
            await asyncio.sleep(REST_PERIOD)
            await self._read(phase)

    async def _runs_over(self) -> str:
        with suppress(OSError, asyncpg.PostgresError, TimeoutError):
            working = await self.audit.working()
            return f"{len(working)}: {working[:5]}" if working else ""
        return "PostgreSQL does not answer"

    async def _nobody_there(self) -> str:
        readings = await self.watch.take(of_cluster(self.cluster), "")
        return ", ".join(f"{one['process']} {one['open']}" for one in readings if one.get("busy"))

    async def _until(self, complaint: Callable[[], Awaitable[str]], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while found := await complaint():
            if time.monotonic() > deadline:
                raise UneasyError(f"{what} after {seconds:.0f} s: {found}")
            await asyncio.sleep(0.5)

    def _say(self, what: str) -> None:
        kinds = self.recorder.kinds
        done = f"{self.clients} clients, {kinds['accepted']} runs, {kinds['fault']} faults so far"
        print(f"{time.strftime('%H:%M:%S')} {what}: {done}", flush=True)


async def _end(enough: asyncio.Event, stopping: asyncio.Event, seconds: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await stopping.wait()
    enough.set()


def ended_by_itself(rows: Sequence[Row]) -> list[str]:
    """Processes that did not live all the time though nothing was to kill them."""
    return sorted({row.process for row in rows if row.note and row.process not in VICTIMS})


async def _play(arguments: argparse.Namespace) -> int:
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("history.jsonl", "ledger.jsonl", "readings.jsonl", "soak.json"):
        (folder / name).unlink(missing_ok=True)
    seed = arguments.seed if arguments.seed is not None else int(time.time())
    print(f"seed {seed}, {arguments.minutes:g} minutes, in {folder}", flush=True)
    failed: list[str] = []
    began = time.monotonic()
    with CountingRecorder(folder / "history.jsonl") as recorder:
        async with Cluster(folder) as cluster:
            soak = Soak(cluster, recorder, random.Random(seed), folder)
            recorder.write("run", seed=seed, theme="soak", plan=[])
            try:
                await soak.run(arguments.warm_up, arguments.minutes * 60)
            except UneasyError as error:
                failed.append(str(error))
            recorder.write("end", settled=not failed, seconds=round(time.monotonic() - began, 1))
    rows = judge(soak.readings, many_lives=STORES)
    table(rows)
    if not failed:
        failed += [f"{row.process} grows" for row in rows if row.grows]
        failed += [f"{name} ended, and nothing was to kill it" for name in ended_by_itself(rows)]
    history = History.load(folder / "history.jsonl", folder / "ledger.jsonl")
    failed += [f"invariant {one.invariant}: {one.text}" for one in check(history)]
    summary = {
        "seed": seed,
        "minutes": arguments.minutes,
        "clients": soak.clients,
        "looked in": dict(soak.left),
        "runs": recorder.kinds["accepted"],
        "events": recorder.kinds["event"],
        "faults": dict(recorder.faults),
        "errors": recorder.kinds["error"],
        "failed": failed,
    }
    (folder / "soak.json").write_text(
        json.dumps(summary | {"processes": [dataclasses.asdict(row) for row in rows]}, indent=1) + "\n"
    )
    print()
    for name, value in summary.items():
        print(f"{name}: {value}")
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0, help="of load between the two rests")
    parser.add_argument(
        "--warm-up",
        type=float,
        default=WARM_UP_SECONDS,
        metavar="SECONDS",
        help="in less time caches are not full, and their filling counts as growth",
    )
    parser.add_argument("--seed", type=int, help="of traffic and faults; from the clock if left out")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "soak")
    return run(_play(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
