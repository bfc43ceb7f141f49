"""Requests refused for want of a place, told together: a line each would cost more than the refusal.

Each one still has a line of level debug with its id, and its place in the figures.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from uuid import UUID

import structlog

from meshkit.identity import current_identity

_log = structlog.get_logger("gateway.http")

PERIOD_S = 1.0


class Refusals:
    """What was refused since the last line about it."""

    def __init__(self) -> None:
        """Nothing was."""
        self._refused: dict[str, Counter[UUID | None]] = {}

    def add(self, route: str) -> None:
        """Takes that a request of the current tenant was refused."""
        tenants = self._refused.get(route)
        if tenants is None:
            tenants = self._refused[route] = Counter()
        tenants[current_identity().tenant_id] += 1

    def say(self) -> None:
        """Writes a line a route of which some were refused, with the tenant of which most were."""
        refused, self._refused = self._refused, {}
        for route, tenants in refused.items():
            tenant_id, most = tenants.most_common(1)[0]
            _log.info(
                "requests refused",
                path=route,
                status=429,
                count=tenants.total(),
                tenants=len(tenants),
                most_of=str(tenant_id),
                most=most,
            )

    async def report(self) -> None:
        """Says each second what was refused, until it is cancelled; then the rest."""
        try:
            while True:
                await asyncio.sleep(PERIOD_S)
                self.say()
        finally:
            self.say()
