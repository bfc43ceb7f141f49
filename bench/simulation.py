"""A small discrete-event simulation: a clock, and stations where work waits for one of so many servers."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from itertools import count

Done = Callable[[], None]
# What a process takes up at once before it looks for more.
MOST_AT_ONCE = 64


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


class Loop:
    """A process of one thread: whenever it is free it takes what waits, at one price and one a piece.

    Args:
        clock: whose time passes.
        wake: seconds for each time that it finds something.
        token: seconds for each token among it.
        below: where its work needs a core.

    Attributes:
        worked: seconds of work so far.
        wakes: how often it found something.
        tokens: how many tokens it has handled.
    """

    servers = 1

    def __init__(self, clock: Clock, wake: float, token: float, below: Station | None = None) -> None:
        self._clock, self._wake, self._token, self._below = clock, wake, token, below
        self._waiting: list[tuple[float, float, Done]] = []
        self._busy = False
        self.worked = 0.0
        self.wakes = 0
        self.tokens = 0.0

    def visit(self, tokens: float, seconds: float, done: Done) -> None:
        """Brings tokens, and work of so many seconds beside; `done` is called when it is finished."""
        self._waiting.append((tokens, seconds, done))
        if not self._busy:
            self._busy = True
            self._start()

    def _start(self) -> None:
        taken = self._waiting[:MOST_AT_ONCE]
        del self._waiting[:MOST_AT_ONCE]
        tokens = sum(one[0] for one in taken)
        seconds = self._wake + self._token * tokens + sum(one[1] for one in taken)
        self.wakes += 1
        self.tokens += tokens

        def finished() -> None:
            self.worked += seconds
            if self._waiting:
                self._start()
            else:
                self._busy = False
            for _, _, done in taken:
                done()

        if self._below is not None:
            self._below.visit(seconds, finished)
        else:
            self._clock.after(seconds, finished)


class Flusher:
    """Writes what has gathered while the write before it was under way; one write at a time.

    Attributes:
        worked: seconds in which a write was under way.
    """

    servers = 1

    def __init__(self, clock: Clock, write: Callable[[float, Done], None]) -> None:
        self._clock, self._write = clock, write
        self.worked = 0.0
        self._waiting: list[tuple[float, Done]] = []
        self._busy = False

    def add(self, tokens: float, done: Done) -> None:
        """Has tokens written; `done` is called when they are."""
        self._waiting.append((tokens, done))
        if not self._busy:
            self._busy = True
            self._start()

    def _start(self) -> None:
        taken = self._waiting[:MOST_AT_ONCE]
        del self._waiting[:MOST_AT_ONCE]
        began = self._clock.now

        def written() -> None:
            self.worked += self._clock.now - began
            if self._waiting:
                self._start()
            else:
                self._busy = False
            for _, done in taken:
                done()

        self._write(sum(tokens for tokens, _ in taken), written)
