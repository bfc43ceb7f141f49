"""Sessions and runs over HTTP. The mesh behind is the FAKE of tests/fakes/mesh.py."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any
from uuid import uuid4

import httpx
import orjson
import pytest

from gateway.body import MAX_BODY, MAX_INPUT, MAX_INPUT_BODY
from gateway.models import message_json
from hermesh.session.v1 import resources_pb2 as resources
from meshkit.errors import (
    FailedPreconditionError,
    ResourceExhaustedError,
    UnavailableError,
)
from tests.fakes.mesh import OTHER_KEY, TENANT, FakeRun, echo


def problem(answer: httpx.Response, status: int, reason: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert (body["status"], body["reason"]) == (status, reason)
    assert body["type"].endswith(reason.lower().replace("_", "-"))
    assert body["title"]
    assert body["request_id"] == answer.headers["x-request-id"]
    return body


async def new_session(served: Any, **body: Any) -> str:
    answer = await served.client.post("/v1/sessions", json=body)
    assert answer.status_code == 201
    return str(answer.json()["session_id"])


def parse(text: str) -> list[dict[str, Any]]:
    """The events of a stream; the transport's own frames and comments are left out."""
    return [
        json.loads(line[6:])
        for frame in text.split("\n\n")
        if frame.startswith("id: ")
        for line in frame.split("\n")
        if line.startswith("data: ")
    ]


async def run(served: Any, session_id: str, text: str = "a b c", **more: Any) -> list[dict[str, Any]]:
    answer = await served.client.post(
        f"/v1/sessions/{session_id}/runs", json={"input": text, "stream": True, **more}
    )
    assert answer.status_code == 200, answer.text
    return parse(answer.text)


async def test_a_session_lives_its_life(served: Any) -> None:
    made = await served.client.post(
        "/v1/sessions", json={"title": "first", "metadata": {"a": "b"}, "user": "ada"}
    )
    session = made.json()
    assert made.headers["location"] == f"/v1/sessions/{session['session_id']}"
    assert session["metadata"] == {"a": "b"}
    assert session["active_run_id"] is None
    url = f"/v1/sessions/{session['session_id']}"
    assert (await served.client.get(url)).json()["title"] == "first"
    changed = await served.client.patch(url, json={"title": "second"})
    assert changed.json()["title"] == "second"
    assert [s["title"] for s in (await served.client.get("/v1/sessions")).json()["sessions"]] == ["second"]
    assert (await served.client.delete(url)).status_code == 204
    problem(await served.client.get(url), 404, "SESSION_NOT_FOUND")


async def test_sessions_come_in_pages(served: Any) -> None:
    for number in range(5):
        await new_session(served, title=str(number))
    first = (await served.client.get("/v1/sessions?page_size=3")).json()
    assert [s["title"] for s in first["sessions"]] == ["4", "3", "2"]
    rest = await served.client.get(f"/v1/sessions?page_size=3&page_token={first['next_page_token']}")
    assert [s["title"] for s in rest.json()["sessions"]] == ["1", "0"]
    assert rest.json()["next_page_token"] == ""


async def test_an_empty_body_makes_a_session(served: Any) -> None:
    assert (await served.client.post("/v1/sessions")).status_code == 201


async def test_a_run_streams_its_whole_log(served: Any) -> None:
    session_id = await new_session(served)
    events = await run(served, session_id)
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert events[0]["type"] == "run.created"
    assert events[-1]["type"] == "run.completed"
    messages = (await served.client.get(f"/v1/sessions/{session_id}/messages")).json()["messages"]
    assert [(m["role"], m["content"]) for m in messages] == [("user", "a b c"), ("assistant", "a b c ")]


async def test_all_events_of_a_grpc_frame_go_in_one_write(served: Any) -> None:
    served.mesh.frame_size = 50
    session_id = await new_session(served)
    submitted = await served.client.post(f"/v1/sessions/{session_id}/runs", json={"input": "a b c d"})
    await served.mesh.until(lambda: served.mesh.runs[submitted.json()["run_id"]].log.finished)
    parts = []
    url = f"/v1/runs/{submitted.json()['run_id']}/events"
    async with served.client.stream("GET", url) as answer:
        async for part in answer.aiter_raw():
            parts.append(part)
    assert len(parts) == 1
    assert len(parse(parts[0].decode())) == 10


