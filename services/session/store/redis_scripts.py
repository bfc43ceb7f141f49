"""Calls of Redis with one kind of error, and scripts that a flushed Redis gets again."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import redis.asyncio
import redis.exceptions

from meshkit.errors import UnavailableError
from meshkit.redis import REDIS_ERRORS, Breaker, BreakerOpenError


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


async def guarded(breaker: Breaker, call: Callable[[], Awaitable[Any]]) -> Any:
    """Makes a call unless the breaker is open.

    Raises:
        UnavailableError: Redis does not answer, or answers with an error.
    """
    try:
        result = await breaker.run(call)
        stop_if_cancelled()
        return result
    except (BreakerOpenError, *REDIS_ERRORS) as error:
        raise UnavailableError("SERVICE_UNAVAILABLE", "Redis does not answer") from error


async def run_script(
    client: redis.asyncio.Redis,
    breaker: Breaker,
    script: Script,
    keys: Sequence[str],
    arguments: Sequence[Any],
) -> Any:
    """Runs a script.

    Raises:
        UnavailableError: As `guarded`.
    """

    async def call() -> Any:
        command = ("EVALSHA", script.sha, len(keys), *keys, *arguments)
        try:
            return await client.execute_command(*command)  # type: ignore[no-untyped-call]
        except redis.exceptions.NoScriptError:
            # Redis is new or was flushed.
            await client.script_load(script.text)
            return await client.execute_command(*command)  # type: ignore[no-untyped-call]

    return await guarded(breaker, call)
