"""Two ways into the mesh that look the same to a client of the suite: SSE over HTTP, and gRPC."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc
import grpc.aio
import httpx
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException

from hermesh.agent.v1 import agent_service_pb2 as agent_pb
from hermesh.agent.v1.agent_service_pb2_grpc import AgentServiceStub
from hermesh.common.v1 import event_pb2
from hermesh.session.v1 import resources_pb2
from hermesh.session.v1 import session_service_pb2 as session_pb
from hermesh.session.v1.session_service_pb2_grpc import SessionServiceStub
from meshkit.channel import stream_call

POLICIES = ("enqueue", "reject", "interrupt", "rollback")
DECISIONS = ("completed", "failed", "retry", "abandon")
# What may be tried again with the same key.
_RETRYABLE_STATUS = {408, 425, 429, 502, 503, 504}
_RETRYABLE_CODES = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.CANCELLED,
}
CALL_SECONDS = 20.0
# Longer than any silence of a healthy stream: heartbeats come each 15 s.
SILENT_SECONDS = 40.0


@dataclass(frozen=True, slots=True)
class Event:
    """One event as a client received it; `text` is its data, byte for byte."""

    run: str
    seq: int
    type: str
    text: str

    @property
    def data(self) -> dict[str, Any]:
        """The data, parsed."""
        parsed: dict[str, Any] = json.loads(self.text)
        return parsed


@dataclass(frozen=True, slots=True)
class Reconnect:
    """The server asks to come back."""

    after: float


class Refused(Exception):
    """A typed error: nothing was accepted by this try."""

    def __init__(self, status: int, reason: str, retryable: bool, after: float = 0.0) -> None:
        super().__init__(f"{status} {reason}")
        self.status = status
        self.reason = reason
        self.retryable = retryable
        self.after = after


class Broken(Exception):
    """The connection broke, or no answer came: what became of the request is not known."""


class Malformed(Exception):
    """What no client should ever see."""


Item = Event | Reconnect


class SessionTransport(Protocol):
    """What a watcher of a session does with the mesh."""

    via: str

    def watch_session(self, session: str, cursor: str) -> AsyncIterator[Item]:
        """Yields a session's events, run after run, without end."""
        ...

    async def close(self) -> None:
        """Ends its connections."""
        ...


class Transport(Protocol):
    """What a client does with the mesh. All raise Refused, Broken or Malformed."""

    via: str

    async def create_session(self, key: str) -> str:
        """Makes a session."""
        ...

    def run(self, session: str, text: str, key: str, policy: str) -> AsyncIterator[Item]:
        """Submits input and yields its run's events; the first says that it was accepted."""
        ...

    async def submit(self, session: str, text: str, key: str, policy: str) -> str:
        """Submits input and returns its run."""
        ...

    def watch(self, run: str, after: int) -> AsyncIterator[Item]:
        """Yields a run's events past a seq."""
        ...

    async def cancel(self, run: str) -> None:
        """Asks to cancel."""
        ...

    async def resolve(self, run: str, call: str, decision: str, content: str, key: str) -> None:
        """Gives a person's word."""
        ...

    async def get_session(self, session: str) -> str:
        """Asks for a session; returns nothing."""
        ...

    async def delete_session(self, session: str) -> str:
        """Deletes a session; returns nothing."""
        ...

    async def close(self) -> None:
        """Ends its connections."""
        ...


