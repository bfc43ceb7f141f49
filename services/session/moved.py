"""Tenants that were moved to another cell: whoever follows a log here is told to ask again, and comes there.

What changes something is refused where it is stored; this is for reads that have no end.
"""

import asyncio
import random
from typing import Protocol
from uuid import UUID

import structlog

from meshkit.errors import HermeshError
from meshkit.postgres import tenant_elsewhere
from services.session.tail import Tail

_log = structlog.get_logger("session.moved")

_INTERVAL_S = 1.0


class Moves(Protocol):
    """The part of the store that this needs; see `store.port.Tenants`."""

    async def moved_tenants(self) -> frozenset[UUID]:
        """Returns the tenants that were moved away."""
        ...


class MovedTenants:
    """Those that this replica knows of."""

    def __init__(self, store: Moves, tail: Tail) -> None:
        """Knows of none until `keep_looking` has looked."""
        self._store = store
        self._tail = tail
        self._moved: frozenset[UUID] = frozenset()

    def check(self, tenant_id: UUID) -> None:
        """Raises UnavailableError, TENANT_MOVED, for a tenant that is not here any more."""
        if tenant_id in self._moved:
            raise tenant_elsewhere("TENANT_MOVED")

    async def look(self) -> None:
        """Looks once, and wakes the watches of those that went."""
        moved = await self._store.moved_tenants()
        gone, self._moved = moved - self._moved, moved
        if gone:
            _log.info("tenants were moved to another cell", tenants=[str(tenant_id) for tenant_id in gone])
            self._tail.wake_tenants(gone)

    async def keep_looking(self) -> None:
        """Looks now and then until cancelled."""
        jitter = random.Random()  # noqa: S311 -- spreads load, keeps no secret
        while True:
            try:
                await self.look()
            except HermeshError as error:
                _log.warning("moved tenants could not be looked up", error=str(error))
            await asyncio.sleep(_INTERVAL_S * jitter.uniform(0.8, 1.2))
