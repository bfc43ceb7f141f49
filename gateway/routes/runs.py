"""Runs, and the event streams that follow them."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from gateway import models
from gateway.body import MAX_INPUT_BODY
from gateway.clients import call
from gateway.context import Gateway
from gateway.cursor import RunCursor, parse_event_id, parse_seq
from gateway.download import HEADERS as DOWNLOAD_HEADERS
from gateway.download import Download
from gateway.endpoints import (
    Answer,
    Endpoint,
    Param,
    idempotency_key,
    json_response,
    query_bool,
    query_int,
    query_text,
    read_model,
    run_id_of,
    session_id_of,
)
from gateway.follow import RunFeed
from gateway.problems import violation
from gateway.routes.sessions import IDEMPOTENCY, PAGE_TOKEN
from gateway.streams import EventStream
from gateway.watch_stream import WatchStream
from gateway.watches import START, Log, Place
from hermesh.session.v1 import session_service_pb2 as pb
from meshkit import failpoints
from meshkit.context import run_id_var
from meshkit.errors import OutOfRangeError
from meshkit.identity import require_tenant

# How long new input may take to be accepted before the caller gets 504.
ACCEPT_SECONDS = 15.0
EVENTS = "text/event-stream"
# Runs of a session looked at in one go for the one at work.
_PAGE = 50
LAST_EVENT_ID = Param(
    "Last-Event-ID", "header", "The id of the last event received, `<run_id>:<seq>`; goes before the query."
)

_before_submit = failpoints.point("gateway.submit.before")
_after_submit = failpoints.point("gateway.submit.after")


async def create(gateway: Gateway, request: Request) -> ASGIApp:
    """POST /v1/sessions/{session_id}/runs."""
    session_id = session_id_of(request)
    body = await read_model(gateway, request, models.CreateRun, limit=MAX_INPUT_BODY)
    _before_submit()
    if body.stream:
        gateway.hub.check_room()
        gateway.door.check()
    model = await gateway.mesh.check_model(body.chosen_model)
    if body.stream:
        submit = body.run_request(session_id, idempotency_key(request, always=True))
        submit.options.model = model
        patience = gateway.settings.follow_timeout_seconds
        feed = RunFeed(gateway.mesh, RunCursor(), patience, submit, gateway.door)
        return EventStream(
            gateway.hub, feed, keep=True, hold=ACCEPT_SECONDS, hold_fails=True, name=f"run in {session_id}"
        )
    order = body.submit_request(session_id, idempotency_key(request))
    order.options.model = model
    answer = await call(gateway.mesh.sessions.SubmitRun(order))
    _after_submit()
    run = models.run_json(answer.run)
    run_id_var.set(answer.run.run_id)
    return json_response(run, 202, {"location": f"/v1/runs/{run['run_id']}"})


async def list_runs(gateway: Gateway, request: Request) -> ASGIApp:
    """GET /v1/sessions/{session_id}/runs."""
    answer = await call(
        gateway.mesh.sessions.ListRuns(
            pb.ListRunsRequest(
                session_id=session_id_of(request),
                page_size=query_int(request, "page_size", 1, 200),
                page_token=query_text(request, "page_token", 500),
            )
        )
    )
    return json_response(
        {"runs": [models.run_json(run) for run in answer.runs], "next_page_token": answer.next_page_token}
    )


async def get(gateway: Gateway, request: Request) -> ASGIApp:
    """GET /v1/runs/{run_id}."""
    answer = await call(gateway.mesh.sessions.GetRun(pb.GetRunRequest(run_id=run_id_of(request))))
    return json_response(models.run_json(answer.run, answer.pending_actions))


async def cancel(gateway: Gateway, request: Request) -> ASGIApp:
    """POST /v1/runs/{run_id}/cancel."""
    run_id = run_id_of(request)
    body = await read_model(gateway, request, models.CancelRun, optional=True)
    answer = await call(
        gateway.mesh.sessions.CancelRun(pb.CancelRunRequest(run_id=run_id, reason=body.reason))
    )
    return json_response(models.run_json(answer.run), 202)


async def resolve(gateway: Gateway, request: Request) -> ASGIApp:
    """POST /v1/runs/{run_id}/actions/{call_id}."""
    run_id = run_id_of(request)
    call_id = _call_id_of(request)
    body = await read_model(gateway, request, models.ResolveAction)
    answer = await call(
        gateway.mesh.sessions.ResolveAction(
            pb.ResolveActionRequest(
                run_id=run_id,
                call_id=call_id,
                decision=models.decision_proto(body.decision),
                content=body.content,
                request_id=idempotency_key(request),
            )
        )
    )
    return json_response(models.run_json(answer.run))


async def tool_content(gateway: Gateway, request: Request) -> ASGIApp:
    """GET /v1/runs/{run_id}/tool-calls/{call_id}/content."""
    order = pb.GetRunToolCallRequest(run_id=run_id_of(request), call_id=_call_id_of(request))
    found = (await call(gateway.mesh.sessions.GetRunToolCall(order))).tool_call
    if found.content_ref:
        return Download(gateway.mesh.tools, found, gateway.settings.write_timeout_seconds)
    headers = {name.decode(): value.decode() for name, value in DOWNLOAD_HEADERS}
    return Response(found.content, headers=headers)


def _call_id_of(request: Request) -> str:
    call_id: str = request.path_params["call_id"]
    if not 1 <= len(call_id) <= 100 or "\0" in call_id:
        raise violation("call_id", "must have 1 to 100 characters, and no NUL")
    return call_id


async def list_actions(gateway: Gateway, request: Request) -> ASGIApp:
    """GET /v1/actions."""
    answer = await call(
        gateway.mesh.sessions.ListPendingActions(
            pb.ListPendingActionsRequest(
                page_size=query_int(request, "page_size", 1, 200),
                page_token=query_text(request, "page_token", 500),
            )
        )
    )
    return json_response(
        {
            "actions": [models.waiting_json(item) for item in answer.actions],
            "next_page_token": answer.next_page_token,
        }
    )


async def run_events(gateway: Gateway, request: Request) -> ASGIApp:
    """GET /v1/runs/{run_id}/events."""
    run_id = run_id_of(request)
    after_seq = _after_seq(request, run_id)
    # Asked first: a wrong id or cursor gets its status, and a quiet run's stream opens at once.
    run = (await call(gateway.mesh.sessions.GetRun(pb.GetRunRequest(run_id=run_id)))).run
    if models.is_finished(run) and after_seq > run.last_seq:
        raise OutOfRangeError(
            "CURSOR_PAST_END",
            f"the run's last event has seq {run.last_seq}",
            metadata={"last_seq": str(run.last_seq)},
        )
    if models.is_finished(run) and after_seq == run.last_seq:
        # Everything was delivered: 204 is what stops an EventSource from coming back.
        return Response(status_code=204)
    return WatchStream(gateway.hub, (str(require_tenant()), "run", run_id), (run_id, after_seq))


def _after_seq(request: Request, run_id: str) -> int:
    last = request.headers.get("last-event-id", "").strip()
    if last:
        try:
            of_run, seq = parse_event_id(last)
        except ValueError as error:
            raise violation("Last-Event-ID", str(error)) from None
        if of_run != run_id:
            raise violation("Last-Event-ID", "names another run")
        return seq
    try:
        return parse_seq(request.query_params.get("after_seq") or "0")
    except ValueError as error:
        raise violation("after_seq", str(error)) from None


async def session_events(gateway: Gateway, request: Request) -> ASGIApp:
    """GET /v1/sessions/{session_id}/events."""
    session_id = session_id_of(request)
    run_id, seq = session_after(
        request.headers.get("last-event-id", "").strip(), request.query_params.get("after", "")
    )
    only_new = query_bool(request, "only_new")
    return WatchStream(gateway.hub, *await session_place(gateway, session_id, run_id, seq, only_new=only_new))


def session_after(last_event_id: str, after: str) -> tuple[str, int]:
    """Returns a session's cursor from the header or the query; ("", 0) without either.

    Raises:
        InvalidArgumentError: It has another form than `<run_id>:<seq>`.
    """
    for name, text in (("Last-Event-ID", last_event_id), ("after", after)):
        if text:
            try:
                return parse_event_id(text)
            except ValueError as error:
                raise violation(name, str(error)) from None
    return "", 0


async def session_place(
    gateway: Gateway, session_id: str, run_id: str, seq: int, *, only_new: bool
) -> tuple[Log, Place]:
    """Returns a place in a session's log, after it was checked that the session exists.

    Args:
        gateway: The services.
        session_id: The session.
        run_id: The run of the last event the reader has; empty without one.
        seq: Its seq.
        only_new: Without a cursor, start with the next event instead of the session's first.
    """
    log = (str(require_tenant()), "session", session_id)
    if only_new and not run_id:
        return log, await _now(gateway, session_id)
    await call(gateway.mesh.sessions.GetSession(pb.GetSessionRequest(session_id=session_id)))
    return log, (run_id, seq)


async def _now(gateway: Gateway, session_id: str) -> Place:
    """Returns the place after the last event that a session has.

    It is found once: a watch that begins again, on another replica, must not begin with what is new by then.
    """
    newest: Place = START
    at_work: Place | None = None
    token = ""
    while True:
        request = pb.ListRunsRequest(session_id=session_id, page_size=_PAGE, page_token=token)
        page = await call(gateway.mesh.sessions.ListRuns(request))
        for run in page.runs:
            place = (run.run_id, run.last_seq)
            if newest == START:
                newest = place
            if not models.is_finished(run):
                at_work = place
        token = page.next_page_token
        # Runs wait in line behind the one at work, and one that waits may be cancelled: further back than a
        # page whose last run has ended nothing is at work.
        if not token or models.is_finished(page.runs[-1]):
            return at_work or newest


endpoints = [
    Endpoint(
        "POST",
        "/v1/sessions/{session_id}/runs",
        create,
        "Sends input and streams the reply, or only submits it",
        {
            200: Answer("With `stream: true`: the run's events, to the terminal one.", media_type=EVENTS),
            202: Answer("The run was accepted.", models.Run),
        },
        body=models.CreateRun,
        params=(IDEMPOTENCY,),
        tag="runs",
        description=(
            "A client that leaves does not stop the run. It can come back to GET /v1/runs/{run_id}/events "
            "with Last-Event-ID, on any gateway."
        ),
    ),
    Endpoint(
        "GET",
        "/v1/sessions/{session_id}/runs",
        list_runs,
        "Lists a session's runs, newest first",
        {200: Answer("One page.", models.RunPage)},
        params=(Param("page_size", "query", "1 to 200; 50 if left out.", "integer"), PAGE_TOKEN),
        tag="runs",
    ),
    Endpoint(
        "GET",
        "/v1/sessions/{session_id}/events",
        session_events,
        "Streams a session's events, run after run",
        {200: Answer("What is stored after the cursor, then live, without end.", media_type=EVENTS)},
        params=(
            LAST_EVENT_ID,
            Param("after", "query", "A cursor, `<run_id>:<seq>`."),
            Param("only_new", "query", "Start with the next event instead of the first one.", "boolean"),
        ),
        tag="events",
    ),
    Endpoint(
        "GET",
        "/v1/runs/{run_id}",
        get,
        "Returns a run",
        {200: Answer("The run.", models.Run)},
        tag="runs",
    ),
    Endpoint(
        "POST",
        "/v1/runs/{run_id}/cancel",
        cancel,
        "Asks for a run to be cancelled",
        {202: Answer("The run as it is now; its terminal event follows.", models.Run)},
        body=models.CancelRun,
        tag="runs",
    ),
    Endpoint(
        "GET",
        "/v1/runs/{run_id}/tool-calls/{call_id}/content",
        tool_content,
        "Returns the whole result of a tool call",
        {200: Answer("What the tool returned, or its error's text.", media_type="text/plain")},
        tag="runs",
        description="Events and messages hold the first 2 KiB of a result above 64 KiB; this is all of it.",
    ),
    Endpoint(
        "GET",
        "/v1/actions",
        list_actions,
        "Lists the tool calls that wait for a person, in all sessions, the oldest run first",
        {200: Answer("One page.", models.ActionPage)},
        params=(Param("page_size", "query", "1 to 200; 50 if left out.", "integer"), PAGE_TOKEN),
        tag="runs",
    ),
    Endpoint(
        "POST",
        "/v1/runs/{run_id}/actions/{call_id}",
        resolve,
        "Settles a tool call that waits for a person",
        {200: Answer("The run as it is now.", models.Run)},
        body=models.ResolveAction,
        params=(IDEMPOTENCY,),
        tag="runs",
    ),
    Endpoint(
        "GET",
        "/v1/runs/{run_id}/events",
        run_events,
        "Streams a run's events",
        {
            200: Answer(
                "What is stored after the cursor, then live, to the terminal event.", media_type=EVENTS
            ),
            204: Answer("The terminal event was the last one received: there is nothing more."),
        },
        params=(
            LAST_EVENT_ID,
            Param("after_seq", "query", "Events with a larger seq are sent; 0 if left out.", "integer"),
        ),
        tag="events",
    ),
]
