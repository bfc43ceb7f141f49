"""A client of the gateway as an application would write one: httpx, SSE frames, reconnects by cursor."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from bench.mesh import Mesh

TERMINAL = {"run.completed", "run.failed", "run.cancelled"}


@dataclass(frozen=True)
class Frame:
    """One SSE frame; `raw` is its text without the blank line."""

    raw: str
    event: str
    id: str
    data: dict[str, Any]

    @property
    def seq(self) -> int:
        return int(self.id.rpartition(":")[2])

    @property
    def run_id(self) -> str:
        return self.id.rpartition(":")[0]


async def frames_of(response: httpx.Response) -> AsyncIterator[Frame]:
    """Yields the frames of an SSE response; comments (heartbeats) are left out."""
    lines: list[str] = []
    async for line in response.aiter_lines():
        if line:
            lines.append(line)
            continue
        fields = dict(item.split(": ", 1) for item in lines if not item.startswith(":"))
        raw = "\n".join(lines)
        lines = []
        if fields:
            yield Frame(
                raw,
                fields.get("event", "message"),
                fields.get("id", ""),
                json.loads(fields.get("data", "{}")),
            )


@asynccontextmanager
async def http(mesh: Mesh, **headers: str) -> AsyncIterator[httpx.AsyncClient]:
    timeout = httpx.Timeout(30, read=60)
    async with httpx.AsyncClient(
        base_url=mesh.url, headers=mesh.headers | headers, timeout=timeout
    ) as client:
        yield client


async def new_session(client: httpx.AsyncClient, **body: Any) -> str:
    answer = await client.post("/v1/sessions", json=body)
    assert answer.status_code in (200, 201), answer.text
    return str(answer.json()["session_id"])


@asynccontextmanager
async def run_stream(
    client: httpx.AsyncClient, session_id: str, text: str, headers: dict[str, str] | None = None, **body: Any
) -> AsyncIterator[AsyncIterator[Frame]]:
    """Submits a run and yields its frames."""
    url = f"/v1/sessions/{session_id}/runs"
    payload = {"input": text, "stream": True} | body
    async with client.stream("POST", url, json=payload, headers=headers) as response:
        if response.status_code != 200:
            await response.aread()
        assert response.status_code == 200, response.text
        yield frames_of(response)


async def run_to_end(client: httpx.AsyncClient, session_id: str, text: str, **body: Any) -> list[Frame]:
    """Submits a run and returns all its frames."""
    async with run_stream(client, session_id, text, **body) as frames:
        return [frame async for frame in frames]


async def submit(client: httpx.AsyncClient, session_id: str, text: str, **body: Any) -> str:
    """Submits a run without a stream and returns its id."""
    answer = await client.post(
        f"/v1/sessions/{session_id}/runs", json={"input": text, "stream": False} | body
    )
    assert answer.status_code == 202, answer.text
    return str(answer.json()["run_id"])


async def watch(
    client: httpx.AsyncClient,
    run_id: str,
    after_seq: int = 0,
    until: Callable[[Frame], bool] = lambda frame: frame.event in TERMINAL,
    by_header: bool = True,
) -> list[Frame]:
    """Follows a run from a cursor on; returns the frames with an id up to the one where `until` holds."""
    url = f"/v1/runs/{run_id}/events"
    headers = {"Last-Event-ID": f"{run_id}:{after_seq}"} if by_header and after_seq else {}
    params = {} if by_header else {"after_seq": str(after_seq)}
    got: list[Frame] = []
    async with client.stream("GET", url, headers=headers, params=params) as response:
        if response.status_code == 204:
            return got
        if response.status_code != 200:
            await response.aread()
        assert response.status_code == 200, response.text
        async for frame in frames_of(response):
            if frame.id:
                got.append(frame)
                if until(frame):
                    break
    return got


async def watch_to_end(
    client: httpx.AsyncClient, run_id: str, after_seq: int = 0, tries: int = 50
) -> list[Frame]:
    """Follows a run to its end, coming back by cursor whenever the stream breaks, as EventSource does."""
    got: list[Frame] = []
    for _ in range(tries):
        last = got[-1].seq if got else after_seq
        try:
            url, headers = f"/v1/runs/{run_id}/events", {"Last-Event-ID": f"{run_id}:{last}"} if last else {}
            async with client.stream("GET", url, headers=headers) as response:
                if response.status_code == 204:
                    return got
                if response.status_code == 200:
                    async for frame in frames_of(response):
                        if frame.id:
                            got.append(frame)
        except (httpx.TransportError, httpx.StreamError):
            continue
        if got and got[-1].event in TERMINAL:
            return got
    raise AssertionError(f"run {run_id} did not end within {tries} connections; last: {got[-1:]}")


async def follow(
    client: httpx.AsyncClient, session_id: str, text: str, events: list[str] | None = None
) -> list[Frame]:
    """Sends one message and reads its stream to the end, over every `reconnect`; an error is raised.

    Args:
        client: who sends it.
        session_id: where.
        text: what.
        events: gets the name of each frame as it comes.
    """
    frames: list[Frame] = []
    path, body, method = f"/v1/sessions/{session_id}/runs", {"input": text, "stream": True}, "POST"
    headers = {"Idempotency-Key": str(uuid.uuid4())}
    while not frames or frames[-1].event not in TERMINAL:
        async with client.stream(method, path, json=body, headers=headers) as response:
            if response.status_code != 200:
                await response.aread()
            assert response.status_code == 200, response.text
            async for frame in frames_of(response):
                if events is not None:
                    events.append(frame.event)
                if frame.id:
                    frames.append(frame)
        path, body, method = f"/v1/runs/{frames[-1].run_id}/events", None, "GET"
        headers = {"Last-Event-ID": frames[-1].id}
    return frames


def assert_whole(frames: Sequence[Frame], first: int = 1) -> None:
    """The frames are one run's log from `first` to its terminal event, without gap or duplicate."""
    assert [frame.seq for frame in frames] == list(range(first, first + len(frames)))
    assert len({frame.run_id for frame in frames}) == 1
    assert frames[-1].event in TERMINAL
    assert not any(frame.event in TERMINAL for frame in frames[:-1])


def text_of(frames: Sequence[Frame]) -> str:
    """The reply as a reader shows it: an attempt.reset discards what came from its `from_seq` on."""
    parts: list[tuple[int, str]] = []
    for frame in frames:
        if frame.event == "text.delta":
            parts.append((frame.seq, frame.data["data"]["text"]))
        elif frame.event == "attempt.reset":
            parts = [part for part in parts if part[0] < frame.data["data"]["from_seq"]]
    return "".join(text for _, text in parts)
