"""Through a real PgBouncer: what it breaks is found out, and made up for or refused with the reason."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import asyncpg
import pytest

from meshkit.errors import StartupError
from meshkit.ids import uuid7
from meshkit.migrate import migrate, pending
from meshkit.postgres import Pool, open_pool
from services.session.domain import AppendOutcome
from services.session.store.notifications import DEAF, LOG, Notifications
from services.session.store.postgres import POOL_SETTINGS, PostgresStore
from tests.conftest import MIGRATIONS, create_database
from tests.deploy.pgbouncer import pgbouncer
from tests.integration.session.store.kit import Kit

LIMITS = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout")
SECONDS = 20.0


def make_role(url: str, name: str) -> str:
    """Makes a user who is no superuser and may make schemas; returns the URL under that name."""
    database = url.partition("?")[0].rpartition("/")[2]

    async def make() -> None:
        connection = await asyncpg.connect(url, timeout=30)
        try:
            await connection.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'test-password'")
            await connection.execute(f"GRANT CREATE ON DATABASE {database} TO {name}")
            await connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
        finally:
            await connection.close()

    asyncio.run(make())
    return url.replace("://postgres:", f"://{name}:")


@pytest.fixture(scope="module")
def unlimited(postgres_url: str) -> str:
    """A database of a user who has no limits of time."""
    return make_role(create_database(postgres_url), "unlimited")


@pytest.fixture(scope="module")
def direct(postgres_url: str) -> str:
    """A database of a user who has them."""
    url = make_role(create_database(postgres_url), "limited")

    async def limit() -> None:
        connection = await asyncpg.connect(url, timeout=30)
        database = await connection.fetchval("SELECT current_database()")
        for name in LIMITS:
            await connection.execute(f"ALTER ROLE limited IN DATABASE {database} SET {name} = '5s'")
        await connection.close()

    asyncio.run(limit())
    return url


@pytest.fixture(scope="module")
def pooler(direct: str) -> Iterator[str]:
    with pgbouncer(direct) as url:
        yield url


@pytest.fixture
async def pool(pooler: str) -> AsyncIterator[Pool]:
    pool = await open_pool(pooler, max_size=8, name="session-1", server_settings=POOL_SETTINGS)
    try:
        yield pool
    finally:
        await pool.close()


async def test_limits_of_time_that_do_not_arrive_are_refused_with_what_sets_them(
    unlimited: str,
) -> None:
    with pgbouncer(unlimited) as url, pytest.raises(StartupError) as refused:
        await open_pool(url, server_settings=POOL_SETTINGS)
    text = str(refused.value)
    assert "PgBouncer" in text
    assert all(f"SET {name} = " in text for name in (*LIMITS, "jit", "plan_cache_mode"))
    assert "test-password" not in text
    # Those that it is told to let go by do not arrive either.
    ignored = ",".join((*LIMITS, "jit", "timezone"))
    with pgbouncer(unlimited, ignore_startup_parameters=ignored) as url:
        with pytest.raises(StartupError, match="keeps statement_timeout"):
            await open_pool(url)
    # The remedy is one: the words of the refusal, as they stand.
    remedy = text.partition("console: ")[2]
    connection = await asyncpg.connect(unlimited, timeout=30)
    await connection.execute(remedy)
    await connection.close()
    with pgbouncer(unlimited) as url:
        pool = await open_pool(url, server_settings=POOL_SETTINGS)
        assert await pool.fetchval("SELECT current_setting('statement_timeout')") == "5s"
        assert await pool.fetchval("SELECT current_setting('plan_cache_mode')") == "force_generic_plan"
        await pool.close()


async def test_statement_pooling_is_refused(direct: str) -> None:
    with pgbouncer(direct, mode="statement") as url, pytest.raises(StartupError, match="pool_mode"):
        await open_pool(url)


async def test_migrations_and_a_store_work_through_it(pooler: str, pool: Pool) -> None:
    for schema, directory in MIGRATIONS.items():
        await migrate(pooler, directory, schema=schema)
        assert await pending(pooler, directory, schema=schema) == []
    assert pool.pooled
    store = PostgresStore(pool)
    kit = Kit(store, await store.ensure_key(f"tenant-{uuid7()}", uuid7().hex * 2, "test"), pool)

    async def one(number: int) -> None:
        grant = await kit.started(f"agent-{number}")
        for seq in range(2, 12):
            assert (await kit.append(grant, seq)).outcome is AppendOutcome.COMMITTED
        await kit.finish(grant, 12)
        assert len(await kit.log(grant.run_id)) == 12

    # More clients than PgBouncer has connections: each statement may meet another one.
    async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as group:
        for number in range(12):
            group.create_task(one(number))
    await store.maintain()


async def test_no_statement_meets_that_of_another_process(pooler: str) -> None:
    """Every driver gives its statements the same names, and PgBouncer before 1.21 hands them on."""
    pools = [await open_pool(pooler, min_size=4, max_size=4, name=f"session-{i}") for i in range(3)]

    async def ask(number: int, pool: Pool) -> None:
        for turn in range(60):
            answer = await pool.fetchval(f"SELECT {number} * 1000 + $1::int", turn)
            assert answer == number * 1000 + turn

    try:
        async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as group:
            for number, one in enumerate(pools):
                for _ in range(4):
                    group.create_task(ask(number, one))
    finally:
        for one in pools:
            await one.close()


async def test_notices_that_cannot_be_heard_are_said_and_a_direct_way_hears_them(
    pooler: str, direct: str
) -> None:
    async with asyncio.timeout(SECONDS):
        async with Notifications(pooler, name="deaf") as notifications:
            while await notifications.problem() is None:
                await asyncio.sleep(0.02)
            assert await notifications.problem() == DEAF
            assert not notifications.listening
        with pgbouncer(direct, mode="session", default_pool_size="8") as session_url:
            for url in (session_url, direct):
                async with Notifications(url, (LOG,), name="hears") as notifications:
                    await notifications.wait_listening()
                    connection = await asyncpg.connect(direct)
                    await connection.execute(f"NOTIFY {LOG}, 'run'")
                    await connection.close()
                    assert await anext(notifications) == (LOG, "run")
                    assert await notifications.problem() is None
