"""What is measured here: the mesh, and the model server asked directly."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import orjson

from bench.mesh import Mesh, ModelServer
from bench.target import Ask, IncompleteReply
from launcher.control import supervisor_of
from launcher.folder import Folder

MESH = "hermesh"
ALONE = "model alone"
MESSAGES_A_RUN = 250
# Whose sessions those are that recall: a session of nobody recalls only what it said itself.
USER = "bench"
_SHOWN = 600


class ModelTarget:
    """The model server alone: what any server that stands before it is compared with.

    Attributes:
        url: the model's base URL with its /v1.
        pid: its process.
    """

    name = ALONE
    durable = False
    first_token = re.compile(rb'"content":"[^"]')

    def __init__(self, model: ModelServer) -> None:
        self.url = model.url
        self.pid = model.process.pid

    def processes(self) -> Mapping[str, int]:
        """Returns the model server's pid."""
        return {"model": self.pid}

    async def prepare(self, prompt: str) -> Ask:
        """Returns the question; nothing has to be done before."""
        body = {"model": "scripted", "stream": True, "messages": [{"role": "user", "content": prompt}]}
        return Ask(f"{self.url}/chat/completions", body)

    def text(self, body: bytes) -> str:
        """Joins the deltas. Raises IncompleteReply without `[DONE]`."""
        if b"data: [DONE]" not in body:
            raise IncompleteReply(f"the reply ends with {body[-_SHOWN:]!r}")
        chunks = (orjson.loads(line[6:]) for line in body.split(b"\n") if line.startswith(b"data: {"))
        return "".join(
            choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]
        )


class MeshTarget:
    """The mesh as a browser sees it: SSE through Envoy from the native API.

    Attributes:
        memory: whether runs read long-term memory.
    """

    name = MESH
    durable = True
    first_token = re.compile(rb'event: text\.delta\ndata: [^\n]*"text": ?"[^"]')

    def __init__(self, mesh: Mesh, *, memory: bool = False, key: str = "") -> None:
        """Asks by an API key, or by the one that the mesh was started with."""
        self.memory = memory
        self._url = mesh.url
        self._headers = {"Authorization": f"Bearer {key}"} if key else mesh.headers
        self._client: httpx.AsyncClient | None = None
        self._processes = {row.replica: row.pid for row in mesh.status() if row.pid}
        supervisor = supervisor_of(Folder(mesh.data_dir))
        if supervisor is not None:
            self._processes["supervisor"] = supervisor.pid

    def processes(self) -> Mapping[str, int]:
        """Returns every process of the mesh, its supervisor, Envoy and the stores among them."""
        return self._processes

    async def __aenter__(self) -> MeshTarget:
        limits = httpx.Limits(max_connections=32, max_keepalive_connections=32)
        self._client = httpx.AsyncClient(
            base_url=self._url, headers=self._headers, timeout=60, limits=limits, trust_env=False
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._client is not None
        await self._client.aclose()

    async def new_session(self) -> str:
        """Creates a session, of one and the same user where memory is read, and returns its id."""
        body = {"user": USER} if self.memory else {}
        return str((await self._post("/v1/sessions", body))["session_id"])

    async def prepare(self, prompt: str) -> Ask:
        """Creates a session and returns the question to ask in it."""
        return self.ask(await self.new_session(), prompt)

    def ask(self, session_id: str, prompt: str) -> Ask:
        """Returns a question in a session."""
        body = {"input": prompt, "stream": True, "options": {"memory": self.memory}}
        return Ask(f"{self._url}/v1/sessions/{session_id}/runs", body, self._headers)

    def watch(self, session_id: str) -> tuple[str, Mapping[str, str]]:
        """Returns URL and headers with which a session is followed from now on."""
        return f"{self._url}/v1/sessions/{session_id}/events", self._headers

    async def check_kept(self, body: bytes) -> None:
        """Replays a run from its log: every event, byte for byte. Raises IncompleteReply when it differs."""
        streamed = event_lines(body)
        run_id = orjson.loads(streamed[0])["run_id"]
        assert self._client is not None
        answer = await self._client.get(f"/v1/runs/{run_id}/events")
        answer.raise_for_status()
        kept = event_lines(answer.content)
        if kept != streamed:
            raise IncompleteReply(f"of run {run_id} {len(streamed)} events were streamed, {len(kept)} kept")

    async def learn(self, notes: int) -> None:
        """Has the user say so many things, each in a session of its own; a moment later they are memories."""
        for number in range(notes):
            session = await self.new_session()
            said = f"[[echo]] Note {number}: my garden has {number} old trees and a bench of stone."
            body = {"input": said, "stream": False, "options": {"memory": True}}
            await self._post(f"/v1/sessions/{session}/runs", body)

    def recalled(self, body: bytes) -> int:
        """Returns how many memories a run got."""
        return sum(
            len(event["data"]["memories"]) for event in events(body) if event["type"] == "memory.recalled"
        )

    async def fill(self, session_id: str, messages: int) -> None:
        """Has a session gather messages, many as the input of each run; it ends with a few more at most."""
        count = 0
        while count < messages:
            # Each run adds its reply, too.
            batch = min(MESSAGES_A_RUN, max(1, messages - count - 1))
            said = [
                {
                    "role": "assistant" if number % 2 else "user",
                    "content": f"Message {count + number} of many.",
                }
                for number in range(batch - 1)
            ]
            said.append({"role": "user", "content": "[[tokens=5]]"})
            body = {"input": said, "stream": True, "options": {"memory": False}}
            assert self._client is not None
            answer = await self._client.post(f"/v1/sessions/{session_id}/runs", json=body)
            answer.raise_for_status()
            self.text(answer.content)
            count += batch + 1

    async def message_count(self, session_id: str) -> int:
        """Returns how many messages a session has."""
        assert self._client is not None
        answer = await self._client.get(f"/v1/sessions/{session_id}")
        answer.raise_for_status()
        return int(answer.json()["message_count"])

    async def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        assert self._client is not None
        answer = await self._client.post(path, json=body)
        answer.raise_for_status()
        return answer.json()

    def text(self, body: bytes) -> str:
        """Joins the deltas. Raises IncompleteReply without `run.completed`, or when text was taken back."""
        if b"\nevent: run.completed\n" not in body or b"\nevent: attempt.reset\n" in body:
            raise IncompleteReply(f"the run's events end with {body[-_SHOWN:]!r}")
        return "".join(event["data"]["text"] for event in events(body) if event["type"] == "text.delta")


def events(body: bytes) -> Sequence[Mapping[str, Any]]:
    """Returns the events of a stream, in order, without what has no id."""
    return [orjson.loads(line) for line in event_lines(body)]


def event_lines(body: bytes) -> list[bytes]:
    """Returns the same as the JSON that came."""
    return [line[6:] for line in body.split(b"\n") if line.startswith(b'data: {"run_id"')]
