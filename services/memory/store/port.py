"""The store's port. Every method is scoped by a tenant; all raise UnavailableError when the store is away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol
from uuid import UUID

from services.memory.domain import Memory, NewMemory, Query, Recalled, Scope, Vector


class MemoryStore(Protocol):
    """Memories."""

    async def remember(self, tenant_id: UUID, new: NewMemory) -> Memory:
        """Stores a memory, or returns the one that its request id stored before.

        Raises:
            AlreadyExistsError: The request id stored something else (REQUEST_ID_REUSED).
            ResourceExhaustedError: The scope is full (QUOTA_EXCEEDED).
        """
        ...

    async def recall(self, tenant_id: UUID, scope: Scope, query: Query) -> Sequence[Recalled]:
        """Returns a scope's memories nearest to a query, best first."""
        ...

    async def forget(self, tenant_id: UUID, memory_id: UUID) -> int:
        """Deletes one memory; returns how many were deleted, 0 or 1."""
        ...

    async def forget_scope(self, tenant_id: UUID, scope: Scope) -> int:
        """Deletes all memories of a scope; returns how many."""
        ...

    async def list_memories(
        self, tenant_id: UUID, scope: Scope, before: UUID | None, size: int
    ) -> Sequence[Memory]:
        """Returns up to `size` memories of a scope, newest first, from those older than `before`."""
        ...

    async def sweep(self, limit: int) -> int:
        """Removes up to `limit` expired memories of all tenants; returns how many."""
        ...


class VectorStore(Protocol):
    """The vectors of all tenants, for a change of embedder."""

    async def other_models(self, model: str, after: UUID | None, size: int) -> Sequence[tuple[UUID, str]]:
        """Returns id and text of memories whose vector is of another model, by id from `after` on."""
        ...

    async def set_vector(self, memory_id: UUID, text: str, model: str, vector: Vector) -> bool:
        """Replaces the vector of a memory that still has this text; returns False if there is none."""
        ...


class PreferenceStore(Protocol):
    """Preferences of users."""

    async def get_preferences(self, tenant_id: UUID, user: str) -> Mapping[str, str]:
        """Returns a user's preferences; empty if there are none."""
        ...

    async def set_preferences(
        self, tenant_id: UUID, user: str, changes: Mapping[str, str]
    ) -> Mapping[str, str]:
        """Sets preferences, removes those with an empty value, and returns all.

        Raises:
            ResourceExhaustedError: There would be too many (QUOTA_EXCEEDED).
        """
        ...


class Store(MemoryStore, VectorStore, PreferenceStore, Protocol):
    """All of it."""

    async def ping(self) -> str | None:
        """Returns None if the store answers, else why not."""
        ...
