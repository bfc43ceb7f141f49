"""What `hermesh doctor` looks at in a PostgreSQL that a URL names."""

from __future__ import annotations

import time
from collections.abc import Callable

import asyncpg

from launcher.examine import Row
from meshkit.errors import StartupError
from meshkit.hosts import Connection, Hosts
from meshkit.pooler import find_way
from meshkit.postgres import FAILURES, LIMITS, connect_failure
from meshkit.schemas import in_schema

# Functions whose body is SQL of the standard came with it.
_OLDEST = 14
_SKEW_SECONDS = 1.0
_MOST_USED = 0.8

_FACTS = """
SELECT current_setting('server_version') AS version, current_setting('server_version_num')::int AS number,
       current_user AS role, (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) AS superuser,
       has_database_privilege(current_database(), 'CREATE') AS may_create,
       to_regclass('session.run') IS NOT NULL AS has_session,
       to_regclass('memory.item') IS NOT NULL AS has_memory,
       (SELECT extversion FROM pg_extension WHERE extname = 'vector') AS pgvector,
       EXISTS (SELECT FROM pg_available_extensions WHERE name = 'vector') AS has_pgvector,
       current_setting('synchronous_standby_names') AS synchronous,
       (SELECT count(*) FROM pg_stat_replication) AS standbys,
       current_setting('max_connections')::int AS connections,
       (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend') AS used,
       pg_is_in_recovery() AS standby
"""
_CLOCK = "SELECT extract(epoch FROM clock_timestamp())::float8"


async def rows(url: str, *, direct_url: str = "", standby_url: str = "", prefix: str = "") -> list[Row]:
    """Looks at a database, and at the other ways to it; `prefix` as the setting of that name."""
    try:
        connection = await Hosts(url).connect(statement_cache_size=0)
    except FAILURES as error:
        return [("PostgreSQL", "cannot be used", connect_failure(url, error))]
    try:
        found = await _database(connection, prefix)
    except (*FAILURES, asyncpg.InternalClientError) as error:
        return [("PostgreSQL", "cannot be asked", connect_failure(url, error))]
    finally:
        connection.terminate()
    found += await _way(url, direct_url)
    if standby_url:
        found.append(await _standby(standby_url))
    return found


async def _database(connection: Connection, prefix: str) -> list[Row]:
    facts = await connection.fetchrow(
        in_schema(in_schema(_FACTS, "session", f"{prefix}session"), "memory", f"{prefix}memory")
    )
    assert facts is not None
    new = facts["number"] >= _OLDEST * 10_000
    found = [("PostgreSQL", facts["version"], "" if new else f"Hermesh needs PostgreSQL {_OLDEST} or later")]
    found.append(("PostgreSQL's user", *_rights(facts)))
    found.append(("pgvector", *_pgvector(facts)))
    found.append(("PostgreSQL's replication", *_replication(facts)))
    full = facts["used"] > facts["connections"] * _MOST_USED
    remedy = (
        "raise max_connections, lower HERMESH_DATABASE_POOL_SIZE, or put PgBouncer before it" if full else ""
    )
    found.append(("PostgreSQL's connections", f"{facts['used']} of {facts['connections']}", remedy))
    found.append(await _clock(connection))
    return found


def _rights(facts: asyncpg.Record) -> tuple[str, str]:
    kind = "a superuser" if facts["superuser"] else "no superuser"
    there = facts["has_session"] and facts["has_memory"]
    remedy = ""
    if not facts["may_create"] and not there:
        remedy = (
            f"GRANT CREATE ON DATABASE to {facts['role']}, or make its schemas: docs/deploy/postgresql.md"
        )
    return f"{facts['role']}, {kind}; its tables are {'' if there else 'not '}there", remedy


def _pgvector(facts: asyncpg.Record) -> tuple[str, str]:
    if facts["pgvector"]:
        return facts["pgvector"], ""
    if facts["has_pgvector"]:
        return "not made", "" if facts["superuser"] or facts[
            "may_create"
        ] else "have a superuser run: CREATE EXTENSION vector"
    return "not installed", "install pgvector on PostgreSQL's server; on Debian postgresql-NN-pgvector"


def _replication(facts: asyncpg.Record) -> tuple[str, str]:
    if facts["standby"]:
        return "this is a standby", "name the primary, or all hosts: postgresql://user@a:5432,b:5432/database"
    standbys = f"{facts['standbys']} standby{'' if facts['standbys'] == 1 else 's'}"
    if not facts["synchronous"]:
        return f"{standbys}, none synchronous: a lost primary loses what it had not sent", ""
    if facts["standbys"]:
        return f"{standbys}, synchronous", ""
    return "synchronous, and no standby answers", "nothing can be stored: docs/runbooks/standby-down.md"


async def _clock(connection: Connection) -> Row:
    before = time.time()
    theirs: float = await connection.fetchval(_CLOCK)
    after = time.time()
    # Whatever its answer took is no skew.
    skew = max(0.0, theirs - after, before - theirs)
    remedy = "set both clocks by NTP: times of messages and of tokens come from different machines"
    return ("PostgreSQL's clock", f"{skew:.1f} s off", remedy if skew > _SKEW_SECONDS else "")


async def _way(url: str, direct_url: str) -> list[Row]:
    what = "a pooler before PostgreSQL"
    try:
        way = await find_way(Hosts(url).connect, "hermesh-doctor", LIMITS)
    except StartupError as error:
        return [(what, "there", str(error))]
    except FAILURES as error:
        return [(what, "cannot be looked for", connect_failure(url, error))]
    if not way.pooled:
        return [(what, "none", "")]
    kept = "statement_cache_size" not in way.options
    row = (what, f"there; prepared statements {'work' if kept else 'do not, and are done without'}", "")
    if direct_url:
        return [row, await _reachable("HERMESH_DATABASE_DIRECT_URL", direct_url, lambda standby: "")]
    remedy = "name a way past it, so that cancelling and starting runs is told at once"
    return [row, ("HERMESH_DATABASE_DIRECT_URL", "not set", remedy)]


async def _standby(url: str) -> Row:
    return await _reachable(
        "HERMESH_DATABASE_STANDBY_URL", url, lambda standby: "" if standby else "it is no standby"
    )


async def _reachable(what: str, url: str, judge: Callable[[bool], str]) -> Row:
    try:
        connection = await Hosts(url).connect(statement_cache_size=0)
        try:
            standby = await connection.fetchval("SELECT pg_is_in_recovery()")
        finally:
            connection.terminate()
    except FAILURES as error:
        return (what, "cannot be used", connect_failure(url, error))
    return (what, "a standby" if standby else "a primary", judge(standby))