async def test_messages_and_options_reach_the_run(served: Any) -> None:
    session_id = await new_session(served)
    body = {
        "input": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
        "stream": True,
        "options": {"model": "other", "temperature": 0, "seed": 3, "memory": False, "stop": ["x"]},
    }
    await served.client.post(f"/v1/sessions/{session_id}/runs", json=body)
    made = served.mesh.sessions[session_id].runs[0]
    assert made.input == [("system", "s"), ("user", "u")]
    assert made.options.model == "other"
    assert made.options.HasField("temperature")
    assert made.options.temperature == 0
    assert made.options.HasField("memory")
    assert not made.options.memory
    assert list(made.options.stop) == ["x"]


async def test_a_run_that_is_only_submitted_answers_202(served: Any) -> None:
    session_id = await new_session(served)
    answer = await served.client.post(f"/v1/sessions/{session_id}/runs", json={"input": "a b"})
    assert answer.status_code == 202
    made = answer.json()
    assert answer.headers["location"] == f"/v1/runs/{made['run_id']}"
    events = parse((await served.client.get(f"/v1/runs/{made['run_id']}/events")).text)
    assert events[-1]["type"] == "run.completed"
    assert (await served.client.get(f"/v1/runs/{made['run_id']}")).json()["status"] == "completed"
    listed = (await served.client.get(f"/v1/sessions/{session_id}/runs")).json()["runs"]
    assert [item["run_id"] for item in listed] == [made["run_id"]]


@pytest.mark.parametrize("stream", [True, False])
async def test_an_idempotency_key_gives_one_run(served: Any, stream: bool) -> None:
    session_id = await new_session(served)
    url, headers = f"/v1/sessions/{session_id}/runs", {"Idempotency-Key": "k1"}
    body = {"input": "a", "stream": stream}
    first = await served.client.post(url, json=body, headers=headers)
    second = await served.client.post(url, json=body, headers=headers)
    if stream:
        assert first.text == second.text
    else:
        assert first.json()["run_id"] == second.json()["run_id"]
    assert len(served.mesh.runs) == 1
    other = await served.client.post(url, json={"input": "b", "stream": stream}, headers=headers)
    problem(other, 409, "REQUEST_ID_REUSED")


async def test_an_idempotency_key_gives_one_session(served: Any) -> None:
    headers = {"Idempotency-Key": "k"}
    made = [(await served.client.post("/v1/sessions", json={}, headers=headers)).json() for _ in range(2)]
    assert made[0]["session_id"] == made[1]["session_id"]
    problem(
        await served.client.post("/v1/sessions", json={}, headers={"Idempotency-Key": "k" * 201}),
        400,
        "INVALID_ARGUMENT",
    )


async def test_after_the_terminal_event_there_is_nothing_more(served: Any) -> None:
    events = await run(served, await new_session(served))
    run_id, last = events[-1]["run_id"], events[-1]["seq"]
    url = f"/v1/runs/{run_id}/events"
    headers = {"Last-Event-ID": f"{run_id}:{last}"}
    assert (await served.client.get(url, headers=headers)).status_code == 204
    assert (await served.client.get(f"{url}?after_seq={last}")).status_code == 204
    assert parse((await served.client.get(f"{url}?after_seq={last - 2}")).text) == events[-2:]
    problem(await served.client.get(f"{url}?after_seq={last + 1}"), 416, "CURSOR_PAST_END")


async def test_a_bad_cursor_is_named(served: Any) -> None:
    events = await run(served, await new_session(served))
    url = f"/v1/runs/{events[0]['run_id']}/events"
    for cursor in ("x", f"{uuid4()}:1", f"{events[0]['run_id']}:-1"):
        body = problem(
            await served.client.get(url, headers={"Last-Event-ID": cursor}), 400, "INVALID_ARGUMENT"
        )
        assert body["violations"][0]["field"] == "Last-Event-ID"
    problem(await served.client.get(f"{url}?after_seq=x"), 400, "INVALID_ARGUMENT")


