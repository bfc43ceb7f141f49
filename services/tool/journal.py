"""The journal that stands between the intent to call a tool and the act."""

from __future__ import annotations

import math
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

# Also the longest time from asking the journal for its go to the start of the act.
CALL_SECONDS = 5.0


class Journal(Protocol):
    """The port; all methods raise HermeshError."""

    async def begin(self, request: CallRequest, act_seconds: float = 0.0) -> tuple[BeginOutcome, Entry]:
        """Records that the tool is about to act, for so many seconds at most. Only GO allows it to."""
        ...

    async def complete(
        self, request: CallRequest, outcome: Outcome, tries: int = 0, *, still_acts: bool = False
    ) -> Entry:
        """Records what a try did, and whether it still acts. May be repeated: the first outcome stays, and is
        returned.
        """
        ...

    async def look(self, request: CallRequest) -> Entry:
        """Returns how the call stands."""
        ...

    async def reconcile(self, request: CallRequest, outcome: Outcome | None, tries: int) -> Entry:
        """Records what became of an unknown call as of its `tries`; None: it was not done and may run.

        Returns how the call stands then: the journal takes nothing that comes too early or too late.
        """
        ...


class MeshJournal:
    """The journal of the session service, asked through the mesh."""

    def __init__(self, channel: grpc.aio.Channel, settings: MeshSettings) -> None:
        """Uses a channel that stays the caller's. It must not try anything again by itself."""
        self._stub = SessionInternalServiceStub(channel)
        self._settings = settings

    @failpoints.around("tool.begin")
    async def begin(self, request: CallRequest, act_seconds: float = 0.0) -> tuple[BeginOutcome, Entry]:
        """Calls BeginToolCall."""
        try:
            response = await self._stub.BeginToolCall(
                session_internal_service_pb2.BeginToolCallRequest(
                    call_id=request.call_id,
                    session_id=str(request.session_id),
                    fence=request.fence,
                    act_ms=math.ceil(act_seconds * 1000),
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
    async def complete(
        self, request: CallRequest, outcome: Outcome, tries: int = 0, *, still_acts: bool = False
    ) -> Entry:
        """Calls CompleteToolCall."""
        try:
            response = await self._stub.CompleteToolCall(
                session_internal_service_pb2.CompleteToolCallRequest(
                    call_id=request.call_id,
                    fence=request.fence,
                    state=resources_pb2.ToolCallState.ValueType(outcome.state),
                    content=outcome.content,
                    content_ref=outcome.content_ref,
                    tries=tries,
                    still_acts=still_acts,
                ),
                metadata=mesh_metadata(self._settings, request.tenant_id),
                timeout=CALL_SECONDS,
            )
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        return _entry(response.tool_call)

    async def look(self, request: CallRequest) -> Entry:
        """Calls GetToolCall."""
        try:
            response = await self._stub.GetToolCall(
                session_internal_service_pb2.GetToolCallRequest(
                    call_id=request.call_id, session_id=str(request.session_id)
                ),
                metadata=mesh_metadata(self._settings, request.tenant_id),
                timeout=CALL_SECONDS,
            )
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        return _entry(response.tool_call)

    async def reconcile(self, request: CallRequest, outcome: Outcome | None, tries: int) -> Entry:
        """Calls ReconcileToolCall."""
        state = resources_pb2.TOOL_CALL_STATE_INTENT if outcome is None else outcome.state
        try:
            response = await self._stub.ReconcileToolCall(
                session_internal_service_pb2.ReconcileToolCallRequest(
                    call_id=request.call_id,
                    state=resources_pb2.ToolCallState.ValueType(state),
                    content=outcome.content if outcome is not None else "",
                    content_ref=outcome.content_ref if outcome is not None else "",
                    tries=tries,
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
        tries=call.tries,
        quiet_in=call.quiet_in_ms / 1000,
        may_begin=call.state == resources_pb2.TOOL_CALL_STATE_INTENT and not call.needs_approval,
    )
