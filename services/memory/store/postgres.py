"""The store on PostgreSQL with pgvector."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Self, TypeAlias
from uuid import UUID

import asyncpg
import orjson
import structlog

from meshkit.commit_watch import CommitWatch
from meshkit.context import remaining
from meshkit.errors import (
    AlreadyExistsError,
    DeadlineError,
    HermeshError,
    ResourceExhaustedError,
    StartupError,
)
from meshkit.postgres import load_sql, map_pg_error
from meshkit.schemas import in_schema
from services.memory.domain import Memory, NewMemory, Query, Recalled, Scope, ScopeKind, Vector

Connection: TypeAlias = "asyncpg.pool.PoolConnectionProxy[asyncpg.Record]"

_log = structlog.get_logger("memory.store")

MIGRATIONS = Path(__file__).parent / "migrations"
SCHEMA = "memory"
MAX_PREFERENCES = 256
# For a free connection and the statement together, unless the caller's deadline is sooner.
_SECONDS = 5.0

_MEMORY = load_sql("services.memory.store.sql", "memory.sql")
_PREFERENCES = load_sql("services.memory.store.sql", "preferences.sql")


class PostgresStore:
    """Memories and preferences in the schema `memory`."""

    def __init__(
        self,
        pool: asyncpg.Pool[asyncpg.Record],
        *,
        max_per_scope: int,
        schema: str = SCHEMA,
        vector_schema: str = "public",
    ) -> None:
        """Uses a pool that stays the caller's.

        Args:
            pool: The database.
            max_per_scope: Most memories of one scope.
            schema: What the schema is called in this database.
            vector_schema: Where the extension pgvector is.
        """
        self._pool = pool
        self._max_per_scope = max_per_scope
        # Said with its schema, so that no search_path has to lead there.
        self._memory = {
            name: in_schema(sql, SCHEMA, schema)
            .replace("::vector", f"::{vector_schema}.vector")
            .replace("<#>", f"OPERATOR({vector_schema}.<#>)")
            for name, sql in _MEMORY.items()
        }
        self._preferences = {name: in_schema(sql, SCHEMA, schema) for name, sql in _PREFERENCES.items()}

    @classmethod
    async def over(cls, pool: asyncpg.Pool[asyncpg.Record], *, max_per_scope: int, schema: str) -> Self:
        """Makes a store for wherever this database has pgvector.

        Raises:
            StartupError: It has none, or does not answer.
        """
        try:
            async with _bounded():
                where = await pool.fetchval(_MEMORY["vector_schema"])
        except HermeshError as error:
            raise StartupError(f"the database does not answer: {error.message}") from error
        if where is None:
            raise StartupError(
                "the database lacks the extension pgvector; have a superuser run: CREATE EXTENSION vector"
            )
        return cls(pool, max_per_scope=max_per_scope, schema=schema, vector_schema=where)

    async def ping(self) -> str | None:
        """Returns None if the database answers and has the tables."""
        async with _bounded():
            there = await self._pool.fetchval(self._memory["ready"])
        return None if there else "the tables are not there: run python -m services.memory migrate"

    async def remember(self, tenant_id: UUID, new: NewMemory) -> Memory:
        """Stores a memory once."""
        fingerprint = new.fingerprint()
        async with self._writing() as connection:
            row = await connection.fetchrow(
                self._memory["remember"],
                new.memory_id,
                tenant_id,
                int(new.scope.kind),
                new.scope.owner,
                new.text,
                new.importance,
                new.source_session_id,
                new.ttl_ms or None,
                new.request_id or None,
                fingerprint,
                new.model,
                list(new.vector),
                self._max_per_scope,
            )
            if row is None and new.request_id:
                row = await connection.fetchrow(self._memory["find_request"], tenant_id, new.request_id)
                if row is not None and row["request_hash"] != fingerprint:
                    raise AlreadyExistsError(
                        "REQUEST_ID_REUSED",
                        "this request id was used for another memory; use a new one",
                        metadata={"request_id": new.request_id},
                    )
        if row is None:
            raise ResourceExhaustedError(
                "QUOTA_EXCEEDED",
                f"the scope has {self._max_per_scope} memories; forget some",
                metadata={"limit": "memories_per_scope", "max": str(self._max_per_scope)},
            )
        return _memory(row)

    async def recall(self, tenant_id: UUID, scope: Scope, query: Query) -> Sequence[Recalled]:
        """Searches one scope exactly."""
        async with _bounded():
            rows = await self._pool.fetch(
                self._memory["recall"],
                tenant_id,
                int(scope.kind),
                scope.owner,
                query.model,
                list(query.vector),
                query.min_score,
                query.importance_weight,
                query.limit,
            )
        # The sum of 256 rounded products may leave the range by a hair.
        return [Recalled(_memory(row), min(1.0, max(-1.0, row["score"]))) for row in rows]

    async def forget(self, tenant_id: UUID, memory_id: UUID) -> int:
        """Deletes one."""
        async with self._writing() as connection:
            return int(await connection.fetchval(self._memory["forget"], tenant_id, memory_id))

    async def forget_scope(self, tenant_id: UUID, scope: Scope) -> int:
        """Deletes a scope's."""
        async with self._writing() as connection:
            return int(
                await connection.fetchval(
                    self._memory["forget_scope"], tenant_id, int(scope.kind), scope.owner
                )
            )

    async def list_memories(
        self, tenant_id: UUID, scope: Scope, before: UUID | None, size: int
    ) -> Sequence[Memory]:
        """Lists a scope's."""
        async with _bounded():
            rows = await self._pool.fetch(
                self._memory["list_memories"], tenant_id, int(scope.kind), scope.owner, before, size
            )
        return [_memory(row) for row in rows]

    async def sweep(self, limit: int) -> int:
        """Removes what has expired."""
        async with self._writing() as connection:
            return int(await connection.fetchval(self._memory["sweep"], limit))

    async def other_models(self, model: str, after: UUID | None, size: int) -> Sequence[tuple[UUID, str]]:
        """Reads a batch of all tenants' memories."""
        async with _bounded():
            rows = await self._pool.fetch(self._memory["other_models"], model, after, size)
        return [(UUID(int=row["memory_id"].int), row["text"]) for row in rows]

    async def set_vector(self, memory_id: UUID, text: str, model: str, vector: Vector) -> bool:
        """Changes one row."""
        async with self._writing() as connection:
            found = await connection.fetchval(
                self._memory["set_vector"], memory_id, text, model, list(vector)
            )
        return found is not None

    async def get_preferences(self, tenant_id: UUID, user: str) -> Mapping[str, str]:
        """Reads one row."""
        async with _bounded():
            return _preferences(
                await self._pool.fetchval(self._preferences["get_preferences"], tenant_id, user)
            )

    async def set_preferences(
        self, tenant_id: UUID, user: str, changes: Mapping[str, str]
    ) -> Mapping[str, str]:
        """Changes one row."""
        document = orjson.dumps({key: value or None for key, value in changes.items()}).decode()
        async with self._writing() as connection:
            text = await connection.fetchval(
                self._preferences["set_preferences"], tenant_id, user, document, MAX_PREFERENCES
            )
        if text is None:
            raise ResourceExhaustedError(
                "QUOTA_EXCEEDED",
                f"a user has at most {MAX_PREFERENCES} preferences",
                metadata={"limit": "preferences_per_user", "max": str(MAX_PREFERENCES)},
            )
        return _preferences(text)

    @asynccontextmanager
    async def _writing(self) -> AsyncIterator[Connection]:
        """Yields a connection for statements that change something.

        Raises:
            UnavailableError: OUTCOME_UNKNOWN where the database gave no answer or no synchronous standby has
                what it answered; DATABASE_UNAVAILABLE where nothing was sent, or it refused.
        """
        async with _bounded() as use, self._pool.acquire() as connection:
            with CommitWatch(connection):
                use.changes = True
                yield connection


