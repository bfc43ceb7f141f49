"""python -m tests.chaos.drills NAME [--streams 50] [--kills 50] [--stop]."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time

from tests.chaos.drills import drain, envoy, large, postgres, rolling, sessions, takeover, valkey
from tests.chaos.drills.report import Report

STREAMS = {
    "rolling": rolling.drill,
    "drain": drain.drill,
    "envoy": envoy.drill,
    "sessions": sessions.drill,
    "valkey": valkey.drill,
    "postgres": postgres.drill,
}


def main() -> int:
    """Runs one drill; the status is 1 when a bound is broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.drills")
    parser.add_argument("name", choices=[*STREAMS, "takeover", "large"])
    parser.add_argument("--streams", type=int, default=50, help="how many clients stream meanwhile")
    parser.add_argument(
        "--kills",
        type=int,
        default=0,
        help="how many agents takeover kills (50) or stops (3), or large kills (10)",
    )
    parser.add_argument("--stop", action="store_true", help="takeover: SIGSTOP in place of kill -9")
    wanted = parser.parse_args()
    began = time.monotonic()

    async def run() -> Report:
        if wanted.name == "takeover":
            return await (
                takeover.stopped(wanted.kills or 3) if wanted.stop else takeover.killed(wanted.kills or 50)
            )
        if wanted.name == "large":
            return await large.drill(wanted.kills or 10)
        return await STREAMS[wanted.name](wanted.streams)

    report = asyncio.run(run())
    report.note("the drill took", f"{time.monotonic() - began:.0f} s")
    return 0 if report.show() else 1


if __name__ == "__main__":
    sys.exit(main())
