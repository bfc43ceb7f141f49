"""How each peer is asked for one streamed reply, and how what it sends is read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
import orjson

from bench.target import Ask, IncompleteReply

_SHOWN = 600
_PREPARE_SECONDS = 30.0


class PeerTarget:
    """A peer that listens on a port of loopback.

    Attributes:
        name: how tables name it.
        durable: whether its pages promise that an accepted run outlives its process.
    """

    first_token = re.compile(rb'"content": ?"[^"]')

    def __init__(self, name: str, url: str, pids: Mapping[str, int], *, durable: bool) -> None:
        self.name = name
        self.durable = durable
        self.url = url
        self._pids = dict(pids)

    def processes(self) -> Mapping[str, int]:
        """Returns the server's pid and those of its stores."""
        return self._pids

    async def prepare(self, prompt: str) -> Ask:
        """Does what a conversation needs before its first question; returns the question."""
        raise NotImplementedError

    def text(self, body: bytes) -> str:
        """Returns the text of a reply. Raises IncompleteReply when it lacks its end."""
        raise NotImplementedError


class ChatTarget(PeerTarget):
    """ogx's Chat Completions."""

    async def prepare(self, prompt: str) -> Ask:
        """Returns the question; nothing has to be done before."""
        body = {"model": "openai/scripted", "stream": True, "messages": [{"role": "user", "content": prompt}]}
        return Ask(f"{self.url}/v1/chat/completions", body)

    def text(self, body: bytes) -> str:
        """Joins the deltas. Raises IncompleteReply without a finish reason; ogx sends no `[DONE]`."""
        _ended(body, b'"finish_reason":"stop"')
        return "".join(
            choice["delta"].get("content") or "" for chunk in data(body) for choice in chunk["choices"]
        )


class ResponsesTarget(PeerTarget):
    """ogx's Responses, stored, as they are by default."""

    first_token = re.compile(rb'"delta": ?"[^"]')

    async def prepare(self, prompt: str) -> Ask:
        """Returns the question; nothing has to be done before."""
        return Ask(f"{self.url}/v1/responses", {"model": "openai/scripted", "stream": True, "input": prompt})

    def text(self, body: bytes) -> str:
        """Joins the deltas. Raises IncompleteReply without `response.completed`."""
        _ended(body, b'"type":"response.completed"')
        return "".join(one["delta"] for one in data(body) if one.get("type") == "response.output_text.delta")


class AgnoTarget(PeerTarget):
    """A run of an agent of AgentOS, in a session of its own.

    Attributes:
        background: whether it runs in the durable queue and can be resumed, or inline in the request.
    """

    first_token = re.compile(rb'"event": ?"RunContent"[^\n]*"content": ?"[^"]')

    def __init__(
        self, name: str, url: str, pids: Mapping[str, int], *, durable: bool, background: bool
    ) -> None:
        super().__init__(name, url, pids, durable=durable)
        self.background = background

    async def prepare(self, prompt: str) -> Ask:
        """Returns the question; without a session id AgentOS makes a session for it."""
        body = {"message": prompt, "stream": "true"} | ({"background": "true"} if self.background else {})
        return Ask(f"{self.url}/agents/bench/runs", body, form=True)

    def text(self, body: bytes) -> str:
        """Joins what the run said. Raises IncompleteReply without `RunCompleted`."""
        _ended(body, b"event: RunCompleted\n")
        return "".join(one["content"] for one in data(body) if one.get("event") == "RunContent")


class LangGraphTarget(PeerTarget):
    """A run on a thread of its own, by the HTTP API that LangGraph and Aegra have, as `messages-tuple`."""

    async def prepare(self, prompt: str) -> Ask:
        """Makes a thread and returns the question to ask in it."""
        async with httpx.AsyncClient(timeout=_PREPARE_SECONDS, trust_env=False) as client:
            answer = await client.post(f"{self.url}/threads", json={})
            answer.raise_for_status()
            thread = answer.json()["thread_id"]
        body = {
            "assistant_id": "agent",
            "input": {"messages": [{"type": "human", "content": prompt}]},
            "stream_mode": ["messages-tuple"],
        }
        return Ask(f"{self.url}/threads/{thread}/runs/stream", body)

    def text(self, body: bytes) -> str:
        """Joins the chunks of the model's message. Raises IncompleteReply without the last of them."""
        _ended(body, b'"chunk_position":"last"')
        pairs = (one for one in data(body) if isinstance(one, list))
        return "".join(one[0]["content"] for one in pairs if one[0]["type"] == "AIMessageChunk")


def data(body: bytes) -> Iterator[Any]:
    """Yields the JSON of every `data:` line of an SSE stream."""
    for line in body.splitlines():
        if line.startswith((b"data: {", b"data: [{")):
            yield orjson.loads(line[6:])


def _ended(body: bytes, end: bytes) -> None:
    if end not in body:
        raise IncompleteReply(f"the reply ends with {body[-_SHOWN:]!r}")
