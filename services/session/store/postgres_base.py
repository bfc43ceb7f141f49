"""What the parts of the PostgreSQL store share: connections with a deadline, and errors that callers know."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, nullcontext
from typing import Any, TypeAlias
from uuid import UUID

import asyncpg
import structlog

from meshkit.commit_watch import CommitWatch
from meshkit.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    HermeshError,
    InternalError,
    NotFoundError,
)
from meshkit.postgres import changes, load_sql, map_pg_error, refusal
from meshkit.schemas import in_schema
from services.session import metrics
from services.session.store.standby_reads import StandbyReads

_log = structlog.get_logger("session.store")

Record: TypeAlias = "asyncpg.Record"
Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"
Connection: TypeAlias = "asyncpg.pool.PoolConnectionProxy[asyncpg.Record]"

_SQL = load_sql("services.session.store.sql", "upkeep.sql")

SCHEMA = "session"
ACQUIRE_TIMEOUT = 5.0
CONFIRM_TIMEOUT = 5.0
# What PostgreSQL refused is held to be so still for this long: reads may work all the while, and whoever
# waits to write asks again far sooner.
REFUSAL_SECONDS = 10.0

# What migrations raise with a SQLSTATE of class HM; the message is the reason.
_RAISED: Mapping[str, type[HermeshError]] = {
    "HM404": NotFoundError,
    "HM409": AlreadyExistsError,
    "HM412": FailedPreconditionError,
}
_MESSAGES: Mapping[str, str] = {
    "SESSION_NOT_FOUND": "no such session",
    "RUN_NOT_FOUND": "no such run",
    "TOOL_CALL_NOT_FOUND": "no such tool call",
    "REQUEST_ID_REUSED": "the request id was used for another request",
    "SESSION_BUSY": "the session has an unfinished run",
    "ACTION_NOT_REQUIRED": "the tool call does not wait for a decision",
}


def translate(error: BaseException, ids: Mapping[str, UUID | str], *, sent: bool = False) -> HermeshError:
    """Returns the error to raise for one of the driver, and logs those that are bugs.

    Args:
        error: What asyncpg raised.
        ids: What the statement was about, for the error's metadata.
        sent: As `map_pg_error` takes it.
    """
    kind = _RAISED.get(getattr(error, "sqlstate", None) or "")
    if kind is not None:
        reason = str(error.args[0])
        return kind(reason, _MESSAGES.get(reason, ""), metadata={key: str(ids[key]) for key in ids})
    mapped = map_pg_error(error, sent=sent)
    if isinstance(mapped, InternalError):
        _log.error("a statement failed by a bug", exc_info=error)
    return mapped


def not_found(kind: str, identifier: UUID | str) -> NotFoundError:
    """Returns the error for a thing that is not there or another tenant's; `kind` such as `session`."""
    reason = f"{kind.upper()}_NOT_FOUND"
    return NotFoundError(reason, _MESSAGES[reason], metadata={f"{kind}_id": str(identifier)})


