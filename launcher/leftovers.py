"""Ending processes that no supervisor keeps any more: services first, then the parts they need."""

from __future__ import annotations

import signal
from collections.abc import Iterable

from launcher.plan import STAGES
from launcher.processes import end_all
from launcher.state import Remembered

# Services that have nothing under way need 2.5 s; a run that is cut off goes on at the next `up`.
STOP_SECONDS = 6.0


def end_leftovers(children: Iterable[Remembered]) -> None:
    """Ends those of them that live, each stage within its time."""
    children = list(children)
    for services in STAGES:
        living = [c.identity for c in children if c.service in services and c.identity.alive]
        # PostgreSQL's SIGTERM waits for its clients; its SIGINT is the fast and clean stop.
        polite = signal.SIGINT if "postgresql" in services else signal.SIGTERM
        end_all(living, STOP_SECONDS, polite)
