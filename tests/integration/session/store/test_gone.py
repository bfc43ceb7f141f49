"""Deleted sessions are noted, with what deletes them, until their large results are gone."""

from __future__ import annotations

import asyncio
from uuid import UUID

import pytest

from services.session.domain import EffectClass, GoneSession
from tests.integration.session.store.kit import Kit
from tests.integration.session.store.test_journal import journalled


@pytest.fixture
def database(fresh_database: str) -> str:
    """What is taken is anybody's: each test has a database of its own."""
    return fresh_database


async def deleted(kit: Kit) -> UUID:
    """A deleted session that had a call."""
    grant, _ = await journalled(kit, EffectClass.PURE)
    assert await kit.store.delete_session(kit.tenant, grant.session_id) == []
    return grant.session_id


async def take(kit: Kit, limit: int = 10, grace: float = 0.0, retry: float = 60.0) -> set[GoneSession]:
    return set(await kit.store.take_gone(limit, grace_seconds=grace, retry_seconds=retry))


async def test_a_deleted_session_with_calls_is_noted_until_it_is_forgotten(kit: Kit) -> None:
    without_calls = await kit.session()
    assert await kit.store.delete_session(kit.tenant, without_calls.session_id) == []
    assert await kit.store.count_gone() == 0
    gone = await deleted(kit)
    assert await kit.store.count_gone() == 1
    assert await take(kit, grace=3600) == set()
    assert await take(kit) == {GoneSession(kit.tenant, gone)}
    # Somebody sees to it now.
    assert await take(kit) == set()
    await kit.store.forget_gone(gone)
    assert await kit.store.count_gone() == 0


async def test_what_was_taken_and_not_forgotten_is_taken_again(kit: Kit) -> None:
    gone = await deleted(kit)
    assert await take(kit, retry=0.0) == {GoneSession(kit.tenant, gone)}
    assert await take(kit, retry=0.0) == {GoneSession(kit.tenant, gone)}


async def test_a_delete_that_is_undone_notes_nothing(kit: Kit) -> None:
    grant, _ = await journalled(kit, EffectClass.PURE)
    async with kit.pool.acquire() as connection:
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute("DELETE FROM session.session WHERE session_id = $1", grant.session_id)
        assert await connection.fetchval("SELECT count(*) FROM session.gone_session") == 1
        await transaction.rollback()
    assert await kit.store.count_gone() == 0


async def test_the_sessions_of_a_tenant_that_ends_are_noted(kit: Kit) -> None:
    grant, _ = await journalled(kit, EffectClass.PURE)
    await kit.pool.execute("DELETE FROM session.tenant WHERE tenant_id = $1", kit.tenant)
    assert await take(kit) == {GoneSession(kit.tenant, grant.session_id)}


async def test_each_is_taken_by_one_only(kit: Kit) -> None:
    gone = {await deleted(kit) for _ in range(6)}
    taken = await asyncio.gather(*(take(kit, limit=2) for _ in range(3)))
    found = [one.session_id for some in taken for one in some]
    assert len(found) == len(set(found))
    assert set(found) <= gone
