"""Session is restarted replica by replica, then one of two is killed: agents move their streams, and no
run moves.
"""

from __future__ import annotations

import asyncio
import signal
import time

from bench.mesh import Mesh
from tests.chaos.drills.load import Script, load
from tests.chaos.drills.parts import healthy, process
from tests.chaos.drills.report import Report
from tests.chaos.drills.rolling import restart


async def drill(streams: int) -> Report:
    """0 takeovers, 0 client errors, 0 gaps."""
    report = Report("sessions")
    with Mesh(replicas="gateway=2,agent=2,session=2,tool=1,memory=1") as mesh:
        async with load(mesh, streams, [Script(150, 10), Script(30, 10, tool=True)]) as seen:
            before = time.monotonic()
            await restart(mesh, "session")
            rolled, by_roll = time.monotonic(), seen.takeovers
            await asyncio.sleep(2)
            for name in [replica.replica for replica in mesh.of("session")]:
                process(mesh, name).send(signal.SIGKILL)
                await asyncio.sleep(5)
                await healthy(mesh)
            killed = time.monotonic()
            await asyncio.sleep(2)
        report.at_most("takeovers by the rolling restart", by_roll, 0)
        report.at_most("takeovers by kill -9 of one replica of two, twice", seen.takeovers - by_roll, 0)
        report.streams(seen, refused=None)
        report.waits(seen, [("before", 0, before), ("rolling", before, rolled), ("killed", rolled, killed)])
    return report
