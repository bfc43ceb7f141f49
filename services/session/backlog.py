"""How many runs wait, by tenant: what is beyond the bound is refused before anything is written.

Each replica counts in the store now and then, and adds what it queued itself since: the count is a moment
old, and the bound is kept as well as that. Counting exactly would put one row under every submit.
"""

import asyncio
import random
from collections import Counter
from typing import Protocol
from uuid import UUID

import structlog

from meshkit.errors import HermeshError
from meshkit.fairness import admits, overloaded
from services.session import metrics

_log = structlog.get_logger("session.backlog")

_LOOK_S = 0.5
# While little waits, looking again so soon tells nothing.
_CALM_LOOK_S = 2.0
_RETRY_AFTER_MS = 2000


class Queued(Protocol):
    """The part of the store that is needed here."""

    async def queued(self) -> dict[UUID, int]:
        """Returns how many runs of each tenant wait."""
        ...

    async def accepted(self, tenant_id: UUID, request_id: str) -> bool:
        """Returns whether input with this idempotency key was accepted."""
        ...


class Backlog:
    """Keeps the count, and refuses what is too much."""

    def __init__(self, store: Queued, limit: int) -> None:
        """Makes an empty one; at most `limit` runs wait in the whole mesh."""
        self._store = store
        self._limit = limit
        self._waiting: Counter[UUID] = Counter()
        self._total = 0
        self._random = random.Random()  # noqa: S311 -- spreads load, keeps no secret

    async def check(self, tenant_id: UUID, request_id: str) -> None:
        """Refuses new input of a tenant for whose run there is no room.

        Input that was accepted before is not new: whoever did not get the answer, and asks again, must not be
        told that nothing was accepted.

        Raises:
            ResourceExhaustedError: OVERLOADED.
        """
        if admits(self._waiting[tenant_id], self._total, self._limit):
            return
        if request_id and await self._store.accepted(tenant_id, request_id):
            return
        metrics.refused_input.inc()
        raise overloaded("too many runs wait already", _RETRY_AFTER_MS)

    def added(self, tenant_id: UUID) -> None:
        """Counts a run that was queued."""
        self._waiting[tenant_id] += 1
        self._total += 1

    async def look(self) -> None:
        """Counts anew. Raises HermeshError."""
        self._waiting = Counter(await self._store.queued())
        self._total = self._waiting.total()
        metrics.queued_runs.set(self._total)

    async def run(self) -> None:
        """Counts until cancelled."""
        while True:
            wait = _LOOK_S if self._total * 4 > self._limit else _CALM_LOOK_S
            await asyncio.sleep(wait * self._random.uniform(0.7, 1.3))
            try:
                await self.look()
            except HermeshError as error:
                _log.warning("the runs that wait could not be counted", error=str(error))
