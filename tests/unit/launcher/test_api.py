"""The command's client against a scripted gateway: streams that break, refusals, what is shown."""

import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from rich.console import Console

from launcher.actions import full_id, lines
from launcher.api import Api
from launcher.errors import LaunchError
from launcher.talk import show

RUN = "01890000-0000-7000-8000-000000000001"


def event(seq: int, type_: str, **data: Any) -> dict[str, Any]:
    return {"run_id": RUN, "seq": seq, "type": type_, "time": 1, "data": data}


EVENTS = [
    event(1, "run.created"),
    event(2, "text.delta", text="The capital "),
    event(3, "text.delta", text="is Paris."),
    event(4, "run.completed", message_id="m"),
]


class Gateway(ThreadingHTTPServer):
    """Answers from a script, and notes what was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, str, str]] = []
        self.pieces: list[list[dict[str, Any]]] = []
        self.answers: dict[str, tuple[int, Any]] = {}
        self.away: dict[str, int] = {}
        self.keys: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: Gateway

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append((self.command, self.path, self.headers.get("Last-Event-ID", "")))
        self.server.keys.append(self.headers.get("Idempotency-Key", ""))
        if self.server.away.get(self.path):
            self.server.away[self.path] -= 1
            self.send_error(503)
            return
        if self.path in self.server.answers:
            status, body = self.server.answers[self.path]
            text = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)
            return
        frames = b": heartbeat\n\n"
        for one in self.server.pieces.pop(0):
            text = one.get("as it stands") or json.dumps(one)
            frames += f"id: {RUN}:{one['seq']}\nevent: {one['type']}\ndata: {text}\n\n".encode()
        self.send_response(200)
        # What is promised and not sent is a stream that broke.
        self.send_header("Content-Length", str(len(frames) + (10 if self.server.pieces else 0)))
        self.end_headers()
        self.wfile.write(frames)
        self.close_connection = True

    do_GET = do_POST = answer


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    with Gateway() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def api(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    monkeypatch.setattr("launcher.api.PAUSE_SECONDS", 0.01)
    with Api(f"http://127.0.0.1:{gateway.server_port}", "hm_key") as api:
        yield api


def test_a_stream_that_breaks_goes_on_where_it_was(gateway: Gateway, api: Api) -> None:
    gateway.pieces = [EVENTS[:2], [], EVENTS[2:3], EVENTS[3:]]
    assert list(api.run("s", "hello")) == EVENTS
    assert gateway.asked == [
        ("POST", "/v1/sessions/s/runs", ""),
        ("GET", f"/v1/runs/{RUN}/events", f"{RUN}:2"),
        ("GET", f"/v1/runs/{RUN}/events", f"{RUN}:2"),
        ("GET", f"/v1/runs/{RUN}/events", f"{RUN}:3"),
    ]


def test_an_event_keeps_how_it_came(gateway: Gateway, api: Api) -> None:
    """Arguments are what the model wrote: 1.10 is not 1.1, and a name may stand there twice."""
    text = json.dumps(event(2, "tool.started", arguments="X")).replace('"X"', '{"a":1.10, "a":1e2}')
    written = event(2, "tool.started") | {"as it stands": text}
    gateway.pieces = [[EVENTS[0], written, *EVENTS[2:]]]
    assert list(api.run("s", "hello"))[1].text == text


def test_an_action_shows_the_arguments_that_were_written(gateway: Gateway, api: Api) -> None:
    text = '{"run_id":"' + RUN + '","arguments":{"a":1.10, "a":1e2}}'
    page = '{"actions":[' + text + '],"next_page_token":""}'
    gateway.answers = {"/v1/actions?page_size=200": (200, page)}
    [action] = api.actions()
    assert (action.text, action["arguments_text"]) == (text, '{"a":1.10, "a":1e2}')


def test_what_the_gateway_refuses_is_said_with_its_reason(gateway: Gateway, api: Api) -> None:
    problem = {"title": "Not Found", "detail": "there is no such session", "reason": "SESSION_NOT_FOUND"}
    gateway.answers = {"/v1/sessions/s/runs": (404, problem), "/v1/sessions": (502, "<html>")}
    with pytest.raises(LaunchError, match=r"^there is no such session \(SESSION_NOT_FOUND\)$"):
        list(api.run("s", "hello"))
    with pytest.raises(LaunchError, match="the gateway answered 502"):
        api.create_session()


def test_a_submission_whose_answer_was_lost_is_sent_again_under_its_key(gateway: Gateway, api: Api) -> None:
    gateway.pieces = [[], EVENTS]
    assert list(api.run("s", "hello")) == EVENTS
    assert [path for _, path, _ in gateway.asked] == ["/v1/sessions/s/runs"] * 2
    assert len(set(gateway.keys)) == 1


def test_a_decision_whose_answer_was_lost_is_sent_again_under_its_key(gateway: Gateway, api: Api) -> None:
    path = f"/v1/runs/{RUN}/actions/{RUN}%3A1%3A0"
    gateway.away = {path: 2}
    gateway.answers = {path: (200, {"status": "queued"})}
    assert api.resolve(RUN, f"{RUN}:1:0", "retry", "")["status"] == "queued"
    assert [asked for asked, _, _ in gateway.asked] == ["POST"] * 3
    assert len(set(gateway.keys)) == 1
    problem = {"detail": "the tool call does not wait", "reason": "ACTION_NOT_REQUIRED"}
    gateway.answers = {path: (409, problem)}
    with pytest.raises(LaunchError, match=r"does not wait \(ACTION_NOT_REQUIRED\)"):
        api.resolve(RUN, f"{RUN}:1:0", "retry", "")


def test_a_decision_that_reaches_nobody_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.api.PATIENCE_SECONDS", 0.0)
    with Api("http://127.0.0.1:1", "hm_key") as api, pytest.raises(LaunchError, match="cannot be reached"):
        api.resolve(RUN, f"{RUN}:1:0", "retry", "")


def test_all_pages_of_actions_are_read(gateway: Gateway, api: Api) -> None:
    first, second = "/v1/actions?page_size=200", "/v1/actions?page_size=200&page_token=next"
    gateway.answers = {
        first: (200, {"actions": [{"call_id": "a"}], "next_page_token": "next"}),
        second: (200, {"actions": [{"call_id": "b"}], "next_page_token": ""}),
    }
    assert [action["call_id"] for action in api.actions()] == ["a", "b"]


def test_the_mesh_is_not_looked_for_behind_a_proxy(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    gateway.answers = {"/v1/sessions": (200, {"session_id": "s"})}
    with Api(f"http://127.0.0.1:{gateway.server_port}", "hm_key") as api:
        assert api.create_session() == "s"


def test_a_gateway_that_is_being_started_is_waited_for(gateway: Gateway, api: Api) -> None:
    gateway.pieces = [EVENTS[:3], EVENTS[3:]]
    gateway.away = {f"/v1/runs/{RUN}/events": 2}
    assert list(api.run("s", "hello")) == EVENTS
    assert len(gateway.asked) == 4


def test_what_does_not_answer_is_named(gateway: Gateway, api: Api) -> None:
    gateway.answers = {"/ready": (200, {"status": "ready", "checks": {"session": "ok", "agent": "ok"}})}
    assert api.problem() == ""
    checks = {"session": "ok", "agent": "SERVICE_UNAVAILABLE"}
    gateway.answers = {"/ready": (200, {"status": "degraded", "checks": checks})}
    assert api.problem().startswith("waiting: no agent answers; hermesh status")
    gateway.answers = {"/ready": (200, {"status": "degraded", "checks": checks | {"mesh": "away"}})}
    assert "Envoy does not answer" in api.problem()
    gateway.answers = {"/ready": (200, {"status": "degraded", "checks": {"session": "away"}})}
    assert "its database" in api.problem()
    gateway.answers = {"/ready": (502, "<html>")}
    assert "the gateway does not answer" in api.problem()


def test_what_is_no_text_and_no_key_is_one_line(gateway: Gateway, api: Api) -> None:
    with pytest.raises(LaunchError, match="UTF-8"):
        next(api.run("s", "bad \udcff bytes"))
    for key in ("ключ", "two\nlines"):
        with pytest.raises(LaunchError, match="HERMESH_API_KEY"):
            Api("http://127.0.0.1:1", key)


def test_a_gateway_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.api.PATIENCE_SECONDS", 0.0)
    with Api("http://127.0.0.1:1", "hm_key") as api:
        for ask in (api.sessions, lambda: list(api.run("s", "hello"))):
            with pytest.raises(LaunchError, match=r"http://127\.0\.0\.1:1.* cannot be reached"):
                ask()


def shown(events: list[dict[str, Any]]) -> str:
    out = io.StringIO()
    show(events, Console(file=out, width=200))
    return out.getvalue()


def test_text_is_shown_as_it_is() -> None:
    marked = [event(2, "text.delta", text="[bold]not[/bold] markup "), *EVENTS[2:]]
    assert shown(marked) == "[bold]not[/bold] markup is Paris.\n"


def test_a_failed_run_is_an_error_with_its_reason() -> None:
    failed = event(3, "run.failed", code="UNAVAILABLE", reason="MODEL_UNAVAILABLE", message="no model")
    with pytest.raises(LaunchError, match=r"no model \(MODEL_UNAVAILABLE\)"):
        shown([*EVENTS[:2], failed])


def test_what_happens_beside_the_text_is_told() -> None:
    text = shown(
        [
            event(2, "tool.call", call_id="c", name="calculator", arguments={}),
            event(3, "tool.result", call_id="c", status="completed", content="42"),
            event(4, "attempt.reset", from_seq=2, reason="x"),
            event(5, "context.degraded", part="memory", detail="gone"),
            event(6, "run.cancelled", reason="x"),
        ]
    )
    for word in ("calculator", "42", "starts again", "without memory", "cancelled"):
        assert word in text


@pytest.mark.parametrize(
    ("kind", "words"),
    [("approval", ["approve", "deny", "abandon"]), ("unknown", ["completed", "failed", "retry", "abandon"])],
)
def test_a_question_comes_with_the_commands_that_answer_it(kind: str, words: list[str]) -> None:
    asked = event(2, "action.required", call_id=f"{RUN}:1:0", kind=kind, name="pay", arguments={"a": "[b]"})
    text = shown([asked, event(3, "action.resolved", call_id=f"{RUN}:1:0", decision=words[0])])
    assert 'pay {"a": "[b]"}' in text
    assert [line.split()[-1] for line in text.splitlines() if "hermesh resolve" in line] == words
    assert f"hermesh resolve {RUN} 1:0 {words[0]}" in text
    assert f"decided: {words[0]}" in text


def test_a_person_is_asked_about_the_arguments_as_the_model_wrote_them() -> None:
    text = '{"id": 18446744073709551616, "x":0.1000000000000000055511151, "a":1,"a":2}'
    asked = event(
        2,
        "action.required",
        call_id=f"{RUN}:1:0",
        kind="approval",
        name="pay",
        arguments=json.loads(text),
        arguments_text=text,
    )
    assert f"pay {text} needs approval" in shown([asked])


def test_what_waits_is_listed_with_what_it_waits_for() -> None:
    action = {
        "run_id": RUN,
        "session_id": "s-1",
        "call_id": f"{RUN}:2:1",
        "kind": "unknown",
        "name": "pay",
        "arguments": {"a": 1},
        "waiting_since_ms": 1_000_000_000,
        "may_act_ms": 12_300,
    }
    text = "\n".join(lines(action, 1_000_000 + 2 * 3600 + 61))
    for words in ("pay", "2 h 1 min", "s-1", "may still act for 12 s", f"hermesh resolve {RUN} 2:1 retry"):
        assert words in text
    assert "may still act" not in "\n".join(lines(action | {"may_act_ms": 0}, 1_000_000))
    assert full_id(RUN, "2:1") == full_id(RUN, f"{RUN}:2:1") == f"{RUN}:2:1"
