"""Refuses new runs at the door while the mesh has no place for them: that costs a fraction of asking it.

Three bounds, each by tenant. A few new runs at once are on their way to being accepted, others wait in line
(`gateway.line`). Of those that find all agents full a few are queued and followed from here; the others are
told when to come back. And of what a tenant asks for, a part is refused at once, as large as what was refused
lately calls for: client-side throttling, as "Handling Overload" in Google's book on site reliability
engineering has it.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

from prometheus_client import REGISTRY, CollectorRegistry, Gauge
from prometheus_client import Counter as CounterMetric

from gateway.line import Line, LineFull, Turn
from meshkit.errors import HermeshError, ResourceExhaustedError
from meshkit.fairness import admits, overloaded
from meshkit.identity import current_identity
from meshkit.telemetry import begin_at_zero

# So many times what was accepted lately is let through. Less saves more, and takes longer to notice that
# there is room again: with 1.2 a stalled moment was felt for all of the twelve seconds that were measured.
_LET_THROUGH = 2.0
# Refusals that say nothing yet.
_FREE = 8
_HALF_LIFE_S = 1.0
_FORGET = 0.05
_MAX_TENANTS = 10_000
_RETRY_AFTER_MS = 1000
# How many are being accepted at once, and how many wait for that.
_AT_ONCE = 32
_IN_LINE = 512


class DoorMetrics:
    """Figures of the door."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        """Registers them; once a registry."""
        self.refused = begin_at_zero(
            CounterMetric(
                "hermesh_gateway_refused_runs",
                "New runs refused: at the door, or because nothing more may wait.",
                ["where"],
                registry=registry,
            ),
            *("line", "door", "queue"),
        )
        self.waiting = Gauge(
            "hermesh_gateway_waiting_streams",
            "Streams whose run is queued until an agent is free.",
            registry=registry,
        )


@dataclass(slots=True)
class _Lately:
    """What a tenant asked for and got, each counted less the longer ago it was."""

    asked: float = 0.0
    accepted: float = 0.0
    at: float = 0.0

    def fade(self, now: float) -> None:
        factor = 0.5 ** ((now - self.at) / _HALF_LIFE_S)
        self.asked *= factor
        self.accepted *= factor
        self.at = now

    @property
    def refusal(self) -> float:
        """How much of what comes is to be refused, 0 to 1."""
        return max(0.0, (self.asked - _FREE - _LET_THROUGH * self.accepted) / (self.asked + 1))


class Door:
    """Watches what becomes of new runs; acts for the current tenant."""

    def __init__(
        self,
        max_waiting: int,
        metrics: DoorMetrics,
        *,
        line_seconds: float = 2.0,
        monotonic: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        """Makes an open door.

        Args:
            max_waiting: Most streams that wait for an agent.
            metrics: Its figures.
            line_seconds: How long a new run waits for its turn to be accepted.
            monotonic: A clock, seconds.
            rng: Decides whom to refuse.
        """
        self.metrics = metrics
        self._max_waiting = max_waiting
        self._line = Line(_AT_ONCE, _IN_LINE, line_seconds)
        self._monotonic = monotonic
        self._random = rng or random.Random()  # noqa: S311 -- spreads load, keeps no secret
        self._lately: dict[UUID | None, _Lately] = {}
        self._waiting: Counter[UUID | None] = Counter()
        self._wait_ms = float(_RETRY_AFTER_MS)

    def check(self) -> None:
        """Refuses a new run that has hardly a chance.

        One that passes is counted once it is known what became of it: many that come together are no flood.

        Raises:
            ResourceExhaustedError: OVERLOADED.
        """
        tenant_id = current_identity().tenant_id
        lately = self._of(tenant_id)
        if not self._line.has_room(tenant_id):
            # Says nothing of what the mesh would have done.
            self.metrics.refused.labels("line").inc()
            raise self._overloaded()
        if self._random.random() < lately.refusal:
            lately.asked += 1
            self.metrics.refused.labels("door").inc()
            raise self._overloaded()

    async def enter(self) -> Turn:
        """Waits for a run's turn to be accepted.

        Raises:
            ResourceExhaustedError: OVERLOADED: it did not come.
        """
        try:
            return await self._line.enter(current_identity().tenant_id)
        except LineFull:
            self.metrics.refused.labels("line").inc()
            raise self._overloaded() from None

    def accepted(self) -> None:
        """Takes that a run was accepted: by an agent, or to wait for one."""
        lately = self._of(current_identity().tenant_id)
        lately.asked += 1
        lately.accepted += 1

    def refused(self) -> None:
        """Takes that the mesh refused a run."""
        self._of(current_identity().tenant_id).asked += 1

    def wait(self, refusal: HermeshError) -> Waiting:
        """Lets a run that all agents refused be queued; returns its place among those that wait.

        Raises:
            HermeshError: Too many wait; when to come back is in it.
        """
        tenant_id = current_identity().tenant_id
        if not admits(self._waiting[tenant_id], self._waiting.total(), self._max_waiting):
            self.metrics.refused.labels("queue").inc()
            raise self._overloaded() from refusal
        self._waiting[tenant_id] += 1
        self.metrics.waiting.inc()
        return Waiting(self, tenant_id, self._monotonic())

    def now(self) -> float:
        """The door's clock, seconds."""
        return self._monotonic()

    def left(self, tenant_id: UUID | None, waited: float | None) -> None:
        """Takes that one of those that wait is no more; `waited` is how long if its run began, seconds."""
        self._waiting[tenant_id] -= 1
        if not self._waiting[tenant_id]:
            del self._waiting[tenant_id]
        self.metrics.waiting.dec()
        if waited is not None:
            self._wait_ms += (min(waited * 1000, 30_000.0) - self._wait_ms) / 8

    def _overloaded(self) -> ResourceExhaustedError:
        # Who was refused would have waited as long as those before.
        return overloaded("there is no place for another run now", max(200.0, self._wait_ms), self._random)

    def _of(self, tenant_id: UUID | None) -> _Lately:
        now = self._monotonic()
        lately = self._lately.get(tenant_id)
        if lately is None:
            if len(self._lately) >= _MAX_TENANTS:
                self._forget(now)
            lately = self._lately[tenant_id] = _Lately(at=now)
        lately.fade(now)
        return lately

    def _forget(self, now: float) -> None:
        for tenant_id, lately in list(self._lately.items()):
            lately.fade(now)
            if lately.asked < _FORGET:
                del self._lately[tenant_id]


class Waiting:
    """A stream's place among those that wait for an agent."""

    __slots__ = ("_door", "_since", "_tenant_id")

    def __init__(self, door: Door, tenant_id: UUID | None, since: float) -> None:
        """Made by `Door.wait`."""
        self._door = door
        self._tenant_id = tenant_id
        self._since = since

    def begun(self) -> None:
        """Its run began."""
        self._door.left(self._tenant_id, self._door.now() - self._since)

    def given_up(self) -> None:
        """Nobody follows it any more."""
        self._door.left(self._tenant_id, None)
