"""Remember: a text, its meaning, and how long to keep it."""

from __future__ import annotations

import math
from uuid import UUID

from meshkit.ids import uuid7
from services.memory import metrics
from services.memory.domain import Memory, NewMemory, Scope
from services.memory.embedding.port import Embedder
from services.memory.operations.text import invalid, storable
from services.memory.store.port import MemoryStore

DEFAULT_IMPORTANCE = 0.5
# A hundred years: what is to last longer has no expiry.
MAX_TTL_MS = 100 * 366 * 24 * 3600 * 1000


async def remember(
    store: MemoryStore,
    embedder: Embedder,
    tenant_id: UUID,
    scope: Scope,
    text: str,
    *,
    importance: float | None = None,
    ttl_ms: int = 0,
    source_session_id: UUID | None = None,
    request_id: str = "",
) -> Memory:
    """Stores a memory, or returns the first one of a repeated request.

    Raises:
        InvalidArgumentError: The text says nothing, or a value is out of its range.
    """
    if not text.strip():
        raise invalid("text", "has nothing to remember")
    if importance is None:
        importance = DEFAULT_IMPORTANCE
    if not math.isfinite(importance) or not 0 <= importance <= 1:
        raise invalid("importance", "must be from 0 to 1")
    if not 0 <= ttl_ms <= MAX_TTL_MS:
        raise invalid("ttl_ms", "must be from 0 to a hundred years")
    new = NewMemory(
        memory_id=uuid7(),
        scope=scope,
        text=storable("text", text),
        importance=importance,
        ttl_ms=ttl_ms,
        source_session_id=source_session_id,
        request_id=storable("request_id", request_id),
        model=embedder.model,
        vector=await embedder.embed(text),
    )
    memory = await store.remember(tenant_id, new)
    if memory.memory_id == new.memory_id:
        metrics.REMEMBERED.inc()
    return memory
