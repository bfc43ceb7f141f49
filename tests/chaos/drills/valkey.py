"""Valkey hangs for 10 s and is gone for 20 s more while replies stream: it costs latency and nothing else."""

from __future__ import annotations

import asyncio
import signal
import time

from bench.mesh import Mesh
from tests.chaos.drills.load import Script, load
from tests.chaos.drills.parts import folder
from tests.chaos.drills.report import Report
from tests.chaos.faults.stores import own_valkey

HUNG_SECONDS = 10.0
GONE_SECONDS = 20.0


async def drill(streams: int) -> Report:
    """0 client errors, 0 gaps; the added latency is printed."""
    report = Report("valkey")
    with folder("hm-dv-") as place:
        valkey = own_valkey(place, place / "log")
        await valkey.start()
        try:
            settings = {"HERMESH_REDIS_URL": valkey.url}
            with Mesh(settings=settings, replicas="gateway=2,agent=2,session=2,tool=1,memory=1") as mesh:
                async with load(mesh, streams, [Script(150, 10)]) as seen:
                    await asyncio.sleep(8)
                    down = time.monotonic()
                    valkey.send(signal.SIGSTOP)
                    await asyncio.sleep(HUNG_SECONDS)
                    gone = time.monotonic()
                    await valkey.stop(signal.SIGKILL)
                    await asyncio.sleep(GONE_SECONDS)
                    await valkey.start()
                    back = time.monotonic()
                    await asyncio.sleep(8)
                report.note("Valkey away", f"{back - down:.1f} s")
                report.streams(seen)
                report.at_most("takeovers", seen.takeovers, 0)
                report.waits(
                    seen,
                    [
                        ("before", 0, down),
                        ("hung", down, gone),
                        ("gone", gone, back),
                        ("after", back, float("inf")),
                    ],
                )
        finally:
            await valkey.stop(signal.SIGKILL)
    return report
