"""The memory service: what is known at a run's start, and what is kept at its end."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import grpc.aio

from hermesh.memory.v1.memory_service_pb2 import (
    GetPreferencesRequest,
    RecallRequest,
    RememberRequest,
    Scope,
)
from hermesh.memory.v1.memory_service_pb2_grpc import MemoryServiceStub
from meshkit.channel import mesh_metadata, stream_call
from meshkit.errors import HermeshError, from_rpc_error
from meshkit.identity import PROBE_TENANT
from meshkit.settings import MeshSettings
from services.agent.domain.prompt import RunSpec

MAX_QUERY = 16 * 1024
MAX_TEXT = 4 * 1024
PROBE_TIMEOUT = 1.5


@dataclass(frozen=True, slots=True)
class Recalled:
    """A memory that was found; `source` is the session it came from, if known."""

    memory_id: str
    text: str
    score: float
    source: str


@dataclass(frozen=True, slots=True)
class Known:
    """What is known at a run's start.

    Attributes:
        recalled: memories, best first.
        preferences: the user's, by name.
        missing: what could not be had, by part (`memory`, `preferences`), and why.
    """

    recalled: Sequence[Recalled] = ()
    preferences: Mapping[str, str] = field(default_factory=dict)
    missing: Mapping[str, HermeshError] = field(default_factory=dict)


class MemoryClient:
    """Calls to the memory service.

    Args:
        channel: to the mesh.
        settings: for the mesh's credential.
    """

    def __init__(self, channel: grpc.aio.Channel, settings: MeshSettings) -> None:
        self._stub = MemoryServiceStub(channel)
        self._settings = settings

    async def problem(self) -> str | None:
        """Return None if the memory service and its database answer, else what is wrong."""
        try:
            await self._stub.GetPreferences(
                GetPreferencesRequest(user="readiness-probe"),
                metadata=mesh_metadata(self._settings, PROBE_TENANT),
                timeout=PROBE_TIMEOUT,
            )
        except grpc.aio.AioRpcError as error:
            return f"the memory service does not answer: {from_rpc_error(error).reason}"
        return None

    async def known(self, spec: RunSpec, query: str, timeout: float) -> Known:
        """Return what is recalled for a query and the user's preferences; what fails is named and empty.

        Args:
            spec: the run.
            query: what its input says.
            timeout: seconds for both, side by side.
        """
        if not spec.user and spec.ordinal <= 1:
            return Known()  # a session of nobody has nothing to recall before its first run is over
        recalled, preferences = await asyncio.gather(
            self._recall(spec, query, timeout), self._preferences(spec, timeout), return_exceptions=True
        )
        missing: dict[str, HermeshError] = {}
        for part, found in (("memory", recalled), ("preferences", preferences)):
            if isinstance(found, grpc.aio.AioRpcError):
                missing[part] = from_rpc_error(found)
            elif isinstance(found, BaseException):
                raise found
        return Known(
            () if isinstance(recalled, BaseException) else recalled,
            {} if isinstance(preferences, BaseException) else preferences,
            missing,
        )

    async def _recall(self, spec: RunSpec, query: str, timeout: float) -> Sequence[Recalled]:
        if not query:
            return ()
        request = RecallRequest(scope=_scope(spec), query=cut(query, MAX_QUERY))
        found: list[Recalled] = []
        call = self._stub.Recall(
            request, metadata=mesh_metadata(self._settings, spec.tenant_id), timeout=timeout
        )
        async with stream_call(call) as responses:
            async for response in responses:
                memory = response.memory
                found.append(
                    Recalled(memory.memory_id, memory.text, response.score, memory.source_session_id)
                )
        return found

    async def _preferences(self, spec: RunSpec, timeout: float) -> Mapping[str, str]:
        if not spec.user:
            return {}
        response = await self._stub.GetPreferences(
            GetPreferencesRequest(user=spec.user),
            metadata=mesh_metadata(self._settings, spec.tenant_id),
            timeout=timeout,
        )
        return dict(response.preferences)

    async def remember(self, spec: RunSpec, text: str, timeout: float) -> None:
        """Keep a text; the run's id makes that safe to repeat.

        Raises:
            HermeshError: it was not kept, as far as is known.
        """
        request = RememberRequest(
            scope=_scope(spec),
            text=cut(text, MAX_TEXT),
            source_session_id=spec.session_id,
            request_id=spec.run_id,
        )
        metadata = mesh_metadata(self._settings, spec.tenant_id)
        try:
            await self._stub.Remember(request, metadata=metadata, timeout=timeout)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error


def _scope(spec: RunSpec) -> Scope:
    return Scope(user=spec.user) if spec.user else Scope(session_id=spec.session_id)


def cut(text: str, max_bytes: int) -> str:
    """Cut a text to so many bytes of UTF-8, never inside a character."""
    data = text.encode()
    return text if len(data) <= max_bytes else data[:max_bytes].decode(errors="ignore")
