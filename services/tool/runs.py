"""The runs that calls belong to: a call whose run is over has nobody left who wants its result."""

from __future__ import annotations

from typing import Protocol

import grpc
import grpc.aio

from hermesh.session.v1.resources_pb2 import (
    RUN_STATUS_CANCELLED,
    RUN_STATUS_COMPLETED,
    RUN_STATUS_FAILED,
)
from hermesh.session.v1.session_service_pb2 import GetRunRequest
from hermesh.session.v1.session_service_pb2_grpc import SessionServiceStub
from meshkit.channel import mesh_metadata
from meshkit.errors import NotFoundError, from_rpc_error
from meshkit.settings import MeshSettings
from services.tool.domain import CallRequest

ASK_TIMEOUT = 1.0
_TERMINAL = (RUN_STATUS_COMPLETED, RUN_STATUS_FAILED, RUN_STATUS_CANCELLED)


class Runs(Protocol):
    """The port."""

    async def over(self, request: CallRequest) -> bool:
        """Returns whether a call's run has ended, is to be cancelled, or is gone. Raises HermeshError."""
        ...


class MeshRuns:
    """The runs of the session service, asked through the mesh."""

    def __init__(self, channel: grpc.aio.Channel, settings: MeshSettings) -> None:
        """Uses a channel that stays the caller's."""
        self._stub = SessionServiceStub(channel)
        self._settings = settings

    async def over(self, request: CallRequest) -> bool:
        """Calls GetRun."""
        try:
            response = await self._stub.GetRun(
                GetRunRequest(run_id=str(request.run_id)),
                metadata=mesh_metadata(self._settings, request.tenant_id),
                timeout=ASK_TIMEOUT,
            )
        except grpc.aio.AioRpcError as rpc_error:
            error = from_rpc_error(rpc_error)
            if isinstance(error, NotFoundError):
                return True
            raise error from rpc_error
        return response.run.cancel_requested or response.run.status in _TERMINAL
