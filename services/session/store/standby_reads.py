"""Old events read from a standby that keeps up, so that replays cost the primary nothing.

How far a standby is behind is found without any right of a superuser: the primary's place in its log is noted
with the time, and the newest place that the standby has passed says how old its data can be at most. (The
time of the last transaction that it replayed says nothing where nobody writes, and a standby whose connection
to the primary is broken believes that it has everything.)

Nothing here decides anything: what the standby does not have, or what it fails at, the primary is asked for.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Self, TypeAlias
from uuid import UUID

import asyncpg
import structlog

from meshkit.clock import now_ms
from meshkit.errors import HermeshError, StartupError
from meshkit.hosts import split_hosts
from meshkit.postgres import Pool, load_sql, open_pool
from meshkit.schemas import in_schema
from services.session import metrics
from services.session.domain import TERMINAL_EVENTS
from services.session.store.port import PAGE_BYTES

_log = structlog.get_logger("session.standby")

_SQL = load_sql("services.session.store.sql", "upkeep.sql")
_LOG = load_sql("services.session.store.sql", "log.sql")

# What was written so lately is asked of the primary: a standby might not have it yet.
OLD_SECONDS = 60.0
_BEAT_SECONDS = 1.0
_TIMEOUT = 2.0
_CONNECTIONS = 4
_SAMPLES = 600
_UNKNOWN = float("inf")
_FAILURES = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
    TimeoutError,
)

Record: TypeAlias = "asyncpg.Record"
Position = Callable[[], Awaitable[int]]


class Lag:
    """How old a standby's data can be, from places in the primary's log and when they were seen."""

    def __init__(self) -> None:
        """Knows nothing."""
        self._seen: deque[tuple[float, int]] = deque(maxlen=_SAMPLES)

    def note(self, at: float, position: int) -> None:
        """Notes the primary's place; one that went back is another primary's."""
        if self._seen and position < self._seen[-1][1]:
            self._seen.clear()
        self._seen.append((at, position))

    def of(self, position: int, now: float) -> float:
        """Returns the seconds by which a standby that has replayed so far may be behind."""
        for at, seen in reversed(self._seen):
            if seen <= position:
                return now - at
        return _UNKNOWN


class StandbyReads:
    """Reads from a standby while it keeps up.

    async with StandbyReads(url, name="session-1", max_lag=5.0) as standby:
        owner.start(standby.watch(store.position))
        rows = await standby.events_after(...)     # None: ask the primary
    """

    def __init__(self, url: str, *, name: str, max_lag: float, schema: str = "session") -> None:
        """Connects at the first look.

        Args:
            url: The standby, one host.
            name: `application_name`.
            max_lag: Seconds; a standby that is further behind is not asked.
            schema: What the schema is called in this database.

        Raises:
            StartupError: The URL names several hosts.
        """
        if len(split_hosts(url)) > 1:
            raise StartupError("HERMESH_DATABASE_STANDBY_URL names several hosts; name one standby")
        self._url = url
        self._name = name
        self._max_lag = max_lag
        self._events = in_schema(_LOG["events_after"], "session", schema)
        self._pool: Pool | None = None
        self._lag = Lag()
        self._problem: str | None = "the standby for reads was not looked at yet"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            await self._pool.shut()

    async def problem(self) -> str | None:
        """Returns why the standby is not asked; None while it is."""
        return self._problem

    async def watch(self, position: Position) -> None:
        """Looks again and again how far the standby is, until cancelled; `position` is the primary's."""
        jitter = random.Random()  # noqa: S311 -- spreads load, keeps no secret
        while True:
            problem = await self.look(position)
            if problem != self._problem:
                _log.info("reads of old events", standby=problem is None, reason=problem)
            self._problem = problem
            await asyncio.sleep(_BEAT_SECONDS * jitter.uniform(0.8, 1.2))

    async def look(self, position: Position) -> str | None:
        """Looks once; returns why the standby is not to be asked."""
        try:
            at = time.monotonic()
            self._lag.note(at, await position())
        except HermeshError:
            return "the primary does not say how far it is"
        try:
            if self._pool is None:
                self._pool = await open_pool(
                    self._url, min_size=1, max_size=_CONNECTIONS, name=f"{self._name}-reads"
                )
            async with asyncio.timeout(_TIMEOUT):
                replayed = await self._pool.fetchval(_SQL["replayed"])
        except (StartupError, *_FAILURES):
            return "the standby for reads does not answer"
        if replayed is None:
            return "the standby for reads is no standby"
        lag = self._lag.of(replayed, time.monotonic())
        metrics.standby_lag.set(lag)
        if lag > self._max_lag:
            return "the standby for reads is too far behind"
        return None

    async def events_after(self, tenant_id: UUID, run_id: UUID, seq: int, limit: int) -> list[Record] | None:
        """Returns a page of an old run's events past `seq`; None where the primary is to be asked."""
        if self._problem is not None or self._pool is None:
            return None
        # An id begins with the milliseconds at which it was made.
        if now_ms() - (run_id.int >> 80) < OLD_SECONDS * 1000:
            return None
        try:
            async with asyncio.timeout(_TIMEOUT):
                rows: list[Any] = await self._pool.fetch(
                    self._events, tenant_id, run_id, seq, limit, PAGE_BYTES
                )
        except _FAILURES as error:
            metrics.standby_reads.labels("failed").inc()
            _log.info("a read from the standby failed; the primary is asked", error=type(error).__name__)
            return None
        if not rows or rows[0]["seq"] != seq + 1 or not _whole(rows, limit):
            metrics.standby_reads.labels("not_there").inc()
            return None
        metrics.standby_reads.labels("read").inc()
        return rows


def _whole(rows: list[Any], limit: int) -> bool:
    """Whether a page ends where it had to, and not where the standby's data does."""
    return (
        len(rows) == limit
        or rows[-1]["type"] in TERMINAL_EVENTS
        # So a reader takes a page that was cut by its size, and asks again.
        or sum(len(row["data"]) for row in rows) * 4 >= PAGE_BYTES
    )
