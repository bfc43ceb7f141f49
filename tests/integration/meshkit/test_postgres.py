from __future__ import annotations

import asyncio
import time

import asyncpg
import pytest

from meshkit.errors import StartupError, UnavailableError
from meshkit.postgres import map_pg_error, open_pool

BROKEN = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError)


async def test_a_pool_has_bounds_and_a_name(empty_database: str) -> None:
    pool = await open_pool(empty_database, min_size=1, max_size=2, name="session-1")
    async with pool:
        settings = {
            name: await pool.fetchval("SELECT current_setting($1)", name)
            for name in (
                "statement_timeout",
                "lock_timeout",
                "idle_in_transaction_session_timeout",
                "application_name",
                "jit",
            )
        }
    assert settings == {
        "statement_timeout": "5s",
        "lock_timeout": "2s",
        "idle_in_transaction_session_timeout": "5s",
        "application_name": "session-1",
        "jit": "off",
    }


async def test_a_connection_comes_back_without_an_open_transaction(empty_database: str) -> None:
    pool = await open_pool(empty_database, min_size=1, max_size=1)
    async with pool:
        async with pool.acquire() as connection:
            await connection.execute("BEGIN")
        async with pool.acquire() as connection:
            assert not connection.is_in_transaction()


async def test_limits_of_time_are_unavailable(empty_database: str) -> None:
    pool = await open_pool(empty_database, min_size=2, max_size=2)
    async with pool:
        await pool.execute("CREATE TABLE t (id int)")
        async with pool.acquire() as holder, holder.transaction():
            await holder.execute("LOCK TABLE t")
            async with pool.acquire() as waiter, waiter.transaction():
                await waiter.execute("SET LOCAL lock_timeout = 50")
                with pytest.raises(asyncpg.PostgresError) as locked:
                    await waiter.fetch("SELECT * FROM t")
        async with pool.acquire() as slow:
            transaction = slow.transaction()
            await transaction.start()
            await slow.execute("SET LOCAL statement_timeout = 50")
            with pytest.raises(asyncpg.PostgresError) as late:
                await slow.execute("SELECT pg_sleep(5)")
            await transaction.rollback()
    assert type(map_pg_error(locked.value)) is UnavailableError
    assert type(map_pg_error(late.value)) is UnavailableError


async def test_a_connection_ended_by_the_server_is_unavailable(empty_database: str) -> None:
    pool = await open_pool(empty_database, min_size=2, max_size=2)
    async with pool:
        async with pool.acquire() as victim, pool.acquire() as other:
            pid = victim.get_server_pid()
            sleeping = asyncio.ensure_future(victim.execute("SELECT pg_sleep(4)"))
            await other.execute("SELECT pg_terminate_backend($1)", pid)
            with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)) as ended:
                await sleeping
            assert type(map_pg_error(ended.value)) is UnavailableError
            with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)) as gone:
                await victim.execute("SELECT 1")
            assert type(map_pg_error(gone.value)) is UnavailableError
        assert await pool.fetchval("SELECT 1") == 1


async def test_an_idle_connection_that_is_told_of_its_end_is_unavailable(empty_database: str) -> None:
    """Between the server's last word and the close the driver is in a state of its own, and says so oddly."""
    for turns in range(6):
        victim = await asyncpg.connect(empty_database, timeout=30)
        other = await asyncpg.connect(empty_database, timeout=30)
        await other.execute("SELECT pg_terminate_backend($1)", victim.get_server_pid())
        other.terminate()
        # The loop is busy with something else until both have arrived, and then takes one after the other.
        time.sleep(0.2)  # noqa: ASYNC251
        for _ in range(turns):
            await asyncio.sleep(0)
        with pytest.raises(BROKEN) as ended:
            await victim.execute("SELECT 1")
        assert type(map_pg_error(ended.value)) is UnavailableError
        victim.terminate()


async def test_a_wrong_password_or_database_is_one_line(postgres_url: str) -> None:
    with pytest.raises(StartupError, match="user or password is refused"):
        await open_pool(postgres_url.replace("test-password", "hunter2"))
    with pytest.raises(StartupError, match="does not exist"):
        await open_pool(postgres_url.replace("/postgres?", "/absent?"))


async def test_a_nul_character_is_the_callers_fault(empty_database: str) -> None:
    pool = await open_pool(empty_database)
    async with pool:
        with pytest.raises(asyncpg.PostgresError) as error:
            await pool.fetchval("SELECT $1::text", "a\x00b")
    assert map_pg_error(error.value).reason == "INVALID_ARGUMENT"
