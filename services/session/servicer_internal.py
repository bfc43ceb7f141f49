"""SessionInternalService: glue between the mesh's own services and this one."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc.aio

from hermesh.session.v1 import session_internal_service_pb2 as pb
from hermesh.session.v1 import session_internal_service_pb2_grpc as grpc_pb
from meshkit.auth import Authenticator
from meshkit.identity import require_mesh
from services.session import convert
from services.session.append_hub import AppendHub
from services.session.commits import Commits
from services.session.domain import BeginOutcome, ClaimOutcome, ContextPosition, ToolCallState
from services.session.store.cached import Contexts
from services.session.store.port import Store
from services.session.watch_hub import WatchHub

Context = grpc.aio.ServicerContext[Any, Any]

LEASE_TTL_MS = 10_000
# What a run's readers are told when its agent could not say it.
FAIL_MESSAGES = {
    pb.FAIL_CAUSE_UNSPECIFIED: "an internal error ended the run",
    pb.FAIL_CAUSE_INTERNAL: "an internal error ended the run",
    pb.FAIL_CAUSE_REFUSED: "the run's events were refused by the store",
}
# Pages of contexts that are made at once: they share the database's connections with every commit.
_MAX_PAGES = 4


@asynccontextmanager
async def _opened(
    hub: AppendHub | WatchHub, requests: AsyncIterator[Any], name: str
) -> AsyncIterator[AsyncGenerator[Any]]:
    """Opens a stream of a hub, has a task read what comes up it, and yields what goes down."""
    stream = hub.open()
    reader = hub.tasks.start(stream.read(requests), name=name)
    try:
        async with aclosing(stream.responses()) as responses:
            yield responses
    finally:
        reader.cancel()
        hub.close(stream)  # type: ignore[arg-type]  # it is the hub's own


class SessionInternalServicer(grpc_pb.SessionInternalServiceServicer):
    """Serves the mesh; every method refuses callers from outside."""

    def __init__(
        self,
        store: Store,
        contexts: Contexts,
        hub: AppendHub,
        watches: WatchHub,
        commits: Commits,
        keys: Authenticator,
    ) -> None:
        """Makes a servicer.

        Args:
            store: What is durable.
            contexts: The store, or a cache before it, for claims.
            hub: The append streams.
            watches: The watch streams.
            commits: Told of what is committed outside of the append streams.
            keys: Looks API keys up, without a cache: the callers have one.
        """
        self._store = store
        self._contexts = contexts
        self._hub = hub
        self._watches = watches
        self._commits = commits
        self._keys = keys
        self._pages = asyncio.Semaphore(_MAX_PAGES)

    async def Authenticate(
        self, request: pb.AuthenticateRequest, context: Context
    ) -> pb.AuthenticateResponse:
        """See the proto."""
        require_mesh()
        return pb.AuthenticateResponse(tenant_id=str(await self._keys.authenticate(request.api_key)))

    async def ClaimRun(self, request: pb.ClaimRunRequest, context: Context) -> pb.ClaimRunResponse:
        """See the proto."""
        require_mesh()
        claim = await self._contexts.claim(convert.uuid_of(request.run_id, "run_id"), request.owner)
        response = pb.ClaimRunResponse(
            outcome=int(claim.outcome),  # type: ignore[arg-type]  # the numbers are the wire's by definition
            run=convert.run_to_proto(claim.run),
        )
        if claim.outcome is ClaimOutcome.FINISHED:
            self._commits.changed(claim.run)
        if claim.grant is not None and claim.context is not None:
            response.grant.CopyFrom(convert.grant_to_proto(claim.grant))
            response.context.CopyFrom(convert.context_to_proto(claim.context))
            response.options.CopyFrom(convert.options_of(claim.run.options))
            response.tenant_id = str(claim.run.tenant_id)
        return response

    async def ReadContext(
        self, request: pb.ReadContextRequest, context: Context
    ) -> AsyncIterator[pb.ReadContextResponse]:
        """See the proto."""
        require_mesh()
        run_id = convert.uuid_of(request.run_id, "run_id")
        position: ContextPosition | None = convert.position_of(request.position)
        while position is not None:
            async with self._pages:
                page = await self._store.read_context(run_id, request.fence, position)
                response = pb.ReadContextResponse(context=convert.context_to_proto(page))
            yield response
            position = page.next

    async def Append(
        self, request_iterator: AsyncIterator[pb.AppendRequest], context: Context
    ) -> AsyncIterator[pb.AppendResponse]:
        """See the proto."""
        require_mesh()
        # The writer learns at once that the stream is up, before its first append.
        await context.send_initial_metadata(())
        async with _opened(self._hub, request_iterator, "append-read") as responses:
            async for response in responses:
                yield response

    async def Watch(
        self, request_iterator: AsyncIterator[pb.WatchRequest], context: Context
    ) -> AsyncIterator[pb.WatchResponse]:
        """See the proto."""
        require_mesh()
        await context.send_initial_metadata(())
        async with _opened(self._watches, request_iterator, "watch-read") as responses:
            async for response in responses:
                yield response

    async def RenewLeases(self, request: pb.RenewLeasesRequest, context: Context) -> pb.RenewLeasesResponse:
        """See the proto."""
        require_mesh()
        leases = [convert.lease_of(lease) for lease in request.leases]
        renewal = await self._store.renew(leases, request.owner)
        return pb.RenewLeasesResponse(
            lost_run_ids=[str(run_id) for run_id in renewal.lost],
            cancelled_run_ids=[str(run_id) for run_id in renewal.cancelled],
            busy_run_ids=[str(run_id) for run_id in renewal.busy],
            ttl_ms=LEASE_TTL_MS,
        )

    async def ReleaseLease(
        self, request: pb.ReleaseLeaseRequest, context: Context
    ) -> pb.ReleaseLeaseResponse:
        """See the proto."""
        require_mesh()
        released = await self._store.release(convert.lease_of(request.lease), request.owner)
        self._hub.detach(request.lease.run_id, request.lease.fence)
        return pb.ReleaseLeaseResponse(released=released)

    async def ListLeases(self, request: pb.ListLeasesRequest, context: Context) -> pb.ListLeasesResponse:
        """See the proto."""
        require_mesh()
        leases = await self._store.leases_of(request.owner)
        return pb.ListLeasesResponse(
            leases=[
                pb.LeaseRef(session_id=str(ref.session_id), run_id=str(ref.run_id), fence=ref.fence)
                for ref in leases
            ]
        )

    async def FailRun(self, request: pb.FailRunRequest, context: Context) -> pb.FailRunResponse:
        """See the proto."""
        require_mesh()
        run = await self._store.fail_held(convert.lease_of(request.lease), FAIL_MESSAGES[request.cause])
        if run is not None:
            self._hub.detach(request.lease.run_id)
            self._commits.changed(run)
        return pb.FailRunResponse(ended=run is not None)

    async def BeginToolCall(
        self, request: pb.BeginToolCallRequest, context: Context
    ) -> pb.BeginToolCallResponse:
        """See the proto."""
        require_mesh()
        outcome, call = await self._store.begin(
            request.call_id,
            convert.uuid_of(request.session_id, "session_id"),
            request.fence,
            request.act_ms,
        )
        return pb.BeginToolCallResponse(
            outcome=int(BeginOutcome(outcome)),  # type: ignore[arg-type]  # the numbers are the wire's
            tool_call=convert.tool_call_to_proto(call),
        )

    async def CompleteToolCall(
        self, request: pb.CompleteToolCallRequest, context: Context
    ) -> pb.CompleteToolCallResponse:
        """See the proto."""
        require_mesh()
        call = await self._store.complete(
            request.call_id,
            request.fence,
            ToolCallState(request.state),
            request.content,
            request.content_ref,
            request.tries,
            request.still_acts,
        )
        return pb.CompleteToolCallResponse(tool_call=convert.tool_call_to_proto(call))

    async def ReconcileToolCall(
        self, request: pb.ReconcileToolCallRequest, context: Context
    ) -> pb.ReconcileToolCallResponse:
        """See the proto."""
        require_mesh()
        call = await self._store.reconcile(
            request.call_id,
            ToolCallState(request.state),
            request.content,
            request.content_ref,
            request.tries,
        )
        return pb.ReconcileToolCallResponse(tool_call=convert.tool_call_to_proto(call))

    async def GetToolCall(self, request: pb.GetToolCallRequest, context: Context) -> pb.GetToolCallResponse:
        """See the proto."""
        require_mesh()
        call = await self._store.look(request.call_id, convert.uuid_of(request.session_id, "session_id"))
        return pb.GetToolCallResponse(tool_call=convert.tool_call_to_proto(call))
