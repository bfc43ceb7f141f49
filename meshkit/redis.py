"""Redis: a cache and a live tail that may be slow, wrong or gone at any moment without harm."""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog

from meshkit.redis_servers import REDIS_ERRORS
from meshkit.redis_trouble import Trouble, explain

T = TypeVar("T")

_log = structlog.get_logger("meshkit.redis")


class BreakerOpenError(Exception):
    """Redis failed a moment ago and is not asked again yet."""


class Breaker:
    """Keeps a dead Redis from costing its timeout on every call.

    After `failures` failures in a row, or one that the server itself is sure about (it is read-only, it
    refuses the password), it opens for about `open_seconds` (with jitter, so that replicas do not come back
    together); then one call is let through to try, and the others still see it open until that one ends.

    Attributes:
        trouble: Why it opened; None while it is closed.

    Example:
        try:
            value = await breaker.run(lambda: client.get(key))
        except REDIS_ERRORS + (BreakerOpenError,):
            value = None
    """

    def __init__(
        self,
        name: str = "redis",
        *,
        failures: int = 3,
        open_seconds: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Makes a closed breaker."""
        self._name = name
        self._limit = failures
        self._open_seconds = open_seconds
        self._clock = clock
        self._failures = 0
        self._open_until: float | None = None
        self._trying = False
        self.trouble: Trouble | None = None
        self._random = random.Random()  # noqa: S311 -- spreads load, keeps no secret

    @property
    def is_open(self) -> bool:
        """True while calls are refused; looking does not take the trial call's place."""
        return self._open_until is not None and (self._trying or self._clock() < self._open_until)

    def allow(self) -> bool:
        """Returns True if a call may be made now; its end must be told to `success` or `failure`."""
        if self._open_until is None:
            return True
        if self._trying or self._clock() < self._open_until:
            return False
        self._trying = True
        return True

    def success(self) -> None:
        """Records a call that worked: the breaker closes."""
        if self._open_until is not None:
            _log.debug("redis can be used again", breaker=self._name)
        self._failures = 0
        self._open_until = None
        self.trouble = None
        self._trying = False

    def failure(self, trouble: Trouble) -> None:
        """Records a call that failed, and why."""
        self._failures += 1
        if self._trying or trouble.sure or (self._open_until is None and self._failures >= self._limit):
            self.trip(trouble)
        self._trying = False

    def trip(self, trouble: Trouble) -> None:
        """Opens it at once, whatever was before."""
        if self._open_until is None:
            _log.debug("redis cannot be used", breaker=self._name, reason=trouble.text)
        self.trouble = trouble
        self._open_until = self._clock() + self._open_seconds * self._random.uniform(0.75, 1.25)

    def cancelled(self) -> None:
        """Records a call that ended without telling anything, such as a cancelled one."""
        self._trying = False

    async def run(self, call: Callable[[], Awaitable[T]]) -> T:
        """Makes a call and records how it ended.

        A reply that is an error about the data (WRONGTYPE, a script's own) shows that Redis works: it passes
        through and does not open the breaker.

        Raises:
            BreakerOpenError: The breaker is open; nothing was sent.
        """
        if not self.allow():
            raise BreakerOpenError(self._name)
        try:
            result = await call()
        except REDIS_ERRORS as error:
            trouble = explain(error)
            if trouble is None:
                self.success()
            else:
                self.failure(trouble)
            raise
        except BaseException:
            self.cancelled()
            raise
        self.success()
        return result