async def test_a_session_streams_run_after_run(served: Any) -> None:
    session_id = await new_session(served)
    first = await run(served, session_id, "a")
    got: list[dict[str, Any]] = []
    async with served.client.stream("GET", f"/v1/sessions/{session_id}/events") as answer:
        second = await run(served, session_id, "b")
        text = ""
        async for part in answer.aiter_text():
            text += part
            got = parse(text)
            if len(got) == len(first) + len(second):
                break
    assert got == first + second


async def test_a_session_resumes_after_a_cursor(served: Any) -> None:
    session_id = await new_session(served)
    first, second = await run(served, session_id, "a"), await run(served, session_id, "b")
    headers = {"Last-Event-ID": f"{first[2]['run_id']}:{first[2]['seq']}"}
    async with served.client.stream("GET", f"/v1/sessions/{session_id}/events", headers=headers) as answer:
        text = ""
        async for part in answer.aiter_text():
            text += part
            if len(parse(text)) >= len(first) - 3 + len(second):
                break
    assert parse(text) == first[3:] + second


async def test_a_cancel_ends_the_run(served: Any) -> None:
    go = asyncio.Event()

    async def slow(made: FakeRun) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        yield "text.delta", {"text": "a"}
        await made.cancelled.wait()
        go.set()
        yield "run.cancelled", {"reason": "enough"}

    served.mesh.script = slow
    session_id = await new_session(served)
    made = (await served.client.post(f"/v1/sessions/{session_id}/runs", json={"input": "x"})).json()
    answer = await served.client.post(f"/v1/runs/{made['run_id']}/cancel", json={"reason": "enough"})
    assert answer.status_code == 202
    assert answer.json()["cancel_requested"]
    events = parse((await served.client.get(f"/v1/runs/{made['run_id']}/events")).text)
    assert events[-1]["type"] == "run.cancelled"
    assert (await served.client.post(f"/v1/runs/{made['run_id']}/cancel")).status_code == 202


async def test_a_tool_call_that_waits_is_settled(served: Any) -> None:
    async def asks(made: FakeRun) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        call_id = f"{made.run_id}:1:0"
        made.pending.append(
            resources.ToolCall(
                call_id=call_id,
                run_id=made.run_id,
                session_id=session_id,
                name="send_mail",
                arguments='{"to":"ada"}',
                effect=3,
                state=5,
                quiet_in_ms=1500,
            )
        )
        yield "action.required", {"call_id": call_id, "kind": "unknown", "name": "send_mail", "arguments": {}}
        await made.resolved.wait()
        yield "run.completed", {"message_id": "", "finish_reason": "stop"}

    served.mesh.script = asks
    session_id = await new_session(served)
    made = (await served.client.post(f"/v1/sessions/{session_id}/runs", json={"input": "x"})).json()
    url = f"/v1/runs/{made['run_id']}"
    await served.mesh.until(lambda: bool(served.mesh.runs[made["run_id"]].pending))
    waiting = (await served.client.get(url)).json()
    assert waiting["status"] == "requires_action"
    assert waiting["pending_actions"] == [
        {
            "call_id": f"{made['run_id']}:1:0",
            "kind": "unknown",
            "name": "send_mail",
            "arguments": {"to": "ada"},
            "arguments_text": '{"to":"ada"}',
            "effect": "non_idempotent",
            "state": "unknown",
            "may_act_ms": 1500,
        }
    ]
    listed = (await served.client.get("/v1/actions")).json()
    assert listed["next_page_token"] == ""
    where = {"run_id": made["run_id"], "session_id": session_id, "waiting_since_ms": 7}
    assert listed["actions"] == [waiting["pending_actions"][0] | where]
    foreign = {"authorization": f"Bearer {OTHER_KEY}"}
    assert (await served.client.get("/v1/actions", headers=foreign)).json()["actions"] == []
    problem(await served.client.get("/v1/actions?page_size=0"), 400, "INVALID_ARGUMENT")
    body = {"decision": "completed", "content": "it was sent"}
    action = f"{url}/actions/{made['run_id']}:1:0"
    assert (await served.client.post(action, json=body)).status_code == 200
    assert served.mesh.runs[made["run_id"]].decisions == [(f"{made['run_id']}:1:0", 1, "it was sent")]
    problem(await served.client.post(action, json={"decision": "maybe"}), 400, "INVALID_ARGUMENT")


