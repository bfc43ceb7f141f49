"""The adapter for OpenAI-compatible backends: vLLM, SGLang, llama.cpp, and the hosted ones."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import orjson

from services.agent.model import wire
from services.agent.model.errors import (
    ModelError,
    ModelProtocolError,
    ModelRateLimitedError,
    ModelTruncatedError,
    ModelUnavailableError,
)
from services.agent.model.http import HttpPool, Response, Timeouts
from services.agent.model.port import ModelEvent, ModelInfo, ModelRequest


@dataclass(frozen=True, slots=True)
class Retry:
    """How often and how patiently a request is sent again before its first token.

    Attributes:
        attempts: all tries together.
        base: seconds before the second try; doubles, with full jitter.
        cap: the most seconds to wait; a Retry-After above it ends the tries.
    """

    attempts: int = 3
    base: float = 0.1
    cap: float = 5.0

    def wait(self, attempt: int, error: ModelError) -> float | None:
        """Return the seconds before the next try, None when there is none.

        Args:
            attempt: the try that failed, from 1.
            error: how it failed.
        """
        if attempt >= self.attempts or not isinstance(error, ModelRateLimitedError | ModelUnavailableError):
            return None
        if error.retry_after is not None:
            return error.retry_after if error.retry_after <= self.cap else None
        ceiling = min(self.cap, self.base * 2 ** (attempt - 1))
        return random.uniform(ceiling / 2, ceiling)  # noqa: S311 - jitter, not a secret


class OpenAIModel:
    """A `Model` over HTTP.

    Args:
        base_url: the backend's URL with its /v1.
        api_key: sent as a bearer token when not empty.
        connections: the most at once.
        timeouts: of one try.
        retry: tries before the first token; after it nothing is sent again.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str = "",
        connections: int = 512,
        timeouts: Timeouts | None = None,
        retry: Retry | None = None,
    ) -> None:
        self._pool = HttpPool(base_url, connections, timeouts or Timeouts())
        self._retry = retry or Retry()
        self._headers = {"Accept-Encoding": "identity", "User-Agent": "hermesh-agent"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    async def stream(self, request: ModelRequest) -> AsyncGenerator[Sequence[ModelEvent], None]:
        """See `Model.stream`."""
        body = wire.encode_request(request)
        attempt = 0
        while True:
            attempt += 1
            started = False
            try:
                async with aclosing(self._attempt(body, request.cache_key)) as batches:
                    async for batch in batches:
                        started = True
                        yield batch
                return
            except ModelError as error:
                wait = None if started else self._retry.wait(attempt, error)
                if wait is None:
                    raise
            await asyncio.sleep(wait)

    async def _attempt(self, body: bytes, cache_key: str) -> AsyncGenerator[Sequence[ModelEvent], None]:
        headers = {**self._headers, "Accept": "text/event-stream"}
        if cache_key:
            headers["x-hermesh-affinity"] = cache_key
        async with self._pool.request("POST", "/chat/completions", headers, body) as response:
            if response.status != 200:
                raise await _error_of(response)
            parser = wire.StreamParser()
            try:
                while not parser.done and (data := await response.read()):
                    events = parser.feed(data)
                    if events:
                        yield events
            except ModelTruncatedError:
                if not parser.said_anything:
                    raise ModelUnavailableError("the backend broke off before its first token") from None
                if not parser.finish_reason:
                    raise
            if not parser.done and not parser.finish_reason:
                if not parser.said_anything:
                    raise ModelProtocolError("the model's answer is not a stream of events")
                raise ModelTruncatedError("the model's stream ended before its reply did")
            response.release()
            yield (parser.finished(),)

    async def list_models(self) -> Sequence[ModelInfo]:
        """See `Model.list_models`."""
        async with self._pool.request("GET", "/models", self._headers) as response:
            if response.status != 200:
                raise await _error_of(response)
            body = await response.read_all()
        try:
            data = orjson.loads(body)["data"]
            return [
                ModelInfo(str(entry["id"]), str(entry.get("owned_by") or ""))
                for entry in data
                if isinstance(entry.get("id"), str)
            ]
        except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ModelProtocolError("the backend's list of models is not the protocol's JSON") from error

    async def aclose(self) -> None:
        """Close the pooled connections."""
        await self._pool.aclose()


async def _error_of(response: Response) -> ModelError:
    """Read an error answer; one that cannot be read still has its status."""
    body = b""
    with contextlib.suppress(ModelError):
        body = await response.read_all(limit=64 * 1024)
    return wire.error_of_status(
        response.status, wire.message_of_body(body), wire.retry_after_of(response.headers)
    )
