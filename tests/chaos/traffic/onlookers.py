"""Clients who look in and leave in the middle: each opens one thing by a way of its own and goes away."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

import httpx
import websockets

# Longest that an onlooker stays, and that it waits for an answer.
STAY_SECONDS = 3.0
_ANSWER_SECONDS = 20.0


@dataclass
class Onlooker:
    """Looks in again and again until told to stop; whatever breaks meanwhile is for others to judge.

    Attributes:
        sessions: which there are to look at; others add to it.
        left: how often it left, by where from.
    """

    base_url: str
    headers: Mapping[str, str]
    rng: random.Random
    sessions: list[str]
    left: dict[str, int] = field(default_factory=dict)

    async def run(self, stopping: asyncio.Event) -> None:
        """Looks in by one way after the other."""
        ways: list[Callable[[], Awaitable[None]]] = [
            self._session_events,
            self._websocket,
            self._chat,
            self._read,
        ]
        while not stopping.is_set():
            if not self.sessions:
                await asyncio.sleep(0.1)
                continue
            way = self.rng.choice(ways)
            try:
                async with asyncio.timeout(_ANSWER_SECONDS):
                    await way()
            except (httpx.HTTPError, websockets.WebSocketException, OSError, TimeoutError):
                pass
            name = way.__name__.removeprefix("_")
            self.left[name] = self.left.get(name, 0) + 1

    def _session(self) -> str:
        return self.rng.choice(self.sessions[-20:])

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.base_url, headers=dict(self.headers), timeout=_ANSWER_SECONDS)

    async def _stay(self, source: Callable[[], Awaitable[object]]) -> None:
        """Takes what comes until it has seen enough."""
        try:
            async with asyncio.timeout(self.rng.uniform(0, STAY_SECONDS)):
                while True:
                    await source()
        except (TimeoutError, StopAsyncIteration):
            return

    async def _session_events(self) -> None:
        async with (
            self._client() as client,
            client.stream("GET", f"/v1/sessions/{self._session()}/events") as response,
        ):
            await self._stay(response.aiter_bytes().__anext__)

    async def _websocket(self) -> None:
        url = f"{self.base_url.replace('http', 'ws', 1)}/v1/sessions/{self._session()}/ws"
        async with websockets.connect(url, additional_headers=dict(self.headers), max_size=None) as socket:
            await self._stay(socket.recv)

    async def _chat(self) -> None:
        body = {
            "model": "default",
            "stream": True,
            "messages": [{"role": "user", "content": "onlooker [[tokens=40 rate=40]]"}],
        }
        async with self._client() as client:
            async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                await self._stay(response.aiter_bytes().__anext__)

    async def _read(self) -> None:
        session = self._session()
        async with self._client() as client:
            for path in ("/v1/sessions", f"/v1/sessions/{session}/messages", f"/v1/sessions/{session}/runs"):
                await client.get(path)