HUGE = '{"id": 18446744073709551616, "n":-1e2, "x":0.1000000000000000055511151, "a":1,"a":2}'
DEEP = '{"a":' * 249 + "1" + "}" * 249


@pytest.mark.parametrize("arguments", [HUGE, DEEP])
async def test_the_arguments_of_a_call_are_served_as_the_model_wrote_them(
    served: Any, arguments: str
) -> None:
    async def asks(made: FakeRun) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        made.pending.append(
            resources.ToolCall(
                call_id=f"{made.run_id}:1:0",
                run_id=made.run_id,
                session_id=session_id,
                name="pay",
                arguments=arguments,
                effect=3,
                state=1,
                needs_approval=True,
            )
        )
        yield "step.started", {"step": 1}
        await made.resolved.wait()
        yield "run.completed", {"message_id": "", "finish_reason": "stop"}

    served.mesh.script = asks
    session_id = await new_session(served)
    made = (await served.client.post(f"/v1/sessions/{session_id}/runs", json={"input": "x"})).json()
    await served.mesh.until(lambda: bool(served.mesh.runs[made["run_id"]].pending))
    for path in (f"/v1/runs/{made['run_id']}", "/v1/actions"):
        answer = await served.client.get(path)
        assert answer.status_code == 200, answer.text
        assert f'"arguments":{arguments}' in answer.text
        found = answer.json()
        [action] = found.get("pending_actions") or found["actions"]
        assert action["arguments_text"] == arguments
    body = {"decision": "approve"}
    answer = await served.client.post(f"/v1/runs/{made['run_id']}/actions/{made['run_id']}:1:0", json=body)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("arguments", [HUGE, DEEP])
def test_a_message_has_its_calls_as_the_model_wrote_them(arguments: str) -> None:
    stored = f'[{{"call_id":"r:1:0","name":"pay","arguments":{arguments},"provider":{{"id":"x"}}}}]'
    message = resources.Message(role="assistant", tool_calls=stored)
    shown = orjson.dumps(message_json(message)).decode()
    assert f'"tool_calls":[{{"call_id":"r:1:0","name":"pay","arguments":{arguments}}}]' in shown


@pytest.mark.parametrize("stored", ["", "[]", "oops", "[1]", '[{"name":"x"}]'])
def test_a_message_whose_calls_cannot_be_read_has_none(stored: str) -> None:
    assert message_json(resources.Message(role="assistant", tool_calls=stored))["tool_calls"] == []


async def test_a_tool_calls_whole_result_is_served(served: Any) -> None:
    session_id = await new_session(served)
    made = (await served.client.post(f"/v1/sessions/{session_id}/runs", json={"input": "x"})).json()
    call_id, ref = f"{made['run_id']}:1:0", "sha256:" + "a" * 64
    call = resources.ToolCall(call_id=call_id, content="the beginning", state=3)
    served.mesh.runs[made["run_id"]].pending.append(call)
    url = f"/v1/runs/{made['run_id']}/tool-calls/{call_id}/content"
    small = await served.client.get(url)
    assert (small.text, small.headers["content-type"]) == ("the beginning", "text/plain; charset=utf-8")
    call.content_ref = ref
    problem(await served.client.get(url), 404, "TOOL_CALL_NOT_FOUND")
    pieces = [b"<script>" * 30_000, "é".encode() * 100_000]
    served.mesh.results[str(TENANT), ref] = pieces
    large = await served.client.get(url)
    assert large.content == b"".join(pieces)
    for headers in (small.headers, large.headers):
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["content-disposition"] == "attachment"
    served.mesh.results[str(TENANT), ref] = [pieces[0], b"", pieces[1]]
    with pytest.raises(httpx.TransportError):
        await served.client.get(url)
    foreign = {"authorization": f"Bearer {OTHER_KEY}"}
    problem(await served.client.get(url, headers=foreign), 404, "RUN_NOT_FOUND")
    problem(await served.client.get(url.replace(":1:0", ":1:1")), 404, "TOOL_CALL_NOT_FOUND")


