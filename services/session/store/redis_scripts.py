"""Calls of Redis with one kind of error, and scripts that a flushed Redis gets again."""

from __future__ import annotations

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


async def guarded(breaker: Breaker, call: Callable[[], Awaitable[Any]]) -> Any:
    """Makes a call unless the breaker is open.

    Raises:
        UnavailableError: Redis does not answer, or answers with an error.
    """
    try:
        return await breaker.run(call)
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
