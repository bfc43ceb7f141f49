"""The gateway's calls into the mesh: stubs on one channel, errors of the one tree."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
import grpc.aio

from gateway.bundle import RunCalls
from hermesh.agent.v1 import agent_service_pb2 as agent_pb
from hermesh.agent.v1.agent_service_pb2_grpc import AgentServiceStub
from hermesh.session.v1 import session_service_pb2 as session_pb
from hermesh.session.v1.session_internal_service_pb2_grpc import SessionInternalServiceStub
from hermesh.session.v1.session_service_pb2_grpc import SessionServiceStub
from hermesh.tool.v1.tool_service_pb2_grpc import ToolServiceStub
from meshkit.errors import HermeshError, NotFoundError, from_rpc_error
from meshkit.identity import PROBE_TENANT, TENANT_KEY

T = TypeVar("T")

_SESSION = "hermesh.session.v1.SessionService"
# Read-only and unary: the channel may try them again when a replica is gone.
SAFE_METHODS = (
    f"{_SESSION}/GetSession",
    f"{_SESSION}/ListSessions",
    f"{_SESSION}/ListMessages",
    f"{_SESSION}/GetRun",
    f"{_SESSION}/ListRuns",
    f"{_SESSION}/ListPendingActions",
    f"{_SESSION}/GetRunToolCall",
    "hermesh.session.v1.SessionInternalService/Authenticate",
    "hermesh.agent.v1.AgentService/ListModels",
)
_MODELS_TTL = 10.0
_MODELS_TIMEOUT = 3.0
# After a failure nobody asks again for so long: callers must not queue up behind an agent that hangs.
_MODELS_PAUSE = 1.0
_PROBE = ((TENANT_KEY, str(PROBE_TENANT)),)
_PROBE_TIMEOUT = 1.5
DEFAULT_MODEL = "default"


async def call(awaitable: Awaitable[T]) -> T:
    """Awaits a unary call and raises its error as a `HermeshError`."""
    try:
        return await awaitable
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from None


class MeshClients:
    """The services as the gateway sees them.

    Attributes:
        sessions: Stub of the session service's public face.
        internal: Stub of its face for the mesh.
        agents: Stub of the agent service.
        tools: Stub of the tool service.
        runs: Begins runs; enter the clients before it is used, and leave them when all have their end.
    """

    def __init__(self, channel: grpc.aio.Channel) -> None:
        """Uses a channel of `meshkit.channel.open_channel`, which stays the caller's."""
        # The generated stubs are typed for the synchronous channel as well; these are always aio.
        self.sessions: Any = SessionServiceStub(channel)
        self.internal: Any = SessionInternalServiceStub(channel)
        self.agents: Any = AgentServiceStub(channel)
        self.tools: Any = ToolServiceStub(channel)
        self.runs = RunCalls(self.agents)
        self._models: list[agent_pb.Model] = []
        self._models_until = 0.0
        self._models_error: HermeshError | None = None
        self._models_lock = asyncio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.runs.close()

    async def models(self) -> list[agent_pb.Model]:
        """Returns the models that runs may ask for, the default first; remembered for some seconds.

        While no agent answers, those of before stand.

        Raises:
            HermeshError: No agent answers, and none ever did.
        """
        async with self._models_lock:
            if self._models_until < time.monotonic():
                try:
                    request = agent_pb.ListModelsRequest()
                    answer = await call(self.agents.ListModels(request, timeout=_MODELS_TIMEOUT))
                except HermeshError as error:
                    self._models_error = error
                    self._models_until = time.monotonic() + _MODELS_PAUSE
                else:
                    self._models, self._models_error = list(answer.models), None
                    self._models_until = time.monotonic() + _MODELS_TTL
            if self._models_error is not None and not self._models:
                raise self._models_error
            return self._models

    async def check_model(self, name: str) -> str:
        """Returns the name as runs take it: empty for the default.

        When no agent answers, the name passes: the run itself says so then.

        Raises:
            NotFoundError: No such model.
        """
        if name in ("", DEFAULT_MODEL):
            return ""
        try:
            known = [model.name for model in await self.models()]
        except HermeshError:
            return name
        if name in known:
            return name
        raise NotFoundError(
            "MODEL_NOT_FOUND", f"there is no model {name[:100]!r}", metadata={"model": name[:100]}
        )

    async def probe_sessions(self) -> str | None:
        """Returns None if the session service and its database answer, else what is wrong."""
        try:
            await self.sessions.ListSessions(
                session_pb.ListSessionsRequest(page_size=1), metadata=_PROBE, timeout=_PROBE_TIMEOUT
            )
        except grpc.aio.AioRpcError as error:
            return from_rpc_error(error).reason
        return None

    async def probe_agents(self) -> str | None:
        """Returns None if an agent answers, else what is wrong."""
        try:
            await self.agents.ListModels(
                agent_pb.ListModelsRequest(), metadata=_PROBE, timeout=_PROBE_TIMEOUT
            )
        except grpc.aio.AioRpcError as error:
            return from_rpc_error(error).reason
        return None