@pytest.mark.parametrize(
    ("method", "path", "reason"),
    [
        ("GET", "/v1/sessions/{id}", "SESSION_NOT_FOUND"),
        ("PATCH", "/v1/sessions/{id}", "SESSION_NOT_FOUND"),
        ("DELETE", "/v1/sessions/{id}", "SESSION_NOT_FOUND"),
        ("GET", "/v1/sessions/{id}/messages", "SESSION_NOT_FOUND"),
        ("GET", "/v1/sessions/{id}/events", "SESSION_NOT_FOUND"),
        ("GET", "/v1/sessions/{id}/runs", "SESSION_NOT_FOUND"),
        ("POST", "/v1/sessions/{id}/runs", "SESSION_NOT_FOUND"),
        ("GET", "/v1/runs/{id}", "RUN_NOT_FOUND"),
        ("GET", "/v1/runs/{id}/events", "RUN_NOT_FOUND"),
        ("POST", "/v1/runs/{id}/cancel", "RUN_NOT_FOUND"),
        ("POST", "/v1/runs/{id}/actions/c", "RUN_NOT_FOUND"),
    ],
)
async def test_what_is_unknown_or_anothers_is_not_found(
    served: Any, method: str, path: str, reason: str
) -> None:
    mine = await new_session(served)
    made = (await served.client.post(f"/v1/sessions/{mine}/runs", json={"input": "x"})).json()["run_id"]
    foreign = {"authorization": f"Bearer {OTHER_KEY}"}
    body = {"POST": {"input": "x", "stream": True}, "PATCH": {"title": "x"}}.get(method)
    if "cancel" in path:
        body = {}
    elif "actions" in path:
        body = {"decision": "retry"}
    for name, headers in (
        (str(uuid4()), {}),
        ("nonsense", {}),
        (made if reason.startswith("RUN") else mine, foreign),
    ):
        answer = await served.client.request(method, path.format(id=name), json=body, headers=headers)
        problem(answer, 404, reason)


