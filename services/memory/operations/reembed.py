"""Reembed: gives every memory a vector of the present embedder, after that was changed."""

from __future__ import annotations

from uuid import UUID

from services.memory.embedding.port import Embedder
from services.memory.store.port import VectorStore

_BATCH = 200


async def reembed(store: VectorStore, embedder: Embedder) -> int:
    """Replaces the vectors of other models and returns how many.

    It may run beside the service, be stopped and be run again: each memory changes in one statement, and is
    found by one embedder before it and by the other after it.
    """
    total = 0
    after: UUID | None = None
    while True:
        batch = await store.other_models(embedder.model, after, _BATCH)
        for memory_id, text in batch:
            total += await store.set_vector(memory_id, text, embedder.model, await embedder.embed(text))
        if len(batch) < _BATCH:
            return total
        after = batch[-1][0]
