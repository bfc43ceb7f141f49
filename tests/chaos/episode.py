"""One episode: traffic and faults drawn from a seed, a history, and what the checker says of it."""

from __future__ import annotations

import asyncio
import json
import random
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg

from tests.chaos.faults.audit import Audit, LiveEyes
from tests.chaos.faults.cluster import Cluster
from tests.chaos.faults.faults import Stage
from tests.chaos.faults.plan import Planned, plan, theme_of
from tests.chaos.model.history import History, Recorder
from tests.chaos.traffic.clients import Client
from tests.chaos.traffic.leavers import Leaver
from tests.chaos.traffic.transport import Grpc, Http, SessionTransport, Transport, Ws
from tests.chaos.traffic.watchers import Watcher
from tests.chaos.validate import check

TRAFFIC_SECONDS = 8.0
# For so long clients go on beyond that while something is still broken.
_MORE_SECONDS = 20.0
CLIENTS = 10
# From the last fault's end until every run must be over: a lease's life, five idle claims, and a little.
SETTLE_SECONDS = 45.0
_LOOK_SECONDS = 0.7
# A client of gRPC and three of HTTP, and so on.
_GRPC_SHARE = 0.25
# Sessions that somebody else watches, one by each way there is.
_WATCH_GAP_SECONDS = 0.5


@dataclass
class Verdict:
    """How an episode ended."""

    seed: int
    theme: str
    faults: list[str]
    seconds: float
    settled: bool
    violations: list[dict[str, Any]] = field(default_factory=list)
    mutation: str = ""

    @property
    def ok(self) -> bool:
        """Whether nothing was broken that must hold."""
        return not self.violations


