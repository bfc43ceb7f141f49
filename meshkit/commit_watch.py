"""Commits that PostgreSQL calls done although no synchronous standby has them."""

from __future__ import annotations

from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import asyncpg

from meshkit.postgres import outcome_unknown

# A warning; there is but one that our statements give.
_WAIT_CANCELLED = "01000"


class CommitWatch:
    """Makes a cancelled wait for a synchronous standby an error, for what a connection does within a block.

    Whoever ends that wait (`pg_cancel_backend`, a cancelled call) has the statement succeed with a warning.
    It is committed on this server alone, and a failover takes it back.

    Example:
        with CommitWatch(connection):
            await connection.execute(...)

    Raises:
        UnavailableError: OUTCOME_UNKNOWN, at the end of a block that raised nothing itself.
    """

    __slots__ = ("_cancelled", "_connection")

    def __init__(self, connection: Any) -> None:
        """Watches a connection of a pool, or one of its own."""
        self._connection = connection
        self._cancelled = False

    def __enter__(self) -> Self:
        self._connection.add_log_listener(self._hear)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # One that broke has left its pool, and what listened to it is gone: its own error is the one to tell.
        with suppress(asyncpg.InterfaceError):
            self._connection.remove_log_listener(self._hear)
        if kind is None and self._cancelled:
            raise outcome_unknown()

    def _hear(self, _: object, message: asyncpg.PostgresLogMessage) -> None:
        if message.sqlstate == _WAIT_CANCELLED:
            self._cancelled = True
