"""A transaction of somebody else's holds one session's lease row: the other sessions must not wait for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import asyncpg

from bench.mesh import Mesh
from tests.chaos.drills.load import Load
from tests.chaos.drills.report import Report
from tests.chaos.drills.rounds import SETTINGS, WINDOW_SECONDS, Struck, rounds

HELD_SECONDS = 12.0
REPLICAS = "gateway=1,agent=2,session=2,tool=1,memory=1"


async def drill(streams: int, count: int) -> Report:
    """Others from the lock on, the locked session from its end on: p50 <= 1.5 s, max <= 3 s."""
    report = Report("locked", f"an idle transaction holds one lease row for {HELD_SECONDS:.0f} s")
    with Mesh(settings=SETTINGS, replicas=REPLICAS) as mesh:
        database = mesh.command("env", "HERMESH_DATABASE_URL").strip()

        async def blow(seen: Load) -> Sequence[Struck]:
            flowing = [run.session_id for run in seen.runs if run.words and not run.ended]
            held = frozenset(flowing[:1])
            connection = await asyncpg.connect(database, timeout=30)
            try:
                async with connection.transaction():
                    await connection.execute(
                        "SELECT FROM session.lease WHERE session_id = ANY($1::uuid[]) FOR UPDATE", [*held]
                    )
                    locked = time.monotonic()
                    await asyncio.sleep(HELD_SECONDS)
                released = time.monotonic()
            finally:
                await connection.close()
            others = frozenset(run.session_id for run in seen.runs) - held
            return [
                Struck(
                    "silence of the other sessions from the lock on",
                    locked,
                    others,
                    released + WINDOW_SECONDS,
                ),
                Struck("silence of the locked session after its release", released, held),
            ]

        await rounds(report, mesh, count, streams, blow)
    return report