@dataclass
class Http:
    """The native HTTP API."""

    base_url: str
    headers: Mapping[str, str]
    via: str = "sse"
    _client: httpx.AsyncClient = field(init=False)

    def __post_init__(self) -> None:
        timeout = httpx.Timeout(CALL_SECONDS, read=SILENT_SECONDS, connect=5)
        self._client = httpx.AsyncClient(base_url=self.base_url, headers=dict(self.headers), timeout=timeout)

    async def close(self) -> None:
        await self._client.aclose()

    async def _call(
        self, path: str, body: dict[str, Any] | None, key: str = "", method: str = "POST"
    ) -> dict[str, Any]:
        headers = {"Idempotency-Key": key} if key else {}
        try:
            answer = await self._client.request(method, path, json=body, headers=headers)
        except (httpx.TransportError, httpx.StreamError) as error:
            raise Broken(type(error).__name__) from error
        if answer.status_code >= 400:
            raise _refusal(answer.status_code, answer.content, answer.headers)
        found: dict[str, Any] = answer.json() if answer.content else {}
        return found

    async def get_session(self, session: str) -> str:
        await self._call(f"/v1/sessions/{session}", None, method="GET")
        return ""

    async def delete_session(self, session: str) -> str:
        await self._call(f"/v1/sessions/{session}", None, method="DELETE")
        return ""

    async def create_session(self, key: str) -> str:
        return str((await self._call("/v1/sessions", {"title": "chaos"}, key))["session_id"])

    async def submit(self, session: str, text: str, key: str, policy: str) -> str:
        body = {"input": text, "stream": False, "concurrency": policy}
        return str((await self._call(f"/v1/sessions/{session}/runs", body, key))["run_id"])

    async def cancel(self, run: str) -> None:
        await self._call(f"/v1/runs/{run}/cancel", {"reason": "chaos"})

    async def resolve(self, run: str, call: str, decision: str, content: str, key: str) -> None:
        await self._call(f"/v1/runs/{run}/actions/{call}", {"decision": decision, "content": content}, key)

    async def run(self, session: str, text: str, key: str, policy: str) -> AsyncIterator[Item]:
        body = {"input": text, "stream": True, "concurrency": policy}
        stream = self._stream(
            "POST", f"/v1/sessions/{session}/runs", json=body, headers={"Idempotency-Key": key}
        )
        async with aclosing(stream):
            async for item in stream:
                yield item

    async def watch(self, run: str, after: int) -> AsyncIterator[Item]:
        headers = {"Last-Event-ID": f"{run}:{after}"} if after else {}
        stream = self._stream("GET", f"/v1/runs/{run}/events", headers=headers)
        async with aclosing(stream):
            async for item in stream:
                yield item

    async def watch_session(self, session: str, cursor: str) -> AsyncIterator[Item]:
        """Yields a session's events past a cursor `<run>:<seq>`, or from its start, without end."""
        headers = {"Last-Event-ID": cursor} if cursor else {}
        stream = self._stream("GET", f"/v1/sessions/{session}/events", headers=headers)
        async with aclosing(stream):
            async for item in stream:
                yield item

    async def _stream(self, method: str, path: str, **fields: Any) -> AsyncIterator[Item]:
        try:
            async with self._client.stream(method, path, **fields) as response:
                if response.status_code == 204:
                    return
                if response.status_code >= 400:
                    await response.aread()
                    raise _refusal(response.status_code, response.content, response.headers)
                lines: list[str] = []
                async for line in response.aiter_lines():
                    if line:
                        lines.append(line)
                        continue
                    item = _item(lines)
                    lines = []
                    if item is not None:
                        yield item
        except (httpx.TransportError, httpx.StreamError) as error:
            raise Broken(type(error).__name__) from error


def _item(lines: list[str]) -> Item | None:
    fields = dict(line.split(": ", 1) for line in lines if not line.startswith(":") and ": " in line)
    if not fields:
        return None
    data = fields.get("data", "")
    if fields.get("event") == "reconnect":
        return Reconnect(json.loads(data).get("after_ms", 0) / 1000)
    if "id" not in fields:
        raise Malformed(f"a frame without an id: {lines}")
    run, _, seq = fields["id"].rpartition(":")
    if json.loads(data)["seq"] != int(seq):
        raise Malformed(f"an event whose id is another's: {lines}")
    return Event(run, int(seq), fields["event"], _data_of(data))


@dataclass
class Ws:
    """The WebSocket of a session: only watching is done by it here."""

    base_url: str
    headers: Mapping[str, str]
    via: str = "ws"

    async def close(self) -> None:
        """Nothing is kept open between calls."""

    async def watch_session(self, session: str, cursor: str) -> AsyncIterator[Item]:
        """As `Http.watch_session`."""
        url = f"{self.base_url.replace('http', 'ws', 1)}/v1/sessions/{session}/ws"
        url += f"?after={cursor}" if cursor else ""
        try:
            async with connect(
                url, additional_headers=self.headers, open_timeout=CALL_SECONDS, close_timeout=1, proxy=None
            ) as socket:
                async for text in socket:
                    item = _ws_item(str(text))
                    if item is not None:
                        yield item
        except (WebSocketException, OSError, TimeoutError) as error:
            raise Broken(type(error).__name__) from error


def _ws_item(text: str) -> Item | None:
    message = json.loads(text)
    if "seq" in message:
        return Event(message["run_id"], message["seq"], message["type"], _data_of(text))
    if message["type"] == "reconnect":
        return Reconnect(message["data"].get("after_ms", 0) / 1000)
    if message["type"] == "error":
        problem = message["data"]
        return _raise(_problem(int(problem["status"]), problem, {}))
    return None


def _raise(error: Exception) -> None:
    raise error


def _data_of(text: str) -> str:
    # The event's data is the last member: what PostgreSQL holds, byte for byte.
    _, mark, rest = text.partition(',"data":')
    if not mark or not rest.endswith("}"):
        raise Malformed(f"an event of another form: {text[:200]}")
    return rest[:-1]


def _refusal(status: int, content: bytes, headers: Mapping[str, str]) -> Exception:
    """A problem document, or what is none."""
    try:
        problem = json.loads(content)
        assert problem["reason"]
    except (ValueError, KeyError, TypeError, AssertionError):
        # Envoy itself answers so while no gateway is there, and says it in plain text.
        if status in (502, 503, 504):
            return Refused(status, "(edge)", True)
        return Malformed(f"{status} without a problem document: {content[:200]!r}")
    return _problem(status, problem, headers)


def _problem(status: int, problem: Mapping[str, Any], headers: Mapping[str, str]) -> Exception:
    reason = str(problem["reason"])
    if reason == "INTERNAL" or status == 500:
        return Malformed(f"{status} {reason}: {problem.get('detail', '')}")
    return Refused(status, reason, status in _RETRYABLE_STATUS, float(headers.get("retry-after", 0)))


