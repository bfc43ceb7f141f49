"""Envoy is killed while replies stream: every stream in the mesh breaks, and no run changes its agent.

Clients connect to the gateways themselves, since the listener that they have otherwise dies with Envoy.
"""

from __future__ import annotations

import asyncio
import signal
import time

from bench.mesh import Mesh
from tests.chaos.drills.load import Script, at_gateways, load
from tests.chaos.drills.parts import healthy, process
from tests.chaos.drills.report import Report

KILLS = 3


async def drill(streams: int) -> Report:
    """0 takeovers, 0 gaps, and no stream that a client has breaks."""
    report = Report("envoy")
    with Mesh(replicas="gateway=2,agent=2,session=2,tool=1,memory=1") as mesh:
        async with load(
            mesh, streams, [Script(150, 10), Script(30, 10, tool=True)], at_gateways(mesh)
        ) as seen:
            before = time.monotonic()
            for _ in range(KILLS):
                process(mesh, "envoy-1").send(signal.SIGKILL)
                await asyncio.sleep(5)
                await healthy(mesh)
            after = time.monotonic()
            await asyncio.sleep(2)
        report.note("Envoy killed", KILLS)
        report.at_most("takeovers", seen.takeovers, 0)
        report.streams(seen, refused=None)
        report.waits(seen, [("before", 0, before), ("during", before, after), ("after", after, float("inf"))])
    return report
