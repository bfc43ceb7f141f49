"""Fakes of what an agent talks to: they keep the store's rules (fences, seqs) and nothing else of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hermesh.common.v1.event_pb2 import Event
from hermesh.session.v1.resources_pb2 import (
    EFFECT_CLASS_PURE,
    RUN_STATUS_FAILED,
    ContextPosition,
    Grant,
    Message,
    Run,
    RunContext,
    RunOptions,
    ToolCall,
)
from hermesh.session.v1.session_internal_service_pb2 import (
    APPEND_OUTCOME_COMMITTED,
    APPEND_OUTCOME_FENCED,
    APPEND_OUTCOME_GAP,
    APPEND_OUTCOME_INVALID,
    APPEND_OUTCOME_RETRY,
    AppendRequest,
    AppendResponse,
    AppendResult,
    ReattachResult,
    RunAppend,
)
from meshkit.errors import HermeshError
from meshkit.ids import uuid7
from services.agent.clients.memory import Known
from services.agent.clients.session import Claim, NotClaimed
from services.agent.clients.tools import CallPlace, ToolInfo
from services.agent.domain.loop import MAX_LOOKS, Call, CallState, Limits
from services.agent.domain.prompt import RunSpec
from services.agent.model.port import ModelEvent, ModelInfo, ModelRequest, ToolOffer
from services.agent.runs.leases import Renewal
from services.agent.runs.link import AppendLink
from services.agent.runs.ports import World
from services.agent.runs.supervisor import Supervisor
from services.agent.settings import AgentSettings

TENANT = "00000000-0000-7000-8000-000000000001"
TTL_MS = 10_000


@dataclass
class FakeRun:
    """A run as the fake store has it."""

    run_id: str
    session_id: str
    fence: int = 1
    next_seq: int = 2
    owner: str = "agent-test"
    attempt: int = 1
    events: list[Event] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    calls: dict[str, ToolCall] = field(default_factory=dict)
    status: int = 0
    fences: list[int] = field(default_factory=list)

    def types(self) -> list[str]:
        return [event.type for event in self.events]

    def data(self, kind: str) -> list[dict[str, Any]]:
        return [json.loads(event.data) for event in self.events if event.type == kind]

    def text(self) -> str:
        """The reply as a reader folds it, resets honoured."""
        pieces: list[tuple[int, str]] = []
        for event in self.events:
            if event.type == "text.delta":
                pieces.append((event.seq, json.loads(event.data)["text"]))
            elif event.type == "attempt.reset":
                from_seq = json.loads(event.data)["from_seq"]
                pieces = [piece for piece in pieces if piece[0] < from_seq]
        return "".join(text for _, text in pieces)


class FakeCall:
    """One append stream to a `FakeStore`."""

    def __init__(self, store: FakeStore) -> None:
        self._store = store
        self._responses: asyncio.Queue[AppendResponse | BaseException | None] = asyncio.Queue()
        self.closed = False

    async def write(self, request: AppendRequest) -> None:
        if self.closed:
            raise ConnectionError("the stream is broken")
        copy = AppendRequest()
        copy.CopyFrom(request)
        await asyncio.sleep(0)
        self._store.received(self, copy)

    def respond(self, response: AppendResponse) -> None:
        self._responses.put_nowait(response)

    def break_off(self) -> None:
        self.closed = True
        self._responses.put_nowait(None)

    def cancel_by_peer(self) -> None:
        """End as grpc.aio ends a call whose peer cancelled it."""
        self.closed = True
        self._responses.put_nowait(asyncio.CancelledError())

    def cancel(self) -> bool:
        self.closed = True
        return True

    async def __aiter__(self) -> AsyncIterator[AppendResponse]:
        while (response := await self._responses.get()) is not None:
            if isinstance(response, BaseException):
                raise response
            yield response


class FakeStore:
    """The session service's append, claim, renew and release, in memory."""

    def __init__(self) -> None:
        # Runs of which the writer was granted something that it never heard of.
        self.unheard: set[str] = set()
        self.runs: dict[str, FakeRun] = {}
        self.streams: list[FakeCall] = []
        self.script: list[str] = []
        self.appends = 0
        self.messages = 0
        self.hold = False
        self.held: list[tuple[FakeCall, AppendRequest]] = []
        self.released: list[str] = []
        self.failed: list[tuple[str, bool]] = []
        self.renewals: list[Sequence[tuple[str, str, int]]] = []
        self.cancelled: list[str] = []
        # Messages in a claim's context, 0 for all; what was asked for of the rest.
        self.page = 0
        self.rests: list[tuple[int, int]] = []
        self.rest_error: HermeshError | None = None
        self.changed = asyncio.Event()

    def open_stream(self) -> FakeCall:
        call = FakeCall(self)
        self.streams.append(call)
        return call

    def received(self, call: FakeCall, request: AppendRequest) -> None:
        if self.hold:
            self.held.append((call, request))
            self.notify()
            return
        self.process(call, request)

    def process(self, call: FakeCall, request: AppendRequest) -> None:
        response = AppendResponse()
        for reattach in request.reattach:
            run = self.runs[reattach.run_id]
            result = ReattachResult(run_id=run.run_id)
            if run.fence == reattach.fence or run.run_id in self.unheard:
                run.fence += 1
                result.grant.CopyFrom(self.grant(run))
            else:
                result.lost = True
            response.reattached.append(result)
        self.messages += bool(request.appends)
        for append in request.appends:
            self.appends += 1
            action = self.script.pop(0) if self.script else "commit"
            if action == "break":  # lost on the way
                call.break_off()
                continue
            if action == "commit-break":  # committed, and the answer lost
                self._commit(append)
                call.break_off()
                continue
            if action == "retry":
                response.results.append(self._result(append, APPEND_OUTCOME_RETRY))
            elif action == "commit-retry":  # committed, and the store did not know
                self._commit(append)
                response.results.append(self._result(append, APPEND_OUTCOME_RETRY))
            elif action == "invalid":
                response.results.append(self._result(append, APPEND_OUTCOME_INVALID))
            else:
                response.results.append(self._result(append, self._commit(append)))
        if not call.closed:
            call.respond(response)
        self.notify()

    def _result(self, append: RunAppend, outcome: int) -> AppendResult:
        return AppendResult(
            run_id=append.run_id,
            first_seq=append.first_seq,
            outcome=outcome,
            next_seq=self.runs[append.run_id].next_seq,
        )

    def _commit(self, append: RunAppend) -> int:
        run = self.runs[append.run_id]
        if append.fence != run.fence:
            return APPEND_OUTCOME_FENCED
        if append.first_seq != run.next_seq:
            return APPEND_OUTCOME_GAP
        for new in append.events:
            run.events.append(
                Event(run_id=run.run_id, seq=run.next_seq, type=new.type, time_ms=new.time_ms, data=new.data)
            )
            run.next_seq += 1
            run.fences.append(append.fence)
        for message in append.commit.messages:
            run.messages.append(
                Message(
                    message_id=message.message_id,
                    session_id=run.session_id,
                    run_id=run.run_id,
                    role=message.role,
                    content=message.content,
                    tool_calls=message.tool_calls,
                    tool_call_id=message.tool_call_id,
                )
            )
        for intent in append.commit.intents:
            run.calls.setdefault(intent.call_id, ToolCall()).CopyFrom(intent)
        if append.commit.status:
            run.status = append.commit.status
        return APPEND_OUTCOME_COMMITTED

    def release_held(self) -> None:
        self.hold = False
        held, self.held = self.held, []
        for call, request in held:
            if not call.closed:
                self.process(call, request)

    def break_streams(self) -> None:
        for call in self.streams:
            call.break_off()

    def say_cancelled(self, run_id: str) -> None:
        self.streams[-1].respond(AppendResponse(cancelled_run_ids=[run_id]))

    def say_draining(self) -> None:
        self.streams[-1].respond(AppendResponse(draining=True))

    def notify(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    async def until(self, condition: Callable[[], bool], timeout: float = 5.0) -> None:
        async with asyncio.timeout(timeout):
            while not condition():
                await self.changed.wait()

    # leases

    def grant(self, run: FakeRun, timeout_ms: int = 0) -> Grant:
        return Grant(
            session_id=run.session_id,
            run_id=run.run_id,
            fence=run.fence,
            next_seq=run.next_seq,
            ttl_ms=TTL_MS,
            time_left_ms=timeout_ms or 600_000,
        )

    def new_claim(self, said: str, options: RunOptions | None = None, user: str = "", **run: Any) -> Claim:
        """Make a run with one user message and claim it."""
        row = FakeRun(str(uuid7()), str(uuid7()))
        row.events.append(Event(run_id=row.run_id, seq=1, type="run.created", data="{}"))
        row.messages.append(Message(run_id=row.run_id, role="user", content=said))
        self.runs[row.run_id] = row
        return self.claim_of(row, options, user, **run)

    def take_over(self, run_id: str, options: RunOptions | None = None) -> Claim:
        """Claim a run anew, as a second replica does after the first one is gone."""
        row = self.runs[run_id]
        row.fence += 1
        row.attempt += 1
        return self.claim_of(row, options)

    def claim_of(self, row: FakeRun, options: RunOptions | None = None, user: str = "", **run: Any) -> Claim:
        last = max((place for place, one in enumerate(row.events) if one.type == "step.started"), default=0)
        events, calls, messages = row.events[last:], row.calls.values(), row.messages
        if self.page and len(messages) > self.page:
            context = RunContext(
                messages=messages[: self.page], user=user, next=ContextPosition(message=self.page)
            )
        else:
            context = RunContext(messages=messages, events=events, tool_calls=calls, user=user)
        context.written_bytes = sum(len(one.data) for one in row.events)
        return Claim(
            Run(run_id=row.run_id, session_id=row.session_id, ordinal=1, attempt=row.attempt, **run),
            self.grant(row, options.timeout_ms if options else 0),
            context,
            options or RunOptions(),
            TENANT,
            asyncio.get_running_loop().time() + TTL_MS / 1000,
        )

    async def rest(
        self, run_id: str, fence: Callable[[], int], position: ContextPosition
    ) -> Sequence[RunContext]:
        """The pages after the first, of `page` messages each; the last has events and calls."""
        self.rests.append((fence(), position.message))
        if self.rest_error is not None:
            raise self.rest_error
        row = self.runs[run_id]
        last = max((place for place, one in enumerate(row.events) if one.type == "step.started"), default=0)
        pages = [
            RunContext(messages=row.messages[start : start + self.page])
            for start in range(position.message, len(row.messages), self.page)
        ]
        return [*pages, RunContext(events=row.events[last:], tool_calls=row.calls.values())]

    async def claim(self, run_id: str) -> Claim | NotClaimed:
        if run_id not in self.runs:
            return NotClaimed(elsewhere=False)
        return self.take_over(run_id)

    async def release(self, session_id: str, run_id: str, fence: int) -> bool:
        held = self.runs[run_id].fence == fence
        if held:
            self.released.append(run_id)
        self.notify()
        return held

    async def fail(self, session_id: str, run_id: str, fence: int, *, refused: bool) -> bool:
        self.failed.append((run_id, refused))
        run = self.runs[run_id]
        if run.fence != fence:
            return False
        run.fence += 1
        self._end(run, "run.failed", RUN_STATUS_FAILED)
        return True

    def _end(self, run: FakeRun, kind: str, status: int) -> None:
        run.events.append(Event(run_id=run.run_id, seq=run.next_seq, type=kind, data="{}"))
        run.next_seq += 1
        run.status = status
        self.notify()

    async def cancel_reason(self, run_id: str, tenant_id: str) -> str:
        return "no longer needed"

    async def renew(self, leases: Sequence[tuple[str, str, int]], timeout: float) -> Renewal:
        self.renewals.append(leases)
        lost = [run_id for _, run_id, fence in leases if self.runs[run_id].fence != fence]
        return Renewal(lost, self.cancelled, TTL_MS / 1000)


class FakeModel:
    """A model whose replies are scripted as lists of batches; an exception in one is raised there."""

    def __init__(self, *replies: Sequence[Sequence[ModelEvent] | BaseException | asyncio.Event]) -> None:
        self.replies = list(replies)
        self.requests: list[ModelRequest] = []
        self.closed = 0

    async def stream(self, request: ModelRequest) -> AsyncIterator[Sequence[ModelEvent]]:
        request.asking()
        self.requests.append(request)
        try:
            for batch in self.replies.pop(0):
                if isinstance(batch, BaseException):
                    raise batch
                if isinstance(batch, asyncio.Event):
                    await batch.wait()
                    continue
                yield batch
        finally:
            self.closed += 1

    async def list_models(self) -> Sequence[ModelInfo]:
        return [ModelInfo("fake")]


class FakeCatalog:
    """Knows every model."""

    async def resolve(self, name: str) -> str:
        return name or "fake"


class FakeTools:
    """Tools that answer from a table; a missing answer never comes."""

    def __init__(self, answers: Mapping[str, Any] | None = None, effect: int = EFFECT_CLASS_PURE) -> None:
        self.answers = dict(answers or {})
        self.effect = effect
        self.executed: list[str] = []
        self.cancelled: list[str] = []
        self.seconds_left: list[float] = []
        self.approval: set[str] = set()
        self.error: HermeshError | None = None
        self.findings: dict[str, list[str]] = {}
        self.unlisted: dict[str, str] = {}
        self.started = asyncio.Event()

    async def tools(self) -> Mapping[str, ToolInfo]:
        if self.error is not None:
            raise self.error
        return {
            name: ToolInfo(
                ToolOffer(name, f"does {name}", {"type": "object"}),
                self.effect,
                5.0,
                name in self.approval,
                name in self.findings,
            )
            for name in self.answers
        }

    async def execute(
        self,
        spec: RunSpec,
        call: Call,
        info: ToolInfo,
        fence: Callable[[], int],
        on_progress: Callable[[str], None],
        seconds_left: Callable[[], float],
        place: CallPlace,
    ) -> Call:
        self.executed.append(call.call_id)
        self.seconds_left.append(seconds_left())
        place.replica = f"replica of {call.call_id}"
        self.started.set()
        answer = self.unlisted[call.name] if call.name in self.unlisted else self.answers[call.name]
        if isinstance(answer, list):
            answer = answer.pop(0)
        if answer == "never":
            await asyncio.Event().wait()
        if answer == "unknown":
            return replace(call, state=CallState.UNKNOWN)
        on_progress("working")
        return replace(call, state=CallState.COMPLETED, content=str(answer))

    async def reconcile(self, spec: RunSpec, call: Call, known_since: float) -> Call:
        """Finds what is next in `findings`: "not done", "cannot tell", "never" or a result."""
        call = replace(call, looks=call.looks + 1)
        found = self.findings[call.name].pop(0)
        if found == "never":
            await asyncio.Event().wait()
        if found == "not done":
            return replace(call, state=CallState.INTENT)
        if found == "cannot tell":
            return replace(call, looks=MAX_LOOKS)
        return replace(call, state=CallState.COMPLETED, content=found)

    async def cancel(self, call_id: str, tenant_id: str, place: CallPlace) -> None:
        assert place.replica == f"replica of {call_id}"
        self.cancelled.append(call_id)


class FakeMemory:
    """Memories and preferences that are always the same; with `error` they are missing for it."""

    def __init__(self, found: Sequence[Any] = (), preferences: Mapping[str, str] | None = None) -> None:
        self.found = found
        self.preferences = dict(preferences or {})
        self.error: HermeshError | None = None
        self.kept: list[tuple[str, str]] = []

    async def known(self, spec: RunSpec, query: str, timeout: float) -> Known:
        if self.error is not None:
            return Known(missing={"memory": self.error, "preferences": self.error})
        return Known(self.found, self.preferences)

    async def remember(self, spec: RunSpec, text: str, timeout: float) -> None:
        if self.error is not None:
            raise self.error
        self.kept.append((spec.run_id, text))


class Bench:
    """A supervisor on fakes, with its append stream running."""

    def __init__(self, model: Any, tasks: Any, background: Any, **settings: Any) -> None:
        self.store = FakeStore()
        self.model = model
        self.tools = FakeTools()
        self.memory = FakeMemory()
        self.settings = AgentSettings(
            llm_base_url="http://model.invalid/v1", replica="agent-test", mesh_token="t", **settings
        )
        self.tasks = tasks
        loop = asyncio.get_running_loop()
        self.world = World(
            replica="agent-test",
            model=model,
            catalog=FakeCatalog(),
            tools=self.tools,
            memory=self.memory,
            reasons=self.store,
            contexts=self.store,
            tool_mode=self.settings.llm_tool_mode,
            can_prefill=self.settings.llm_prefill,
            context_tokens=self.settings.llm_context_tokens,
            memory_timeout=0.3,
            limits=lambda spec: Limits(
                spec.max_turns,
                spec.max_output_tokens,
                self.settings.llm_resumes,
                self.settings.llm_spare_requests,
                self.settings.max_run_bytes,
            ),
            now_ms=lambda: 1,
            monotonic=loop.time,
            draining=lambda: self.supervisor.draining,
        )
        self.supervisor = Supervisor(self.settings, self.store, self.world, tasks)
        self.link = AppendLink(self.store.open_stream, "agent-test", self.supervisor.cancel, loop.time)
        self.supervisor.serve_with(self.link)
        background.start(self.link.run(), name="link")

    async def finish(self, claim: Claim, timeout: float = 5.0) -> FakeRun:
        """Work on a claimed run to its end here, and return it as stored."""
        active = self.supervisor.begin(claim)
        async with asyncio.timeout(timeout):
            await active.done.wait()
        await self.tasks.wait_idle(timeout)
        self.outcome = active.outcome
        return self.store.runs[claim.run.run_id]
