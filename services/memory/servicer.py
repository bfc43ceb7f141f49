"""Glue between the wire and the operations."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

from hermesh.memory.v1 import memory_service_pb2 as pb
from hermesh.memory.v1.memory_service_pb2_grpc import MemoryServiceServicer
from meshkit.identity import require_tenant
from services.memory.domain import Memory, Scope, ScopeKind
from services.memory.embedding.port import Embedder
from services.memory.operations.forget import forget
from services.memory.operations.list_memories import list_memories
from services.memory.operations.recall import Ranking, recall
from services.memory.operations.remember import remember
from services.memory.operations.text import invalid, storable
from services.memory.store.port import Store


class MemoryServicer(MemoryServiceServicer):
    """hermesh.memory.v1.MemoryService."""

    def __init__(self, store: Store, embedder: Embedder, ranking: Ranking) -> None:
        """Serves these."""
        self._store = store
        self._embedder = embedder
        self._ranking = ranking

    async def Remember(self, request: pb.RememberRequest, context: Any) -> pb.RememberResponse:
        """Stores a memory."""
        memory = await remember(
            self._store,
            self._embedder,
            require_tenant(),
            _scope(request.scope),
            request.text,
            importance=request.importance if request.HasField("importance") else None,
            ttl_ms=request.ttl_ms,
            source_session_id=_session(request.source_session_id),
            request_id=request.request_id,
        )
        return pb.RememberResponse(memory=_memory(memory))

    async def Recall(self, request: pb.RecallRequest, context: Any) -> AsyncIterator[pb.RecallResponse]:
        """Streams what is near a query."""
        found = await recall(
            self._store,
            self._embedder,
            self._ranking,
            require_tenant(),
            _scope(request.scope),
            request.query,
            limit=request.limit,
            min_score=request.min_score if request.HasField("min_score") else None,
        )
        for recalled in found:
            yield pb.RecallResponse(memory=_memory(recalled.memory), score=recalled.score)

    async def Forget(self, request: pb.ForgetRequest, context: Any) -> pb.ForgetResponse:
        """Deletes memories."""
        scope = _scope(request.scope) if request.HasField("scope") else None
        return pb.ForgetResponse(
            deleted=await forget(self._store, require_tenant(), request.memory_id, scope)
        )

    async def ListMemories(self, request: pb.ListMemoriesRequest, context: Any) -> pb.ListMemoriesResponse:
        """Lists a scope."""
        page, token = await list_memories(
            self._store, require_tenant(), _scope(request.scope), request.page_size, request.page_token
        )
        return pb.ListMemoriesResponse(memories=[_memory(memory) for memory in page], next_page_token=token)

    async def GetPreferences(
        self, request: pb.GetPreferencesRequest, context: Any
    ) -> pb.GetPreferencesResponse:
        """Reads preferences."""
        user = storable("user", request.user)
        return pb.GetPreferencesResponse(
            preferences=await self._store.get_preferences(require_tenant(), user)
        )

    async def SetPreferences(
        self, request: pb.SetPreferencesRequest, context: Any
    ) -> pb.SetPreferencesResponse:
        """Changes preferences."""
        user = storable("user", request.user)
        changes = {
            storable("preferences", key): storable("preferences", value)
            for key, value in request.preferences.items()
        }
        return pb.SetPreferencesResponse(
            preferences=await self._store.set_preferences(require_tenant(), user, changes)
        )


def _scope(scope: pb.Scope) -> Scope:
    if scope.WhichOneof("owner") == "session_id":
        # In canonical form, so that upper case names the same session.
        return Scope(ScopeKind.SESSION, str(UUID(scope.session_id)))
    if not scope.user:
        raise invalid("scope", "must name a user or a session")
    return Scope(ScopeKind.USER, storable("scope.user", scope.user))


def _session(text: str) -> UUID | None:
    try:
        return UUID(text) if text else None
    except ValueError:
        raise invalid("source_session_id", "is not a UUID") from None


def _memory(memory: Memory) -> pb.Memory:
    owner = memory.scope.owner
    scope = pb.Scope(user=owner) if memory.scope.kind is ScopeKind.USER else pb.Scope(session_id=owner)
    return pb.Memory(
        memory_id=str(memory.memory_id),
        scope=scope,
        text=memory.text,
        importance=memory.importance,
        source_session_id=str(memory.source_session_id or ""),
        create_time_ms=memory.create_time_ms,
        expire_time_ms=memory.expire_time_ms,
    )
