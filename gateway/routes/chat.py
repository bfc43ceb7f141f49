"""OpenAI's Chat Completions and Models."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import grpc
import structlog
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway import models
from gateway.body import MAX_INPUT_BODY, check_input, parse_json, read_body
from gateway.clients import call
from gateway.context import Gateway
from gateway.cursor import RunCursor
from gateway.endpoints import Answer, Endpoint, Param, idempotency_key, json_response
from gateway.follow import FeedLost, RunFeed
from gateway.openai.chat_fold import ChatChunks, Failure, Reply, completion, error_chunk
from gateway.openai.chat_request import CONCURRENCY_HEADER, ChatRequest, parse_chat
from gateway.problems import OpenAIError, openai_kind, status_of
from gateway.routes.sessions import IDEMPOTENCY
from gateway.streams import EventStream
from hermesh.agent.v1 import agent_service_pb2 as agent_pb
from hermesh.common.v1.event_pb2 import Event
from hermesh.session.v1 import session_service_pb2 as pb
from meshkit.errors import HermeshError, NotFoundError, UnavailableError, http_status

_log = structlog.get_logger("gateway.chat")

SESSION_HEADER = "x-hermesh-session"
# A response that started can no longer be refused with a status of its own: it waits for the first text.
FIRST_TEXT_SECONDS = 15.0

# Reasons whose fault is between us and the model, not between the client and us.
_BAD_GATEWAY = frozenset({"MODEL_UNAUTHENTICATED", "MODEL_BAD_RESPONSE", "MODEL_STREAM_TRUNCATED"})
# Reasons that say so.
_NOTHING_DONE = frozenset({"DATABASE_UNAVAILABLE", "OVERLOADED"})


class ChatMessage(BaseModel):
    """A message in OpenAI's shape."""

    model_config = ConfigDict(extra="allow")

    role: str = Field(description="system, developer, user or assistant.")
    content: Any = Field(description="A string, or parts of type text.")


class ChatBody(BaseModel):
    """What is taken of OpenAI's parameters; other ones are ignored, or refused where that would mislead."""

    model_config = ConfigDict(extra="allow")

    model: str = Field(description="A model of GET /v1/models, or `default`.")
    messages: list[ChatMessage]
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    user: str | None = Field(None, description="Becomes the session's user.")
    session_id: str | None = Field(None, description="A session to go on with; else each call makes one.")


class ChatCompletion(BaseModel):
    """OpenAI's chat.completion."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: str
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: dict[str, Any]


def failure_error(failure: Failure) -> OpenAIError:
    """Returns the HTTP error for a run that failed before anything was sent."""
    if failure.reason in _BAD_GATEWAY:
        status = 502
    elif failure.code == "CANCELLED":
        status = 409
    else:
        code = getattr(grpc.StatusCode, failure.code, grpc.StatusCode.INTERNAL)
        status = http_status(HermeshError(failure.reason, failure.message, code=code))
        # The client's own key is good: it is the model's that is not.
        status = 502 if status in (401, 403) else status
    error = OpenAIError(
        status,
        failure.message,
        kind=openai_kind(status),
        openai_code=failure.reason.lower(),
        reason=failure.reason,
        retry=failure.retryable,
    )
    error.retry_after_ms = failure.retry_after_ms
    return error


def not_again(error: HermeshError) -> HermeshError:
    """Returns an error of input that was passed on without a key of the client's: it is not to be sent again.

    Packages send what failed with 5xx again by themselves, each time as new input. Where an error says that
    nothing was changed, or whether to try, that stays.
    """
    status = status_of(error)
    if status < 500 or isinstance(error, OpenAIError) or error.reason in _NOTHING_DONE:
        return error
    return OpenAIError(
        status,
        error.message,
        kind=openai_kind(status),
        openai_code=error.reason.lower(),
        reason=error.reason,
        retry=False,
    )


class ChatRenderer:
    """Renders a run's events as chunks."""

    def __init__(self, chunks: ChatChunks) -> None:
        """Renders with a fresh fold."""
        self._chunks = chunks
        self._sent = False

    @property
    def complete(self) -> bool:
        """Whether the last chunk was rendered."""
        return self._chunks.ended

    def events(self, batch: list[Event]) -> bytes:
        """Returns the chunks of a batch.

        Raises:
            OpenAIError: The run failed before there was anything to send.
        """
        body = b"".join([self._chunks.feed(event) for event in batch])
        failure = self._chunks.reply.failure
        if failure is not None and not self._sent:
            raise failure_error(failure)
        self._sent = self._sent or bool(body)
        return body

    def reconnect(self, reason: str, after_ms: int) -> bytes:
        """Returns an error: this protocol has no way to come back."""
        return error_chunk(
            Failure("UNAVAILABLE", "SERVICE_UNAVAILABLE", "the stream was lost; ask again", True)
        )

    def failed(self, error: HermeshError) -> bytes:
        """Returns an error chunk."""
        return error_chunk(Failure(error.code.name, error.reason, error.message, False))


