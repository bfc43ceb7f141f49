"""GET /v1/sessions/{id}/ws: a session's events as JSON texts, and input on the same connection."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any, Literal

import orjson
import structlog
from pydantic import Field
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from gateway import frames, models
from gateway.body import StrictModel, parse_json, validate
from gateway.clients import call
from gateway.context import Gateway
from gateway.cursor import canonical_id
from gateway.follow import FeedLost
from gateway.problems import problem, violation
from gateway.routes.runs import session_after, session_place
from gateway.watch_stream import WatchFeed
from hermesh.session.v1 import session_service_pb2 as pb
from meshkit.errors import HermeshError, NotFoundError

_log = structlog.get_logger("gateway.websocket")

GOING_AWAY = 1001
UNSUPPORTED = 1003
TRY_AGAIN = 1013
# 4000 and up are an application's own: 4000 + the HTTP status.
OWN = 4000


class InputMessage(models.CreateRun):
    """New input."""

    type: Literal["input"]
    request_id: str = Field("", max_length=200, description="Makes it safe to send again.")
    stream: Literal[True] = Field(True, description="Always: the events come on this connection.")


class CancelMessage(models.CancelRun):
    """Asks for a run to be cancelled."""

    type: Literal["cancel"]
    run_id: str


class ResolveMessage(models.ResolveAction):
    """Settles a tool call."""

    type: Literal["resolve"]
    run_id: str
    call_id: str = Field(min_length=1, max_length=100)
    request_id: str = Field("", max_length=200)


class PingMessage(StrictModel):
    """Asks for a `pong`."""

    type: Literal["ping"]


Incoming = InputMessage | CancelMessage | ResolveMessage | PingMessage
_TYPES: dict[str, type[Incoming]] = {
    "input": InputMessage,
    "cancel": CancelMessage,
    "resolve": ResolveMessage,
    "ping": PingMessage,
}


class SessionSocket:
    """One WebSocket: a task that sends events, one that takes messages, under one roof."""

    is_socket = True

    def __init__(self, gateway: Gateway, websocket: WebSocket) -> None:
        """Prepares to serve it."""
        self._gateway = gateway
        self._socket = websocket
        self._session_id = ""
        self._drain = asyncio.Event()

    async def serve(self) -> None:
        """Serves it to its end."""
        socket, gateway = self._socket, self._gateway
        try:
            await gateway.identify(socket, "WS")
            gateway.hub.check_room()
            feed = await self._place()
            # Of many that came together none was counted before.
            gateway.hub.check_room()
        except HermeshError as error:
            # Accepted first: a browser is told nothing about a handshake that was refused.
            await socket.accept()
            await self._send(orjson.dumps({"type": "error", "data": problem(error)}).decode())
            await socket.close(OWN + problem(error)["status"], error.reason.lower())
            return
        gateway.hub.begin_watching()
        try:
            await socket.accept()
            await self._serve(feed)
        finally:
            gateway.hub.end_watching()

    async def _serve(self, feed: WatchFeed) -> None:
        hub = self._gateway.hub
        hub.register(self, self._socket.scope)
        if hub.draining.is_set():
            self.drain()
        try:
            await self._run(feed)
        finally:
            hub.unregister(self)

    def drain(self) -> None:
        """Ends the connection with `reconnect`."""
        self._drain.set()

    async def _place(self) -> WatchFeed:
        query = self._socket.query_params
        try:
            self._session_id = canonical_id(self._socket.path_params["session_id"])
        except ValueError:
            raise NotFoundError("SESSION_NOT_FOUND", "there is no such session") from None
        run_id, seq = session_after(self._socket.headers.get("last-event-id", ""), query.get("after", ""))
        only_new = query.get("only_new", "").lower() in ("1", "true")
        place = await session_place(self._gateway, self._session_id, run_id, seq, only_new=only_new)
        return WatchFeed(self._gateway.hub, *place)

    async def _run(self, feed: WatchFeed) -> None:
        owner = self._gateway.hub.owner
        tasks = [
            owner.start(self._send_events(feed), name=f"ws events {self._session_id}"),
            owner.start(self._receive(), name=f"ws input {self._session_id}"),
            owner.start(self._leave(), name=f"ws drain {self._session_id}"),
        ]
        code, reason = GOING_AWAY, ""
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if not task.cancelled() and task.exception() is None:
                    code, reason = task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=1.0)
        if self._socket.client_state is WebSocketState.CONNECTED and code:
            try:
                async with asyncio.timeout(1.0):
                    await self._socket.close(code, reason)
            except (TimeoutError, RuntimeError, WebSocketDisconnect):
                pass

    async def _send_events(self, feed: WatchFeed) -> tuple[int, str]:
        try:
            async with aclosing(feed.batches()) as batches:
                async for batch in batches:
                    for event in batch:
                        await self._send(frames.event_json(event))
                    self._gateway.hub.metrics.events.inc(len(batch))
        except FeedLost as lost:
            await self._send(frames.reconnect_json(lost.reason, lost.after_ms))
            return TRY_AGAIN, lost.reason
        except HermeshError as error:
            await self._send(orjson.dumps({"type": "error", "data": problem(error)}).decode())
            return OWN + problem(error)["status"], error.reason.lower()
        except TimeoutError:
            self._gateway.hub.metrics.dropped.inc()
            return TRY_AGAIN, "slow_reader"
        except (WebSocketDisconnect, RuntimeError):
            return 0, ""
        return GOING_AWAY, ""

    async def _send(self, text: str) -> None:
        async with asyncio.timeout(self._gateway.settings.write_timeout_seconds):
            await self._socket.send_text(text)

    async def _leave(self) -> tuple[int, str]:
        await self._drain.wait()
        await self._send(frames.reconnect_json("drain", 100))
        return GOING_AWAY, "drain"

    async def _receive(self) -> tuple[int, str]:
        try:
            while True:
                received = await self._socket.receive()
                if received["type"] == "websocket.disconnect":
                    return 0, ""
                text = received.get("text")
                if text is None:
                    return UNSUPPORTED, "text messages only"
                try:
                    answer = await self._take(text)
                except HermeshError as error:
                    answer = {"type": "error", "data": problem(error)}
                await self._send(orjson.dumps(answer).decode())
        except (WebSocketDisconnect, RuntimeError):
            return 0, ""
        except TimeoutError:
            return TRY_AGAIN, "slow_reader"

    async def _take(self, text: str) -> dict[str, Any]:
        value = parse_json(text.encode("utf-8", "replace"))
        message = _message(value)
        sessions = self._gateway.mesh.sessions
        if isinstance(message, PingMessage):
            return {"type": "pong"}
        if isinstance(message, InputMessage):
            order = message.submit_request(self._session_id, message.request_id)
            order.options.model = await self._gateway.mesh.check_model(message.chosen_model)
            answer = await call(sessions.SubmitRun(order))
            return {"type": "accepted", "data": models.run_json(answer.run)}
        run_id = _run_id(message.run_id)
        if isinstance(message, CancelMessage):
            cancelled = await call(
                sessions.CancelRun(pb.CancelRunRequest(run_id=run_id, reason=message.reason))
            )
            return {"type": "cancelling", "data": models.run_json(cancelled.run)}
        resolved = await call(
            sessions.ResolveAction(
                pb.ResolveActionRequest(
                    run_id=run_id,
                    call_id=message.call_id,
                    decision=models.decision_proto(message.decision),
                    content=message.content,
                    request_id=message.request_id,
                )
            )
        )
        return {"type": "resolved", "data": models.run_json(resolved.run)}


def _message(value: Any) -> Incoming:
    kind = value.get("type") if isinstance(value, dict) else None
    model = _TYPES.get(kind) if isinstance(kind, str) else None
    if model is None:
        raise violation("type", f"must be one of {', '.join(_TYPES)}")
    return validate(model, value)


def _run_id(text: str) -> str:
    try:
        return canonical_id(text)
    except ValueError:
        raise NotFoundError("RUN_NOT_FOUND", "there is no such run") from None
