"""A small discrete-event simulation: a clock, and stations where work waits for one of so many servers."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from itertools import count

Done = Callable[[], None]


class Clock:
    """Simulated time in seconds; what is due at one moment happens in the order it was asked for."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Done]] = []
        self._number = count()

    def after(self, seconds: float, then: Done) -> None:
        """Has something happen so many seconds from now."""
        heapq.heappush(self._due, (self.now + seconds, next(self._number), then))

    def run(self, until: float = float("inf")) -> None:
        """Lets time pass until nothing is due any more, or until a moment."""
        due = self._due
        while due and due[0][0] <= until:
            self.now, _, then = heapq.heappop(due)
            then()
        if until != float("inf"):
            self.now = until


class Station:
    """Servers with one queue before them, first come first served.

    Args:
        clock: whose time passes.
        servers: how much is worked on at once.
        below: where a server's work needs a place in its turn: a process's single thread, and a core for it.

    Attributes:
        worked: seconds of work done so far, of all servers together.
        present: how many are here, waiting or worked on.
    """

    def __init__(self, clock: Clock, servers: int, below: Station | None = None) -> None:
        self._clock = clock
        self._free = servers
        self._below = below
        self._waiting: deque[tuple[float, Done]] = deque()
        self.servers = servers
        self.worked = 0.0
        self.present = 0

    def visit(self, seconds: float, done: Done) -> None:
        """Brings work of so many seconds; `done` is called when it is finished."""
        self.present += 1
        if self._free:
            self._free -= 1
            self._start(seconds, done)
        else:
            self._waiting.append((seconds, done))

    def take(self, then: Done) -> None:
        """Takes a server when one is free; whoever took it gives it back by `give`."""
        self.present += 1
        if self._free:
            self._free -= 1
            then()
        else:
            self._waiting.append((-1.0, then))

    def give(self, seconds: float) -> None:
        """Gives a server back that was held for so many seconds."""
        self.present -= 1
        self.worked += seconds
        self._next()

    def _start(self, seconds: float, done: Done) -> None:
        def finished() -> None:
            self.present -= 1
            self.worked += seconds
            self._next()
            done()

        if self._below is not None:
            self._below.visit(seconds, finished)
        else:
            self._clock.after(seconds, finished)

    def _next(self) -> None:
        if not self._waiting:
            self._free += 1
            return
        seconds, done = self._waiting.popleft()
        if seconds < 0:
            done()
        else:
            self._start(seconds, done)
