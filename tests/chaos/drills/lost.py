"""Every process of every service is killed at once; PostgreSQL, Valkey, Envoy and the supervisor live on."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence

from bench.mesh import Mesh
from launcher.plan import SERVICES
from launcher.state import State
from tests.chaos.drills.load import Load
from tests.chaos.drills.report import Report
from tests.chaos.drills.rounds import SETTINGS, Struck, rounds

REPLICAS = "gateway=2,agent=2,session=2,tool=1,memory=1"


async def drill(streams: int, count: int) -> Report:
    """From the kill, the time in which the supervisor starts all anew included: p50 <= 1.5 s, max <= 3 s."""
    report = Report("lost", "every process of every service killed at once")
    with Mesh(settings=SETTINGS, replicas=REPLICAS) as mesh:

        async def blow(_: Load) -> Sequence[Struck]:
            for child in State.load(mesh.data_dir / "state.json").children:
                if child.service in SERVICES:
                    child.identity.send(signal.SIGKILL)
            return [Struck("silence after the kill", time.monotonic())]

        await rounds(report, mesh, count, streams, blow, errors=None)
    return report
