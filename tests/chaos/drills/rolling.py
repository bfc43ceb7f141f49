"""Every replica of every service is replaced while replies stream: no client may notice."""

from __future__ import annotations

import asyncio
import subprocess
import time

from bench.mesh import HERMESH, Mesh
from tests.chaos.drills.load import Script, load
from tests.chaos.drills.report import Report

ROLL_SECONDS = 150.0


async def restart(mesh: Mesh, service: str) -> float:
    """Restarts a service replica by replica, its progress on our output; returns how long it took."""
    began = time.monotonic()
    command = [str(HERMESH), "restart", service, "--rolling"]
    process = await asyncio.create_subprocess_exec(
        *command, env=mesh.environment, stdin=subprocess.DEVNULL, cwd="/"
    )
    try:
        async with asyncio.timeout(ROLL_SECONDS):
            status = await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if status:
        raise RuntimeError(f"hermesh restart {service} --rolling ended with {status}")
    return time.monotonic() - began


async def drill(streams: int) -> Report:
    """0 client errors and 0 gaps. Some replies end within an agent's grace, some do not, some call tools."""
    report = Report("rolling")
    with Mesh(replicas="gateway=2,agent=2,session=2,tool=1,memory=1") as mesh:
        async with load(mesh, streams, [Script(40, 10), Script(300, 10), Script(30, 10, tool=True)]) as seen:
            before = time.monotonic()
            took = await restart(mesh, "all")
            after = time.monotonic()
            await asyncio.sleep(3)
        report.note("restart all --rolling took", f"{took:.1f} s")
        report.streams(seen, asked=1)
        report.note("runs that changed their agent", seen.takeovers)
        report.waits(seen, [("before", 0, before), ("during", before, after), ("after", after, float("inf"))])
    return report
