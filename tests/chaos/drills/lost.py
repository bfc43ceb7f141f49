"""Every process of every service is killed at once; PostgreSQL, Valkey, Envoy and the supervisor live on."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Sequence

from bench.mesh import Mesh
from launcher.envoy import Admin
from launcher.folder import Folder
from launcher.plan import SERVICES
from launcher.state import State
from tests.chaos.drills.load import Load
from tests.chaos.drills.report import Report, Series
from tests.chaos.drills.rounds import SETTINGS, Struck, rounds

REPLICAS = "gateway=2,agent=2,session=2,tool=1,memory=1"
START_SECONDS = 30.0


async def _serve(admin: Admin, former: frozenset[str]) -> None:
    """Waits until Envoy has a new replica of every service: before, nobody could go on with a run."""
    async with asyncio.timeout(START_SECONDS):
        while True:
            found = {name for name, healthy in (await admin.healthy()).items() if healthy} - former
            if {name.partition("/")[0] for name in found} >= set(SERVICES):
                return
            await asyncio.sleep(0.02)


async def drill(streams: int, count: int) -> Report:
    """From the moment in which one replica of each service serves again: p50 <= 1.5 s, max <= 3 s.

    Until then it takes what this machine takes to start so many processes at once; that is noted, and has no
    bound.
    """
    report = Report("lost", "every process of every service killed at once")
    with Mesh(settings=SETTINGS, replicas=REPLICAS) as mesh:
        admin = Admin(Folder(mesh.data_dir).sockets / "envoy.sock")
        starts = Series("from the kill until one of each serves")

        async def blow(_: Load) -> Sequence[Struck]:
            former = frozenset(await admin.healthy())
            killed = time.monotonic()
            for child in State.load(mesh.data_dir / "state.json").children:
                if child.service in SERVICES:
                    child.identity.send(signal.SIGKILL)
            await _serve(admin, former)
            starts.rounds.append([time.monotonic() - killed])
            return [Struck("silence after one of each serves", time.monotonic())]

        await rounds(report, mesh, count, streams, blow, errors=None)
        report.series(starts)
    return report
