"""SessionService: glue between the wire and the service."""

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any
from uuid import UUID

import grpc.aio

from hermesh.session.v1 import resources_pb2 as resources
from hermesh.session.v1 import session_service_pb2 as pb
from hermesh.session.v1 import session_service_pb2_grpc as grpc_pb
from meshkit import tracing
from meshkit.context import run_id_var
from meshkit.errors import FieldViolation, InvalidArgumentError
from meshkit.identity import current_identity, require_tenant
from services.session import convert
from services.session.backlog import Backlog
from services.session.commits import Commits
from services.session.domain import ActionDecision, ConcurrencyPolicy, RunStatus
from services.session.operations.delete import delete_session
from services.session.operations.options import check_options
from services.session.operations.resolve import resolve
from services.session.operations.submit import check_text, fingerprint, submit
from services.session.store.cached import Contexts
from services.session.store.port import Store
from services.session.watch import Moved, Watcher

Context = grpc.aio.ServicerContext[Any, Any]


class SessionServicer(grpc_pb.SessionServiceServicer):
    """Serves the public RPCs; each is scoped by the caller's tenant."""

    def __init__(
        self,
        store: Store,
        contexts: Contexts,
        commits: Commits,
        backlog: Backlog,
        watcher_for: Callable[[UUID], Watcher],
    ) -> None:
        """Makes a servicer.

        Args:
            store: What is durable.
            contexts: The store, or a cache before it, for accepting input.
            commits: Told of what is committed outside of the append streams.
            backlog: Refuses input while too much waits.
            watcher_for: Makes a watcher for a tenant.
        """
        self._store = store
        self._contexts = contexts
        self._commits = commits
        self._backlog = backlog
        self._watcher_for = watcher_for

    async def CreateSession(
        self, request: pb.CreateSessionRequest, context: Context
    ) -> pb.CreateSessionResponse:
        """See the proto."""
        tenant_id = require_tenant()
        metadata = dict(request.metadata)
        _check_texts(title=request.title, agent=request.agent, user=request.user, metadata=metadata)
        session = await self._store.create_session(
            tenant_id,
            title=request.title,
            metadata=metadata,
            agent=request.agent,
            user=request.user,
            request_id=request.request_id,
            fingerprint=fingerprint(
                "session",
                request.title,
                request.agent,
                request.user,
                *(text for pair in sorted(metadata.items()) for text in pair),
            ),
        )
        return pb.CreateSessionResponse(session=convert.session_to_proto(session))

    async def GetSession(self, request: pb.GetSessionRequest, context: Context) -> pb.GetSessionResponse:
        """See the proto."""
        session = await self._store.get_session(require_tenant(), _id(request.session_id, "session_id"))
        return pb.GetSessionResponse(session=convert.session_to_proto(session))

    async def ListSessions(
        self, request: pb.ListSessionsRequest, context: Context
    ) -> pb.ListSessionsResponse:
        """See the proto."""
        _check_texts(user=request.user)
        page = await self._store.list_sessions(
            require_tenant(),
            page_size=request.page_size or 50,
            page_token=request.page_token,
            user=request.user,
        )
        return pb.ListSessionsResponse(
            sessions=[convert.session_to_proto(session) for session in page.items],
            next_page_token=page.next_page_token,
        )

    async def UpdateSession(
        self, request: pb.UpdateSessionRequest, context: Context
    ) -> pb.UpdateSessionResponse:
        """See the proto."""
        metadata = dict(request.metadata)
        _check_texts(title=request.title, metadata=metadata)
        session = await self._store.update_session(
            require_tenant(),
            _id(request.session_id, "session_id"),
            title=request.title if request.HasField("title") else None,
            metadata=metadata,
        )
        return pb.UpdateSessionResponse(session=convert.session_to_proto(session))

    async def DeleteSession(
        self, request: pb.DeleteSessionRequest, context: Context
    ) -> pb.DeleteSessionResponse:
        """See the proto."""
        session_id = _id(request.session_id, "session_id")
        await delete_session(self._store, self._commits, require_tenant(), session_id)
        return pb.DeleteSessionResponse()

    async def ListMessages(
        self, request: pb.ListMessagesRequest, context: Context
    ) -> pb.ListMessagesResponse:
        """See the proto."""
        page = await self._store.list_messages(
            require_tenant(),
            _id(request.session_id, "session_id"),
            page_size=request.page_size or 100,
            page_token=request.page_token,
        )
        return pb.ListMessagesResponse(
            messages=[convert.message_to_proto(message) for message in page.items],
            next_page_token=page.next_page_token,
        )

    async def SubmitRun(self, request: pb.SubmitRunRequest, context: Context) -> pb.SubmitRunResponse:
        """See the proto."""
        tenant_id = require_tenant()
        await self._backlog.check(tenant_id, request.request_id)
        check_options(request.options)
        request.options.ClearField("traceparent")
        submitted = await submit(
            self._contexts,
            current_identity(),
            tenant_id,
            session_id=_id(request.session_id, "session_id"),
            messages=[(message.role, message.content) for message in request.input],
            options=request.options.SerializeToString(deterministic=True),
            model=request.options.model,
            timeout_ms=request.options.timeout_ms,
            request_id=request.request_id,
            concurrency=ConcurrencyPolicy(request.concurrency),
            claim_owner=request.claim_owner,
            trace=_trace(),
        )
        run_id_var.set(str(submitted.run.run_id))
        self._commits.submitted(submitted)
        if submitted.run.status is RunStatus.QUEUED and not submitted.duplicate:
            self._backlog.added(tenant_id)
        response = pb.SubmitRunResponse(
            run=convert.run_to_proto(submitted.run),
            created=convert.event_to_proto(submitted.created),
            duplicate=submitted.duplicate,
        )
        claim = submitted.claim
        if claim is not None and claim.grant is not None and claim.context is not None:
            response.grant.CopyFrom(convert.grant_to_proto(claim.grant))
            response.context.CopyFrom(convert.context_to_proto(claim.context))
            response.options.CopyFrom(convert.options_of(claim.run.options))
        return response

    async def GetRun(self, request: pb.GetRunRequest, context: Context) -> pb.GetRunResponse:
        """See the proto."""
        tenant_id = require_tenant()
        run = await self._store.get_run(tenant_id, _id(request.run_id, "run_id"))
        response = pb.GetRunResponse(run=convert.run_to_proto(run))
        if run.status is RunStatus.REQUIRES_ACTION:
            calls = await self._store.waiting_calls(tenant_id, run.run_id)
            response.pending_actions.extend(convert.tool_call_to_proto(call) for call in calls)
        return response

    async def ListRuns(self, request: pb.ListRunsRequest, context: Context) -> pb.ListRunsResponse:
        """See the proto."""
        page = await self._store.list_runs(
            require_tenant(),
            _id(request.session_id, "session_id"),
            page_size=request.page_size or 50,
            page_token=request.page_token,
        )
        return pb.ListRunsResponse(
            runs=[convert.run_to_proto(run) for run in page.items], next_page_token=page.next_page_token
        )

    async def CancelRun(self, request: pb.CancelRunRequest, context: Context) -> pb.CancelRunResponse:
        """See the proto."""
        _check_texts(reason=request.reason)
        run, event = await self._store.cancel(require_tenant(), _id(request.run_id, "run_id"), request.reason)
        self._commits.cancelled(run, event)
        return pb.CancelRunResponse(run=convert.run_to_proto(run))

    async def ResolveAction(
        self, request: pb.ResolveActionRequest, context: Context
    ) -> pb.ResolveActionResponse:
        """See the proto."""
        run, call = await resolve(
            self._store,
            require_tenant(),
            _id(request.run_id, "run_id"),
            request.call_id,
            ActionDecision(request.decision),
            request.content,
            request.request_id,
        )
        self._commits.changed(run)
        return pb.ResolveActionResponse(
            run=convert.run_to_proto(run), tool_call=convert.tool_call_to_proto(call)
        )

    async def GetRunToolCall(
        self, request: pb.GetRunToolCallRequest, context: Context
    ) -> pb.GetRunToolCallResponse:
        """See the proto."""
        _check_texts(call_id=request.call_id)
        run = await self._store.get_run(require_tenant(), _id(request.run_id, "run_id"))
        call = await self._store.call_of_run(run.tenant_id, run.run_id, request.call_id)
        return pb.GetRunToolCallResponse(tool_call=convert.tool_call_to_proto(call))

    async def ListPendingActions(
        self, request: pb.ListPendingActionsRequest, context: Context
    ) -> pb.ListPendingActionsResponse:
        """See the proto."""
        page = await self._store.pending_actions(
            require_tenant(), page_size=request.page_size or 50, page_token=request.page_token
        )
        return pb.ListPendingActionsResponse(
            actions=[
                pb.PendingAction(
                    tool_call=convert.tool_call_to_proto(action.call), waiting_since_ms=action.since_ms
                )
                for action in page.items
            ],
            next_page_token=page.next_page_token,
        )

    async def WatchRun(
        self, request: pb.WatchRunRequest, context: Context
    ) -> AsyncIterator[pb.WatchRunResponse]:
        """See the proto."""
        watcher = self._watcher_for(require_tenant())
        async with aclosing(watcher.run(_id(request.run_id, "run_id"), request.after_seq)) as batches:
            async for batch in batches:
                if isinstance(batch, Moved):
                    yield pb.WatchRunResponse(frame=convert.reconnect_frame(batch.reason))
                else:
                    yield pb.WatchRunResponse(frame=convert.frame_of(batch))

    async def WatchSession(
        self, request: pb.WatchSessionRequest, context: Context
    ) -> AsyncIterator[pb.WatchSessionResponse]:
        """See the proto."""
        watcher = self._watcher_for(require_tenant())
        after = _id(request.after_run_id, "after_run_id") if request.after_run_id else None
        session_id = _id(request.session_id, "session_id")
        async with aclosing(
            watcher.session(session_id, after, request.after_seq, only_new=request.only_new)
        ) as batches:
            async for batch in batches:
                if isinstance(batch, Moved):
                    yield pb.WatchSessionResponse(frame=convert.reconnect_frame(batch.reason))
                else:
                    yield pb.WatchSessionResponse(frame=convert.frame_of(batch))


_id = convert.uuid_of


def _check_texts(metadata: dict[str, str] | None = None, **fields: str) -> None:
    found: list[FieldViolation] = []
    for field, text in fields.items():
        check_text(field, text, found)
    for key, value in (metadata or {}).items():
        check_text("metadata", key + value, found)
    if found:
        raise InvalidArgumentError("INVALID_ARGUMENT", "the request is not valid", violations=found)


def _trace() -> bytes:
    """Returns the run options that say under which recorded trace a run was submitted; empty without one."""
    if not tracing.recording():
        return b""
    return resources.RunOptions(traceparent=tracing.current_traceparent()).SerializeToString()