async def complete(gateway: Gateway, request: Request) -> ASGIApp:
    """POST /v1/chat/completions."""
    body = await read_body(request, limit=MAX_INPUT_BODY, timeout=gateway.settings.body_timeout_seconds)
    # Unread the body would cost the refused client its connection; looking at it is what is saved.
    gateway.hub.check_room()
    gateway.door.check()
    chat = parse_chat(
        parse_json(body), request.headers.get(SESSION_HEADER), request.headers.get(CONCURRENCY_HEADER)
    )
    check_input(chat.messages)
    try:
        chat.options.model = await gateway.mesh.check_model(chat.model)
    except NotFoundError as error:
        raise OpenAIError(
            404,
            f"The model {chat.model[:100]!r} does not exist; GET /v1/models lists those that do.",
            openai_code="model_not_found",
            param="model",
            reason=error.reason,
        ) from None
    key = idempotency_key(request)
    session_id = chat.session_id or await _new_session(gateway, chat, key)
    submit = agent_pb.RunRequest(
        session_id=session_id,
        input=chat.messages,
        options=chat.options,
        request_id=key or idempotency_key(request, always=True),
        concurrency=chat.concurrency,
    )
    feed = RunFeed(gateway.mesh, RunCursor(), gateway.settings.follow_timeout_seconds, submit, gateway.door)
    headers = {SESSION_HEADER: session_id}
    # With a key the next try finds it again.
    once = _Once(gateway, "" if chat.session_id or key else session_id, again=bool(key))
    if chat.stream:
        stream = EventStream(
            gateway.hub,
            feed,
            ChatRenderer(ChatChunks(chat.model, include_usage=chat.include_usage)),
            keep=True,
            resumable=False,
            hold=FIRST_TEXT_SECONDS,
            headers=[(name.encode(), value.encode()) for name, value in headers.items()],
            name=f"chat in {session_id}",
        )
        return once.around(stream)
    # A task of the hub's: when the client leaves, the run is still followed to its end.
    reply = await asyncio.shield(gateway.hub.start(_collect(feed, chat.model), name=f"chat in {session_id}"))
    if isinstance(reply, HermeshError):
        raise await once.after(reply)
    if reply.failure is not None:
        raise failure_error(reply.failure)
    return json_response(completion(reply), headers=headers)


class _Once:
    """How a refused call ends: no session made for it alone stays, and it says whether to try again."""

    def __init__(self, gateway: Gateway, session_id: str, *, again: bool) -> None:
        """Takes a session's id, empty for one that stays, and whether sending again repeats nothing."""
        self._gateway = gateway
        self._session_id = session_id
        self._again = again

    async def after(self, error: HermeshError) -> HermeshError:
        """Returns what the client is told; deletes the session if nothing was accepted in it."""
        if self._session_id and error.reason == "OVERLOADED":
            await self._delete()
        return error if self._again else not_again(error)

    async def _delete(self) -> None:
        try:
            await call(
                self._gateway.mesh.sessions.DeleteSession(
                    pb.DeleteSessionRequest(session_id=self._session_id)
                )
            )
        except HermeshError as failed:
            _log.warning("an unused session stays", session_id=self._session_id, error=str(failed))

    def around(self, stream: ASGIApp) -> ASGIApp:
        """Returns the application that serves a stream, and has the last word when it is refused."""

        async def serve(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                await stream(scope, receive, send)
            except HermeshError as error:
                raise await self.after(error) from error

        return serve


async def _new_session(gateway: Gateway, chat: ChatRequest, key: str) -> str:
    answer = await call(
        gateway.mesh.sessions.CreateSession(
            pb.CreateSessionRequest(
                metadata={"source": "chat_completions"},
                user=chat.user,
                # A repeated call must find the session of the first one, in which its run is.
                request_id=f"chat:{key}"[:200] if key else "",
            )
        )
    )
    session_id: str = answer.session.session_id
    return session_id


async def _collect(feed: RunFeed, model: str) -> Reply | HermeshError:
    reply = Reply(model=model)
    try:
        async with aclosing(feed.batches()) as batches:
            async for batch in batches:
                for event in batch:
                    reply.feed(event)
                if reply.failure is not None:
                    # A run that waits for a person has no terminal event to wait for.
                    break
    except FeedLost as lost:
        return UnavailableError(retry_after_ms=lost.after_ms)
    except HermeshError as error:
        return error
    return reply


async def list_models(gateway: Gateway, request: Request) -> ASGIApp:
    """GET /v1/models."""
    known = await gateway.mesh.models()
    return json_response({"object": "list", "data": [_model(model) for model in known]})


async def get_model(gateway: Gateway, request: Request) -> ASGIApp:
    """GET /v1/models/{model}."""
    name = request.path_params["model"]
    for model in await gateway.mesh.models():
        if model.name == name:
            return json_response(_model(model))
    raise OpenAIError(
        404,
        f"The model {name[:100]!r} does not exist.",
        openai_code="model_not_found",
        param="model",
        reason="MODEL_NOT_FOUND",
    )


def _model(model: agent_pb.Model) -> dict[str, Any]:
    return {"id": model.name, "object": "model", "created": 0, "owned_by": model.owned_by or "hermesh"}


endpoints = [
    Endpoint(
        "POST",
        "/v1/chat/completions",
        complete,
        "OpenAI's Chat Completions",
        {200: Answer("A completion, or with `stream: true` its chunks as SSE.", ChatCompletion)},
        body=ChatBody,
        params=(
            IDEMPOTENCY,
            Param("X-Hermesh-Session", "header", "A session to go on with: send only what is new."),
            Param(
                CONCURRENCY_HEADER,
                "header",
                "When that session is busy: enqueue, reject, interrupt or rollback.",
            ),
        ),
        tag="openai",
        errors="openai",
        description="The response's header X-Hermesh-Session names the session, for the native API.",
    ),
    Endpoint(
        "GET",
        "/v1/models",
        list_models,
        "Lists the models that runs may ask for",
        {200: Answer("The default one comes first.", models.ModelList)},
        tag="openai",
        errors="openai",
    ),
    Endpoint(
        "GET",
        "/v1/models/{model:path}",
        get_model,
        "Returns a model",
        {200: Answer("The model.", models.Model)},
        tag="openai",
        errors="openai",
    ),
]
