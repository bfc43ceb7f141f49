"""The gateway's HTTP API as the command uses it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from launcher.errors import LaunchError

RECONNECTS = 20


class Api:
    """A client of one mesh."""

    def __init__(self, url: str, api_key: str) -> None:
        headers = {"Authorization": f"Bearer {api_key}"}
        self._client = httpx.Client(base_url=url, headers=headers, timeout=httpx.Timeout(30, read=120))

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
        """A session's messages, oldest first."""
        found: list[dict[str, Any]] = self._json("GET", f"/v1/sessions/{session_id}/messages")["messages"]
        return found

    def cancel(self, run_id: str) -> None:
        """Asks for a run to be cancelled."""
        self._json("POST", f"/v1/runs/{run_id}/cancel", json={})

    def run(self, session_id: str, text: str) -> Iterator[dict[str, Any]]:
        """Submits input and yields the run's events, coming back by cursor when the stream breaks."""
        path = f"/v1/sessions/{session_id}/runs"
        last: dict[str, Any] | None = None
        try:
            with self._stream("POST", path, json={"input": text, "stream": True}) as events:
                for event in events:
                    last = event
                    yield event
        except httpx.TransportError as error:
            if last is None:
                raise LaunchError(
                    f"the mesh at {self._client.base_url} cannot be reached: {error}"
                ) from error
        for _ in range(RECONNECTS):
            if last is None or last["type"] in ("run.completed", "run.failed", "run.cancelled"):
                return
            cursor = {"Last-Event-ID": f"{last['run_id']}:{last['seq']}"}
            try:
                with self._stream("GET", f"/v1/runs/{last['run_id']}/events", headers=cursor) as events:
                    for event in events:
                        last = event
                        yield event
            except httpx.TransportError:
                continue
        raise LaunchError("the stream broke too often; hermesh status shows what runs")

    @contextmanager
    def _stream(self, method: str, path: str, **options: Any) -> Iterator[Iterator[dict[str, Any]]]:
        with self._client.stream(method, path, **options) as answer:
            if answer.status_code >= 400:
                answer.read()
                raise LaunchError(_problem(answer))
            yield (
                json.loads(line[6:])
                for line in answer.iter_lines()
                if line.startswith("data: ") and '"seq"' in line
            )

    def _json(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        try:
            answer = self._client.request(method, path, **options)
        except httpx.TransportError as error:
            raise LaunchError(
                f"the mesh at {self._client.base_url} cannot be reached ({error}); is it up? hermesh status"
            ) from error
        if answer.status_code >= 400:
            raise LaunchError(_problem(answer))
        found: dict[str, Any] = answer.json()
        return found


def _problem(answer: httpx.Response) -> str:
    try:
        problem = answer.json()
        return (
            f"{problem.get('detail') or problem.get('title')} ({problem.get('reason', answer.status_code)})"
        )
    except ValueError:
        return f"the gateway answered {answer.status_code}"
