"""A FAKE mesh for tests of the gateway: session and agent services in memory, in this process.

Nothing here is durable and no rule of the real services is enforced beyond what the gateway can see. It
exists to make every behaviour of the mesh happen on command: a broken stream, a drain, a busy session, a
run that fails. Real parts are used by the tests in tests/e2e.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import grpc
import grpc.aio

from hermesh.agent.v1 import agent_service_pb2 as agent_pb
from hermesh.agent.v1 import agent_service_pb2_grpc as agent_grpc
from hermesh.common.v1.event_pb2 import Event, Frame, Reconnect
from hermesh.session.v1 import resources_pb2 as resources
from hermesh.session.v1 import session_internal_service_pb2 as internal_pb
from hermesh.session.v1 import session_internal_service_pb2_grpc as internal_grpc
from hermesh.session.v1 import session_service_pb2 as session_pb
from hermesh.session.v1 import session_service_pb2_grpc as session_grpc
from hermesh.tool.v1 import tool_service_pb2 as tool_pb
from hermesh.tool.v1 import tool_service_pb2_grpc as tool_grpc
from meshkit.clock import now_ms
from meshkit.errors import (
    AbortedError,
    AlreadyExistsError,
    HermeshError,
    NotFoundError,
    OutOfRangeError,
    UnauthenticatedError,
    UnavailableError,
    to_status,
)
from meshkit.ids import uuid7

API_KEY = "hm_" + "k" * 43
OTHER_KEY = "hm_" + "o" * 43
TENANT = UUID("00000000-0000-7000-8000-000000000001")
OTHER_TENANT = UUID("00000000-0000-7000-8000-000000000002")
TERMINAL = {"run.completed": 4, "run.failed": 5, "run.cancelled": 6}

Script = Callable[["FakeRun"], AsyncIterator[tuple[str, dict[str, Any]]]]


class Log:
    """A run's events, and whoever waits for more."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.changed = asyncio.Condition()

    async def append(self, run_id: str, kind: str, data: dict[str, Any] | str) -> Event:
        text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
        async with self.changed:
            event = Event(
                run_id=run_id, seq=len(self.events) + 1, type=kind, time_ms=1_700_000_000_000, data=text
            )
            self.events.append(event)
            self.changed.notify_all()
        return event

    @property
    def finished(self) -> bool:
        return bool(self.events) and self.events[-1].type in TERMINAL

    async def wait_beyond(self, seq: int) -> None:
        async with self.changed:
            await self.changed.wait_for(lambda: len(self.events) > seq or self.finished)


@dataclass
class FakeRun:
    """A run and its state."""

    run_id: str
    session: FakeSession
    input: list[tuple[str, str]]
    options: resources.RunOptions
    ordinal: int
    log: Log = field(default_factory=Log)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    resolved: asyncio.Event = field(default_factory=asyncio.Event)
    decisions: list[tuple[str, int, str]] = field(default_factory=list)
    pending: list[resources.ToolCall] = field(default_factory=list)
    begun: bool = False

    def proto(self) -> resources.Run:
        status = resources.RUN_STATUS_RUNNING if self.begun else resources.RUN_STATUS_QUEUED
        run = resources.Run(run_id=self.run_id, session_id=self.session.session_id, ordinal=self.ordinal)
        if self.pending:
            status = resources.RUN_STATUS_REQUIRES_ACTION
        if self.log.finished:
            status = TERMINAL[self.log.events[-1].type]
            run.finish_time_ms = now_ms()
        run.status = status
        run.last_seq = len(self.log.events)
        run.create_time_ms = now_ms()
        run.model = self.options.model
        run.cancel_requested = self.cancelled.is_set()
        run.attempt = int(self.begun)
        return run


@dataclass
class FakeSession:
    """A session and its state."""

    session_id: str
    tenant: str
    title: str
    metadata: dict[str, str]
    user: str
    runs: list[FakeRun] = field(default_factory=list)
    messages: list[resources.Message] = field(default_factory=list)

    def proto(self) -> resources.Session:
        active = [run.run_id for run in self.runs if not run.log.finished]
        return resources.Session(
            session_id=self.session_id,
            title=self.title,
            metadata=self.metadata,
            user=self.user,
            create_time_ms=1_700_000_000_000,
            update_time_ms=now_ms(),
            active_run_id=active[0] if active else "",
            message_count=len(self.messages),
        )


