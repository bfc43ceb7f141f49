"""A store in memory with the rules of the real one, and an embedder that a test can read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from uuid import UUID

from meshkit.clock import now_ms
from meshkit.errors import AlreadyExistsError, HermeshError, ResourceExhaustedError
from services.memory.domain import Memory, NewMemory, Query, Recalled, Scope, Vector
from services.memory.embedding.port import DIMENSIONS

MAX_PREFERENCES = 256


@dataclass
class Row:
    tenant_id: UUID
    memory: Memory
    new: NewMemory


class FakeStore:
    def __init__(self, max_per_scope: int = 1000) -> None:
        self.rows: dict[UUID, Row] = {}
        self.preferences: dict[tuple[UUID, str], dict[str, str]] = {}
        self.errors: list[HermeshError] = []
        self._max_per_scope = max_per_scope

    async def ping(self) -> str | None:
        return None

    async def remember(self, tenant_id: UUID, new: NewMemory) -> Memory:
        for row in self.rows.values():
            if new.request_id and (row.tenant_id, row.new.request_id) == (tenant_id, new.request_id):
                if row.new.fingerprint() != new.fingerprint():
                    raise AlreadyExistsError("REQUEST_ID_REUSED", "used")
                return row.memory
        if len(self._scope(tenant_id, new.scope, expired=True)) >= self._max_per_scope:
            raise ResourceExhaustedError("QUOTA_EXCEEDED", "full")
        now = now_ms()
        memory = Memory(
            new.memory_id,
            new.scope,
            new.text,
            new.importance,
            new.source_session_id,
            now,
            now + new.ttl_ms if new.ttl_ms else 0,
        )
        self.rows[new.memory_id] = Row(tenant_id, memory, new)
        return memory

    def _scope(self, tenant_id: UUID, scope: Scope, *, expired: bool = False) -> list[Row]:
        now = now_ms()
        return [
            row
            for row in self.rows.values()
            if row.tenant_id == tenant_id
            and row.memory.scope == scope
            and (expired or not row.memory.expire_time_ms or row.memory.expire_time_ms > now)
        ]

    async def recall(self, tenant_id: UUID, scope: Scope, query: Query) -> Sequence[Recalled]:
        found = [
            Recalled(row.memory, sum(a * b for a, b in zip(row.new.vector, query.vector, strict=True)))
            for row in self._scope(tenant_id, scope)
            if row.new.model == query.model
        ]
        kept = [item for item in found if item.score >= query.min_score]
        kept.sort(
            key=lambda item: (
                item.score + query.importance_weight * (item.memory.importance - 0.5),
                item.memory.memory_id,
            ),
            reverse=True,
        )
        return kept[: query.limit]

    async def forget(self, tenant_id: UUID, memory_id: UUID) -> int:
        row = self.rows.get(memory_id)
        if row is None or row.tenant_id != tenant_id:
            return 0
        del self.rows[memory_id]
        return 1

    async def forget_scope(self, tenant_id: UUID, scope: Scope) -> int:
        gone = self._scope(tenant_id, scope, expired=True)
        for row in gone:
            del self.rows[row.memory.memory_id]
        return len(gone)

    async def list_memories(
        self, tenant_id: UUID, scope: Scope, before: UUID | None, size: int
    ) -> Sequence[Memory]:
        found = sorted((row.memory for row in self._scope(tenant_id, scope)), key=lambda m: m.memory_id)
        return [m for m in reversed(found) if before is None or m.memory_id < before][:size]

    async def sweep(self, limit: int) -> int:
        if self.errors:
            raise self.errors.pop(0)
        now = now_ms()
        due = [key for key, row in self.rows.items() if 0 < row.memory.expire_time_ms <= now][:limit]
        for key in due:
            del self.rows[key]
        return len(due)

    async def other_models(self, model: str, after: UUID | None, size: int) -> Sequence[tuple[UUID, str]]:
        found = sorted(key for key, row in self.rows.items() if row.new.model != model)
        return [(key, self.rows[key].memory.text) for key in found if after is None or key > after][:size]

    async def set_vector(self, memory_id: UUID, text: str, model: str, vector: Vector) -> bool:
        row = self.rows.get(memory_id)
        if row is None or row.memory.text != text:
            return False
        row.new = replace(row.new, model=model, vector=vector)
        return True

    def expire(self, memory_id: UUID) -> None:
        row = self.rows[memory_id]
        row.memory = replace(row.memory, expire_time_ms=1)

    async def get_preferences(self, tenant_id: UUID, user: str) -> Mapping[str, str]:
        return dict(self.preferences.get((tenant_id, user), {}))

    async def set_preferences(
        self, tenant_id: UUID, user: str, changes: Mapping[str, str]
    ) -> Mapping[str, str]:
        merged = {**self.preferences.get((tenant_id, user), {}), **changes}
        merged = {key: value for key, value in merged.items() if value}
        if len(merged) > MAX_PREFERENCES:
            raise ResourceExhaustedError("QUOTA_EXCEEDED", "too many")
        self.preferences[tenant_id, user] = merged
        return dict(merged)


class LetterEmbedder:
    """Counts letters: texts of the same letters are near. `texts` is what it was given."""

    def __init__(self, model: str = "letters") -> None:
        self.model = model
        self.texts: list[str] = []

    async def embed(self, text: str) -> Vector:
        self.texts.append(text)
        vector = [0.0] * DIMENSIONS
        for letter in text.lower():
            if letter.isalpha():
                vector[ord(letter) % DIMENSIONS] += 1.0
        length = math.sqrt(sum(value * value for value in vector))
        return [value / length for value in vector] if length else vector
