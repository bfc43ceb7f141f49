"""Sessions and their messages."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from gateway import models
from gateway.clients import call
from gateway.context import Gateway
from gateway.endpoints import (
    Answer,
    Endpoint,
    Param,
    idempotency_key,
    json_response,
    query_int,
    query_text,
    read_model,
    session_id_of,
)
from hermesh.session.v1 import session_service_pb2 as pb

IDEMPOTENCY = Param(
    "Idempotency-Key",
    "header",
    "Makes the request safe to repeat: the same key gets the first answer. At most 200 characters.",
)
PAGE_TOKEN = Param("page_token", "query", "next_page_token of the page before.")


async def create(gateway: Gateway, request: Request) -> ASGIApp:
    """POST /v1/sessions."""
    body = await read_model(gateway, request, models.CreateSession, optional=True)
    answer = await call(
        gateway.mesh.sessions.CreateSession(
            pb.CreateSessionRequest(
                title=body.title,
                metadata=body.metadata,
                agent=body.agent,
                user=body.user,
                # The channel never repeats a create by itself, so that no key is needed without the caller's.
                request_id=idempotency_key(request),
            )
        )
    )
    session = models.session_json(answer.session)
    return json_response(session, 201, {"location": f"/v1/sessions/{session['session_id']}"})


async def list_sessions(gateway: Gateway, request: Request) -> ASGIApp:
    """GET /v1/sessions."""
    answer = await call(
        gateway.mesh.sessions.ListSessions(
            pb.ListSessionsRequest(
                page_size=query_int(request, "page_size", 1, 200),
                page_token=query_text(request, "page_token", 500),
                user=query_text(request, "user", 200),
            )
        )
    )
    return json_response(
        {
            "sessions": [models.session_json(session) for session in answer.sessions],
            "next_page_token": answer.next_page_token,
        }
    )


async def get(gateway: Gateway, request: Request) -> ASGIApp:
    """GET /v1/sessions/{session_id}."""
    answer = await call(
        gateway.mesh.sessions.GetSession(pb.GetSessionRequest(session_id=session_id_of(request)))
    )
    return json_response(models.session_json(answer.session))


async def update(gateway: Gateway, request: Request) -> ASGIApp:
    """PATCH /v1/sessions/{session_id}."""
    session_id = session_id_of(request)
    body = await read_model(gateway, request, models.UpdateSession)
    change = pb.UpdateSessionRequest(session_id=session_id, metadata=body.metadata)
    if body.title is not None:
        change.title = body.title
    answer = await call(gateway.mesh.sessions.UpdateSession(change))
    return json_response(models.session_json(answer.session))


async def delete(gateway: Gateway, request: Request) -> ASGIApp:
    """DELETE /v1/sessions/{session_id}."""
    await call(
        gateway.mesh.sessions.DeleteSession(pb.DeleteSessionRequest(session_id=session_id_of(request)))
    )
    return Response(status_code=204)


async def list_messages(gateway: Gateway, request: Request) -> ASGIApp:
    """GET /v1/sessions/{session_id}/messages."""
    answer = await call(
        gateway.mesh.sessions.ListMessages(
            pb.ListMessagesRequest(
                session_id=session_id_of(request),
                page_size=query_int(request, "page_size", 1, 500),
                page_token=query_text(request, "page_token", 500),
            )
        )
    )
    return json_response(
        {
            "messages": [models.message_json(message) for message in answer.messages],
            "next_page_token": answer.next_page_token,
        }
    )


endpoints = [
    Endpoint(
        "POST",
        "/v1/sessions",
        create,
        "Creates a session",
        {201: Answer("The session.", models.Session)},
        body=models.CreateSession,
        params=(IDEMPOTENCY,),
        tag="sessions",
    ),
    Endpoint(
        "GET",
        "/v1/sessions",
        list_sessions,
        "Lists sessions, last changed first",
        {200: Answer("One page.", models.SessionPage)},
        params=(
            Param("page_size", "query", "1 to 200; 50 if left out.", "integer"),
            PAGE_TOKEN,
            Param("user", "query", "Only sessions of this user."),
        ),
        tag="sessions",
    ),
    Endpoint(
        "GET",
        "/v1/sessions/{session_id}",
        get,
        "Returns a session",
        {200: Answer("The session.", models.Session)},
        tag="sessions",
    ),
    Endpoint(
        "PATCH",
        "/v1/sessions/{session_id}",
        update,
        "Changes a session's title or labels",
        {200: Answer("The session as it is now.", models.Session)},
        body=models.UpdateSession,
        tag="sessions",
    ),
    Endpoint(
        "DELETE",
        "/v1/sessions/{session_id}",
        delete,
        "Deletes a session with all that belongs to it",
        {204: Answer("It is gone; none of its tool calls acts any more.")},
        tag="sessions",
        description=(
            "A run in progress is cancelled, and its tool calls with it. Calls that act are waited for; "
            "where they do not stop within seconds the answer is 409 CALLS_UNDER_WAY, which names them, and "
            "nothing is deleted yet: delete it again."
        ),
    ),
    Endpoint(
        "GET",
        "/v1/sessions/{session_id}/messages",
        list_messages,
        "Lists a session's messages, oldest first",
        {200: Answer("One page.", models.MessagePage)},
        params=(Param("page_size", "query", "1 to 500; 100 if left out.", "integer"), PAGE_TOKEN),
        tag="sessions",
    ),
]
