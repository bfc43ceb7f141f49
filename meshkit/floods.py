"""Log lines that anybody can cause, without a key and as often as they like: a few of a kind a second are
written.
"""

from __future__ import annotations

import time
from collections.abc import Callable

PER_SECOND = 5
_MAX_KINDS = 100


class Floods:
    """Says which lines of a kind are written, and how many were not."""

    def __init__(self, per_second: int = PER_SECOND, clock: Callable[[], float] = time.monotonic) -> None:
        """Lets so many lines of a kind through each second."""
        self._per_second = per_second
        self._clock = clock
        # By kind: when its second began, the lines written in it, and those left out since the last one
        # written.
        self._kinds: dict[str, list[float]] = {}

    def take(self, kind: str) -> bool:
        """Returns whether a line of this kind is written now."""
        now = self._clock()
        found = self._kinds.get(kind)
        if found is None:
            if len(self._kinds) >= _MAX_KINDS:
                # Kinds of seconds that are over make room: nobody fills the table for good.
                self._kinds = {kind: one for kind, one in self._kinds.items() if now - one[0] < 1.0}
            if len(self._kinds) >= _MAX_KINDS:
                return False
            found = self._kinds[kind] = [now, 0, 0]
        if now - found[0] >= 1.0:
            found[0], found[1] = now, 0
        if found[1] >= self._per_second:
            found[2] += 1
            return False
        found[1] += 1
        return True

    def left_out(self, kind: str) -> dict[str, int]:
        """Returns, once, how many lines of a kind were left out, as a field of the next line; {} if none
        was.
        """
        found = self._kinds.get(kind)
        if found is None or not found[2]:
            return {}
        count, found[2] = int(found[2]), 0
        return {"left_out": count}
