"""The gateway's HTTP API as the command uses it."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any
from urllib.parse import quote

import httpx

from launcher.errors import LaunchError
from meshkit import verbatim

TERMINAL = ("run.completed", "run.failed", "run.cancelled")
# Longer than a lease and the takeover after it.
PATIENCE_SECONDS = 30.0
PAUSE_SECONDS = 0.2
PROBE_SECONDS = 2.5


class Written(dict[str, Any]):
    """A JSON object that was read, an event or an action.

    Attributes:
        text: How it came: reading JSON and writing it again alters what a model wrote.
    """

    def __init__(self, text: str) -> None:
        super().__init__(json.loads(text))
        self.text = text


class _AwayError(Exception):
    """Nobody is there to answer now."""


class Api:
    """A client of one mesh."""

    def __init__(self, url: str, api_key: str) -> None:
        if not (api_key.isascii() and api_key.isprintable()):
            raise LaunchError("HERMESH_API_KEY is no key: keys are of visible ASCII characters")
        headers = {"Authorization": f"Bearer {api_key}"}
        # The mesh is on this machine: no proxy is asked, whatever the environment says.
        self._client = httpx.Client(
            base_url=url, headers=headers, timeout=httpx.Timeout(30, read=120), trust_env=False
        )

    def __enter__(self) -> Api:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def create_session(self, title: str = "") -> str:
        """Creates a session and returns its id."""
        return str(self._json("POST", "/v1/sessions", json={"title": title} if title else {})["session_id"])

    def sessions(self) -> list[dict[str, Any]]:
        """The sessions last changed, newest first."""
        found: list[dict[str, Any]] = self._json("GET", "/v1/sessions")["sessions"]
        return found

    def messages(self, session_id: str) -> list[dict[str, Any]]:
        """A session's messages, oldest first, from all pages."""
        found: list[dict[str, Any]] = []
        page = {"page_size": "500"}
        while True:
            answer = self._json("GET", f"/v1/sessions/{session_id}/messages", params=page)
            found += answer["messages"]
            if not answer["next_page_token"]:
                return found
            page["page_token"] = answer["next_page_token"]

    def cancel(self, run_id: str) -> dict[str, Any]:
        """Asks for a run to be cancelled, and returns it as it is then."""
        return self._json("POST", f"/v1/runs/{quote(run_id, safe='')}/cancel", json={})

    def problem(self) -> str:
        """What of the mesh does not answer, and what to do; empty when all does."""
        try:
            checks = self._client.get("/ready", timeout=PROBE_SECONDS).json()["checks"]
        except (httpx.HTTPError, ValueError, KeyError):
            return "waiting: the gateway does not answer; hermesh status shows what runs"
        if checks.get("mesh", "ok") != "ok":
            return "waiting: Envoy does not answer; hermesh status shows what runs"
        if checks.get("session", "ok") != "ok":
            return "waiting: the session service or its database does not answer; hermesh status says which"
        if checks.get("agent", "ok") != "ok":
            return (
                "waiting: no agent answers; hermesh status shows what runs, hermesh scale agent=1 starts "
                "one where none does"
            )
        return ""

    def actions(self) -> list[Written]:
        """The tool calls that wait for a person, in all sessions; arguments as the model wrote them."""
        found: list[Written] = []
        page = {"page_size": "200"}
        while True:
            answer = self._ask("GET", "/v1/actions", params=page)
            for text in verbatim.elements(verbatim.members(answer.text)["actions"]):
                found.append(Written(text))
                found[-1].setdefault("arguments_text", verbatim.members(text).get("arguments", "{}"))
            token = answer.json()["next_page_token"]
            if not token:
                return found
            page["page_token"] = token

    def resolve(self, run_id: str, call_id: str, decision: str, content: str) -> dict[str, Any]:
        """Settles a tool call and returns its run. An answer that is lost is asked for again: it is one word.

        Raises:
            LaunchError: The gateway refuses, or none answers for `PATIENCE_SECONDS`.
        """
        body = {"decision": decision, "content": content}
        key = {"Idempotency-Key": str(uuid.uuid4())}
        since = time.monotonic()
        while True:
            try:
                path = f"/v1/runs/{quote(run_id, safe='')}/actions/{quote(call_id, safe='')}"
                answer = self._client.post(path, json=body, headers=key)
                if answer.status_code < 400:
                    run: dict[str, Any] = answer.json()
                    return run
                if answer.status_code not in (502, 503, 504):
                    raise LaunchError(_problem(answer))
                away = _problem(answer)
            except httpx.TransportError as error:
                away = str(error)
            if time.monotonic() - since > PATIENCE_SECONDS:
                raise LaunchError(
                    f"the mesh at {self._client.base_url} cannot be reached ({away}); hermesh status "
                    "shows what runs, and the same command may be given again"
                )
            time.sleep(PAUSE_SECONDS)

    def run(self, session_id: str, text: str) -> Iterator[Written]:
        """Submits input and yields the run's events, coming back by cursor when the stream breaks.

        Raises:
            LaunchError: The gateway refuses, or nothing came for `PATIENCE_SECONDS`.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise LaunchError("the message is not text in UTF-8") from None
        # With the key a submission whose answer was lost may be sent again, and counts once.
        submit = partial(
            self._stream,
            "POST",
            f"/v1/sessions/{session_id}/runs",
            json={"input": text, "stream": True},
            headers={"Idempotency-Key": str(uuid.uuid4())},
        )
        return self._follow(submit)

    def watch(self, run_id: str) -> Iterator[Written]:
        """Yields a run's events from its first to its last, and comes back by cursor as `run` does.

        Raises:
            LaunchError: The gateway refuses, or nothing came for `PATIENCE_SECONDS`.
        """
        return self._follow(partial(self._stream, "GET", f"/v1/runs/{quote(run_id, safe='')}/events"))

    def _follow(self, first: Callable[[], AbstractContextManager[Iterator[Written]]]) -> Iterator[Written]:
        last: dict[str, Any] | None = None
        since = time.monotonic()
        while last is None or last["type"] not in TERMINAL:
            stream = first if last is None else partial(self._watch, last)
            before = last
            try:
                with stream() as events:
                    for event in events:
                        last = event
                        yield event
            except (httpx.TransportError, _AwayError) as error:
                away: Exception | None = error
            else:
                away = None
            if last is not before:
                since = time.monotonic()
                continue
            if time.monotonic() - since > PATIENCE_SECONDS:
                raise LaunchError(
                    f"the mesh at {self._client.base_url} cannot be reached ({away or 'no event came'}); "
                    "hermesh status shows what runs"
                ) from away
            time.sleep(PAUSE_SECONDS)

    def _watch(self, last: dict[str, Any]) -> AbstractContextManager[Iterator[Written]]:
        cursor = {"Last-Event-ID": f"{last['run_id']}:{last['seq']}"}
        return self._stream("GET", f"/v1/runs/{last['run_id']}/events", headers=cursor)

    @contextmanager
    def _stream(self, method: str, path: str, **options: Any) -> Iterator[Iterator[Written]]:
        with self._client.stream(method, path, **options) as answer:
            if answer.status_code >= 400:
                answer.read()
                # The balancer found no gateway: one is being started.
                if answer.status_code in (502, 503, 504):
                    raise _AwayError(_problem(answer))
                raise LaunchError(_problem(answer))
            yield (
                Written(line[6:])
                for line in answer.iter_lines()
                if line.startswith("data: ") and '"seq"' in line
            )

    def _json(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        found: dict[str, Any] = self._ask(method, path, **options).json()
        return found

    def _ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            answer = self._client.request(method, path, **options)
        except httpx.TransportError as error:
            raise LaunchError(
                f"the mesh at {self._client.base_url} cannot be reached ({error}); is it up? hermesh status"
            ) from error
        if answer.status_code >= 400:
            raise LaunchError(_problem(answer))
        return answer


def _problem(answer: httpx.Response) -> str:
    try:
        problem = answer.json()
        return (
            f"{problem.get('detail') or problem.get('title')} ({problem.get('reason', answer.status_code)})"
        )
    except ValueError:
        return f"the gateway answered {answer.status_code}"
