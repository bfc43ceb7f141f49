"""PostgreSQL is stopped as a whole for longer than a lease lasts, and goes on: replies must go on at once."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Sequence

from bench.mesh import Mesh
from tests.chaos.drills.load import Load
from tests.chaos.drills.parts import folder
from tests.chaos.drills.report import Report
from tests.chaos.drills.rounds import SETTINGS, Struck, rounds
from tests.chaos.faults.stores import own_postgres

FROZEN_SECONDS = 15.0
REPLICAS = "gateway=2,agent=2,session=2,tool=1,memory=1"


async def drill(streams: int, count: int) -> Report:
    """From SIGCONT: p50 <= 1.5 s, max <= 3 s."""
    report = Report("frozen", f"every process of PostgreSQL stopped for {FROZEN_SECONDS:.0f} s")
    with folder("hm-df-") as place:
        postgres = own_postgres(place, place / "data", place / "log")
        await postgres.start()

        async def blow(_: Load) -> Sequence[Struck]:
            postgres.send_all(signal.SIGSTOP)
            try:
                await asyncio.sleep(FROZEN_SECONDS)
            finally:
                postgres.send_all(signal.SIGCONT)
            return [Struck("silence after it goes on", time.monotonic())]

        try:
            settings = SETTINGS | {"HERMESH_DATABASE_URL": postgres.url}
            with Mesh(settings=settings, replicas=REPLICAS) as mesh:
                await rounds(report, mesh, count, streams, blow)
        finally:
            await postgres.stop(signal.SIGQUIT)
    return report
