"""UUIDv7 identifiers (RFC 9562): sortable by the time they were made."""

from __future__ import annotations

import os
import threading
from uuid import UUID

from meshkit.clock import now_ms

_VERSION = 0x7 << 76
_VARIANT = 0x2 << 62
_RAND_A_BITS = 12
_RAND_B_BITS = 62
_RANDOM_BITS = _RAND_A_BITS + _RAND_B_BITS
_RANDOM_MASK = (1 << _RANDOM_BITS) - 1
_RAND_B_MASK = (1 << _RAND_B_BITS) - 1
_MAX_MS = (1 << 48) - 1


class _Generator:
    """Makes ids that strictly grow within one process, whatever the clock does."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ms = -1
        self._random = 0

    def next(self) -> UUID:
        fresh = os.urandom(10)
        with self._lock:
            ms = now_ms()
            if ms > self._ms:
                self._ms = ms
                # The top bit starts at zero, so that a millisecond has room for 2**73 / 2**32 steps.
                self._random = int.from_bytes(fresh, "big") & (_RANDOM_MASK >> 1)
            else:
                # Same millisecond, or the clock went back: go on from the last id by a random step, so that
                # ids stay in order and the next one cannot be guessed.
                self._random += 1 + int.from_bytes(fresh[:4], "big")
                if self._random > _RANDOM_MASK:
                    self._ms += 1
                    self._random = int.from_bytes(fresh, "big") & (_RANDOM_MASK >> 1)
            ms, random = self._ms, self._random
        return _compose(ms, random)

    def forget(self) -> None:
        """Drops the state inherited over a fork: two processes must not walk the same sequence."""
        self._lock = threading.Lock()
        self._ms = -1


def _compose(ms: int, random: int) -> UUID:
    value = (ms << 80) | _VERSION | ((random >> _RAND_B_BITS) << 64) | _VARIANT | (random & _RAND_B_MASK)
    return UUID(int=value)


_generator = _Generator()
os.register_at_fork(after_in_child=_generator.forget)


def uuid7() -> UUID:
    """Returns a new UUIDv7, greater than every one this process made before."""
    return _generator.next()


def uuid7_from_ms(ms: int) -> UUID:
    """Returns the smallest UUIDv7 of a millisecond: the lower bound for a range over ids.

    Args:
        ms: Unix time in milliseconds, 0 to 2**48 - 1.

    Raises:
        ValueError: The time does not fit.
    """
    if not 0 <= ms <= _MAX_MS:
        raise ValueError(f"a UUIDv7 holds 0 to {_MAX_MS} ms, not {ms}")
    return _compose(ms, 0)


def uuid7_ms(u: UUID) -> int:
    """Returns the Unix time in milliseconds that a UUIDv7 carries.

    Raises:
        ValueError: The id is of another version.
    """
    if u.version != 7:
        raise ValueError(f"{u} is not a UUIDv7")
    return u.int >> 80