async def echo(run: FakeRun) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """The default script: repeats the last message word by word."""
    yield "run.started", {"attempt": 1, "replica": "agent-1"}
    yield "step.started", {"step": 1}
    for word in run.input[-1][1].split():
        yield "text.delta", {"text": word + " "}
    text = " ".join(run.input[-1][1].split())
    yield (
        "message.completed",
        {"message_id": str(uuid7()), "role": "assistant", "content": text + " ", "tool_calls": []},
    )
    yield "usage", {"input_tokens": 3, "output_tokens": 5, "cached_tokens": 1, "ttft_ms": 2}
    yield "run.completed", {"message_id": str(uuid7()), "finish_reason": "stop"}


class FakeMesh:
    """The services' state and the levers that tests pull.

    Attributes:
        script: What a run does.
        run_cuts: For each coming Run stream: after how many events it ends, and how (a status code, or
            "reconnect"); None for whole.
        watch_cuts: The same for WatchRun and WatchSession.
        unary_error: Raised by every unary session call while set.
        frame_size: How many events at most go in one frame.
        one_at_a_time: Whether a run waits until those before it in its session have ended.
        messages_a_page: How many messages at most a page has, whatever was asked for.
        expired: The runs whose log is older than what is kept.
        calls: Names of the calls that came.
        metadata: Their metadata.
    """

    def __init__(self) -> None:
        self.script: Script = echo
        self.sessions: dict[str, FakeSession] = {}
        self.runs: dict[str, FakeRun] = {}
        self.requests: dict[str, FakeRun] = {}
        self.session_requests: dict[str, FakeSession] = {}
        self.run_cuts: list[tuple[int, Any] | None] = []
        self.watch_cuts: list[tuple[int, Any] | None] = []
        self.unary_error: HermeshError | None = None
        # Large tool results by tenant and reference; an empty piece breaks the stream there.
        self.results: dict[tuple[str, str], list[bytes]] = {}
        self.frame_size = 1
        # Whether a session's runs wait for each other, as they do.
        self.one_at_a_time = False
        self.messages_a_page = 500
        # Runs whose events are not kept any more.
        self.expired: set[str] = set()
        self.models = ["scripted", "other"]
        self.calls: list[str] = []
        self.metadata: list[dict[str, str]] = []
        self.open_runs = 0
        # Of `Watch`: the open streams (put a status code to break one) and every message that came.
        self.links: set[asyncio.Queue[Any]] = set()
        self.watch_requests: list[Any] = []
        self.changed = asyncio.Condition()
        self.address = ""
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: grpc.aio.Server | None = None

    async def __aenter__(self) -> FakeMesh:
        server = grpc.aio.server()
        session_grpc.add_SessionServiceServicer_to_server(_Sessions(self), server)
        internal_grpc.add_SessionInternalServiceServicer_to_server(_Internal(self), server)
        agent_grpc.add_AgentServiceServicer_to_server(_Agents(self), server)
        tool_grpc.add_ToolServiceServicer_to_server(_Tools(self), server)
        self.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        self._server = server
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        if self._server is not None:
            await self._server.stop(0)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=2)

    async def note(self, name: str, context: Any) -> None:
        self.calls.append(name)
        if context is not None:
            self.metadata.append({key: str(value) for key, value in context.invocation_metadata() or ()})
        async with self.changed:
            self.changed.notify_all()

    async def until(self, check: Callable[[], bool], seconds: float = 5.0) -> None:
        """Waits for something to be true of the fake's state."""
        async with asyncio.timeout(seconds):
            async with self.changed:
                await self.changed.wait_for(check)

    def add_session(self, title: str = "", tenant: UUID = TENANT, **more: Any) -> FakeSession:
        session = FakeSession(
            str(uuid7()), str(tenant), title, dict(more.get("metadata", {})), more.get("user", "")
        )
        self.sessions[session.session_id] = session
        return session

    async def submit(self, request: Any, tenant: str) -> FakeRun:
        known = self.requests.get(request.request_id) if request.request_id else None
        content = [(message.role, message.content) for message in request.input]
        if known is not None:
            if known.input != content:
                raise AlreadyExistsError("REQUEST_ID_REUSED", "the request id was used with another body")
            return known
        session = self.session(request.session_id, tenant)
        run = FakeRun(str(uuid7()), session, content, request.options, len(session.runs) + 1)
        session.runs.append(run)
        self.runs[run.run_id] = run
        if request.request_id:
            self.requests[request.request_id] = run
        if not session.title:
            session.title = content[-1][1][:60]
        for role, text in content:
            self._message(session, run, role, text)
        await run.log.append(
            run.run_id,
            "run.created",
            {
                "session_id": session.session_id,
                "ordinal": run.ordinal,
                "input": [{"role": role, "content": text} for role, text in content],
                "agent": "",
                "model": request.options.model or self.models[0],
            },
        )
        task = asyncio.get_running_loop().create_task(self._work(run))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return run

    def _message(self, session: FakeSession, run: FakeRun, role: str, text: str, calls: str = "") -> None:
        session.messages.append(
            resources.Message(
                message_id=str(uuid7()),
                session_id=session.session_id,
                run_id=run.run_id,
                ordinal=len(session.messages) + 1,
                role=role,
                content=text,
                tool_calls=calls,
                create_time_ms=now_ms(),
            )
        )

    async def _turn(self, run: FakeRun) -> bool:
        """Waits for a run's turn; False if it is cancelled before that."""
        before = [other for other in run.session.runs if other.ordinal < run.ordinal]
        ended = [asyncio.ensure_future(other.log.wait_beyond(1 << 30)) for other in before]
        cancelled = asyncio.ensure_future(run.cancelled.wait())
        try:
            for one in ended:
                await asyncio.wait({one, cancelled}, return_when=asyncio.FIRST_COMPLETED)
            return not run.cancelled.is_set()
        finally:
            for task in (cancelled, *ended):
                task.cancel()

    async def _work(self, run: FakeRun) -> None:
        if self.one_at_a_time and not await self._turn(run):
            await run.log.append(run.run_id, "run.cancelled", {"reason": "stopped at the chat page"})
            async with self.changed:
                self.changed.notify_all()
            return
        run.begun = True
        async for kind, data in self.script(run):
            if run.cancelled.is_set() and kind not in TERMINAL:
                kind, data = "run.cancelled", {"reason": "asked to"}
            if kind == "message.completed":
                calls = data.get("tool_calls")
                self._message(
                    run.session, run, "assistant", data["content"], json.dumps(calls) if calls else ""
                )
            await run.log.append(run.run_id, kind, data)
            async with self.changed:
                self.changed.notify_all()
            if kind in TERMINAL:
                return

    def session(self, session_id: str, tenant: str) -> FakeSession:
        session = self.sessions.get(session_id)
        if session is None or session.tenant != tenant:
            raise NotFoundError("SESSION_NOT_FOUND", "there is no such session")
        return session

    def run(self, run_id: str, tenant: str) -> FakeRun:
        run = self.runs.get(run_id)
        if run is None or run.session.tenant != tenant:
            raise NotFoundError("RUN_NOT_FOUND", "there is no such run")
        return run

    async def follow(
        self, run: FakeRun, after: int, cut: tuple[int, Any] | None, context: Any
    ) -> AsyncIterator[Frame]:
        """Yields a run's frames; `cut` ends them early."""
        if run.run_id in self.expired and after < len(run.log.events):
            raise OutOfRangeError("CURSOR_EXPIRED", "the events after this cursor are not kept any more")
        sent = 0
        while True:
            if cut is None or cut[0] > sent:
                await run.log.wait_beyond(after)
            batch = run.log.events[after : after + self.frame_size]
            if cut is not None and sent + len(batch) > cut[0]:
                batch = batch[: cut[0] - sent]
            if batch:
                yield Frame(events=batch)
                after += len(batch)
                sent += len(batch)
            if cut is not None and sent >= cut[0]:
                if cut[1] == "reconnect":
                    yield Frame(reconnect=Reconnect(reason="drain"))
                elif cut[1] == "end":
                    pass
                else:
                    await context.abort(cut[1], "cut on command")
                return
            if run.log.finished and after >= len(run.log.events):
                return

    async def follow_session(
        self, session: FakeSession, request: Any, cut: tuple[int, Any] | None, context: Any
    ) -> AsyncIterator[Frame]:
        """Yields a session's frames from a cursor on; `cut` ends those of each run early."""
        index, after = 0, 0
        if request.after_run_id:
            index = [run.run_id for run in session.runs].index(request.after_run_id)
            after = request.after_seq
        while True:
            while index >= len(session.runs):
                async with self.changed:
                    await self.changed.wait()
            async for frame in self.follow(session.runs[index], after, cut, context):
                yield frame
            index, after = index + 1, 0


