"""What the memory service speaks about, free of gRPC and SQL."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from uuid import UUID

Vector = Sequence[float]


class ScopeKind(IntEnum):
    """Whose memories a scope holds; the numbers are the table's."""

    USER = 1
    SESSION = 2


@dataclass(frozen=True, slots=True)
class Scope:
    """Whose memories are meant; memories never cross it. `owner` is a user's name or a session's id."""

    kind: ScopeKind
    owner: str


@dataclass(frozen=True, slots=True)
class Memory:
    """One thing remembered; times are Unix milliseconds, `expire_time_ms` 0 means never."""

    memory_id: UUID
    scope: Scope
    text: str
    importance: float
    source_session_id: UUID | None
    create_time_ms: int
    expire_time_ms: int


@dataclass(frozen=True, slots=True)
class NewMemory:
    """A memory before it is stored.

    Attributes:
        memory_id: A UUIDv7: its order is the order of creation.
        scope: Whose it is.
        text: The text.
        importance: 0 to 1.
        ttl_ms: How long to keep it; 0 means for ever.
        source_session_id: Where it came from, if known.
        request_id: Makes storing it twice store it once; empty does not.
        model: The embedder that made `vector`: vectors of different ones are never compared.
        vector: Its meaning, of length 1.
    """

    memory_id: UUID
    scope: Scope
    text: str
    importance: float
    ttl_ms: int
    source_session_id: UUID | None
    request_id: str
    model: str
    vector: Vector

    def fingerprint(self) -> bytes:
        """Returns a digest of what the caller asked for, to tell a repetition from another request."""
        parts = (
            int(self.scope.kind),
            self.scope.owner,
            self.text,
            repr(self.importance),
            self.ttl_ms,
            self.source_session_id or "",
        )
        return hashlib.sha256("\x1f".join(f"{len(str(part))}:{part}" for part in parts).encode()).digest()


@dataclass(frozen=True, slots=True)
class Query:
    """What to recall.

    Attributes:
        model: The embedder that made `vector`.
        vector: The query's meaning.
        limit: At most this many.
        min_score: Least cosine nearness, -1 to 1.
        importance_weight: How much importance 1 over importance 0 counts, in units of nearness.
    """

    model: str
    vector: Vector
    limit: int
    min_score: float
    importance_weight: float


@dataclass(frozen=True, slots=True)
class Recalled:
    """A memory that was found; `score` is its cosine nearness, -1 to 1."""

    memory: Memory
    score: float
