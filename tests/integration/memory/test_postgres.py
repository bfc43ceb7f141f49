"""What is PostgreSQL's own: migrations, plans, locks, and a database that is away."""

from __future__ import annotations

import asyncio
import time

import asyncpg
import pytest

from meshkit.context import deadline_var
from meshkit.errors import DeadlineError, StartupError, UnavailableError
from meshkit.hosts import Hosts
from meshkit.ids import uuid7
from meshkit.migrate import migrate, pending
from meshkit.postgres import Pool, open_pool
from services.memory.domain import NewMemory, Query, Scope, ScopeKind
from services.memory.embedding.port import DIMENSIONS
from services.memory.store.postgres import _MEMORY, MIGRATIONS, SCHEMA, PostgresStore

ANN = Scope(ScopeKind.USER, "ann")
UNIT = [1.0, *[0.0] * (DIMENSIONS - 1)]

FILL = """
INSERT INTO memory.item (memory_id, tenant_id, scope_kind, scope_owner, text, importance, model, embedding)
SELECT gen_random_uuid(), $1, 1, 'user-' || (n % 50), 'text', 0.5, 'm',
    (SELECT array_agg(sin(n * 256 + d)) FROM generate_series(1, 256) AS d)::real[]::vector
FROM generate_series(1, $2::int) AS n
"""


async def test_migrating_makes_the_schema_once(empty_database: str) -> None:
    every = sorted(path.name for path in MIGRATIONS.glob("*.sql"))
    assert await pending(empty_database, MIGRATIONS, schema=SCHEMA) == every
    first, second = await asyncio.gather(
        migrate(empty_database, MIGRATIONS, schema=SCHEMA), migrate(empty_database, MIGRATIONS, schema=SCHEMA)
    )
    assert sorted(first + second) == every
    assert await pending(empty_database, MIGRATIONS, schema=SCHEMA) == []


async def test_a_database_without_the_tables_is_not_ready(empty_database: str) -> None:
    async with await open_pool(empty_database, max_size=1) as pool:
        problem = await PostgresStore(pool, max_per_scope=1).ping()
    assert problem is not None
    assert "migrate" in problem


async def test_a_store_with_its_tables_is_ready(postgres_store: PostgresStore) -> None:
    assert await postgres_store.ping() is None


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("recall", (1, "user-7", "m", UNIT, 0.0, 0.1, 5)),
        ("list_memories", (1, "user-7", None, 50)),
        ("forget_scope", (1, "user-7")),
    ],
)
async def test_reads_begin_with_the_scope(
    pool: asyncpg.Pool[asyncpg.Record], name: str, arguments: tuple[object, ...]
) -> None:
    tenant = uuid7()
    await pool.execute(FILL, tenant, 3000)
    await pool.execute("ANALYZE memory.item")
    plan = "\n".join(row[0] for row in await pool.fetch(f"EXPLAIN {_MEMORY[name]}", tenant, *arguments))
    assert "item_scope" in plan
    assert "Seq Scan" not in plan


async def test_the_sweep_reads_only_what_expires(pool: asyncpg.Pool[asyncpg.Record]) -> None:
    await pool.execute(FILL, uuid7(), 3000)
    await pool.execute("ANALYZE memory.item")
    plan = "\n".join(row[0] for row in await pool.fetch(f"EXPLAIN {_MEMORY['sweep']}", 500))
    assert "item_expire" in plan


async def test_sweeps_at_once_take_different_rows(
    pool: asyncpg.Pool[asyncpg.Record], postgres_store: PostgresStore
) -> None:
    await pool.execute(FILL, uuid7(), 200)
    await pool.execute("UPDATE memory.item SET expire_at = clock_timestamp() - interval '1 second'")
    removed = await asyncio.gather(*(postgres_store.sweep(50) for _ in range(4)))
    assert sum(removed) + await postgres_store.sweep(500) == 200


async def test_a_search_of_a_full_scope_takes_milliseconds(pool: asyncpg.Pool[asyncpg.Record]) -> None:
    tenant = uuid7()
    store = PostgresStore(pool, max_per_scope=20_000)
    await pool.execute(FILL.replace("n % 50", "1"), tenant, 5000)
    began = time.perf_counter()
    found = await store.recall(tenant, Scope(ScopeKind.USER, "user-1"), Query("m", UNIT, 5, -1.0, 0.1))
    assert len(found) == 5
    # Alone it takes about 10 ms; the bound only notices another order of magnitude.
    assert time.perf_counter() - began < 1.0


def new() -> NewMemory:
    return NewMemory(uuid7(), ANN, "x", 0.5, 0, None, "", "m", UNIT)


async def test_a_table_that_is_locked_is_a_typed_error(
    pool: asyncpg.Pool[asyncpg.Record], postgres_store: PostgresStore
) -> None:
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("LOCK TABLE memory.item IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(UnavailableError) as caught:
            await postgres_store.remember(uuid7(), new())
    assert caught.value.reason == "DATABASE_UNAVAILABLE"
    assert caught.value.retry_after_ms


async def test_the_callers_deadline_ends_a_wait(
    pool: asyncpg.Pool[asyncpg.Record], postgres_store: PostgresStore
) -> None:
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("LOCK TABLE memory.item IN ACCESS EXCLUSIVE MODE")
        token = deadline_var.set(time.monotonic() + 0.1)
        try:
            with pytest.raises(DeadlineError):
                await postgres_store.remember(uuid7(), new())
        finally:
            deadline_var.reset(token)


async def test_a_pool_without_a_free_connection_does_not_wait_for_ever(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.memory.store.postgres._SECONDS", 0.1)
    async with await open_pool(database, max_size=1) as pool, pool.acquire():
        with pytest.raises(UnavailableError):
            await PostgresStore(pool, max_per_scope=1).ping()


async def test_a_database_that_is_away_is_a_typed_error() -> None:
    hosts = Hosts("postgresql://u:secret@127.0.0.1:1/d")
    async with Pool(hosts, pooled=False, min_size=0, max_size=1) as pool:
        with pytest.raises(UnavailableError) as caught:
            await PostgresStore(pool, max_per_scope=1).remember(uuid7(), new())
    assert caught.value.reason == "DATABASE_UNAVAILABLE"
    assert "secret" not in caught.value.message


async def test_migrating_a_database_that_is_away_is_one_line() -> None:
    with pytest.raises(StartupError, match="HERMESH_DATABASE_URL"):
        await migrate("postgresql://u:secret@127.0.0.1:1/d", MIGRATIONS, schema=SCHEMA)
