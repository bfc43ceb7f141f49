"""Calls of one shard of Redis with one kind of error, and scripts that a flushed Redis gets again."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from uuid import UUID

import redis.asyncio
import redis.exceptions

from meshkit.errors import UnavailableError
from meshkit.redis import Breaker, BreakerOpenError
from meshkit.redis_servers import REDIS_ERRORS, RedisLink
from meshkit.redis_trouble import Trouble, explain
from services.session import metrics


class Script:
    """A Lua script and the name that Redis knows it by."""

    def __init__(self, text: str) -> None:
        """Makes a script; Redis learns of it at its first call."""
        self.text = text
        self.sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


def stop_if_cancelled() -> None:
    """Ends a task that was cancelled while it waited for Redis.

    redis-py sends under `asyncio.wait_for`, which in Python 3.11 loses a cancellation that comes just when
    the send is done. Call this after each wait.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def session_key(session_id: UUID, tag: str, name: str) -> str:
    """Returns a session's key; all of a session, and with a tag of a shard, are of one slot of a cluster."""
    return f"hermesh:{{{tag}}}:{session_id}:{name}" if tag else f"hermesh:{{{session_id}}}:{name}"


async def note(link: RedisLink, error: BaseException) -> Trouble | None:
    """Counts a failed call, and leaves a server that another one has taken the place of.

    Returns:
        What is wrong with Redis; None if it is the data.
    """
    trouble = explain(error)
    if trouble is not None:
        metrics.redis_failures.labels(trouble.cause).inc()
        if trouble.elsewhere:
            await link.leave()
    return trouble


class Caller:
    """Calls one shard, through a breaker."""

    def __init__(self, link: RedisLink, breaker: Breaker, tag: str = "") -> None:
        """Makes a caller over a link that its owner closes.

        Args:
            link: The shard's.
            breaker: Of this kind of calls.
            tag: The shard's; see `session_key`.
        """
        self._link = link
        self._breaker = breaker
        self.tag = tag

    @property
    def redis(self) -> redis.asyncio.Redis:
        """The client, for what is made before it is run, and for calls that nothing depends on."""
        return self._link.redis

    @property
    def refuses(self) -> bool:
        """True while the shard is known to be down and calls fail at once."""
        return self._breaker.is_open

    @property
    def trouble(self) -> Trouble | None:
        """What is wrong, from the call that showed it to the next one that works."""
        return self._breaker.trouble

    async def run(self, call: Callable[[], Awaitable[Any]]) -> Any:
        """Makes a call unless the breaker is open.

        Raises:
            UnavailableError: Redis does not answer, or answers with an error.
        """
        try:
            result = await self._breaker.run(call)
            stop_if_cancelled()
            return result
        except BreakerOpenError as error:
            raise UnavailableError("SERVICE_UNAVAILABLE", "Redis cannot be used") from error
        except REDIS_ERRORS as error:
            trouble = await note(self._link, error)
            text = trouble.text if trouble else "Redis answers with an error"
            raise UnavailableError("SERVICE_UNAVAILABLE", text) from error

    async def script(self, script: Script, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        """Runs a script.

        Raises:
            UnavailableError: As `run`.
        """
        return await self.run(lambda: self.attempt(script, keys, arguments))

    async def attempt(self, script: Script, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        """Runs a script past the breaker. Raises what the driver raises."""
        execute = self._link.redis.execute_command
        rest = (len(keys), *keys, *arguments)
        try:
            return await execute("EVALSHA", script.sha, *rest)  # type: ignore[no-untyped-call]
        except redis.exceptions.NoScriptError:
            # Redis is new or was flushed; from here on it knows it.
            return await execute("EVAL", script.text, *rest)  # type: ignore[no-untyped-call]

    async def probe(self, call: Callable[[], Awaitable[Any]]) -> Trouble | None:
        """Makes a call past the breaker, which goes by how it ends.

        Returns:
            What is wrong, if it failed.
        """
        try:
            if await self._link.moved():
                await self._link.leave()
            await call()
            stop_if_cancelled()
        except REDIS_ERRORS as error:
            trouble = await note(self._link, error) or Trouble("reply", "Redis answers with an error")
            self._breaker.trip(trouble)
            return trouble
        self._breaker.success()
        return None
