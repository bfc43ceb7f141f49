"""The tool service: what tools there are, and running one journalled call."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import grpc.aio
import orjson
import structlog

from hermesh.session.v1.resources_pb2 import (
    TOOL_CALL_STATE_COMPLETED,
    TOOL_CALL_STATE_FAILED,
    TOOL_CALL_STATE_UNKNOWN,
    EffectClass,
    ToolCall,
)
from hermesh.session.v1.session_internal_service_pb2 import (
    BEGIN_OUTCOME_FENCED,
    BEGIN_OUTCOME_GO,
    BEGIN_OUTCOME_NOT_APPROVED,
    BeginToolCallRequest,
    CompleteToolCallRequest,
)
from hermesh.session.v1.session_internal_service_pb2_grpc import SessionInternalServiceStub
from hermesh.tool.v1.tool_service_pb2 import (
    RECONCILE_OUTCOME_CANNOT_TELL,
    RECONCILE_OUTCOME_NOT_DONE,
    RECONCILE_OUTCOME_SETTLED,
    CancelRequest,
    ExecuteRequest,
    ExecuteResponse,
    ListToolsRequest,
    ReconcileRequest,
    ReconcileResponse,
    Result,
)
from hermesh.tool.v1.tool_service_pb2_grpc import ToolServiceStub
from meshkit import failpoints
from meshkit.channel import Metadata, mesh_metadata, stream_call
from meshkit.errors import HermeshError, UnavailableError, from_rpc_error
from meshkit.identity import PROBE_TENANT
from meshkit.tasks import Backoff
from services.agent import metrics
from services.agent.domain.loop import MAX_LOOKS, Call, CallState
from services.agent.domain.prompt import RunSpec
from services.agent.model.port import ToolOffer
from services.agent.settings import AgentSettings

_log = structlog.get_logger("agent.tools")

LIST_TIMEOUT = 2.0
# For a first list: as long as a call waits for a replica to come back.
FIRST_SECONDS = 2.0
PROBE_TIMEOUT = 1.5
REFRESH_SECONDS = 30.0
EXECUTE_TRIES = 6
# So many of them go to the replica that the call was at: it still knows what becomes of it.
LED_TRIES = 3
# Envoy names the replica that answers Execute by this header, and leads there whatever carries it.
REPLICA_HEADER = "x-hermesh-tool-replica"
PLACE_SECONDS = 0.5
CANCEL_SECONDS = 1.0
# Silence for longer than the tool's own timeout and this is a tool service that is gone: it reports the
# timeout itself, and better, and tells when a result waits to be stored or recorded.
EXECUTE_MARGIN = 5.0
# Above a hook's own time, which is at most a minute.
RECONCILE_TIMEOUT = 75.0
# The call cannot be made, whoever asks: the model is told, and may repair it.
_MODEL_MAY_REPAIR = ("TOOL_NOT_FOUND", "TOOL_ARGUMENTS_INVALID", "INVALID_ARGUMENT", "ADDRESS_REFUSED")


@dataclass(frozen=True, slots=True)
class ToolInfo:
    """A tool as the tool service lists it; `timeout` in seconds."""

    offer: ToolOffer
    effect: EffectClass.ValueType
    timeout: float
    requires_approval: bool
    reconciles: bool = False


ExecuteCall: TypeAlias = "grpc.aio.UnaryStreamCall[ExecuteRequest, ExecuteResponse]"


@dataclass(slots=True)
class CallPlace:
    """Where a call runs.

    Attributes:
        replica: as Envoy names it; empty until a replica has taken the call.
    """

    replica: str = ""


class ToolClient:
    """Calls to the tool service, with the list of tools cached.

    Args:
        channel: to the mesh.
        settings: for the mesh's credential, and how long an unknown outcome is looked for.
    """

    def __init__(self, channel: grpc.aio.Channel, settings: AgentSettings) -> None:
        self._stub = ToolServiceStub(channel)
        self._journal = SessionInternalServiceStub(channel)
        self._settings = settings
        self._mesh = mesh_metadata(settings)
        self._tools: Mapping[str, ToolInfo] | None = None
        self._known = asyncio.Event()
        self._why: HermeshError = UnavailableError(message="the tool service has not answered yet")

    async def tools(self) -> Mapping[str, ToolInfo]:
        """Return the tools by name, as `keep_fresh` knows them.

        Raises:
            HermeshError: none are known, and the tool service has not answered within FIRST_SECONDS: an agent
                that has just begun waits for a tool service that begins beside it.
        """
        if self._tools is None:
            with suppress(TimeoutError):
                async with asyncio.timeout(FIRST_SECONDS):
                    await self._known.wait()
        if self._tools is None:
            raise self._why
        return self._tools

    async def keep_fresh(self) -> None:
        """Read the list and renew it, until cancelled; while the tool service is away the old list stays."""
        backoff = Backoff(0.1, 2.0)
        while True:
            try:
                self._tools = await self._load()
                self._known.set()
            except HermeshError as error:
                self._why = error
                _log.debug("the list of tools was not renewed", reason=error.reason)
                await asyncio.sleep(backoff.next() if self._tools is None else REFRESH_SECONDS)
                continue
            await asyncio.sleep(REFRESH_SECONDS)

    async def problem(self) -> str | None:
        """Return None if the tool service answers, else what is wrong."""
        try:
            await self._stub.ListTools(
                ListToolsRequest(page_size=1),
                metadata=mesh_metadata(self._settings, PROBE_TENANT),
                timeout=PROBE_TIMEOUT,
            )
        except grpc.aio.AioRpcError as error:
            return f"the tool service does not answer: {from_rpc_error(error).reason}"
        return None

    async def _load(self) -> Mapping[str, ToolInfo]:
        tools: dict[str, ToolInfo] = {}
        token = ""
        while True:
            request = ListToolsRequest(page_size=500, page_token=token)
            try:
                response = await self._stub.ListTools(request, metadata=self._mesh, timeout=LIST_TIMEOUT)
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error) from error
            for tool in response.tools:
                offer = ToolOffer(tool.name, tool.description, _schema(tool.input_schema))
                tools[tool.name] = ToolInfo(
                    offer,
                    tool.effect,
                    (tool.timeout_ms or 30_000) / 1000,
                    tool.requires_approval,
                    tool.reconciles,
                )
            token = response.next_page_token
            if not token:
                return tools

    @failpoints.around("agent.tool")
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
        """Run one call whose intent is stored, and return it with its outcome.

        A broken stream is asked for again: the journal says whether the tool may act, so that trying
        again repeats nothing.

        Args:
            spec: the run.
            call: the call.
            info: its tool.
            fence: returns the fence of this moment; it changes when the run is attached anew.
            on_progress: told each sign of life.
            seconds_left: returns how long the run may still take.
            place: is told which replica has the call, for `cancel`.
        """
        backoff = Backoff(0.1, 1.0)
        metadata = mesh_metadata(self._settings, spec.tenant_id)
        silence = info.timeout + EXECUTE_MARGIN
        clock = asyncio.get_running_loop().time
        while True:
            used = fence()
            request = ExecuteRequest(
                call_id=call.call_id,
                session_id=spec.session_id,
                run_id=spec.run_id,
                fence=used,
                name=call.name,
                arguments=call.arguments,
                user=spec.user,
                time_left_ms=max(1, math.ceil(seconds_left() * 1000)),
            )
            led = backoff.attempts <= LED_TRIES
            try:
                stream = self._stub.Execute(request, metadata=_led(metadata, place.replica if led else ""))
                async with asyncio.timeout(silence) as quiet, stream_call(stream) as responses:
                    place.replica = await _replica(stream, place)
                    async for response in responses:
                        quiet.reschedule(clock() + silence)
                        if response.WhichOneof("kind") == "result":
                            return _settled(call, response.result)
                        on_progress(response.progress.text)
                reason, message = "SERVICE_UNAVAILABLE", "the tool service sent no result"
            except TimeoutError:
                reason, message = "DEADLINE_EXCEEDED", "the tool service sent nothing for too long"
            except grpc.aio.AioRpcError as rpc_error:
                error = from_rpc_error(rpc_error)
                reason, message = error.reason, error.message
            if reason == "APPROVAL_REQUIRED":
                return replace(call, needs_approval=True, asked=False)
            if reason in _MODEL_MAY_REPAIR:
                return replace(call, state=CallState.FAILED, content=message)
            stale = reason == "FENCE_STALE"
            if backoff.attempts + 1 >= EXECUTE_TRIES and not stale:
                metrics.unreached_calls.inc()
                _log.warning("tool call failed", call_id=call.call_id, tool=call.name, reason=reason)
                return await self._ask_journal(spec, call, fence, reason)
            # A stale fence ends the run by the writer's word, or is followed by a new one.
            await backoff.sleep()

    async def _ask_journal(self, spec: RunSpec, call: Call, fence: Callable[[], int], reason: str) -> Call:
        """Settle a call that no tool service answers for, by the journal's word.

        A call that the journal lets begin was never begun: it is closed as failed, and a request that is
        still on its way to a tool service cannot act any more without asking first.
        """
        text = (
            "The tool took too long." if reason == "DEADLINE_EXCEEDED" else "The tool could not be reached."
        )
        backoff = Backoff(0.1, 2.0)
        while True:
            used = fence()
            try:
                begun = await self._journal.BeginToolCall(
                    BeginToolCallRequest(call_id=call.call_id, session_id=spec.session_id, fence=used),
                    metadata=self._mesh,
                )
                if begun.outcome == BEGIN_OUTCOME_GO:
                    closed = await self._journal.CompleteToolCall(
                        CompleteToolCallRequest(
                            call_id=call.call_id, fence=used, state=TOOL_CALL_STATE_FAILED, content=text
                        ),
                        metadata=self._mesh,
                    )
                    return _settled(call, closed.tool_call)
                if begun.outcome == BEGIN_OUTCOME_NOT_APPROVED:
                    return replace(call, needs_approval=True, asked=False)
                if begun.outcome != BEGIN_OUTCOME_FENCED:
                    return _settled(call, begun.tool_call)
            except grpc.aio.AioRpcError as error:
                _log.warning("the journal does not answer", call_id=call.call_id, code=error.code().name)
            await backoff.sleep()

    async def reconcile(self, spec: RunSpec, call: Call, known_since: float) -> Call:
        """Have a call's tool look up what became of it, and return it as it stands then.

        A look never acts. An outside that does not answer is asked again on a schedule, a bounded number of
        times and for a bounded time; then the call stays UNKNOWN. While an earlier try may still act, "not
        done" does not count, and is asked for again when no try can any more.

        Args:
            spec: the run.
            call: the call, UNKNOWN.
            known_since: when this process first knew that it may have been begun, by the monotonic clock.
        """
        metadata = mesh_metadata(self._settings, spec.tenant_id)
        request = ReconcileRequest(
            call_id=call.call_id,
            session_id=spec.session_id,
            run_id=spec.run_id,
            name=call.name,
            arguments=call.arguments,
            user=spec.user,
        )
        call = replace(call, looks=call.looks + 1)
        left_to_a_person = replace(call, looks=MAX_LOOKS)
        end = time.monotonic() + self._settings.reconcile_seconds
        backoff = Backoff(1.0, 30.0)
        while True:
            request.waited_ms = int((time.monotonic() - known_since) * 1000)
            response = await self._look(request, metadata)
            if response.outcome == RECONCILE_OUTCOME_SETTLED:
                return _settled(call, response.result)
            if response.outcome == RECONCILE_OUTCOME_NOT_DONE:
                return replace(call, state=CallState.INTENT, content="")
            if response.outcome == RECONCILE_OUTCOME_CANNOT_TELL:
                return left_to_a_person
            wait = response.retry_after_ms / 1000
            if not wait:
                wait = backoff.next()
                if backoff.attempts >= self._settings.reconcile_tries:
                    return left_to_a_person
            if time.monotonic() + wait > end:
                return left_to_a_person
            await asyncio.sleep(wait)

    async def _look(self, request: ReconcileRequest, metadata: Metadata) -> ReconcileResponse:
        """Return what the tool found; without an answer one that says nothing, so that it is asked again."""
        try:
            response: ReconcileResponse = await self._stub.Reconcile(
                request, metadata=metadata, timeout=RECONCILE_TIMEOUT
            )
        except grpc.aio.AioRpcError as error:
            _log.warning(
                "what became of a call was not found out", call_id=request.call_id, code=error.code().name
            )
            return ReconcileResponse()
        return response

    async def cancel(self, call_id: str, tenant_id: str, place: CallPlace) -> None:
        """Ask a running call to stop, on the replica that has it; a replica that is gone runs nothing."""
        metadata = _led(mesh_metadata(self._settings, tenant_id), place.replica)
        code = ""
        backoff = Backoff(0.05, 0.5)
        try:
            async with asyncio.timeout(CANCEL_SECONDS):
                while True:
                    try:
                        answer = await self._stub.Cancel(CancelRequest(call_id=call_id), metadata=metadata)
                    except grpc.aio.AioRpcError as error:
                        code = error.code().name
                        if error.code() is not grpc.StatusCode.UNAVAILABLE:
                            break
                        await backoff.sleep()
                    else:
                        _log.debug("tool call was told to stop", call_id=call_id, found=answer.found)
                        return
        except TimeoutError:
            pass
        _log.warning("tool call could not be told to stop", call_id=call_id, code=code or "no answer")


def _led(metadata: Metadata, replica: str) -> Metadata:
    return (*metadata, (REPLICA_HEADER, replica)) if replica else metadata


async def _replica(stream: ExecuteCall, place: CallPlace) -> str:
    """Wait for an Execute's headers, and return which replica sent them.

    A call that is given up right now may have arrived: without its replica's name nobody could stop it, so
    the name is waited for a moment longer.
    """
    try:
        headers = await stream.initial_metadata()
    except asyncio.CancelledError:
        with suppress(TimeoutError, grpc.aio.AioRpcError):
            async with asyncio.timeout(PLACE_SECONDS):
                place.replica = _named(await stream.initial_metadata()) or place.replica
        raise
    return _named(headers) or place.replica


def _named(headers: Iterable[tuple[str, str | bytes]]) -> str:
    return next((str(value) for name, value in headers if name == REPLICA_HEADER), "")


def _settled(call: Call, found: Result | ToolCall) -> Call:
    if found.state == TOOL_CALL_STATE_COMPLETED:
        return replace(call, state=CallState.COMPLETED, content=found.content, content_ref=found.content_ref)
    if found.state == TOOL_CALL_STATE_UNKNOWN:
        return replace(call, state=CallState.UNKNOWN, content=found.content)
    return replace(call, state=CallState.FAILED, content=found.content or "The tool failed.")


def _schema(text: str) -> Mapping[str, Any]:
    try:
        schema = orjson.loads(text)
    except orjson.JSONDecodeError:
        schema = None
    return schema if isinstance(schema, dict) else {"type": "object"}


def allowed(tools: Mapping[str, ToolInfo], names: Sequence[str]) -> dict[str, ToolInfo]:
    """Return the tools that a run may call: all, or those that it names."""
    return {name: info for name, info in tools.items() if not names or name in names}