def _tenant(context: Any) -> str:
    return dict(context.invocation_metadata() or ()).get("x-hermesh-tenant", "")


async def _abort(context: Any, error: HermeshError) -> None:
    status = to_status(error)
    from grpc_status import rpc_status

    await context.abort_with_status(rpc_status.to_status(status))


def unary(method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def call(self: Any, request: Any, context: Any) -> Any:
        await self.mesh.note(method.__name__, context)
        try:
            if self.mesh.unary_error is not None:
                raise self.mesh.unary_error
            return await method(self, request, context)
        except HermeshError as error:
            await _abort(context, error)

    return call


class _Sessions(session_grpc.SessionServiceServicer):
    def __init__(self, mesh: FakeMesh) -> None:
        self.mesh = mesh

    @unary
    async def CreateSession(self, request: Any, context: Any) -> Any:
        known = self.mesh.session_requests.get(request.request_id) if request.request_id else None
        if known is None:
            known = self.mesh.add_session(
                request.title, UUID(_tenant(context)), metadata=request.metadata, user=request.user
            )
            if request.request_id:
                self.mesh.session_requests[request.request_id] = known
        return session_pb.CreateSessionResponse(session=known.proto())

    @unary
    async def GetSession(self, request: Any, context: Any) -> Any:
        session = self.mesh.session(request.session_id, _tenant(context))
        return session_pb.GetSessionResponse(session=session.proto())

    @unary
    async def ListSessions(self, request: Any, context: Any) -> Any:
        tenant = _tenant(context)
        sessions = [session for session in self.mesh.sessions.values() if session.tenant == tenant]
        start = int(request.page_token or 0)
        size = request.page_size or 50
        page = sessions[::-1][start : start + size]
        return session_pb.ListSessionsResponse(
            sessions=[session.proto() for session in page],
            next_page_token=str(start + size) if start + size < len(sessions) else "",
        )

    @unary
    async def UpdateSession(self, request: Any, context: Any) -> Any:
        session = self.mesh.session(request.session_id, _tenant(context))
        if request.HasField("title"):
            session.title = request.title
        session.metadata.update(request.metadata)
        return session_pb.UpdateSessionResponse(session=session.proto())

    @unary
    async def DeleteSession(self, request: Any, context: Any) -> Any:
        session = self.mesh.session(request.session_id, _tenant(context))
        del self.mesh.sessions[session.session_id]
        return session_pb.DeleteSessionResponse()

    @unary
    async def ListMessages(self, request: Any, context: Any) -> Any:
        session = self.mesh.session(request.session_id, _tenant(context))
        start = int(request.page_token or 0)
        end = start + min(request.page_size or 100, self.mesh.messages_a_page)
        return session_pb.ListMessagesResponse(
            messages=session.messages[start:end],
            next_page_token=str(end) if end < len(session.messages) else "",
        )

    @unary
    async def SubmitRun(self, request: Any, context: Any) -> Any:
        run = await self.mesh.submit(request, _tenant(context))
        return session_pb.SubmitRunResponse(run=run.proto(), created=run.log.events[0])

    @unary
    async def GetRun(self, request: Any, context: Any) -> Any:
        run = self.mesh.run(request.run_id, _tenant(context))
        return session_pb.GetRunResponse(run=run.proto(), pending_actions=run.pending)

    @unary
    async def ListRuns(self, request: Any, context: Any) -> Any:
        session = self.mesh.session(request.session_id, _tenant(context))
        start = int(request.page_token or 0)
        end = start + (request.page_size or 50)
        return session_pb.ListRunsResponse(
            runs=[run.proto() for run in session.runs[::-1][start:end]],
            next_page_token=str(end) if end < len(session.runs) else "",
        )

    @unary
    async def CancelRun(self, request: Any, context: Any) -> Any:
        run = self.mesh.run(request.run_id, _tenant(context))
        run.cancelled.set()
        return session_pb.CancelRunResponse(run=run.proto())

    @unary
    async def ResolveAction(self, request: Any, context: Any) -> Any:
        run = self.mesh.run(request.run_id, _tenant(context))
        run.decisions.append((request.call_id, request.decision, request.content))
        run.pending.clear()
        run.resolved.set()
        return session_pb.ResolveActionResponse(run=run.proto())

    @unary
    async def ListPendingActions(self, request: Any, context: Any) -> Any:
        tenant = _tenant(context)
        waiting = [
            session_pb.PendingAction(tool_call=call, waiting_since_ms=7)
            for run in self.mesh.runs.values()
            if run.session.tenant == tenant
            for call in run.pending
        ]
        return session_pb.ListPendingActionsResponse(actions=waiting[: request.page_size or 50])

    @unary
    async def GetRunToolCall(self, request: Any, context: Any) -> Any:
        run = self.mesh.run(request.run_id, _tenant(context))
        for made in run.pending:
            if made.call_id == request.call_id:
                return session_pb.GetRunToolCallResponse(tool_call=made)
        raise NotFoundError("TOOL_CALL_NOT_FOUND", "no such tool call")

    async def WatchRun(self, request: Any, context: Any) -> AsyncIterator[Any]:
        await self.mesh.note("WatchRun", context)
        cut = self.mesh.watch_cuts.pop(0) if self.mesh.watch_cuts else None
        try:
            run = self.mesh.run(request.run_id, _tenant(context))
        except HermeshError as error:
            await _abort(context, error)
            return
        async for frame in self.mesh.follow(run, request.after_seq, cut, context):
            yield session_pb.WatchRunResponse(frame=frame)

    async def WatchSession(self, request: Any, context: Any) -> AsyncIterator[Any]:
        await self.mesh.note("WatchSession", context)
        cut = self.mesh.watch_cuts.pop(0) if self.mesh.watch_cuts else None
        session = self.mesh.sessions[request.session_id]
        async for frame in self.mesh.follow_session(session, request, cut, context):
            yield session_pb.WatchSessionResponse(frame=frame)
            if frame.HasField("reconnect"):
                return


class _Tools(tool_grpc.ToolServiceServicer):
    def __init__(self, mesh: FakeMesh) -> None:
        self.mesh = mesh

    async def ReadResult(self, request: Any, context: Any) -> AsyncIterator[Any]:
        await self.mesh.note("ReadResult", context)
        pieces = self.mesh.results.get((_tenant(context), request.content_ref))
        if pieces is None:
            await _abort(context, NotFoundError("TOOL_CALL_NOT_FOUND", "there is no such result"))
            return
        yield tool_pb.ReadResultResponse(size=sum(len(piece) for piece in pieces if piece))
        for piece in pieces:
            if not piece:
                await _abort(context, UnavailableError("SERVICE_UNAVAILABLE", "cut on command"))
            yield tool_pb.ReadResultResponse(data=piece)


class _Internal(internal_grpc.SessionInternalServiceServicer):
    def __init__(self, mesh: FakeMesh) -> None:
        self.mesh = mesh

    async def Authenticate(self, request: Any, context: Any) -> Any:
        await self.mesh.note("Authenticate", context)
        tenants = {API_KEY: TENANT, OTHER_KEY: OTHER_TENANT}
        tenant = tenants.get(request.api_key)
        if tenant is None:
            error = self.mesh.unary_error or UnauthenticatedError("API_KEY_INVALID", "unknown key")
            await _abort(context, error)
        return internal_pb.AuthenticateResponse(tenant_id=str(tenant))

    async def Watch(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        await self.mesh.note("Watch", context)
        outbox: asyncio.Queue[Any] = asyncio.Queue()
        tasks: dict[int, asyncio.Task[None]] = {}

        async def read() -> None:
            async for request in requests:
                self.mesh.watch_requests.append(request)
                for watch_id in request.stops:
                    tasks[watch_id].cancel()
                for start in request.starts:
                    coroutine = self._watch(start, outbox)
                    tasks[start.watch_id] = asyncio.get_running_loop().create_task(coroutine)
            await outbox.put(None)

        reader = asyncio.get_running_loop().create_task(read())
        self.mesh.links.add(outbox)
        try:
            while (frame := await outbox.get()) is not None:
                if isinstance(frame, grpc.StatusCode):
                    await context.abort(frame, "cut on command")
                yield internal_pb.WatchResponse(frames=[frame])
        finally:
            self.mesh.links.discard(outbox)
            for task in (reader, *tasks.values()):
                task.cancel()

    async def _watch(self, start: Any, outbox: asyncio.Queue[Any]) -> None:
        mesh = self.mesh
        kind = start.WhichOneof("target")
        await mesh.note("WatchRun" if kind == "run" else "WatchSession", None)
        cut = mesh.watch_cuts.pop(0) if mesh.watch_cuts else None
        cuts = _Cuts()

        async def put(**content: Any) -> None:
            await outbox.put(internal_pb.WatchFrame(watch_id=start.watch_id, **content))

        try:
            if kind == "run":
                run = mesh.run(start.run.run_id, start.tenant_id)
                await put(opened=internal_pb.WatchOpened())
                async for frame in mesh.follow(run, start.run.after_seq, cut, cuts):
                    await put(frame=frame, size=frame.ByteSize())
                    if frame.HasField("reconnect"):
                        return
                await put(ended=internal_pb.WatchEnded())
                return
            session = mesh.session(start.session.session_id, start.tenant_id)
            await put(opened=internal_pb.WatchOpened())
            async for frame in mesh.follow_session(session, start.session, cut, cuts):
                await put(frame=frame, size=frame.ByteSize())
                if frame.HasField("reconnect"):
                    return
        except HermeshError as error:
            await put(error=to_status(error).SerializeToString())


class _Cuts:
    """Stands in for the context of an RPC: a watch that is cut ends with an error of its own."""

    async def abort(self, code: grpc.StatusCode, message: str) -> None:
        errors = {grpc.StatusCode.UNAVAILABLE: UnavailableError, grpc.StatusCode.NOT_FOUND: NotFoundError}
        raise errors.get(code, AbortedError)(message=message)


class _Agents(agent_grpc.AgentServiceServicer):
    def __init__(self, mesh: FakeMesh) -> None:
        self.mesh = mesh

    async def ListModels(self, request: Any, context: Any) -> Any:
        await self.mesh.note("ListModels", context)
        return agent_pb.ListModelsResponse(
            models=[agent_pb.Model(name=name, owned_by="tests") for name in self.mesh.models]
        )

    async def Run(self, request: Any, context: Any) -> AsyncIterator[Any]:
        await self.mesh.note("Run", context)
        cut = self.mesh.run_cuts.pop(0) if self.mesh.run_cuts else None
        if cut is not None and cut[0] < 0:
            # Nothing was submitted.
            if isinstance(cut[1], HermeshError):
                await _abort(context, cut[1])
            await context.abort(cut[1], "refused on command")
        try:
            run = await self.mesh.submit(request, _tenant(context))
        except HermeshError as error:
            await _abort(context, error)
            return
        self.mesh.open_runs += 1
        try:
            async for frame in self.mesh.follow(run, 0, cut, context):
                yield agent_pb.RunResponse(frame=frame)
        finally:
            self.mesh.open_runs -= 1
            async with self.mesh.changed:
                self.mesh.changed.notify_all()