@dataclass
class Grpc:
    """The public gRPC services."""

    address: str
    api_key: str
    via: str = "grpc"

    def __post_init__(self) -> None:
        self._channel = grpc.aio.insecure_channel(
            self.address,
            options=[
                ("grpc.enable_retries", 0),
                ("grpc.initial_reconnect_backoff_ms", 50),
                ("grpc.max_reconnect_backoff_ms", 500),
                ("grpc.use_local_subchannel_pool", 1),
            ],
        )
        self._sessions: Any = SessionServiceStub(self._channel)
        self._agents: Any = AgentServiceStub(self._channel)
        self._metadata = (("authorization", f"Bearer {self.api_key}"),)

    async def close(self) -> None:
        await self._channel.close()

    async def _call(self, method: Any, request: Any) -> Any:
        try:
            return await method(request, metadata=self._metadata, timeout=CALL_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise _rpc_refusal(error) from error

    async def create_session(self, key: str) -> str:
        request = session_pb.CreateSessionRequest(title="chaos", request_id=key)
        return str((await self._call(self._sessions.CreateSession, request)).session.session_id)

    async def get_session(self, session: str) -> str:
        await self._call(self._sessions.GetSession, session_pb.GetSessionRequest(session_id=session))
        return ""

    async def delete_session(self, session: str) -> str:
        await self._call(self._sessions.DeleteSession, session_pb.DeleteSessionRequest(session_id=session))
        return ""

    async def submit(self, session: str, text: str, key: str, policy: str) -> str:
        request = session_pb.SubmitRunRequest(
            session_id=session, input=_input(text), request_id=key, concurrency=_policy(policy)
        )
        return str((await self._call(self._sessions.SubmitRun, request)).run.run_id)

    async def cancel(self, run: str) -> None:
        await self._call(self._sessions.CancelRun, session_pb.CancelRunRequest(run_id=run, reason="chaos"))

    async def resolve(self, run: str, call: str, decision: str, content: str, key: str) -> None:
        request = session_pb.ResolveActionRequest(
            run_id=run,
            call_id=call,
            decision=session_pb.ActionDecision.Value(f"ACTION_DECISION_{decision.upper()}"),
            content=content,
            request_id=key,
        )
        await self._call(self._sessions.ResolveAction, request)

    async def run(self, session: str, text: str, key: str, policy: str) -> AsyncIterator[Item]:
        request = agent_pb.RunRequest(
            session_id=session, input=_input(text), request_id=key, concurrency=_policy(policy)
        )
        async for item in self._stream(self._agents.Run(request, metadata=self._metadata)):
            yield item

    async def watch(self, run: str, after: int) -> AsyncIterator[Item]:
        request = session_pb.WatchRunRequest(run_id=run, after_seq=after)
        async for item in self._stream(self._sessions.WatchRun(request, metadata=self._metadata)):
            yield item

    async def watch_session(self, session: str, cursor: str) -> AsyncIterator[Item]:
        """As `Http.watch_session`."""
        run, _, seq = cursor.rpartition(":")
        request = session_pb.WatchSessionRequest(
            session_id=session, after_run_id=run, after_seq=int(seq or 0)
        )
        async for item in self._stream(self._sessions.WatchSession(request, metadata=self._metadata)):
            yield item

    async def _stream(self, opened: Any) -> AsyncIterator[Item]:
        try:
            async with stream_call(opened) as call:
                async for response in call:
                    frame = response.frame
                    for event in frame.events:
                        yield Event(event.run_id, event.seq, event.type, event.data)
                    if frame.HasField("reconnect"):
                        yield Reconnect(frame.reconnect.after_ms / 1000)
                        return
        except grpc.aio.AioRpcError as error:
            raise _rpc_refusal(error) from error


def _input(text: str) -> list[event_pb2.InputMessage]:
    return [event_pb2.InputMessage(role="user", content=text)]


def _policy(policy: str) -> resources_pb2.ConcurrencyPolicy.ValueType:
    return resources_pb2.ConcurrencyPolicy.Value(f"CONCURRENCY_POLICY_{policy.upper()}")


def _rpc_refusal(error: grpc.aio.AioRpcError) -> Exception:
    code = error.code()
    status = rpc_status.from_call(error)
    reason = ""
    for detail in status.details if status is not None else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Is(info.DESCRIPTOR):
            detail.Unpack(info)
            reason = info.reason
    if not reason:
        # gRPC and Envoy speak for themselves when nobody answers; a service of ours always gives a reason.
        if code in _RETRYABLE_CODES or (
            code is grpc.StatusCode.INTERNAL and "RST_STREAM" in (error.details() or "")
        ):
            return Broken(code.name)
        return Malformed(f"{code.name} without a reason: {error.details()}")
    if reason == "INTERNAL":
        return Malformed(f"{code.name} {reason}: {error.details()}")
    return Refused(code.value[0], reason, code in _RETRYABLE_CODES)
