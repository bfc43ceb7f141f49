"""What the tests of meshkit share: settings, logs as data, and a tiny server with one service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import grpc
import pytest
import structlog

from hermesh.session.v1 import session_internal_service_pb2 as pb
from hermesh.session.v1 import session_internal_service_pb2_grpc as pb_grpc
from meshkit.errors import UnauthenticatedError
from meshkit.server import Server
from meshkit.settings import MeshSettings

TENANT = UUID("01890000-0000-7000-8000-000000000001")
SERVICE = "hermesh.session.v1.SessionInternalService"
TOKEN = "mesh-token"
KEY = "hm_good"


class Keys:
    """Knows one key."""

    async def authenticate(self, api_key: str) -> UUID:
        if api_key != KEY:
            raise UnauthenticatedError("API_KEY_INVALID", "the API key is not valid")
        return TENANT


class Servicer(pb_grpc.SessionInternalServiceServicer):
    """Does what a test puts in `unary` and `stream`."""

    def __init__(self) -> None:
        self.unary: Callable[[Any, Any], Any] | None = None
        self.stream: Callable[[Any, Any], AsyncIterator[Any]] | None = None
        self.calls = 0

    async def Authenticate(self, request: Any, context: Any) -> Any:
        self.calls += 1
        if self.unary is not None:
            return await self.unary(request, context)
        return pb.AuthenticateResponse(tenant_id=request.api_key)

    async def ClaimRun(self, request: Any, context: Any) -> Any:
        self.calls += 1
        return pb.ClaimRunResponse()

    async def Append(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:
        assert self.stream is not None
        async for message in self.stream(request_iterator, context):
            yield message


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> MeshSettings:
    return MeshSettings(mesh_token=TOKEN, drain_delay_seconds=0, drain_seconds=5, replica="test-1")


@pytest.fixture
def logs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Log lines of the RPC interceptor, as dictionaries."""
    capture = structlog.testing.LogCapture()
    logger = structlog.wrap_logger(None, processors=[capture], cache_logger_on_first_use=False)
    monkeypatch.setattr("meshkit.interceptor._log", logger)
    return capture.entries


@pytest.fixture
def servicer() -> Servicer:
    return Servicer()


@asynccontextmanager
async def serve(settings: MeshSettings, servicer: Servicer, **more: Any) -> AsyncIterator[Server]:
    async with asyncio.timeout(20):
        async with Server(
            settings, service="test", configure_logging=False, **({"authenticator": Keys()} | more)
        ) as server:
            server.add(pb_grpc.add_SessionInternalServiceServicer_to_server, servicer, SERVICE)
            await server.start()
            yield server


@pytest.fixture
async def server(settings: MeshSettings, servicer: Servicer) -> AsyncIterator[Server]:
    async with serve(settings, servicer) as running:
        yield running


@pytest.fixture
async def plain(server: Server) -> AsyncIterator[pb_grpc.SessionInternalServiceStub]:
    """A stub over a channel without the mesh's metadata: what a caller from outside has."""
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield pb_grpc.SessionInternalServiceStub(channel)
