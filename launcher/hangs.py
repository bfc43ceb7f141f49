"""Processes that run and do not answer: stopped, deadlocked, spinning. They are killed, to be started again.

Envoy takes a replica that hangs off within seconds, and its leases end by themselves; but only a new process
gives the mesh its place back. The limit lies above a lease's time, so that what wakes up in between finds
itself fenced off and goes on.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable

from launcher import probes
from launcher.children import Child, Children, note
from launcher.processes import Identity

LOOK_SECONDS = 2.5
# Between two looks there is more than this only where the machine slept, or this process did not run.
LATE_SECONDS = 3 * (LOOK_SECONDS + probes.SECONDS)
# PostgreSQL does not answer while it recovers, which takes as long as it takes; killed, it would begin anew.
NEVER = frozenset({"postgresql"})
# A model that answers nobody else while it computes is busy.
BUSY = frozenset({"model"})


def boottime() -> float:
    """Seconds since the machine booted, those in which it slept among them."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class HangWatch:
    """Asks every process whether it lives, and kills what has not answered for too long.

    Args:
        children: Whom to ask.
        limit: Seconds without an answer.
        clock: Goes on while the machine sleeps.
    """

    def __init__(self, children: Children, limit: float, clock: Callable[[], float] = boottime) -> None:
        self._children = children
        self._limit = limit
        self._clock = clock
        self._looked = clock()
        self._silent: dict[Identity, float] = {}
        self._cpu: dict[Identity, int] = {}

    async def run(self) -> None:
        """Looks until cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await self.look()

    async def look(self) -> None:
        """Asks all of them once."""
        asked = [
            (child, child.identity)
            for child in self._children.all.values()
            if child.identity is not None
            and child.ready.is_set()
            and not child.stopping
            and child.spec.service not in NEVER
        ]
        answers = await asyncio.gather(*(self._lives(child, identity) for child, identity in asked))
        self._cpu = {identity: self._cpu[identity] for _, identity in asked if identity in self._cpu}
        now = self._clock()
        slept, self._looked = now - self._looked > LATE_SECONDS, now
        silent = [one for one, answered in zip(asked, answers, strict=True) if not answered]
        if slept or len(silent) * 2 > len(asked) > 1:
            # The machine slept, or it is so busy that most are late: that says nothing about any of them.
            self._silent.clear()
            return
        self._silent = {identity: self._silent.get(identity, now) for _, identity in silent}
        for child, identity in silent:
            seconds = now - self._silent[identity]
            if seconds >= self._limit and child.identity == identity and not child.stopping:
                note(f"{child.spec.replica} has not answered for {seconds:.0f} s; killing it")
                child.hung = f"killed: it did not answer for {seconds:.0f} s"
                identity.send(signal.SIGKILL)

    async def _lives(self, child: Child, identity: Identity) -> bool:
        if await self._answers(child):
            return True
        if child.spec.service not in BUSY:
            return False
        before, self._cpu[identity] = self._cpu.get(identity), identity.cpu_ticks
        return before is None or before != self._cpu[identity]

    async def _answers(self, child: Child) -> bool:
        try:
            if child.spec.probe is not None:
                return await child.spec.probe()
            return await probes.alive(child.metrics_address)
        except Exception as error:
            # Whatever a probe fails by, it is no reason to kill what is asked.
            note(f"{child.spec.replica} could not be asked: {type(error).__name__}: {error}")
            return True
