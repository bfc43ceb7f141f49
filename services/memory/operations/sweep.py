"""The removal of expired memories, in the background of every replica."""

from __future__ import annotations

import asyncio
import random

import structlog

from meshkit.errors import HermeshError
from services.memory import metrics
from services.memory.store.port import MemoryStore

_log = structlog.get_logger("memory.sweep")

BATCH = 500


async def sweep_once(store: MemoryStore) -> int:
    """Removes all that has expired, batch by batch, and returns how many.

    Nothing depends on it in time: what has expired is not returned by any read.
    """
    total = 0
    while True:
        removed = await store.sweep(BATCH)
        total += removed
        metrics.EXPIRED.inc(removed)
        if removed < BATCH:
            return total


async def sweep_forever(store: MemoryStore, seconds: float) -> None:
    """Sweeps each `seconds`, with jitter so that replicas do not meet; runs until it is cancelled."""
    while True:
        await asyncio.sleep(seconds * random.uniform(0.75, 1.25))  # noqa: S311 -- spreads load only
        try:
            removed = await sweep_once(store)
        except HermeshError as error:
            _log.warning("expired memories were not removed", reason=error.reason)
        else:
            if removed:
                _log.info("expired memories removed", count=removed)
