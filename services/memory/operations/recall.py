"""Recall: the memories of one scope nearest in meaning to a query."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from services.memory import metrics
from services.memory.domain import Query, Recalled, Scope
from services.memory.embedding.port import Embedder
from services.memory.operations.text import invalid
from services.memory.store.port import MemoryStore

DEFAULT_LIMIT = 5
MAX_QUERY_BYTES = 16 * 1024


@dataclass(frozen=True, slots=True)
class Ranking:
    """How results are chosen; see `MemorySettings`."""

    min_score: float
    importance_weight: float


async def recall(
    store: MemoryStore,
    embedder: Embedder,
    ranking: Ranking,
    tenant_id: UUID,
    scope: Scope,
    query: str,
    *,
    limit: int = 0,
    min_score: float | None = None,
) -> Sequence[Recalled]:
    """Returns what is near a query, best first; importance breaks what nearness leaves close.

    Raises:
        InvalidArgumentError: `min_score` is not a number.
    """
    if min_score is not None and not math.isfinite(min_score):
        raise invalid("min_score", "must be a number")
    text = query.encode()[:MAX_QUERY_BYTES].decode(errors="ignore")
    if not text.strip():
        return ()
    wanted = Query(
        model=embedder.model,
        vector=await embedder.embed(text),
        limit=limit or DEFAULT_LIMIT,
        min_score=ranking.min_score if min_score is None else min_score,
        importance_weight=ranking.importance_weight,
    )
    with metrics.RECALL_SECONDS.time():
        found = await store.recall(tenant_id, scope, wanted)
    metrics.RECALLED.observe(len(found))
    return found
