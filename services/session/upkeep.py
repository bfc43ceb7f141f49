"""Rounds of upkeep in the store: partitions made and dropped, expired request ids removed."""

import asyncio
import random
from typing import Any, Protocol

import structlog

from meshkit.errors import HermeshError

_log = structlog.get_logger("session.upkeep")

_TIMEOUT = 60.0


class Maintained(Protocol):
    """A store that has upkeep to do."""

    async def maintain(self) -> Any:
        """Does one round; safe on several replicas at once."""
        ...


async def keep_up(store: Maintained, interval: float) -> None:
    """Does a round now and then until cancelled; `interval` is in seconds and gets jitter."""
    jitter = random.Random()  # noqa: S311 -- spreads load, keeps no secret
    while True:
        try:
            async with asyncio.timeout(_TIMEOUT):
                await store.maintain()
        except (HermeshError, TimeoutError) as error:
            _log.warning("a round of upkeep failed; the next one tries again", error=str(error))
        await asyncio.sleep(interval * jitter.uniform(0.8, 1.2))
