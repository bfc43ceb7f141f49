"""Which runs a replica takes: at most so many, fewer while accepting one takes too long, in fair shares.

A refusal costs little and says when to come back; a run that was taken is worked on to its end. Runs that
were accepted before, and wait or lost their agent, have places that new ones cannot take.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from meshkit.errors import ResourceExhaustedError
from meshkit.fairness import admits, overloaded
from services.agent import metrics

RETRY_AFTER_MS = 500
# Of each so many places one is for runs that were accepted before.
KEPT_FOR_QUEUE = 8
# The limit never falls below: so few runs are no overload, whatever makes accepting one slow.
FLOOR = 32
_PERIOD = 0.5
_SAMPLES = 4
_SHRINK = 0.8
_GROW = 0.1


class AdaptiveLimit:
    """How many runs at once a replica can bear: additive growth, multiplicative decrease.

    What is watched is how long the mesh takes to accept a run, the model's part left out. Only when even the
    fastest of a period was too slow are there too many runs: one that waits for a lock, or a store that
    hiccups, tells nothing.

    Args:
        most: the limit is never above.
        target: seconds that accepting a run may take; 0 = the limit is always `most`.
        monotonic: a clock, seconds.
    """

    def __init__(self, most: int, target: float, monotonic: Callable[[], float]) -> None:
        self._most = most
        self._target = target
        self._monotonic = monotonic
        self._floor = min(FLOOR, most)
        self._ends = monotonic() + _PERIOD
        self._fastest = float("inf")
        self._samples = 0
        self.value = most

    def accepted(self, seconds: float, active: int) -> None:
        """Take how long a run took to be accepted, and how many are worked on."""
        if not self._target:
            return
        self._fastest = min(self._fastest, seconds)
        self._samples += 1
        now = self._monotonic()
        if now < self._ends or self._samples < _SAMPLES:
            return
        if self._fastest > self._target:
            self.value = max(self._floor, int(min(self.value, active) * _SHRINK))
        else:
            self.value = min(self._most, self.value + max(1, int(self.value * _GROW)))
        self._ends, self._fastest, self._samples = now + _PERIOD, float("inf"), 0
        metrics.run_limit.set(self.value)


class Admission:
    """Counts the places of a replica.

    Args:
        most: places there are at most.
        target: see `AdaptiveLimit`.
        monotonic: a clock, seconds.
    """

    def __init__(self, most: int, target: float, monotonic: Callable[[], float]) -> None:
        self.limit = AdaptiveLimit(most, target, monotonic)
        self._used = 0
        self._by_tenant: Counter[str] = Counter()

    @property
    def used(self) -> int:
        """How many places are taken."""
        return self._used

    @contextmanager
    def place(self, tenant_id: str | None) -> Iterator[None]:
        """Keep a place for one more run while it is being claimed.

        Args:
            tenant_id: whose new run it is; None for one that was accepted before.

        Raises:
            ResourceExhaustedError: there is none for it.
        """
        limit = self.limit.value
        if tenant_id is None:
            free = self._used < limit
        else:
            free = admits(self._by_tenant[tenant_id], self._used, limit - limit // KEPT_FOR_QUEUE)
        if not free:
            metrics.refused_runs.labels("queued" if tenant_id is None else "new").inc()
            raise full("this replica has no place for another run")
        tenant_id = tenant_id or ""
        self.take(tenant_id)
        try:
            yield
        finally:
            self.give(tenant_id)

    def take(self, tenant_id: str) -> None:
        """Count a run in."""
        self._used += 1
        self._by_tenant[tenant_id] += 1

    def give(self, tenant_id: str) -> None:
        """Count it out."""
        self._used -= 1
        self._by_tenant[tenant_id] -= 1
        if not self._by_tenant[tenant_id]:
            del self._by_tenant[tenant_id]


def full(message: str) -> ResourceExhaustedError:
    """Return the refusal."""
    return overloaded(message, RETRY_AFTER_MS)
