"""The last agent is taken away while replies flow, and agents are asked for again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from bench.mesh import Mesh
from launcher.control import ask
from launcher.folder import Folder
from tests.chaos.drills.load import Load
from tests.chaos.drills.report import Report
from tests.chaos.drills.rounds import SETTINGS, Struck, rounds

NONE_SECONDS = 5.0
BEFORE, AFTER = 3, 2
REPLICAS = f"gateway=1,agent={BEFORE},session=2,tool=1,memory=1"


async def drill(streams: int, count: int) -> Report:
    """From the moment in which agents are asked for again: p50 <= 1.5 s, max <= 3 s."""
    report = Report(
        "scale_zero", f"agents {BEFORE} -> 0, none for {NONE_SECONDS:.0f} s, and {AFTER} are asked for"
    )
    with Mesh(settings=SETTINGS, replicas=REPLICAS) as mesh:

        async def agents(number: int) -> None:
            # As `hermesh scale` does, without the time that a command takes to begin.
            request = {"command": "scale", "replicas": {"agent": number}}
            await asyncio.to_thread(ask, Folder(mesh.data_dir), request)

        async def blow(_: Load) -> Sequence[Struck]:
            await agents(0)
            await asyncio.sleep(NONE_SECONDS)
            asked = time.monotonic()
            await agents(AFTER)
            return [Struck("silence after they are asked for", asked)]

        async def again(seen: Load) -> Sequence[Struck]:
            await agents(BEFORE)
            return await blow(seen)

        await rounds(report, mesh, count, streams, again)
    return report
