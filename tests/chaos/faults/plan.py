"""Which faults an episode has, and when: drawn from its seed alone."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial

from tests.chaos.faults import faults, mesh_faults, store_faults
from tests.chaos.faults.faults import Fault

# A theme: faults to draw from with their weights, and how many there are.
THEMES: dict[str, tuple[dict[Fault, int], tuple[int, int]]] = {
    "points": ({faults.point: 1}, (4, 7)),
    "kills": ({faults.kill: 5, faults.kill_envoy: 1, faults.point: 1}, (3, 6)),
    "freezes": ({faults.freeze: 3, faults.late_flush: 1, faults.pause: 2, faults.kill: 1}, (2, 3)),
    "network": ({faults.network: 3, faults.partition: 3}, (2, 4)),
    "stores": (
        {
            faults.flush: 2,
            faults.valkey_down: 2,
            faults.postgres_down: 3,
            faults.disk_full: 2,
            faults.clock: 3,
            faults.point: 1,
        },
        (3, 4),
    ),
    "drains": ({faults.drain: 1}, (2, 3)),
    "mixed": (
        {
            faults.point: 4,
            faults.kill: 3,
            faults.network: 3,
            faults.partition: 2,
            faults.freeze: 1,
            faults.pause: 2,
            faults.flush: 1,
            faults.valkey_down: 1,
            faults.postgres_down: 2,
            faults.clock: 2,
            faults.kill_envoy: 1,
            faults.drain: 1,
        },
        (4, 6),
    ),
    "postgres": (
        {
            store_faults.postgres_frozen: 2,
            store_faults.postgres_locked: 3,
            store_faults.postgres_full: 2,
            store_faults.postgres_terminated: 2,
            faults.kill: 1,
        },
        (2, 3),
    ),
    "valkey": (
        {
            store_faults.valkey_full: 2,
            store_faults.valkey_slow: 2,
            store_faults.valkey_password: 2,
            store_faults.valkey_stale: 3,
            faults.kill: 2,
        },
        (3, 4),
    ),
    "edge": ({mesh_faults.envoy_frozen: 2, mesh_faults.endpoints_bad: 3, faults.kill: 1}, (2, 3)),
    "whole": (
        {mesh_faults.supervisor_lost: 3, mesh_faults.machine_lost: 2, mesh_faults.scale_zero: 3},
        (1, 2),
    ),
    # With runs of several megabytes beside the others.
    "large": (
        {
            faults.kill: 4,
            faults.drain: 1,
            faults.postgres_down: 1,
            faults.valkey_down: 1,
            store_faults.postgres_terminated: 1,
        },
        (2, 3),
    ),
    "all": (
        {
            store_faults.postgres_frozen: 1,
            store_faults.postgres_locked: 2,
            store_faults.postgres_full: 1,
            store_faults.postgres_terminated: 2,
            store_faults.valkey_full: 1,
            store_faults.valkey_slow: 1,
            store_faults.valkey_password: 1,
            store_faults.valkey_stale: 2,
            mesh_faults.envoy_frozen: 2,
            mesh_faults.endpoints_bad: 2,
            mesh_faults.supervisor_lost: 2,
            mesh_faults.scale_zero: 1,
            faults.point: 4,
            faults.kill: 3,
            faults.pause: 2,
            faults.network: 2,
        },
        (3, 5),
    ),
}
_WEIGHTS = {
    "points": 5,
    "kills": 3,
    "freezes": 2,
    "network": 4,
    "stores": 3,
    "drains": 1,
    "mixed": 4,
    "postgres": 4,
    "valkey": 3,
    "edge": 3,
    "whole": 3,
    "large": 3,
    "all": 4,
}
# Every fault, by its own name.
FAULTS: dict[str, Fault] = {
    fault.__name__: fault  # type: ignore[attr-defined]
    for drawn in (*(theme for theme, _ in THEMES.values()), (faults.kill_agent, faults.kill_gateway))
    for fault in drawn
}


@dataclass(frozen=True, slots=True)
class Planned:
    """One fault at its time, seconds after the traffic began."""

    at: float
    fault: Fault

    def __str__(self) -> str:
        fault = self.fault
        if isinstance(fault, partial):
            return f"{self.at:.1f} {fault.func.__name__} {fault.keywords}"
        return f"{self.at:.1f} {fault.__name__}"


def theme_of(seed: int) -> str:
    """The theme of a seed: drawn by weight, and the same whatever else is drawn."""
    return random.Random(f"theme-{seed}").choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]


def only(*names: str) -> list[Planned]:
    """These faults alone, one after the other from the first second on.

    Raises:
        KeyError: There is no such fault.
    """
    return [Planned(1.0 + 2.5 * place, FAULTS[name]) for place, name in enumerate(names)]


def plan(rng: random.Random, theme: str, seconds: float) -> list[Planned]:
    """Draws the faults of an episode whose traffic lasts so many seconds."""
    drawn, (least, most) = THEMES[theme]
    count = rng.randint(least, most)
    chosen = rng.choices(list(drawn), list(drawn.values()), k=count)
    return sorted(
        (Planned(rng.uniform(0.5, seconds * 0.85), fault) for fault in chosen), key=lambda planned: planned.at
    )
