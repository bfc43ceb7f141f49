"""Redis: a cache and a live tail that may be slow, wrong or gone at any moment without harm."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

import hiredis
import redis.asyncio
import redis.asyncio.retry
import redis.backoff
import redis.exceptions
import redis.maint_notifications
import structlog

from meshkit.errors import StartupError

T = TypeVar("T")

_log = structlog.get_logger("meshkit.redis")

# PostgreSQL answers in about a millisecond: waiting longer than this for a cache is worse than having none.
TIMEOUT = 0.25
_MAX_CONNECTIONS = 64

REDIS_ERRORS = (redis.exceptions.RedisError, OSError, TimeoutError)


class _FastPacking:
    """Encodes commands in C: redis-py's asyncio connections do it in Python, argument by argument."""

    def pack_command(self, *args: Any) -> list[bytes]:
        """Returns a command as it goes over the wire.

        Raises:
            DataError: An argument is neither text, bytes nor a number.
        """
        name = args[0]
        if isinstance(name, str) and " " in name:
            # "SCRIPT LOAD" is two words there.
            args = (*name.split(), *args[1:])
        try:
            return [hiredis.pack_command(args)]
        except TypeError as error:
            raise redis.exceptions.DataError(str(error)) from error


class _Connection(_FastPacking, redis.asyncio.Connection):
    pass


class _SSLConnection(_FastPacking, redis.asyncio.SSLConnection):
    pass


class _UnixConnection(_FastPacking, redis.asyncio.UnixDomainSocketConnection):
    pass


_CONNECTIONS = {"redis": _Connection, "rediss": _SSLConnection, "unix": _UnixConnection}


def open_redis(
    url: str, *, max_connections: int = _MAX_CONNECTIONS, timeout: float = TIMEOUT
) -> redis.asyncio.Redis | None:
    """Returns a client for a URL, or None for an empty one; connects at first use.

    Replies are bytes. Every wait ends after 0.25 s and nothing is tried again behind the caller's back: a
    caller goes to PostgreSQL in its place. Close it with `aclose()`.

    Args:
        url: `redis://`, `rediss://` or `unix://`.
        max_connections: Most connections; a call beyond them fails at once.
        timeout: Longest wait for a reply in seconds; longer only for a client of blocking reads.

    Raises:
        StartupError: The URL cannot be used.
    """
    if not url:
        return None
    try:
        scheme = urlsplit(url).scheme
        if scheme not in ("redis", "rediss", "unix"):
            raise ValueError(scheme)
        client: redis.asyncio.Redis = redis.asyncio.Redis.from_url(
            url,
            socket_timeout=timeout,
            socket_connect_timeout=TIMEOUT,
            retry=redis.asyncio.retry.Retry(redis.backoff.NoBackoff(), 0),
            retry_on_error=[],
            max_connections=max_connections,
            health_check_interval=0,
            decode_responses=False,
            maint_notifications_config=redis.maint_notifications.MaintNotificationsConfig(enabled=False),
        )
        client.connection_pool.connection_class = _CONNECTIONS[scheme]
    except ValueError as error:
        raise StartupError("HERMESH_REDIS_URL must be redis://host:port, rediss:// or unix://path") from error
    return client


class BreakerOpenError(Exception):
    """Redis failed a moment ago and is not asked again yet."""


class Breaker:
    """Keeps a dead Redis from costing its timeout on every call.

    After `failures` failures in a row it opens for about `open_seconds` (with jitter, so that replicas do not
    come back together); then one call is let through to try, and the others still see it open until that one
    ends.

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
            _log.info("redis answers again", breaker=self._name)
        self._failures = 0
        self._open_until = None
        self._trying = False

    def failure(self) -> None:
        """Records a call that failed."""
        self._failures += 1
        if self._trying or (self._open_until is None and self._failures >= self._limit):
            if self._open_until is None:
                _log.warning("redis does not answer; going on without it", breaker=self._name)
            self._open_until = self._clock() + self._open_seconds * self._random.uniform(0.75, 1.25)
        self._trying = False

    def cancelled(self) -> None:
        """Records a call that ended without telling anything, such as a cancelled one."""
        self._trying = False

    async def run(self, call: Callable[[], Awaitable[T]]) -> T:
        """Makes a call and records how it ended.

        A reply that is an error (WRONGTYPE, a script's own) shows that Redis answers: it passes through and
        does not open the breaker.

        Raises:
            BreakerOpenError: The breaker is open; nothing was sent.
        """
        if not self.allow():
            raise BreakerOpenError(self._name)
        try:
            result = await call()
        except asyncio.CancelledError:
            self.cancelled()
            raise
        except redis.exceptions.ResponseError:
            self.success()
            raise
        except REDIS_ERRORS:
            self.failure()
            raise
        except BaseException:
            self.cancelled()
            raise
        self.success()
        return result
