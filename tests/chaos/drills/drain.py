"""Processes are told to end by somebody who does not tell Envoy first, as Kubernetes and compose do it.

What `hermesh restart --rolling` has by itself, an endpoint list without the replica, is missing here: only
the health check tells Envoy, and until then calls still come.
"""

from __future__ import annotations

import asyncio
import signal
import time

from bench.mesh import Mesh
from tests.chaos.drills.load import Script, load
from tests.chaos.drills.parts import healthy, process
from tests.chaos.drills.report import Report

REPLICAS = "gateway=2,agent=2,session=2,tool=2,memory=2"
ENDED = ("session-1", "memory-1", "tool-1", "agent-1", "gateway-1")
DRAIN_SECONDS = 30.0


async def _drained(mesh: Mesh, replica: str) -> float:
    """Sends SIGTERM and returns how long the process took to end."""
    began = time.monotonic()
    victim = process(mesh, replica)
    victim.send(signal.SIGTERM)
    async with asyncio.timeout(DRAIN_SECONDS):
        while victim.alive:
            await asyncio.sleep(0.05)
    return time.monotonic() - began


async def drill(streams: int) -> Report:
    """0 client errors and 0 gaps."""
    report = Report("drain")
    with Mesh(replicas=REPLICAS) as mesh:
        async with load(mesh, streams, [Script(30, 10), Script(200, 10), Script(20, 10, tool=True)]) as seen:
            before = time.monotonic()
            for replica in ENDED:
                report.note(f"SIGTERM to {replica}, ended after", f"{await _drained(mesh, replica):.1f} s")
                await healthy(mesh)
            after = time.monotonic()
            await asyncio.sleep(3)
        report.streams(seen, asked=1)
        report.note("runs that changed their agent", seen.takeovers)
        report.waits(seen, [("before", 0, before), ("during", before, after), ("after", after, float("inf"))])
    return report
