"""A fake mesh on a real gRPC port: sessions over `FakeStore`, two tools, and memories in a list."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
from grpc_status import rpc_status

from hermesh.memory.v1 import memory_service_pb2 as memory_pb
from hermesh.memory.v1 import memory_service_pb2_grpc as memory_grpc
from hermesh.session.v1 import session_internal_service_pb2 as internal_pb
from hermesh.session.v1 import session_internal_service_pb2_grpc as internal_grpc
from hermesh.session.v1 import session_service_pb2 as session_pb
from hermesh.session.v1 import session_service_pb2_grpc as session_grpc
from hermesh.session.v1.resources_pb2 import (
    EFFECT_CLASS_NON_IDEMPOTENT,
    EFFECT_CLASS_PURE,
    TOOL_CALL_STATE_COMPLETED,
    TOOL_CALL_STATE_FAILED,
    TOOL_CALL_STATE_UNKNOWN,
    Run,
    RunOptions,
)
from hermesh.tool.v1 import tool_service_pb2 as tool_pb
from hermesh.tool.v1 import tool_service_pb2_grpc as tool_grpc
from meshkit.errors import (
    AbortedError,
    FailedPreconditionError,
    HermeshError,
    NotFoundError,
    UnavailableError,
    to_status,
)
from services.agent.clients.tools import REPLICA_HEADER
from tests.unit.agent.fakes import TENANT, TTL_MS, FakeStore

TOKEN = "mesh-secret"


async def refuse(context: Any, error: HermeshError) -> None:
    await context.abort_with_status(rpc_status.to_status(to_status(error)))


class Sessions(session_grpc.SessionServiceServicer):
    def __init__(self, mesh: FakeMesh) -> None:
        self.mesh = mesh

    async def SubmitRun(self, request: Any, context: Any) -> Any:
        mesh = self.mesh
        mesh.submits.append(request)
        if mesh.failing_submits:
            mesh.failing_submits -= 1
            await refuse(context, UnavailableError("DATABASE_UNAVAILABLE", "away"))
        if request.session_id == mesh.unknown_session:
            await refuse(context, NotFoundError("SESSION_NOT_FOUND", "no such session"))
        claim = mesh.store.new_claim(request.input[0].content, request.options)
        row = mesh.store.runs[claim.run.run_id]
        answer = session_pb.SubmitRunResponse(run=claim.run, created=row.events[0])
        if request.claim_owner and not mesh.busy:
            answer.grant.CopyFrom(claim.grant)
            answer.context.CopyFrom(claim.context)
            answer.options.CopyFrom(request.options)
        return answer

    async def GetRun(self, request: Any, context: Any) -> Any:
        return session_pb.GetRunResponse(run=Run(cancel_reason="enough"))


class Internal(internal_grpc.SessionInternalServiceServicer):
    def __init__(self, mesh: FakeMesh) -> None:
        self.mesh = mesh

    async def Authenticate(self, request: Any, context: Any) -> Any:
        return internal_pb.AuthenticateResponse(tenant_id=TENANT)

    async def ClaimRun(self, request: Any, context: Any) -> Any:
        row = self.mesh.store.runs.get(request.run_id)
        if row is None:
            return internal_pb.ClaimRunResponse(outcome=internal_pb.CLAIM_OUTCOME_ALREADY_CLAIMED)
        if row.status:
            return internal_pb.ClaimRunResponse(outcome=internal_pb.CLAIM_OUTCOME_FINISHED)
        claim = self.mesh.store.take_over(request.run_id)
        return internal_pb.ClaimRunResponse(
            outcome=internal_pb.CLAIM_OUTCOME_CLAIMED,
            run=claim.run,
            grant=claim.grant,
            context=claim.context,
            options=RunOptions(),
            tenant_id=TENANT,
        )

    async def Append(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        call = self.mesh.store.open_stream()

        async def read() -> None:
            async for request in requests:
                await call.write(request)

        reader = asyncio.ensure_future(read())
        try:
            async for response in call:
                yield response
        finally:
            reader.cancel()

    async def RenewLeases(self, request: Any, context: Any) -> Any:
        return internal_pb.RenewLeasesResponse(ttl_ms=TTL_MS)

    async def ReleaseLease(self, request: Any, context: Any) -> Any:
        lease = request.lease
        released = await self.mesh.store.release(lease.session_id, lease.run_id, lease.fence)
        return internal_pb.ReleaseLeaseResponse(released=released)

    async def BeginToolCall(self, request: Any, context: Any) -> Any:
        self.mesh.begun.append(request.call_id)
        entry = self.mesh.journal
        return internal_pb.BeginToolCallResponse(outcome=self.mesh.begin_outcome, tool_call=entry)

    async def CompleteToolCall(self, request: Any, context: Any) -> Any:
        self.mesh.journal.state, self.mesh.journal.content = request.state, request.content
        return internal_pb.CompleteToolCallResponse(tool_call=self.mesh.journal)


class Tools(tool_grpc.ToolServiceServicer):
    def __init__(self, mesh: FakeMesh) -> None:
        self.mesh = mesh

    async def ListTools(self, request: Any, context: Any) -> Any:
        if self.mesh.list_failures:
            self.mesh.list_failures -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "not there yet")
        if request.page_token:
            pay = tool_pb.Tool(name="pay", effect=EFFECT_CLASS_NON_IDEMPOTENT, timeout_ms=200)
            return tool_pb.ListToolsResponse(tools=[pay])
        add = tool_pb.Tool(
            name="add", input_schema='{"type":"object"}', effect=EFFECT_CLASS_PURE, timeout_ms=1000
        )
        return tool_pb.ListToolsResponse(tools=[add], next_page_token="next")

    async def Execute(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.mesh.executed.append(request)
        self.mesh.tool_asked.set()
        self.mesh.led_to.append(dict(context.invocation_metadata()).get(REPLICA_HEADER, ""))
        action = self.mesh.tool_script.pop(0) if self.mesh.tool_script else "ok"
        if action == "gated":
            await self.mesh.tool_gate.wait()
        # As Envoy does it.
        await context.send_initial_metadata(((REPLICA_HEADER, "here"),))
        if action == "break":
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the connection is gone")
        if action == "gated":
            await asyncio.Event().wait()
        if action == "unavailable":
            await refuse(context, UnavailableError("SERVICE_UNAVAILABLE", "away"))
        if action == "stale":
            await refuse(context, AbortedError("FENCE_STALE", "old"))
        if action == "gone":
            await refuse(context, NotFoundError("TOOL_NOT_FOUND", "no such tool"))
        if action == "unapproved":
            await refuse(context, FailedPreconditionError("APPROVAL_REQUIRED", "ask first"))
        if action == "nothing":
            return
        if action == "hang":
            await asyncio.Event().wait()
        for _ in range(4 if action == "alive" else 0):
            yield tool_pb.ExecuteResponse(progress=tool_pb.Progress(text="waiting"))
            await asyncio.sleep(0.4)
        yield tool_pb.ExecuteResponse(progress=tool_pb.Progress(text="working"))
        state = {
            "ok": TOOL_CALL_STATE_COMPLETED,
            "alive": TOOL_CALL_STATE_COMPLETED,
            "failed": TOOL_CALL_STATE_FAILED,
        }.get(action, TOOL_CALL_STATE_UNKNOWN)
        yield tool_pb.ExecuteResponse(result=tool_pb.Result(state=state, content=action))

    async def Reconcile(self, request: Any, context: Any) -> Any:
        self.mesh.looked.append(request)
        answer = self.mesh.findings.pop(0)
        if answer is None:
            await refuse(context, UnavailableError("SERVICE_UNAVAILABLE", "away"))
        return answer

    async def Cancel(self, request: Any, context: Any) -> Any:
        if self.mesh.failing_cancels:
            self.mesh.failing_cancels -= 1
            await refuse(context, UnavailableError("SERVICE_UNAVAILABLE", "away"))
        self.mesh.led_to.append(dict(context.invocation_metadata()).get(REPLICA_HEADER, ""))
        self.mesh.tool_cancels.append(request.call_id)
        return tool_pb.CancelResponse(found=True)


class Memories(memory_grpc.MemoryServiceServicer):
    def __init__(self, mesh: FakeMesh) -> None:
        self.mesh = mesh

    async def Recall(self, request: Any, context: Any) -> AsyncIterator[Any]:
        if self.mesh.memory_hangs:
            await asyncio.Event().wait()
        for text in self.mesh.memories:
            yield memory_pb.RecallResponse(memory=memory_pb.Memory(memory_id="m", text=text), score=0.5)

    async def GetPreferences(self, request: Any, context: Any) -> Any:
        return memory_pb.GetPreferencesResponse(preferences={"tone": "short"})

    async def Remember(self, request: Any, context: Any) -> Any:
        self.mesh.remembered.append(request)
        self.mesh.store.notify()
        return memory_pb.RememberResponse()


class FakeMesh:
    """All of it, behind one address as behind Envoy."""

    def __init__(self) -> None:
        self.store = FakeStore()
        self.submits: list[Any] = []
        self.looked: list[Any] = []
        self.findings: list[Any] = []
        self.failing_submits = 0
        self.unknown_session = ""
        self.busy = False
        self.executed: list[Any] = []
        self.tool_script: list[str] = []
        self.list_failures = 0
        self.tool_asked = asyncio.Event()
        self.tool_gate = asyncio.Event()
        self.tool_cancels: list[str] = []
        self.failing_cancels = 0
        self.led_to: list[str] = []
        self.begun: list[str] = []
        self.begin_outcome = internal_pb.BEGIN_OUTCOME_GO
        self.journal = internal_pb.BeginToolCallResponse().tool_call
        self.memories: list[str] = []
        self.memory_hangs = False
        self.remembered: list[Any] = []
        self.address = ""

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[FakeMesh]:
        server = grpc.aio.server()
        session_grpc.add_SessionServiceServicer_to_server(Sessions(self), server)
        internal_grpc.add_SessionInternalServiceServicer_to_server(Internal(self), server)
        tool_grpc.add_ToolServiceServicer_to_server(Tools(self), server)
        memory_grpc.add_MemoryServiceServicer_to_server(Memories(self), server)
        self.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        try:
            yield self
        finally:
            await server.stop(0)
