"""Leases that were granted to this process by calls whose answer never came: nobody works under them.

A claim may commit after whoever waited for it gave up: its session replica died, or PostgreSQL stood still
with the statement in hand. By PostgreSQL's word the run is then ours, so that nobody else takes it before the
lease ends. Only this process can tell such a lease from one that it works under: it looks, and gives them up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import structlog

from meshkit.errors import DeadlineError, HermeshError, UnavailableError
from services.agent import metrics

_log = structlog.get_logger("agent.unheard")

LOOK_SECONDS = 0.5
# So long after the last call without an answer, and after the last look without one, its statement may still
# commit: PostgreSQL's own limits on a statement and on the wait for a lock end it by then.
SETTLED_SECONDS = 8.0


class LeasesPort(Protocol):
    """The part of the session service that is needed here."""

    async def leases(self) -> Sequence[tuple[str, str, int]]:
        """Return the leases that are ours by PostgreSQL's word, each (session id, run id, fence)."""
        ...

    async def release(self, session_id: str, run_id: str, fence: int, *, earlier: bool = True) -> bool:
        """Give a lease up; an earlier fence of ours will do, or not."""
        ...


class Unheard:
    """Gives up what was granted unheard; `run` is its one task.

    Args:
        port: where to look.
        held: whether a run is worked on here, or is being claimed by its id.
        monotonic: a clock.
    """

    def __init__(self, port: LeasesPort, held: Callable[[str], bool], monotonic: Callable[[], float]) -> None:
        self._port = port
        self._held = held
        self._monotonic = monotonic
        self._asking: dict[object, float] = {}
        self._since = float("-inf")
        self._wake = asyncio.Event()

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Make a call inside that may be granted a lease; without an answer, what it got is looked for."""
        call = object()
        self._asking[call] = self._monotonic()
        try:
            yield
        except (UnavailableError, DeadlineError):
            self.missed()
            raise
        finally:
            del self._asking[call]

    def missed(self) -> None:
        """Take that a call, or one try of it, got no answer."""
        self._since = self._monotonic()
        self._wake.set()

    async def run(self) -> None:
        """Look while there may be such leases, until cancelled."""
        while True:
            await self._wake.wait()
            seen: dict[str, float] = {}
            while self._wake.is_set():
                await asyncio.sleep(LOOK_SECONDS)
                asked_at = self._monotonic()
                try:
                    await self.look(seen)
                except HermeshError:
                    self._since = self._monotonic()
                    continue
                if asked_at > self._since + SETTLED_SECONDS:
                    self._wake.clear()

    async def look(self, seen: dict[str, float]) -> None:
        """Look once, and give up what nobody waits for.

        Args:
            seen: when leases were first found that are not worked on, by run; kept between looks. A call that
                was under way then may still bring one of them.
        """
        found = {run_id: (session_id, fence) for session_id, run_id, fence in await self._port.leases()}
        now = self._monotonic()
        for run_id in [run_id for run_id in seen if run_id not in found or self._held(run_id)]:
            del seen[run_id]
        oldest = min(self._asking.values(), default=now)
        for run_id, (session_id, fence) in found.items():
            if self._held(run_id):
                continue
            first = seen.setdefault(run_id, now)
            if oldest < first:
                continue
            del seen[run_id]
            # By this very fence: the run may be claimed here at this moment, under a newer one.
            released = await self._port.release(session_id, run_id, fence, earlier=False)
            metrics.unheard_leases.inc(released)
            _log.info("a lease that was granted unheard is given up", run_id=run_id, released=released)