class PostgresPart:
    """A part of the store over a pool that the store's owner opens and closes."""

    def __init__(
        self,
        pool: Pool,
        *,
        ttl_ms: int,
        run_timeout_ms: int,
        standby: StandbyReads | None = None,
        schema: str = SCHEMA,
    ) -> None:
        """Makes a part.

        Args:
            pool: Connections as `meshkit.postgres.open_pool` makes them.
            ttl_ms: How long a lease lasts.
            run_timeout_ms: The time limit of a run for which neither it nor its tenant sets one.
            standby: Where old events are read first.
            schema: What the schema is called in this database.
        """
        self._pool = pool
        self._standby = standby
        self._schema = schema
        self._ttl_ms = ttl_ms
        self._run_timeout_ms = run_timeout_ms
        self._refused = ""
        self._refused_until = 0.0
        # Whether a commit waits for a standby, as of the last look.
        self._synchronous = False
        self._confirming = asyncio.Lock()
        self._confirm_asked = self._confirm_done = 0

    @property
    def refused(self) -> str | None:
        """What PostgreSQL lacked when it refused a statement a moment ago, such as room; None for nothing."""
        return self._refused if time.monotonic() < self._refused_until else None

    async def synchronous(self) -> bool:
        """Returns whether commits wait for a standby, by the server's settings as they are now."""
        self._synchronous = (await self._one(_SQL["synchronous"]))["synchronous"]
        return self._synchronous

    async def archive_fails(self) -> bool:
        """Returns whether the write-ahead log is to be archived and was not when last tried."""
        fails: bool = (await self._one(_SQL["archive_fails"]))["fails"]
        return fails

    async def position(self) -> int:
        """Returns how far this server's log is, in bytes; of a primary only."""
        position: int = (await self._one(_SQL["position"]))["position"]
        return position

    async def confirm(self) -> None:
        """Returns once all that could be read until now is where a failover keeps it.

        A read may see what only this server has: what was committed while a wait for the standby ended, or
        before a crash. All who ask while one such commit is under way share the next.

        Raises:
            UnavailableError: No standby says so in time.
        """
        if not self._synchronous:
            return
        self._confirm_asked += 1
        mine = self._confirm_asked
        try:
            async with asyncio.timeout(CONFIRM_TIMEOUT):
                await self._confirm(mine)
        except TimeoutError as error:
            raise map_pg_error(error) from error

    async def _confirm(self, mine: int) -> None:
        async with self._confirming:
            if self._confirm_done >= mine:
                return
            covered = self._confirm_asked
            await self._one(_SQL["confirm"])
            self._confirm_done = covered

    @asynccontextmanager
    async def _connection(
        self, ids: Mapping[str, UUID | str], *, writes: bool = True
    ) -> AsyncIterator[Connection]:
        """Yields a connection; the driver's errors inside the block become ours.

        Args:
            ids: What it is about, for an error's metadata.
            writes: Whether what is done with it changes anything.
        """
        sent = False
        try:
            connection = await self._acquire()
            try:
                with CommitWatch(connection) if self._synchronous and writes else nullcontext():
                    sent = writes
                    yield connection
            finally:
                await self._pool.release(connection)
        except HermeshError:
            raise
        except Exception as error:
            raise self._failed(error, ids, sent=sent) from error

    def _here(self, statement: str) -> str:
        """A statement as this database's schema is called."""
        return statement if self._schema == SCHEMA else in_schema(statement, SCHEMA, self._schema)

    async def _acquire(self) -> Connection:
        """Takes a connection of the pool; the caller gives it back. Raises what the driver does."""
        # The pool's own limit on this wait makes a task of each.
        async with asyncio.timeout(ACQUIRE_TIMEOUT):
            return await self._pool.acquire()

    def _failed(self, error: Exception, ids: Mapping[str, UUID | str], *, sent: bool) -> HermeshError:
        """Notes what PostgreSQL refuses; returns the error to raise."""
        lacks = refusal(error)
        if lacks is not None:
            self._refused = lacks
            self._refused_until = time.monotonic() + REFUSAL_SECONDS
            metrics.refusals.labels(getattr(error, "sqlstate", "")).inc()
        return translate(error, ids, sent=sent)

    async def _fetch(self, statement: str, *args: Any, **ids: UUID | str) -> list[Record]:
        """Runs one statement and returns its rows; `ids` go to an error's metadata."""
        if self._synchronous:
            async with self._connection(ids, writes=changes(statement)) as connection:
                found: list[Record] = await connection.fetch(self._here(statement), *args)
                return found
        # Not by `_connection`: this carries every flush, and a context manager is a third of its own cost.
        sent = False
        try:
            connection = await self._acquire()
            try:
                sent = True
                rows: list[Record] = await connection.fetch(self._here(statement), *args)
            finally:
                await self._pool.release(connection)
        except Exception as error:
            raise self._failed(error, ids, sent=sent and changes(statement)) from error
        return rows

    async def _fetchrow(self, statement: str, *args: Any, **ids: UUID | str) -> Record | None:
        """Runs one statement and returns its first row."""
        async with self._connection(ids, writes=changes(statement)) as connection:
            return await connection.fetchrow(self._here(statement), *args)

    async def _one(self, statement: str, *args: Any, **ids: UUID | str) -> Record:
        """Runs one statement that always gives a row."""
        row = await self._fetchrow(statement, *args, **ids)
        if row is None:
            raise InternalError()
        return row