@dataclass
class Episode:
    """An episode on a running cluster.

    Attributes:
        seed: what everything is drawn from.
        folder: gets `history.jsonl` and `verdict.json`.
        theme: of the faults; the seed's own if empty.
        faults: these and no others, in place of a theme.
        mutation: the bug that the code was given, if any; it goes into the verdict.
        megabytes: of tools' results in each run of one more client; drawn in the theme `large`, else 0.
        settle: how long clients, and then runs, may take to come to their end.
    """

    cluster: Cluster
    seed: int
    folder: Path
    theme: str = ""
    faults: Sequence[Planned] | None = None
    clients: int = CLIENTS
    seconds: float = TRAFFIC_SECONDS
    mutation: str = ""
    megabytes: float = 0.0
    settle: float = SETTLE_SECONDS

    async def run(self) -> Verdict:
        """Plays the episode and checks its history."""
        began = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "history.jsonl"
        path.unlink(missing_ok=True)
        theme = self.theme_or_drawn
        rng = random.Random(self.seed)
        planned = list(self.faults) if self.faults is not None else plan(rng, theme, self.seconds)
        ledger_from = self.cluster.ledger_file.stat().st_size if self.cluster.ledger_file.exists() else 0
        audit = Audit(self.cluster.postgres.url)
        await audit.forget()
        with Recorder(path) as recorder:
            recorder.write("run", seed=self.seed, theme=theme, plan=[str(one) for one in planned])
            settled = await self._play(Stage(self.cluster, audit, recorder, rng), planned)
            recorder.write("end", settled=settled, seconds=round(time.monotonic() - began, 1))
        ledger = self.folder / "ledger.jsonl"
        with self.cluster.ledger_file.open("rb") as source:
            source.seek(ledger_from)
            ledger.write_bytes(source.read())
        history = History.load(path, ledger)
        violations = [
            {"invariant": one.invariant, "text": one.text, "records": one.records[:10]}
            for one in check(history)
        ]
        names = [
            f"{one['fault']} {one['target']} {one.get('detail', '')}".strip() for one in history["fault"]
        ]
        names += [f"lost {one['service']}" for one in history["drain"] if one["phase"] == "begin"]
        seconds = round(time.monotonic() - began, 1)
        verdict = Verdict(self.seed, theme, names, seconds, settled, violations, self.mutation)
        (self.folder / "verdict.json").write_text(json.dumps(vars(verdict), indent=1) + "\n")
        return verdict

    @property
    def theme_or_drawn(self) -> str:
        """The theme: the caller's, or the seed's own."""
        return self.theme or ("named" if self.faults is not None else theme_of(self.seed))

    async def _play(self, stage: Stage, planned: Sequence[Planned]) -> bool:
        recorder = stage.recorder
        sessions: list[str] = []
        runs: list[tuple[str, str]] = []
        stopping = asyncio.Event()
        drawn = random.Random(f"clients-{self.seed}")
        mesh = self.cluster.mesh
        clients = []
        for number in range(1, self.clients + 1):
            transport: Transport = (
                Grpc(mesh.grpc_address, mesh.api_key)
                if drawn.random() < _GRPC_SHARE
                else Http(mesh.url, mesh.headers)
            )
            name = f"e{self.seed}-c{number}"
            clients.append(
                Client(
                    name,
                    transport,
                    random.Random(f"{self.seed}-{number}"),
                    recorder,
                    stopping,
                    sessions.append,
                    lambda session, run: runs.append((session, run)),
                )
            )
        megabytes = self.megabytes
        if not megabytes and self.theme_or_drawn == "large":
            megabytes = drawn.choices([1, 2, 4, 8, 16, 32, 64], weights=[4, 3, 3, 2, 1, 0.5, 0.5])[0]
        if megabytes:
            recorder.write("mark", text=f"runs of {megabytes} MB")
            clients.append(
                Client(
                    f"e{self.seed}-big",
                    Http(mesh.url, mesh.headers),
                    random.Random(f"{self.seed}-big"),
                    recorder,
                    stopping,
                    sessions.append,
                    lambda session, run: runs.append((session, run)),
                    megabytes=megabytes,
                )
            )
        deleted: dict[str, str] = {}
        leavers = [
            Leaver(
                f"e{self.seed}-l{number}",
                transport,
                random.Random(f"{self.seed}-l{number}"),
                recorder,
                stopping,
                deleted.__setitem__,
            )
            for number, transport in enumerate(
                (Http(mesh.url, mesh.headers), Grpc(mesh.grpc_address, mesh.api_key)), start=1
            )
        ]
        over = asyncio.Event()
        eyes = LiveEyes(self.cluster.valkey.url, recorder)
        settled = True
        try:
            async with asyncio.TaskGroup() as group:
                working = [group.create_task(_guarded(client, recorder)) for client in (*clients, *leavers)]
                looking = group.create_task(_look(eyes, runs, over))
                watching = group.create_task(self._watch(sessions, recorder))
                breaking = [group.create_task(_later(stage, one)) for one in planned]
                try:
                    await asyncio.sleep(self.seconds)
                    # What a fault does to clients shows only while there are some.
                    await asyncio.wait(breaking, timeout=_MORE_SECONDS) if breaking else None
                    stopping.set()
                    await asyncio.wait(breaking) if breaking else None
                    _, late = await asyncio.wait(working, timeout=self.settle)
                    for task in late:
                        task.cancel()
                    settled = not late and await _at_rest(stage.audit, sessions, self.settle)
                finally:
                    over.set()
                await _end({looking, watching})
            await eyes.look(list(dict.fromkeys(runs)))
        finally:
            await eyes.close()
        healthy = await self.cluster.healthy(self.settle)
        if not healthy:
            recorder.write("mark", text="the mesh is not healthy at the end")
        await stage.audit.record(recorder, sessions)
        await stage.audit.record_left(recorder, deleted)
        return settled and healthy

    async def _watch(self, sessions: Sequence[str], recorder: Recorder) -> None:
        """Watches a few sessions by each way, as soon as they are there, until cancelled."""
        mesh = self.cluster.mesh
        ways: list[SessionTransport] = [
            Http(mesh.url, mesh.headers),
            Grpc(mesh.grpc_address, mesh.api_key),
            Ws(mesh.url, mesh.headers),
        ]
        async with asyncio.TaskGroup() as group:
            for number, way in enumerate(ways):
                while len(sessions) <= number:
                    await asyncio.sleep(_WATCH_GAP_SECONDS)
                name = f"e{self.seed}-w{number + 1}"
                rng = random.Random(f"{self.seed}-w{number}")
                group.create_task(Watcher(name, sessions[number], way, rng, recorder).watch())


async def _guarded(client: Client | Leaver, recorder: Recorder) -> None:
    try:
        await client.run()
    except Exception as error:
        _suite_failed(recorder, client.name, error)


def _suite_failed(recorder: Recorder, who: str, error: Exception) -> None:
    """Writes down a bug of the suite: it must be seen, and must not look like one of the mesh."""
    recorder.write("error", client=who, where="suite", detail="".join(traceback.format_exception(error)))


async def _later(stage: Stage, planned: Planned) -> None:
    await asyncio.sleep(planned.at)
    try:
        await planned.fault(stage)
    except Exception as error:
        _suite_failed(stage.recorder, str(planned), error)


async def _look(eyes: LiveEyes, runs: list[tuple[str, str]], over: asyncio.Event) -> None:
    """Looks until it is over: being cancelled alone may be lost on the way, as `_end` says."""
    while not over.is_set():
        await asyncio.sleep(_LOOK_SECONDS)
        await eyes.look(list(dict.fromkeys(runs[-30:])))


async def _end(tasks: set[asyncio.Task[None]]) -> None:
    """Cancels tasks until they have heard it: under Python 3.11 redis-py loses one now and then."""
    while tasks:
        for task in tasks:
            task.cancel()
        _, tasks = await asyncio.wait(tasks, timeout=1)


async def _at_rest(audit: Audit, sessions: Sequence[str], seconds: float) -> bool:
    """Waits until no run is queued or running any more."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with suppress(OSError, asyncpg.PostgresError, TimeoutError):
            if not await audit.unfinished(sessions):
                return True
        await asyncio.sleep(0.2)
    return False