@dataclass
class _Use:
    """A use of the database; `changes`: a statement that changes something may have reached it."""

    changes: bool = False


@asynccontextmanager
async def _bounded() -> AsyncIterator[_Use]:
    """Bounds a use of the database, and turns its errors into ours."""
    use = _Use()
    left = remaining()
    try:
        async with asyncio.timeout(_SECONDS if left is None else min(left, _SECONDS)):
            yield use
    except TimeoutError as error:
        if left is not None and left <= _SECONDS:
            raise DeadlineError() from error
        raise map_pg_error(error, sent=use.changes) from error
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
        _log.warning("the database failed", error=type(error).__name__, detail=str(error))
        raise map_pg_error(error, sent=use.changes) from error


def _memory(row: asyncpg.Record) -> Memory:
    return Memory(
        memory_id=UUID(int=row["memory_id"].int),
        scope=Scope(ScopeKind(row["scope_kind"]), row["scope_owner"]),
        text=row["text"],
        importance=round(row["importance"], 6),
        source_session_id=row["source_session_id"],
        create_time_ms=_ms(row["created_at"]),
        expire_time_ms=_ms(row["expire_at"]),
    )


def _ms(moment: datetime | None) -> int:
    return 0 if moment is None else round(moment.timestamp() * 1000)


def _preferences(text: Any) -> Mapping[str, str]:
    return {} if text is None else {str(key): str(value) for key, value in orjson.loads(text).items()}
