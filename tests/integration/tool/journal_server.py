"""The session service's journal RPCs over a journal in memory, on a real gRPC server."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

from pydantic import SecretStr

from hermesh.session.v1 import resources_pb2
from hermesh.session.v1 import session_internal_service_pb2 as pb
from hermesh.session.v1.session_internal_service_pb2_grpc import (
    SessionInternalServiceServicer,
    add_SessionInternalServiceServicer_to_server,
)
from meshkit.identity import require_tenant
from meshkit.server import Server
from meshkit.settings import MeshSettings
from services.tool.domain import CallRequest, CallState, Entry, Outcome
from tests.unit.tool.fakes import RUN, FakeJournal


def mesh_settings(token: str = "token", **more: Any) -> MeshSettings:
    return MeshSettings(mesh_token=SecretStr(token), drain_delay_seconds=0.0, drain_seconds=1.0, **more)


class JournalServicer(SessionInternalServiceServicer):
    """Begin and Complete over a `FakeJournal`."""

    def __init__(self, journal: FakeJournal) -> None:
        self.journal = journal
        self.tenants: list[UUID] = []

    async def BeginToolCall(self, request: pb.BeginToolCallRequest, context: Any) -> pb.BeginToolCallResponse:
        call = self._call(request.call_id, request.fence, request.session_id)
        outcome, entry = await self.journal.begin(call, request.act_ms / 1000)
        return pb.BeginToolCallResponse(
            outcome=pb.BeginOutcome.ValueType(outcome), tool_call=_wire(request.call_id, entry)
        )

    async def CompleteToolCall(
        self, request: pb.CompleteToolCallRequest, context: Any
    ) -> pb.CompleteToolCallResponse:
        outcome = Outcome(CallState(request.state), request.content, request.content_ref)
        entry = await self.journal.complete(
            self._call(request.call_id, request.fence), outcome, request.tries
        )
        return pb.CompleteToolCallResponse(tool_call=_wire(request.call_id, entry))

    async def GetToolCall(self, request: pb.GetToolCallRequest, context: Any) -> pb.GetToolCallResponse:
        entry = await self.journal.look(self._call(request.call_id, 0, request.session_id))
        return pb.GetToolCallResponse(tool_call=_wire(request.call_id, entry))

    async def ReconcileToolCall(
        self, request: pb.ReconcileToolCallRequest, context: Any
    ) -> pb.ReconcileToolCallResponse:
        outcome = None
        if request.state != resources_pb2.TOOL_CALL_STATE_INTENT:
            outcome = Outcome(CallState(request.state), request.content, request.content_ref)
        entry = await self.journal.reconcile(self._call(request.call_id, 0), outcome, request.tries)
        return pb.ReconcileToolCallResponse(tool_call=_wire(request.call_id, entry))

    def _call(self, call_id: str, fence: int, session_id: str = str(RUN)) -> CallRequest:
        tenant_id = require_tenant()
        self.tenants.append(tenant_id)
        return CallRequest(call_id, tenant_id, UUID(session_id), RUN, fence, "", "{}")


def _wire(call_id: str, entry: Entry) -> resources_pb2.ToolCall:
    unsettled = (
        resources_pb2.TOOL_CALL_STATE_INTENT if entry.may_begin else resources_pb2.TOOL_CALL_STATE_RUNNING
    )
    state = entry.state if entry.state is not None else unsettled
    return resources_pb2.ToolCall(
        call_id=call_id,
        state=resources_pb2.ToolCallState.ValueType(state),
        content=entry.content,
        content_ref=entry.content_ref,
        idempotency_key=entry.idempotency_key,
        effect=resources_pb2.EffectClass.ValueType(entry.effect),
        tries=entry.tries,
        quiet_in_ms=math.ceil(entry.quiet_in * 1000),
    )


@asynccontextmanager
async def serve_journal(journal: FakeJournal, listen: str = "127.0.0.1:0") -> AsyncIterator[str]:
    """Serves until the block ends; gives host:port."""
    async with Server(mesh_settings(listen=listen), service="session", configure_logging=False) as server:
        server.add(
            add_SessionInternalServiceServicer_to_server,
            JournalServicer(journal),
            "hermesh.session.v1.SessionInternalService",
        )
        await server.start()
        yield server.address
