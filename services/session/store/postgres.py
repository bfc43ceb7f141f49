"""The session store over PostgreSQL: all parts of the port over one pool.

The SQL is in `sql/` and, where several rows change together, in the functions of `migrations/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from meshkit.postgres import load_sql
from services.session.domain import GoneSession
from services.session.store.postgres_base import SCHEMA, Pool
from services.session.store.postgres_journal import PostgresJournal
from services.session.store.postgres_log import PostgresLog
from services.session.store.postgres_runs import PostgresRuns
from services.session.store.postgres_sessions import PostgresSessions
from services.session.store.postgres_tenants import PostgresTenants
from services.session.store.standby_reads import StandbyReads

_SQL = load_sql("services.session.store.sql", "upkeep.sql")

# Events are kept this long; request ids so long that no client still repeats a call.
EVENT_RETENTION = timedelta(days=30)
REQUEST_RETENTION = timedelta(days=7)
PARTITIONS_AHEAD_DAYS = 7

# For the pool: the same statements run all the time, so each is planned once. Planning an append anew costs
# as much as the append, and a planner that counts the ids of a batch may read the whole table of leases.
POOL_SETTINGS = {"plan_cache_mode": "force_generic_plan"}

_EXPIRE_BATCH = 10_000
_COUNTED = 10_000
_MAINTAIN_TIMEOUT = 30.0


@dataclass(frozen=True, slots=True)
class Upkeep:
    """What a round of upkeep did."""

    partitions_made: int
    partitions_dropped: int
    requests_expired: int


class PostgresStore(PostgresTenants, PostgresSessions, PostgresRuns, PostgresLog, PostgresJournal):
    """See `port.Store`."""

    def __init__(
        self,
        pool: Pool,
        *,
        ttl_ms: int = 10_000,
        run_timeout_ms: int = 600_000,
        event_retention: timedelta = EVENT_RETENTION,
        standby: StandbyReads | None = None,
        schema: str = SCHEMA,
    ) -> None:
        """Makes a store over a pool that its caller opens and closes.

        Args:
            pool: Connections as `meshkit.postgres.open_pool` makes them.
            ttl_ms: How long a lease lasts.
            run_timeout_ms: The time limit of a run for which neither it nor its tenant sets one.
            event_retention: How long events are kept.
            standby: Where old events are read first.
            schema: What the schema is called in this database.
        """
        super().__init__(pool, ttl_ms=ttl_ms, run_timeout_ms=run_timeout_ms, standby=standby, schema=schema)
        self._event_retention = event_retention

    async def maintain(self) -> Upkeep:
        """Does one round of upkeep: partitions made ahead and dropped, old request ids forgotten.

        Safe on several replicas at once, and harmless to appends: it gives up where it would wait.

        Raises:
            UnavailableError: A lock was not to be had, or the database does not answer; try again later.
        """
        async with self._connection({}) as connection:
            async with connection.transaction():
                await connection.fetchval(_SQL["set_lock_timeout"])
                row = await connection.fetchrow(
                    self._here(_SQL["maintain_partitions"]),
                    PARTITIONS_AHEAD_DAYS,
                    self._event_retention,
                    timeout=_MAINTAIN_TIMEOUT,
                )
            status: str = await connection.execute(
                self._here(_SQL["expire_requests"]), REQUEST_RETENTION, _EXPIRE_BATCH
            )
        assert row is not None
        return Upkeep(row["made"], row["dropped"], int(status.rpartition(" ")[2]))

    async def take_gone(self, limit: int, *, grace_seconds: float, retry_seconds: float) -> list[GoneSession]:
        """See the port."""
        grace, retry = timedelta(seconds=grace_seconds), timedelta(seconds=retry_seconds)
        rows = await self._fetch(_SQL["take_gone"], grace, limit, retry)
        return [GoneSession(row["tenant_id"], row["session_id"]) for row in rows]

    async def forget_gone(self, session_id: UUID) -> None:
        """See the port."""
        await self._fetch(_SQL["forget_gone"], session_id)

    async def count_gone(self) -> int:
        """See the port."""
        return int((await self._one(_SQL["count_gone"], _COUNTED))["number"])
