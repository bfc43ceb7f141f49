"""An agent dies in the middle of a reply, again and again: how long until its client reads on?"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from dataclasses import dataclass

import asyncpg
import httpx

from bench.mesh import Mesh
from tests.chaos.drills.load import Load, Run, Script, through_envoy
from tests.chaos.drills.parts import healthy, process
from tests.chaos.drills.report import Report, percentile

P50_SECONDS = 1.2
P99_SECONDS = 2.5
TTL_SECONDS = 10.0
WAIT_SECONDS = 30.0
SCRIPT = Script(100, 50)
SEED = 4


@dataclass(frozen=True, slots=True)
class Moved:
    """One takeover, in seconds from the signal.

    Attributes:
        written: to the first event of the new agent, by its clock.
        seen: to that event at the client.
    """

    written: float
    seen: float


async def _victim(seen: Load, session_id: str, group: asyncio.TaskGroup) -> Run:
    """Begins a run and returns when its reply flows."""
    run = Run(SCRIPT)
    seen.runs.append(run)
    group.create_task(seen.follow(session_id, run))
    async with asyncio.timeout(WAIT_SECONDS):
        while not run.words:
            await asyncio.sleep(0.005)
    return run


async def _moved(run: Run, number: signal.Signals, mesh: Mesh) -> Moved:
    """Signals the run's agent and waits until another one has the run."""
    before = len(run.attempts)
    holder = process(mesh, run.attempts[-1][0])
    clock, wall = time.monotonic(), time.time()
    holder.send(number)
    async with asyncio.timeout(WAIT_SECONDS):
        while len(run.attempts) == before and not run.ended:
            await asyncio.sleep(0.005)
    if len(run.attempts) == before:
        raise RuntimeError(f"the run ended as {run.ended} before its agent was gone: the drill is too slow")
    _, at, written = run.attempts[before]
    return Moved(written - wall, at - clock)


async def _sessions(mesh: Mesh, count: int) -> list[str]:
    async with httpx.AsyncClient(base_url=mesh.url, headers=mesh.headers, timeout=30) as client:
        answers = [await client.post("/v1/sessions", json={}) for _ in range(count)]
    return [str(answer.raise_for_status().json()["session_id"]) for answer in answers]


async def killed(kills: int) -> Report:
    """From kill -9 to the next event at the client: p50 <= 1.2 s, p99 <= 2.5 s."""
    report = Report("takeover")
    chance = random.Random(SEED)
    moves: list[Moved] = []
    with Mesh(replicas="gateway=1,agent=3,session=2,tool=1,memory=1") as mesh:
        seen = Load(mesh, through_envoy(mesh))
        async with asyncio.TaskGroup() as group:
            for session_id in await _sessions(mesh, kills):
                await healthy(mesh)
                run = await _victim(seen, session_id, group)
                await asyncio.sleep(chance.uniform(0, 0.8))
                moves.append(await _moved(run, signal.SIGKILL, mesh))
    report.note("agents killed in mid-reply", f"{len(moves)} (seed {SEED})")
    times = sorted(move.seen for move in moves)
    report.at_most("kill to next event at the client, p50", percentile(times, 0.5), P50_SECONDS, " s")
    report.at_most("kill to next event at the client, p99", percentile(times, 0.99), P99_SECONDS, " s")
    report.note("  max", f"{times[-1]:.2f} s")
    report.note(
        "kill to next event written, p50", f"{percentile(sorted(m.written for m in moves), 0.5):.2f} s"
    )
    report.streams(seen)
    return report


async def stopped(stops: int) -> Report:
    """From SIGSTOP to the next event: <= TTL + 2 s; and what wakes up again writes nothing any more."""
    report = Report("takeover --stop")
    moves: list[Moved] = []
    regressions = 0
    with Mesh(replicas="gateway=1,agent=2,session=2,tool=1,memory=1") as mesh:
        seen = Load(mesh, through_envoy(mesh))
        database = mesh.command("env", "HERMESH_DATABASE_URL").strip()
        async with asyncio.TaskGroup() as group:
            for session_id in await _sessions(mesh, stops):
                await healthy(mesh)
                run = await _victim(seen, session_id, group)
                holder = process(mesh, run.attempts[-1][0])
                try:
                    moves.append(await _moved(run, signal.SIGSTOP, mesh))
                finally:
                    holder.send(signal.SIGCONT)
        # Awake again, the former owners had until here to write what they still held.
        await asyncio.sleep(2)
        connection = await asyncpg.connect(database, timeout=30)
        try:
            for run in seen.runs:
                fences = [
                    row["fence"]
                    for row in await connection.fetch(
                        "SELECT fence FROM session.event WHERE run_id = $1 ORDER BY seq", run.run_id
                    )
                ]
                regressions += fences != sorted(fences) or len(fences) != run.seq
        finally:
            await connection.close()
    report.note("agents stopped in mid-reply", len(moves))
    longest = max(move.seen for move in moves)
    report.at_most("SIGSTOP to next event, longest", longest, TTL_SECONDS + 2, " s")
    report.note("SIGSTOP to next event written, longest", f"{max(move.written for move in moves):.2f} s")
    report.at_most("logs in which a stale owner wrote", regressions, 0)
    report.streams(seen)
    return report
