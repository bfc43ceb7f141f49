"""The journal that stands between the intent to call a tool and the act."""

from __future__ import annotations

from typing import Protocol

import grpc
import grpc.aio

from hermesh.session.v1 import resources_pb2, session_internal_service_pb2
from hermesh.session.v1.session_internal_service_pb2_grpc import SessionInternalServiceStub
from meshkit import failpoints
from meshkit.channel import mesh_metadata
from meshkit.errors import InternalError, from_rpc_error
from meshkit.settings import MeshSettings
from services.tool.domain import BeginOutcome, CallRequest, CallState, Entry, Outcome

CALL_SECONDS = 5.0


class Journal(Protocol):
    """The port; both methods raise HermeshError."""

    async def begin(self, request: CallRequest) -> tuple[BeginOutcome, Entry]:
        """Records that the tool is about to act. Only GO allows it to."""
        ...

    async def complete(self, request: CallRequest, outcome: Outcome) -> Entry:
        """Records what the tool did. May be repeated: the first outcome stays, and is returned."""
        ...


class MeshJournal:
    """The journal of the session service, asked through the mesh."""

    def __init__(self, channel: grpc.aio.Channel, settings: MeshSettings) -> None:
        """Uses a channel that stays the caller's. It must not try anything again by itself."""
        self._stub = SessionInternalServiceStub(channel)
        self._settings = settings

    @failpoints.around("tool.begin")
    async def begin(self, request: CallRequest) -> tuple[BeginOutcome, Entry]:
        """Calls BeginToolCall."""
        try:
            response = await self._stub.BeginToolCall(
                session_internal_service_pb2.BeginToolCallRequest(
                    call_id=request.call_id, session_id=str(request.session_id), fence=request.fence
                ),
                metadata=mesh_metadata(self._settings, request.tenant_id),
                timeout=CALL_SECONDS,
            )
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        try:
            outcome = BeginOutcome(response.outcome)
        except ValueError as error:
            # A newer session may know an outcome that we do not: then nothing allows us to act.
            raise InternalError(message="the journal gave an answer that is not known") from error
        return outcome, _entry(response.tool_call)

    @failpoints.around("tool.complete")
    async def complete(self, request: CallRequest, outcome: Outcome) -> Entry:
        """Calls CompleteToolCall."""
        try:
            response = await self._stub.CompleteToolCall(
                session_internal_service_pb2.CompleteToolCallRequest(
                    call_id=request.call_id,
                    fence=request.fence,
                    state=resources_pb2.ToolCallState.ValueType(outcome.state),
                    content=outcome.content,
                    content_ref=outcome.content_ref,
                ),
                metadata=mesh_metadata(self._settings, request.tenant_id),
                timeout=CALL_SECONDS,
            )
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        return _entry(response.tool_call)


def _entry(call: resources_pb2.ToolCall) -> Entry:
    try:
        state = CallState(call.state)
    except ValueError:
        state = None
    return Entry(
        state=state,
        content=call.content,
        content_ref=call.content_ref,
        idempotency_key=call.idempotency_key,
        effect=call.effect,
    )
