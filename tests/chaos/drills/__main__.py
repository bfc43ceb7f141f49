"""python -m tests.chaos.drills NAME [--streams 50] [--kills 50] [--stop] [--rounds 10]."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time

from tests.chaos.drills import (
    drain,
    envoy,
    failover,
    frozen,
    large,
    locked,
    lost,
    pairs,
    postgres,
    redis_cluster,
    rolling,
    scale_zero,
    sessions,
    takeover,
    upgrade,
    valkey,
)
from tests.chaos.drills.report import Report
from tests.chaos.faults.cluster import ROOT

# Those of many rounds leave their figures here, for the page.
FOLDER = ROOT / "build" / "drills"

STREAMS = {
    "rolling": rolling.drill,
    "drain": drain.drill,
    "envoy": envoy.drill,
    "sessions": sessions.drill,
    "valkey": valkey.drill,
    "postgres": postgres.drill,
    "upgrade": upgrade.drill,
}
ROUNDS = {
    "failover": failover.drill,
    "frozen": frozen.drill,
    "large": large.drill,
    "locked": locked.drill,
    "pairs": pairs.drill,
    "lost": lost.drill,
    "redis_cluster": redis_cluster.drill,
    "scale_zero": scale_zero.drill,
}


def main() -> int:
    """Runs one drill; the status is 1 when a bound is broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.drills")
    parser.add_argument("name", choices=[*STREAMS, *ROUNDS, "takeover"])
    parser.add_argument(
        "--streams", type=int, default=0, help="how many clients stream meanwhile (50; with rounds 20)"
    )
    parser.add_argument("--rounds", type=int, default=10, help=f"how often: {', '.join(ROUNDS)}")
    parser.add_argument(
        "--kills", type=int, default=0, help="how many agents takeover kills (50) or stops (3)"
    )
    parser.add_argument("--stop", action="store_true", help="takeover: SIGSTOP in place of kill -9")
    wanted = parser.parse_args()
    began = time.monotonic()

    async def run() -> Report:
        if wanted.name == "takeover":
            return await (
                takeover.stopped(wanted.kills or 3) if wanted.stop else takeover.killed(wanted.kills or 50)
            )
        if wanted.name in ROUNDS:
            return await ROUNDS[wanted.name](wanted.streams or 20, wanted.rounds)
        return await STREAMS[wanted.name](wanted.streams or 50)

    report = asyncio.run(run())
    report.note("the drill took", f"{time.monotonic() - began:.0f} s")
    report.save(FOLDER)
    return 0 if report.show() else 1


if __name__ == "__main__":
    sys.exit(main())
