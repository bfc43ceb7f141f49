"""The wall clock, in the one unit the mesh uses for event times."""

from __future__ import annotations

import time


def now_ms() -> int:
    """Returns the Unix time in milliseconds.

    For event times only. Leases use PostgreSQL's clock and waits use the monotonic clock, because a wall
    clock may step.
    """
    return time.time_ns() // 1_000_000
