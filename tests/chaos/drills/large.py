"""A run that has written 64 MB loses its agent, again and again: does it move as fast as a small one?

And what does it cost meanwhile: session replicas and Valkey hold pages of it at most, never the run.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import redis.asyncio

from bench.mesh import Mesh
from tests.chaos.drills.load import Load, Run, Script, through_envoy
from tests.chaos.drills.parts import healthy, process
from tests.chaos.drills.report import Report, Series

ROOT = Path(__file__).resolve().parents[3]
# Of one result, and how many of them a step and a run have.
CHARACTERS = 60_000
CALLS = 64
TURNS = 17
RATE = 20
P50_SECONDS = 1.5
MAX_SECONDS = 3.0
TEXT_P50_SECONDS = 3.0
TEXT_MAX_SECONDS = 6.0
SESSION_MIB = 160
VALKEY_MIB = 16
BUILD_SECONDS = 400.0
MOVE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Bulk(Script):
    """Steps whose calls return much, then slow text."""

    turns: int = TURNS

    @property
    def text(self) -> str:
        """What to say to the scripted model."""
        arguments = f'{{"characters":{CHARACTERS}}}'
        steps = f"calls={CALLS} turns={self.turns}"
        return f"[[tool=bulk {arguments} {steps} tokens={self.tokens} rate={self.rate}]]"

    @property
    def bytes(self) -> int:
        """Of all results."""
        return CHARACTERS * CALLS * self.turns


@dataclass(slots=True)
class Moves:
    """From the signal to the next event, and to the next text."""

    events: Series
    texts: Series


async def _until_text(run: Run, seconds: float) -> None:
    """Returns once the reply grows."""
    known = len(run.words)
    async with asyncio.timeout(seconds):
        while len(run.words) == known:
            if run.ended:
                raise RuntimeError(f"the run ended as {run.ended}")
            await asyncio.sleep(0.005)


async def _move(run: Run, mesh: Mesh, number: signal.Signals, moves: Moves) -> None:
    attempts = len(run.attempts)
    holder = process(mesh, run.attempts[-1][0])
    holder.send(number)
    began = time.monotonic()
    async with asyncio.timeout(MOVE_SECONDS):
        while len(run.attempts) == attempts:
            if run.ended:
                raise RuntimeError(f"the run ended as {run.ended} when its agent was gone")
            await asyncio.sleep(0.005)
    moves.events.rounds.append([run.attempts[attempts][1] - began])
    await _until_text(run, MOVE_SECONDS)
    moves.texts.rounds.append([time.monotonic() - began])


def peak_mib(pid: int) -> float:
    """The most memory that a process ever held."""
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


async def _valkey_mib(mesh: Mesh) -> float:
    client = redis.asyncio.Redis.from_url(mesh.command("env", "HERMESH_REDIS_URL").strip())
    try:
        found = await client.info("memory")
    finally:
        await client.aclose()
    return int(found["used_memory_peak"]) / 2**20


def settings() -> dict[str, str]:
    """Of a mesh whose model continues what was cut off: then a move is no lost work, however often."""
    return {
        "HERMESH_TOOL_MODULES": "tests.chaos.drills.bulk_tool",
        "HERMESH_MAX_TURNS": "100",
        "HERMESH_LLM_PREFILL": "true",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    }


async def drill(streams: int, count: int, *, turns: int = TURNS) -> Report:
    """Kill to next event: p50 <= 1.5 s, max <= 3 s; and bounded memory. One run, whatever `streams` says."""
    report = Report(
        "large", f"the agent of a run of {CHARACTERS * CALLS * turns / 1e6:.0f} MB killed, mid-reply"
    )
    moves = Moves(Series("kill to next event at the client"), Series("kill to next text at the client"))
    script = Bulk(RATE * 600, RATE, turns=turns)
    with Mesh(replicas="gateway=1,agent=3,session=2,tool=1,memory=1", settings=settings()) as mesh:
        seen = Load(mesh, through_envoy(mesh))
        run = Run(script)
        seen.runs.append(run)
        empty = [peak_mib(replica.pid) for replica in mesh.of("session")]
        async with httpx.AsyncClient(base_url=mesh.url, headers=mesh.headers, timeout=30) as client:
            session_id = (await client.post("/v1/sessions", json={})).raise_for_status().json()["session_id"]
            async with asyncio.TaskGroup() as group:
                began = time.monotonic()
                following = group.create_task(seen.follow(session_id, run))
                await _until_text(run, BUILD_SECONDS)
                report.note(
                    f"{script.bytes / 1e6:.0f} MB of results, built in", f"{time.monotonic() - began:.0f} s"
                )
                built = [peak_mib(replica.pid) for replica in mesh.of("session")]
                for _ in range(count):
                    await healthy(mesh)
                    await _move(run, mesh, signal.SIGKILL, moves)
                    report.say(f"{moves.events.last}; to text {moves.texts.last}")
                (await client.post(f"/v1/runs/{run.run_id}/cancel", json={})).raise_for_status()
                await following
        sessions = [peak_mib(replica.pid) for replica in mesh.of("session")]
        valkey = await _valkey_mib(mesh)
    report.note("agents killed", len(moves.events.rounds))
    report.series(moves.events, p50=P50_SECONDS, longest=MAX_SECONDS)
    # By then the whole run was read, sent to the model and read by it.
    report.series(moves.texts, p50=TEXT_P50_SECONDS, longest=TEXT_MAX_SECONDS)
    report.note("session before, VmHWM", " / ".join(f"{one:.0f} MiB" for one in empty))
    report.note("session when the run was built, VmHWM", " / ".join(f"{one:.0f} MiB" for one in built))
    report.at_most("session at the end, VmHWM, larger replica", max(sessions), SESSION_MIB, " MiB")
    report.at_most("Valkey, used_memory_peak", valkey, VALKEY_MIB, " MiB")
    report.at_most("gaps and duplicates at the client", len(seen.wrong), 0)
    report.at_most("client errors", len(seen.errors) + len(seen.refused), 0)
    report.notes += [text for _, text in seen.errors[:5]] + seen.wrong[:5]
    return report
