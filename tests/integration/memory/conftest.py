"""Stores to test: in memory, and on real PostgreSQL with pgvector."""

from __future__ import annotations

from collections.abc import AsyncIterator

import asyncpg
import pytest

from meshkit.postgres import open_pool
from services.memory.store.port import Store
from services.memory.store.postgres import PostgresStore
from tests.unit.memory.fakes import FakeStore

MAX_PER_SCOPE = 30


@pytest.fixture
async def pool(database: str) -> AsyncIterator[asyncpg.Pool[asyncpg.Record]]:
    """A pool on the module's database, with the memory service's tables empty."""
    async with await open_pool(database, min_size=1, max_size=4, name="test") as pool:
        await pool.execute("TRUNCATE memory.item, memory.preference")
        yield pool


@pytest.fixture
def postgres_store(pool: asyncpg.Pool[asyncpg.Record]) -> PostgresStore:
    return PostgresStore(pool, max_per_scope=MAX_PER_SCOPE)


@pytest.fixture(params=["memory", "postgres"])
def store(request: pytest.FixtureRequest) -> Store:
    if request.param == "memory":
        return FakeStore(MAX_PER_SCOPE)
    found: Store = request.getfixturevalue("postgres_store")
    return found
