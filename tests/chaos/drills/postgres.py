"""PostgreSQL is stopped for 10 s, in the way that loses most, while replies stream: no message is lost."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Sequence

import asyncpg

from bench.mesh import Mesh
from tests.chaos.drills.load import Run, Script, load
from tests.chaos.drills.parts import folder, healthy
from tests.chaos.drills.report import Report
from tests.chaos.faults.stores import own_postgres

AWAY_SECONDS = 10.0


async def lost(url: str, runs: Sequence[Run]) -> list[str]:
    """The acknowledged runs whose message is not stored exactly once, or whose log differs from what came."""
    found = []
    connection = await asyncpg.connect(url, timeout=30)
    try:
        for run in runs:
            if not run.run_id:
                continue
            messages = await connection.fetchval(
                "SELECT count(*) FROM session.message WHERE run_id = $1 AND role = 'user' AND content = $2",
                run.run_id,
                run.text,
            )
            last = await connection.fetchval(
                "SELECT max(seq) FROM session.event WHERE run_id = $1", run.run_id
            )
            if messages != 1 or last != run.seq:
                found.append(f"{run.run_id}: {messages} messages, log ends at {last}, client at {run.seq}")
    finally:
        await connection.close()
    return found


async def drill(streams: int) -> Report:
    """No acknowledged message lost, every run ends by itself, 0 gaps. New input is refused meanwhile."""
    report = Report("postgres")
    with folder("hm-dp-") as place:
        postgres = own_postgres(place, place / "data", place / "log")
        await postgres.start()
        try:
            settings = {"HERMESH_DATABASE_URL": postgres.url}
            with Mesh(settings=settings, replicas="gateway=2,agent=2,session=2,tool=1,memory=1") as mesh:
                async with load(mesh, streams, [Script(150, 10), Script(60, 10)]) as seen:
                    await asyncio.sleep(5)
                    down = time.monotonic()
                    await postgres.stop(signal.SIGQUIT)
                    await asyncio.sleep(AWAY_SECONDS)
                    await postgres.start()
                    back = time.monotonic()
                    await asyncio.sleep(10)
                await healthy(mesh)
                missing = await lost(postgres.url, seen.runs)
                report.note("PostgreSQL away", f"{back - down:.1f} s")
                report.at_most("acknowledged messages lost or doubled", len(missing), 0)
                report.notes += missing[:10]
                report.streams(seen, refused=None)
                report.note("takeovers", seen.takeovers)
                report.waits(seen, [("before", 0, down), ("away", down, back), ("after", back, float("inf"))])
        finally:
            await postgres.stop(signal.SIGQUIT)
    return report
