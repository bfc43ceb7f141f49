"""Forget: one memory, or a whole scope, and never both by mistake."""

from __future__ import annotations

from uuid import UUID

from services.memory.domain import Scope
from services.memory.operations.text import invalid
from services.memory.store.port import MemoryStore


async def forget(store: MemoryStore, tenant_id: UUID, memory_id: str, scope: Scope | None) -> int:
    """Deletes and returns how many. What is not there, or another tenant's, counts 0.

    Raises:
        InvalidArgumentError: Not exactly one of the two is given, or the id is none.
    """
    if bool(memory_id) == (scope is not None):
        raise invalid("memory_id", "or scope must be set, and not both")
    if scope is not None:
        return await store.forget_scope(tenant_id, scope)
    try:
        wanted = UUID(memory_id)
    except ValueError:
        raise invalid("memory_id", "is not a UUID") from None
    return await store.forget(tenant_id, wanted)
