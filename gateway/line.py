"""The line before the mesh: so many new runs are being accepted at once, the others wait for their turn.

Without it a gateway under a flood works on all of them at the same time, and each is slow: what is accepted
in 20 ms one after the other takes all of them seconds. A place in the line costs a future. Tenants take
turns, each has its share of the line, and who has waited too long is told when to come back. A turn is short:
whoever waits for a replica that hangs does not keep the others from going to another one.
"""

from __future__ import annotations

import asyncio
from collections import deque
from uuid import UUID

from meshkit.fairness import admits

# Over about so many turns the time between them is averaged.
_LATELY = 16
# After so long the next one has its turn.
TURN_S = 1.0


class LineFull(Exception):
    """There is no place in the line, or it did not move fast enough."""


class Turn:
    """One's turn; it ends by itself after a while."""

    __slots__ = ("_line", "_timer")

    def __init__(self, line: Line) -> None:
        """Made by `Line.enter`."""
        self._line: Line | None = line
        self._timer = asyncio.get_running_loop().call_later(TURN_S, self.end)

    def end(self) -> None:
        """Gives it to the next; a second call does nothing."""
        line, self._line = self._line, None
        if line is not None:
            self._timer.cancel()
            line.leave()


class Line:
    """Hands out turns."""

    def __init__(self, at_once: int, room: int, patience: float) -> None:
        """Makes an empty line.

        Args:
            at_once: Most that have their turn at once.
            room: Most that wait.
            patience: Seconds that one waits at most.
        """
        self._at_once = at_once
        self._room = room
        self._patience = patience
        self._busy = 0
        self._waiting = 0
        # Seconds from one turn to the next while some wait, lately; when the last one began.
        self._gap = 0.0
        self._moved_at = 0.0
        # In the order of their turns; a tenant is here while it has somebody in the line.
        self._tenants: dict[UUID | None, deque[asyncio.Future[None]]] = {}

    @property
    def waiting(self) -> int:
        """How many wait."""
        return self._waiting

    def has_room(self, tenant_id: UUID | None) -> bool:
        """Whether one more of a tenant may come, and has its turn in time as fast as the line moves now."""
        if self._busy < self._at_once:
            return True
        mine = len(self._tenants.get(tenant_id, ()))
        before = min(self._waiting, mine * len(self._tenants))
        return before * self._gap < self._patience and admits(mine, self._waiting, self._room)

    async def enter(self, tenant_id: UUID | None) -> Turn:
        """Returns one's turn when it has come.

        Raises:
            LineFull: It will not be.
        """
        if self._busy < self._at_once:
            self._busy += 1
            return Turn(self)
        if not self.has_room(tenant_id):
            raise LineFull
        loop = asyncio.get_running_loop()
        if not self._waiting:
            self._moved_at = loop.time()
        turn = loop.create_future()
        self._tenants.setdefault(tenant_id, deque()).append(turn)
        self._waiting += 1
        try:
            async with asyncio.timeout(self._patience):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                # It was given just now.
                self.leave()
            else:
                self._forget(tenant_id, turn)
            if isinstance(error, TimeoutError):
                raise LineFull from None
            raise
        return Turn(self)

    def leave(self) -> None:
        """Gives one's turn to the next: the first of the tenant that had none for longest."""
        while self._tenants:
            tenant_id = next(iter(self._tenants))
            line = self._tenants.pop(tenant_id)
            turn = line.popleft()
            self._waiting -= 1
            if line:
                self._tenants[tenant_id] = line
            if not turn.done():
                now = asyncio.get_running_loop().time()
                self._gap += (now - self._moved_at - self._gap) / _LATELY
                self._moved_at = now
                turn.set_result(None)
                return
        self._busy -= 1

    def _forget(self, tenant_id: UUID | None, turn: asyncio.Future[None]) -> None:
        line = self._tenants.get(tenant_id)
        if line is not None and turn in line:
            line.remove(turn)
            self._waiting -= 1
            if not line:
                del self._tenants[tenant_id]
