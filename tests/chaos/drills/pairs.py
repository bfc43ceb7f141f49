"""An agent and a session replica die together, and right after them another pair."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Sequence

from bench.mesh import Mesh
from tests.chaos.drills.load import Load
from tests.chaos.drills.parts import process
from tests.chaos.drills.report import Report
from tests.chaos.drills.rounds import SETTINGS, Struck, rounds

BETWEEN_SECONDS = 1.0
REPLICAS = "gateway=1,agent=3,session=2,tool=1,memory=1"


async def drill(streams: int, count: int) -> Report:
    """From the second kill: p50 <= 1.5 s of the runs whose agent was killed, max <= 3 s of all."""
    report = Report("pairs", f"agent and session killed together, twice, {BETWEEN_SECONDS:.0f} s apart")
    with Mesh(settings=SETTINGS, replicas=REPLICAS) as mesh:
        sessions = [replica.replica for replica in mesh.of("session")]

        async def blow(seen: Load) -> Sequence[Struck]:
            hit: set[str] = set()
            for session in sessions:
                holds = Counter(
                    run.attempts[-1][0] for run in seen.runs if run.words and run.attempts and not run.ended
                )
                [(agent, _)] = holds.most_common(1)
                hit.update(
                    run.session_id
                    for run in seen.runs
                    if run.attempts and not run.ended and run.attempts[-1][0] == agent
                )
                if session != sessions[0]:
                    await asyncio.sleep(BETWEEN_SECONDS)
                for name in (agent, session):
                    process(mesh, name).send(signal.SIGKILL)
            killed = time.monotonic()
            others = frozenset(run.session_id for run in seen.runs) - hit
            return [
                Struck("silence of the runs whose agent was killed", killed, frozenset(hit)),
                Struck("silence of the other runs", killed, others),
            ]

        await rounds(report, mesh, count, streams, blow)
    return report
