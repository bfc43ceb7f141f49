"""The store while PostgreSQL is busy, away or cuts connections: typed errors, and nothing half done."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest

from meshkit.errors import UnavailableError
from meshkit.ids import uuid7
from meshkit.postgres import open_pool
from services.session.domain import AppendOutcome, AppendResult, ClaimOutcome, RunStatus
from services.session.store import postgres_base
from services.session.store.postgres import PostgresStore
from tests.integration.session.store.kit import Kit, event


async def cut(kit: Kit) -> None:
    """Ends every connection of the kit's pool on the server's side."""
    await kit.pool.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'test-store'"
        " AND datname = current_database() AND pid <> pg_backend_pid()"
    )


async def test_no_free_connection_is_unavailable_within_a_deadline(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_base, "ACQUIRE_TIMEOUT", 0.05)
    pool = await open_pool(database, min_size=1, max_size=1)
    try:
        async with pool.acquire():
            with pytest.raises(UnavailableError) as caught:
                await PostgresStore(pool).tenant_of_key("0" * 64)
        assert caught.value.reason == "DATABASE_UNAVAILABLE"
        assert caught.value.retry_after_ms
        assert await PostgresStore(pool).tenant_of_key("0" * 64) is None
    finally:
        await pool.close()


async def test_a_row_lock_that_stays_is_unavailable_and_then_works(kit: Kit) -> None:
    grant = await kit.started()
    async with kit.pool.acquire() as other, other.transaction():
        await other.execute("SELECT FROM session.lease WHERE session_id = $1 FOR UPDATE", grant.session_id)
        async with asyncio.TaskGroup() as tasks:
            calls = [
                tasks.create_task(self_reporting(kit.append(grant, 2))),
                tasks.create_task(self_reporting(kit.store.claim(grant.run_id, "b"))),
                tasks.create_task(self_reporting(kit.submit(grant.session_id))),
            ]
        append, *others = [call.result() for call in calls]
        assert isinstance(append, AppendResult)
        assert append.outcome is AppendOutcome.RETRY
        assert [type(other) for other in others] == [UnavailableError] * 2
    assert (await kit.append(grant, 2)).outcome is AppendOutcome.COMMITTED
    assert await kit.types(grant.run_id) == ["run.created", "text.delta"]


async def self_reporting(call: object) -> object:
    try:
        return await call  # type: ignore[misc]
    except UnavailableError as error:
        return error


async def test_connections_that_were_cut_are_replaced_and_writes_are_whole(kit: Kit) -> None:
    grant = await kit.started()
    seq, cuts = 2, 0
    async with asyncio.timeout(30):
        while seq < 60:
            if seq % 10 == 0 and cuts < seq // 10:
                cuts += 1
                await cut(kit)
            try:
                result = await kit.append(grant, seq)
            except UnavailableError:
                # Not known whether it is there: the same again, and a gap behind it says that it is.
                result = await kit.append(grant, seq)
            assert result.outcome in (AppendOutcome.COMMITTED, AppendOutcome.GAP)
            assert result.next_seq == seq + 1
            seq = result.next_seq
    assert len(await kit.types(grant.run_id)) == 59


async def test_a_call_that_is_cancelled_midway_leaves_the_session_usable(kit: Kit) -> None:
    grant = await kit.started()
    async with kit.pool.acquire() as other:
        transaction = other.transaction()
        await transaction.start()
        await other.execute("SELECT FROM session.lease WHERE session_id = $1 FOR UPDATE", grant.session_id)
        waiting = asyncio.create_task(
            kit.step(grant, 2, event("run.completed", "{}"), status=RunStatus.COMPLETED)
        )
        async with asyncio.timeout(10):
            while not await kit.pool.fetchval(
                "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
                " AND datname = current_database())"
            ):
                pass
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await transaction.rollback()
    assert await kit.types(grant.run_id) == ["run.created"]
    await kit.finish(grant, 2)


async def test_a_client_that_dies_inside_a_claim_leaves_no_lock_and_no_lease(kit: Kit, database: str) -> None:
    run_id = (await kit.submit((await kit.session()).session_id)).run.run_id
    dying = await asyncpg.connect(database)
    await dying.execute("BEGIN")
    await dying.fetch("SELECT * FROM session.claim_run($1, 'dead', '10 s', 5, 200, 1000)", run_id)
    dying.terminate()
    async with asyncio.timeout(10):
        claim = await kit.store.claim(run_id, "a")
    assert claim.outcome is ClaimOutcome.CLAIMED
    assert claim.grant is not None
    assert claim.grant.fence == 1


async def test_a_database_without_tables_says_so_in_no_drivers_words(empty_database: str) -> None:
    pool = await open_pool(empty_database, min_size=1, max_size=1)
    try:
        with pytest.raises(Exception, match="internal error") as caught:
            await PostgresStore(pool).get_run(uuid7(), uuid7())
        assert "relation" not in str(caught.value)
    finally:
        await pool.close()
