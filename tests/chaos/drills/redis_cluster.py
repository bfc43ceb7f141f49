"""A primary of a Redis Cluster is killed while clients watch their runs: that costs latency, no more."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from bench.mesh import Mesh
from tests.chaos.drills.load import Load, Script
from tests.chaos.drills.report import Report
from tests.chaos.drills.rounds import SETTINGS, Struck, rounds
from tests.valkeys import cluster, wait

REPLICAS = "gateway=2,agent=2,session=2,tool=1,memory=1"
# Watched from elsewhere than where they are written, half of them: by Redis, that is.
SCRIPTS = (Script(250, 10, watched=True), Script(120, 10, tool=True, watched=True))


async def drill(streams: int, count: int) -> Report:
    """From the kill on, p50 <= 1.5 s, max <= 3 s; 0 client errors."""
    report = Report("redis_cluster", "a primary of a Redis Cluster is killed, and comes back as a replica")
    with cluster() as servers:
        settings = SETTINGS | {"HERMESH_REDIS_URL": servers.url}
        with Mesh(settings=settings, replicas=REPLICAS) as mesh:
            turn = 0

            async def blow(seen: Load) -> Sequence[Struck]:
                nonlocal turn
                victim = servers.primaries()[turn % 3]
                turn += 1
                victim.kill()
                struck = time.monotonic()
                await asyncio.to_thread(wait, servers.serves, "a failover")
                report.say(f"the cluster served again after {time.monotonic() - struck:.1f} s")
                await asyncio.to_thread(victim.start)
                await asyncio.to_thread(wait, servers.settled, "the former primary as a replica")
                return [Struck("silence from the kill on", struck)]

            await rounds(report, mesh, count, streams, blow, scripts=SCRIPTS)
    return report
