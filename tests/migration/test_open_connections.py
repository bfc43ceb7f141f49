"""Replicas of the version before go on, on the connections they have, while a new one's migrations run."""

from __future__ import annotations

import shutil
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import asyncpg
import orjson

from meshkit.ids import uuid7
from meshkit.migrate import migrate
from meshkit.postgres import open_pool
from services.session.store.postgres import PostgresStore
from tests.conftest import MIGRATIONS

# What was released last, and how its statements are worded.
RELEASED = "0004"
CLAIM = (
    "SELECT c.outcome, c.fence, c.attach, c.next_seq, c.context, (c.run).*"
    " FROM session.claim_run($1, $2, $3, $4, $5, $6) c"
)
QUIET = "session.quiet_in_ms(c.quiet_at) AS quiet_in_ms"
BEGIN = (
    "SELECT b.outcome, (b.call).*, session.quiet_in_ms((b.call).quiet_at) AS quiet_in_ms"
    " FROM session.begin_tool_call($1, $2, $3, $4) b"
)
LOOK = f"SELECT c.*, {QUIET} FROM session.tool_call c WHERE c.call_id = $1"
COMPLETE = f"SELECT c.*, {QUIET} FROM session.complete_tool_call($1, $2, $3, $4, $5, $6) c"
SETTLE = f"SELECT c.*, {QUIET} FROM session.settle_tool_call($1, $2, $3, $4, $5) c"
ENDED = "SELECT session.end_orphans($1)"

_SESSION = """
INSERT INTO session.session (session_id, tenant_id, title, metadata, agent, user_name, created_ms, updated_ms)
VALUES ($1, $2, '', '{}', '', '', 1, 1)
"""
_LEASE = "INSERT INTO session.lease (session_id, tenant_id, fence) VALUES ($1, $2, 1)"
_RUN = """
INSERT INTO session.run (run_id, tenant_id, session_id, ordinal, status, model, options, input, last_seq,
                         created_ms, left_ms)
VALUES ($1, $2, $3, 1, 1, 'm', '', $4, 1, 1, 600000)
"""
_CALL = """
INSERT INTO session.tool_call (call_id, tenant_id, session_id, run_id, name, arguments, effect,
                               idempotency_key, created_ms)
VALUES ($1, $2, $3, $4, 't', '{}', 2, '', 1)
"""


async def work(pool: asyncpg.Pool[asyncpg.Record], tenant: UUID) -> None:
    """Takes a run and carries out a call, as a replica of the released version does."""
    session_id, run_id = uuid7(), uuid7()
    call = f"{run_id}:1:0"
    said = orjson.dumps([[str(uuid7()), "user", "hello"]]).decode()
    await pool.execute(_SESSION, session_id, tenant)
    await pool.execute(_LEASE, session_id, tenant)
    await pool.execute(_RUN, run_id, tenant, session_id, said)
    await pool.execute(_CALL, call, tenant, session_id, run_id)

    async def one(statement: str, *args: object) -> asyncpg.Record:
        row = await pool.fetchrow(statement, *args)
        assert row is not None
        return row

    ttl = timedelta(seconds=10)
    for fence in (2, 3):
        claim = await one(CLAIM, run_id, "agent-1", ttl, 5, 200, 2**19)
        assert (claim["outcome"], claim["fence"], claim["run_id"]) == (1, fence, run_id)
        context = orjson.loads(claim["context"])
        assert [message[4] for message in context["messages"]] == ["hello"]
        assert context["omitted"] == 0
    assert (await one(BEGIN, call, session_id, 3, ttl))["outcome"] == 1
    assert (await one(LOOK, call))["state"] == 2
    assert (await one(COMPLETE, call, 3, 5, "?", "", 1))["state"] == 5
    assert (await one(COMPLETE, call, 3, 3, "42", "", 1))["state"] == 3
    assert (await one(SETTLE, call, 4, "no", "", 1))["content"] == "42"
    assert (await one(ENDED, 64))[0] == 0


async def test_statements_of_the_version_before_outlive_the_migrations(
    empty_database: str, tmp_path: Path
) -> None:
    for path in MIGRATIONS["session"].glob("*.sql"):
        if path.name[:4] <= RELEASED:
            shutil.copy(path, tmp_path)
    await migrate(empty_database, tmp_path, schema="session")
    pool = await open_pool(empty_database, min_size=1, max_size=1, name="version-before")
    try:
        tenant = await PostgresStore(pool).ensure_key("tenant", uuid7().hex * 2, "test")
        # Often enough for PostgreSQL to keep its plans.
        for _ in range(7):
            await work(pool, tenant)
        await migrate(empty_database, MIGRATIONS["session"], schema="session")
        for _ in range(2):
            await work(pool, tenant)
    finally:
        await pool.close()
