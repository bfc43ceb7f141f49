"""The same blow again and again, and after each how long every client had to wait once its cause was gone.

A client's silence is the longest time without an event from the moment the cause was gone to
`WINDOW_SECONDS` later. It begins at that moment and not at the last event before: so it holds what the mesh
takes to come back and not what was broken. A client between two runs is silent until the next one's first
event. So a stream that comes late is seen, and one that comes at once and then stops again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from bench.mesh import Mesh
from tests.chaos.drills.load import Load, Script, load
from tests.chaos.drills.parts import healthy
from tests.chaos.drills.report import Report, Series

# What it takes for a lease that nobody renews to run out, and a little.
WINDOW_SECONDS = 13.0
P50_SECONDS = 1.5
MAX_SECONDS = 3.0
# Long enough that most replies go on through a whole round.
SCRIPTS = (Script(250, 10), Script(200, 10), Script(120, 10, tool=True))
# A reply that is continued where it was cut off: one that is begun anew each time would never end.
SETTINGS = {"HERMESH_LLM_PREFILL": "true"}


@dataclass(frozen=True, slots=True)
class Struck:
    """Who is asked how long they waited, and since when.

    Attributes:
        what: names these clients and their moment, the same in each round.
        since: when the cause was gone, by the monotonic clock in seconds.
        sessions: whose clients; all if None.
        until: when their wait is looked at, seconds of the same clock; `WINDOW_SECONDS` later if None.
    """

    what: str
    since: float
    sessions: frozenset[str] | None = None
    until: float | None = None


Blow = Callable[[Load], Awaitable[Sequence[Struck]]]


def silences(seen: Load, struck: Struck) -> list[float]:
    """The longest silence of each client, in seconds, sorted."""
    end = struck.until if struck.until is not None else struck.since + WINDOW_SECONDS
    arrivals: dict[str, list[float]] = {}
    for run in seen.runs:
        if struck.sessions is None or run.session_id in struck.sessions:
            arrivals.setdefault(run.session_id, []).extend(run.arrivals)
    return sorted(
        max(
            later - earlier
            for earlier, later in pairwise(
                [struck.since, *(at for at in came if struck.since < at < end), end]
            )
        )
        for came in map(sorted, arrivals.values())
    )


async def rounds(
    report: Report,
    mesh: Mesh,
    count: int,
    streams: int,
    blow: Blow,
    errors: int | None = 0,
    scripts: Sequence[Script] = SCRIPTS,
) -> None:
    """Strikes `count` times under load; every figure and its bound go into the report.

    `errors` bounds how often a stream breaks under its client; None where its gateway dies, too.
    """
    found: dict[str, Series] = {}
    async with load(mesh, streams, scripts) as seen:
        for number in range(1, count + 1):
            struck = await blow(seen)
            last = max(one.since for one in struck)
            await asyncio.sleep(max(0.0, last + WINDOW_SECONDS - time.monotonic()))
            for one in struck:
                series = found.setdefault(one.what, Series(one.what))
                series.rounds.append(silences(seen, one))
                report.say(f"round {number}: {one.what}: {series.last}")
            await healthy(mesh)
            await seen.flowing(streams * 9 // 10)
    for series in found.values():
        report.series(series, p50=P50_SECONDS, longest=MAX_SECONDS)
    report.streams(seen, refused=None, errors=errors)
    report.note("takeovers", seen.takeovers)
