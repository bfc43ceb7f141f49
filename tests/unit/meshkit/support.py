"""What the tests of meshkit share: a tiny server with one service, and a keyring of one key."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, NoReturn
from uuid import UUID

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


class Logs:
    """A structlog processor that keeps lines as dictionaries and can wait for them."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []
        self._changed = asyncio.Event()

    def __call__(self, logger: Any, method: str, event: dict[str, Any]) -> NoReturn:
        self.entries.append({**event, "log_level": method})
        self._changed.set()
        raise structlog.DropEvent

    async def rpcs(self, count: int = 1) -> list[dict[str, Any]]:
        """Waits for access log lines: a client may read the status before the server has ended the RPC."""
        async with asyncio.timeout(5):
            while len(lines := [entry for entry in self.entries if entry["event"] == "rpc"]) < count:
                self._changed.clear()
                await self._changed.wait()
        return lines


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


@asynccontextmanager
async def serve(settings: MeshSettings, servicer: Servicer, **more: Any) -> AsyncIterator[Server]:
    async with asyncio.timeout(20):
        async with Server(
            settings, service="test", configure_logging=False, **({"authenticator": Keys()} | more)
        ) as server:
            server.add(pb_grpc.add_SessionInternalServiceServicer_to_server, servicer, SERVICE)
            server.reflect("hermesh.tool.v1.ToolService")
            await server.start()
            yield server
