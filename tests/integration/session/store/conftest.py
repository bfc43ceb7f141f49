"""A store on a real database, and a tenant for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from meshkit.ids import uuid7
from meshkit.postgres import open_pool
from services.session.store.postgres import POOL_SETTINGS, PostgresStore
from tests.integration.session.store.kit import Kit


@pytest.fixture
async def kit(database: str) -> AsyncIterator[Kit]:
    pool = await open_pool(
        database, min_size=1, max_size=10, name="test-store", server_settings=POOL_SETTINGS
    )
    try:
        store = PostgresStore(pool)
        tenant = await store.ensure_key(f"tenant-{uuid7()}", uuid7().hex * 2, "test")
        yield Kit(store, tenant, pool)
    finally:
        await pool.close()
