"""A database that others use too, and a user who is no superuser; on Debian's PostgreSQL 15 as well."""

from __future__ import annotations

from collections.abc import Iterator

import asyncpg
import pytest

from meshkit.errors import StartupError
from meshkit.ids import uuid7
from meshkit.migrate import migrate, open_migrated, pending
from meshkit.postgres import open_pool
from services.memory.store.postgres import PostgresStore as MemoryStore
from services.session.store.postgres import POOL_SETTINGS, PostgresStore
from services.session.store.standby_reads import StandbyReads
from tests.conftest import MIGRATIONS
from tests.deploy.postgres15 import postgres15
from tests.integration.memory.test_store import ANN, new, query, texts
from tests.integration.session.store.kit import Kit

SESSION = MIGRATIONS["session"]
MEMORY = MIGRATIONS["memory"]


async def execute(url: str, *statements: str) -> None:
    connection = await asyncpg.connect(url, timeout=30)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


async def one_run(url: str, schema: str) -> None:
    """A session, a run, its log and its end."""
    pool = await open_migrated(
        url, SESSION, service="session", schema=schema, max_size=4, server_settings=POOL_SETTINGS
    )
    async with pool:
        store = PostgresStore(pool, schema=schema)
        kit = Kit(store, await store.ensure_key(f"tenant-{uuid7()}", uuid7().hex * 2, "test"), pool)
        grant = await kit.started()
        await kit.append(grant, 2)
        await kit.finish(grant, 3)
        assert await kit.types(grant.run_id) == ["run.created", "text.delta", "run.completed"]
        await store.maintain()
        await store.delete_session(kit.tenant, grant.session_id)


@pytest.fixture(scope="module")
def fifteen() -> Iterator[str]:
    with postgres15() as url:
        yield url


async def test_a_user_with_one_schema_and_nothing_else_is_enough(fifteen: str) -> None:
    await execute(
        fifteen,
        "CREATE ROLE plain LOGIN PASSWORD 'test-password'",
        "CREATE SCHEMA acme_session AUTHORIZATION plain",
        "CREATE SCHEMA session",
        "CREATE TABLE session.session (id int)",
    )
    url = fifteen.replace("://postgres:", "://plain:")
    with pytest.raises(StartupError, match=r"not Hermesh's; set HERMESH_DATABASE_SCHEMA_PREFIX"):
        await migrate(url, SESSION, schema="session")
    with pytest.raises(StartupError, match=r"may not make tables.*CREATE SCHEMA other_session AUTHORIZATION"):
        await migrate(url, SESSION, schema="session", name="other_session")
    assert await migrate(url, SESSION, schema="session", name="acme_session")
    assert await pending(url, SESSION, schema="acme_session") == []
    await one_run(url, "acme_session")
    # The other one's table is as it was.
    await execute(fifteen, "INSERT INTO session.session VALUES (1)")


async def test_a_server_without_pgvector_says_what_it_lacks(fifteen: str) -> None:
    with pytest.raises(StartupError, match=r"postgresql-NN-pgvector.*CREATE EXTENSION vector") as error:
        await migrate(fifteen, MEMORY, schema="memory")
    assert "\n" not in str(error.value)


async def test_two_meshes_share_a_database_and_pgvector_is_where_it_is(empty_database: str) -> None:
    await execute(
        empty_database,
        "CREATE SCHEMA extensions",
        "CREATE EXTENSION vector SCHEMA extensions",
        "CREATE ROLE tenant LOGIN PASSWORD 'test-password'",
        "GRANT USAGE ON SCHEMA extensions TO tenant",
        f"GRANT CREATE ON DATABASE {empty_database.partition('?')[0].rpartition('/')[2]} TO tenant",
    )
    url = empty_database.replace("://postgres:", "://tenant:")
    for prefix in ("a_", "b_"):
        await migrate(url, SESSION, schema="session", name=f"{prefix}session")
        await migrate(url, MEMORY, schema="memory", name=f"{prefix}memory")
        await one_run(url, f"{prefix}session")
    tenant = uuid7()
    async with await open_pool(url, max_size=2) as pool:
        first, second = [
            await MemoryStore.over(pool, max_per_scope=9, schema=f"{prefix}memory") for prefix in ("a_", "b_")
        ]
        await first.remember(tenant, new("cat"))
        await first.set_preferences(tenant, "ann", {"tone": "short"})
        assert await texts(first, tenant, ANN, query()) == ["cat"]
        assert await texts(second, tenant, ANN, query()) == []
        assert await second.get_preferences(tenant, "ann") == {}


async def test_a_database_whose_extension_is_gone_says_so(empty_database: str) -> None:
    async with await open_pool(empty_database, max_size=1) as pool:
        with pytest.raises(StartupError, match="CREATE EXTENSION vector"):
            await MemoryStore.over(pool, max_per_scope=9, schema="memory")


def test_a_standby_is_one_host() -> None:
    with pytest.raises(StartupError, match="one standby"):
        StandbyReads("postgresql://u@a:1,b:2/d", name="x", max_lag=1.0)
