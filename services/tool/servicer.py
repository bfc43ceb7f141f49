"""Glue between the wire and the executor."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any
from uuid import UUID

from hermesh.session.v1 import resources_pb2
from hermesh.tool.v1 import tool_service_pb2 as pb
from hermesh.tool.v1.tool_service_pb2_grpc import ToolServiceServicer
from meshkit.errors import NotFoundError
from meshkit.identity import require_mesh, require_tenant
from meshkit.paging import make_page_token, read_page_token
from services.tool.domain import CallRequest, Outcome
from services.tool.execution import Executor, Progress
from services.tool.reconcile import Finding, Reconciler
from services.tool.registry import Registry, Tool
from services.tool.results import ResultStore

_PAGE = 100
_FINDINGS = {
    Finding.SETTLED: pb.RECONCILE_OUTCOME_SETTLED,
    Finding.NOT_DONE: pb.RECONCILE_OUTCOME_NOT_DONE,
    Finding.CANNOT_TELL: pb.RECONCILE_OUTCOME_CANNOT_TELL,
    Finding.ASK_AGAIN: pb.RECONCILE_OUTCOME_ASK_AGAIN,
}


class ToolServicer(ToolServiceServicer):
    """hermesh.tool.v1.ToolService."""

    def __init__(
        self,
        registry: Registry,
        executor: Executor,
        reconciler: Reconciler,
        results: ResultStore | None = None,
    ) -> None:
        """Serves these; without an object store there is no large result to read."""
        self._registry = registry
        self._executor = executor
        self._reconciler = reconciler
        self._results = results

    async def ListTools(self, request: pb.ListToolsRequest, context: Any) -> pb.ListToolsResponse:
        """Lists the tools by name."""
        after = read_page_token("ListTools", (), request.page_token)
        size = request.page_size or _PAGE
        tools = self._registry.page(after, size + 1)
        more = len(tools) > size
        return pb.ListToolsResponse(
            tools=[_tool(tool) for tool in tools[:size]],
            next_page_token=make_page_token("ListTools", (), tools[size - 1].name) if more else "",
        )

    async def Execute(self, request: pb.ExecuteRequest, context: Any) -> AsyncIterator[pb.ExecuteResponse]:
        """Runs one journalled call. The call goes on when this stream breaks."""
        require_mesh()
        # Envoy adds who we are: whoever asked can cancel from now on, before there is any progress.
        await context.send_initial_metadata(())
        call = CallRequest(
            call_id=request.call_id,
            tenant_id=require_tenant(),
            session_id=UUID(request.session_id),
            run_id=UUID(request.run_id),
            fence=request.fence,
            name=request.name,
            arguments=request.arguments,
            user=request.user,
            ends_at=time.monotonic() + request.time_left_ms / 1000 if request.time_left_ms else math.inf,
        )
        async with aclosing(self._executor.run(call)) as updates:
            async for update in updates:
                yield _response(update)

    async def Cancel(self, request: pb.CancelRequest, context: Any) -> pb.CancelResponse:
        """Asks a running call to stop."""
        require_mesh()
        return pb.CancelResponse(found=self._executor.cancel(request.call_id, require_tenant()))

    async def Reconcile(self, request: pb.ReconcileRequest, context: Any) -> pb.ReconcileResponse:
        """Looks up what became of an unknown call. It never acts."""
        require_mesh()
        look = await self._reconciler.look(
            CallRequest(
                call_id=request.call_id,
                tenant_id=require_tenant(),
                session_id=UUID(request.session_id),
                run_id=UUID(request.run_id),
                fence=0,
                name=request.name,
                arguments=request.arguments,
                user=request.user,
            ),
            request.waited_ms / 1000,
        )
        response = pb.ReconcileResponse(
            outcome=_FINDINGS[look.finding], retry_after_ms=math.ceil(look.after * 1000)
        )
        if look.outcome is not None:
            response.result.CopyFrom(_result(look.outcome))
        return response

    async def ReadResult(
        self, request: pb.ReadResultRequest, context: Any
    ) -> AsyncIterator[pb.ReadResultResponse]:
        """Streams a large result of the tenant's own."""
        require_mesh()
        if self._results is None:
            raise NotFoundError("TOOL_CALL_NOT_FOUND", "there is no such result")
        session_id = UUID(request.session_id) if request.session_id else None
        size, pieces = await self._results.get(require_tenant(), session_id, request.content_ref)
        yield pb.ReadResultResponse(size=size)
        async for piece in pieces:
            yield pb.ReadResultResponse(data=piece)

    async def DeleteResults(self, request: pb.DeleteResultsRequest, context: Any) -> pb.DeleteResultsResponse:
        """Deletes large results of a session of the tenant's that is gone."""
        require_mesh()
        if self._results is None:
            return pb.DeleteResultsResponse()
        deleted, more = await self._results.delete(require_tenant(), UUID(request.session_id))
        return pb.DeleteResultsResponse(deleted=deleted, more=more)


def _tool(tool: Tool) -> pb.Tool:
    return pb.Tool(
        name=tool.name,
        description=tool.description,
        input_schema=tool.schema_text,
        effect=resources_pb2.EffectClass.ValueType(tool.effect),
        timeout_ms=round(tool.timeout * 1000),
        requires_approval=tool.requires_approval,
        reconciles=tool.reconcile is not None,
    )


def _response(update: Progress | Outcome) -> pb.ExecuteResponse:
    if isinstance(update, Progress):
        return pb.ExecuteResponse(progress=pb.Progress(text=update.text))
    return pb.ExecuteResponse(result=_result(update))


def _result(outcome: Outcome) -> pb.Result:
    return pb.Result(
        state=resources_pb2.ToolCallState.ValueType(outcome.state),
        content=outcome.content,
        content_ref=outcome.content_ref,
        reason=outcome.reason,
        reused=outcome.reused,
    )