async def test_an_unknown_model_is_not_found(served: Any) -> None:
    session_id = await new_session(served)
    for body in ({"model": "no-such"}, {"options": {"model": "no-such"}}):
        answer = await served.client.post(f"/v1/sessions/{session_id}/runs", json={"input": "x", **body})
        problem(answer, 404, "MODEL_NOT_FOUND")
    assert (await run(served, session_id, model="default"))[-1]["type"] == "run.completed"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b'{"input": "\xc3\x28"}',
        b'{"input":"a\\u0000b"}',
        b"NaN",
    ],
)
async def test_a_body_that_is_no_json_object_in_utf8_is_refused(served: Any, content: bytes) -> None:
    session_id = await new_session(served)
    answer = await served.client.post(
        f"/v1/sessions/{session_id}/runs", content=content, headers={"content-type": "application/json"}
    )
    problem(answer, 400, "INVALID_ARGUMENT")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "input"),
        ({"input": 7}, "input"),
        ({"input": None}, "input"),
        ({"input": [{"role": "wizard", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": "x", "stream": "yes"}, "stream"),
        ({"input": "x", "streem": True}, "streem"),
        ({"input": "x", "options": {"temperature": 3}}, "options.temperature"),
        ({"input": "x", "options": {"temperature": "1"}}, "options.temperature"),
        ({"input": "x", "concurrency": "fight"}, "concurrency"),
    ],
)
async def test_a_wrong_field_is_named(served: Any, body: dict[str, Any], field: str) -> None:
    session_id = await new_session(served)
    answer = await served.client.post(f"/v1/sessions/{session_id}/runs", json=body)
    violations = problem(answer, 400, "INVALID_ARGUMENT")["violations"]
    assert field in [item["field"] for item in violations]
    assert not served.mesh.runs


@pytest.mark.parametrize("text", ["", "   ", []])
async def test_empty_input_is_refused(served: Any, text: Any) -> None:
    session_id = await new_session(served)
    answer = await served.client.post(f"/v1/sessions/{session_id}/runs", json={"input": text})
    problem(answer, 400, "INVALID_ARGUMENT")


async def test_a_body_over_the_limit_is_refused_by_its_header_and_while_it_arrives(
    served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    session_id = await new_session(served)
    url = f"/v1/sessions/{session_id}/runs"
    answer = await served.client.post(url, json={"input": "x" * MAX_INPUT_BODY})
    assert problem(answer, 413, "INPUT_TOO_LARGE")["metadata"] == {"limit_bytes": str(MAX_INPUT_BODY)}
    answer = await served.client.post("/v1/sessions", json={"title": "x" * MAX_BODY})
    assert problem(answer, 413, "INPUT_TOO_LARGE")["metadata"] == {"limit_bytes": str(MAX_BODY)}

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(MAX_INPUT_BODY // 65536 + 1):
            yield b"x" * 65536

    # Its last byte is the one too many: nothing more comes that could be waited for.
    monkeypatch.setattr("gateway.body._DISCARD_SECONDS", 3600)
    problem(await served.client.post(url, content=chunks()), 413, "INPUT_TOO_LARGE")


@pytest.mark.parametrize("ascii_only", [True, False])
async def test_input_is_measured_by_its_text_however_json_spells_it(served: Any, ascii_only: bool) -> None:
    url = f"/v1/sessions/{await new_session(served)}/runs"
    whole = "\u00e9" * (MAX_INPUT // 2)
    for text, status in ((whole, 202), (whole + "x", 413)):
        for value in (text, [{"role": "user", "content": text[:9]}, {"role": "user", "content": text[9:]}]):
            body = json.dumps({"input": value}, ensure_ascii=ascii_only).encode()
            answer = await served.client.post(url, content=body)
            assert answer.status_code == status, answer.text[:500]
    assert problem(answer, 413, "INPUT_TOO_LARGE")["metadata"]["limit_bytes"] == str(MAX_INPUT)


async def test_a_body_that_does_not_arrive_is_given_up(start: Callable[..., Any]) -> None:
    served = await start(body_timeout_seconds=0.1)
    reader, writer = await asyncio.open_connection(*served.host.split(":"))
    head = (
        f"POST /v1/sessions HTTP/1.1\r\nHost: {served.host}\r\nContent-Length: 10\r\n"
        f"Authorization: {served.client.headers['authorization']}\r\n\r\n{{"
    )
    writer.write(head.encode())
    async with asyncio.timeout(5):
        answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    assert b"408 Request Timeout" in answer.split(b"\r\n")[0]


@pytest.mark.parametrize(
    ("error", "status", "retry"),
    [
        (UnavailableError("DATABASE_UNAVAILABLE", "later", retry_after_ms=1500), 503, ("2", "1500")),
        (ResourceExhaustedError("QUOTA_EXCEEDED", "too much", retry_after_ms=200), 429, ("1", "200")),
        (FailedPreconditionError("SESSION_BUSY", "busy"), 409, None),
    ],
)
async def test_an_error_of_the_mesh_keeps_its_reason(
    served: Any, error: Any, status: int, retry: tuple[str, str] | None
) -> None:
    session_id = await new_session(served)
    served.mesh.unary_error = error
    for stream in (True, False):
        if stream:
            served.mesh.run_cuts = [(-1, error)] * 10
        answer = await served.client.post(
            f"/v1/sessions/{session_id}/runs", json={"input": "x", "stream": stream}
        )
        body = problem(answer, status, error.reason)
        assert body["detail"] == error.message
        if retry:
            assert (answer.headers["retry-after"], answer.headers["retry-after-ms"]) == retry
        else:
            assert "retry-after" not in answer.headers


async def test_paths_and_methods_that_are_not_served(served: Any) -> None:
    problem(await served.client.get("/v1/nothing"), 404, "UNIMPLEMENTED")
    answer = await served.client.put("/v1/sessions", json={})
    problem(answer, 405, "UNIMPLEMENTED")
    assert answer.headers["allow"] == "GET, HEAD, OPTIONS, POST"


async def test_a_request_id_is_kept_or_made(served: Any) -> None:
    kept = await served.client.get("/v1/sessions", headers={"x-request-id": "abc-1"})
    assert kept.headers["x-request-id"] == "abc-1"
    assert served.mesh.metadata[-1]["x-request-id"] == "abc-1"
    made = await served.client.get("/v1/sessions", headers={"x-request-id": "bad id {}"})
    assert made.headers["x-request-id"] != "bad id {}"
    assert served.mesh.metadata[-1]["x-request-id"] == made.headers["x-request-id"]


async def test_the_trace_goes_on_into_the_mesh(served: Any) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    session_id = await new_session(served)
    served.mesh.metadata.clear()
    headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-01"}
    body = {"input": "x", "stream": True}
    await served.client.post(f"/v1/sessions/{session_id}/runs", json=body, headers=headers)
    assert {entry["traceparent"].split("-")[1] for entry in served.mesh.metadata} == {trace}


async def test_the_mesh_is_told_the_tenant_and_never_the_key(served: Any) -> None:
    await run(served, await new_session(served))
    calls = [
        entry
        for name, entry in zip(served.mesh.calls, served.mesh.metadata, strict=True)
        if name not in ("Authenticate", "ListModels")
    ]
    assert {entry["x-hermesh-tenant"] for entry in calls} == {"00000000-0000-7000-8000-000000000001"}
    assert all("authorization" not in entry for entry in served.mesh.metadata)


async def test_probes_answer_without_a_key(served: Any) -> None:
    async with httpx.AsyncClient(base_url=served.url) as anyone:
        assert (await anyone.get("/health")).json() == {"status": "ok"}
        assert (await anyone.get("/ready")).json()["status"] == "ready"
        assert "python_info" in (await anyone.get("/metrics")).text
        assert (await anyone.head("/health")).status_code == 200
        served.mesh.unary_error = UnavailableError("DATABASE_UNAVAILABLE", "later")
        degraded = await anyone.get("/ready")
        assert (degraded.status_code, degraded.json()["status"]) == (200, "degraded")
        assert degraded.json()["checks"]["session"] == "DATABASE_UNAVAILABLE"
        served.gateway.hub.leaving = True
        leaving = await anyone.get("/ready")
        assert (leaving.status_code, leaving.json()["status"]) == (503, "draining")
        # No balancer keeps the connection for another request.
        assert leaving.headers["connection"] == "close"
        assert (await anyone.get("/health")).status_code == 503


async def test_models_are_listed_in_openais_shape(served: Any) -> None:
    listed = (await served.client.get("/v1/models")).json()
    assert [item["id"] for item in listed["data"]] == ["scripted", "other"]
    assert (await served.client.get("/v1/models/other")).json()["id"] == "other"
    missing = await served.client.get("/v1/models/none")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


async def test_an_unforeseen_error_tells_nothing_but_its_id(served: Any) -> None:
    served.mesh.script = echo

    async def broken(key: str) -> Any:
        raise ValueError("a secret of the driver")

    served.gateway.authenticator.authenticate = broken
    answer = await served.client.get("/v1/sessions")
    problem(answer, 500, "INTERNAL")
    assert "secret" not in answer.text


def test_what_a_models_server_wants_back_is_in_no_message() -> None:
    stored = (
        '[{"call_id":"r:1:0","name":"add","arguments":{"a":1.10},"provider":{"id":"functions.add:0"},'
        '"message_provider":{"reasoning_content":"hm"}}]'
    )
    shown = orjson.loads(orjson.dumps(message_json(resources.Message(role="assistant", tool_calls=stored))))
    assert shown["tool_calls"] == [{"call_id": "r:1:0", "name": "add", "arguments": {"a": 1.1}}]
