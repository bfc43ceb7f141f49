"""The adapter for OpenAI-compatible backends: vLLM, SGLang, llama.cpp, and the hosted ones."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Sequence

import orjson

from services.agent.model import wire
from services.agent.model.errors import (
    ModelError,
    ModelProtocolError,
    ModelTruncatedError,
    ModelUnavailableError,
)
from services.agent.model.http import HttpPool, Response, Timeouts
from services.agent.model.port import ModelEvent, ModelInfo, ModelRequest


class OpenAIModel:
    """A `Model` over HTTP.

    Args:
        base_url: the backend's URL with its /v1.
        api_key: sent as a bearer token when not empty.
        connections: the most at once.
        timeouts: of one request; nothing is sent again here (see `Backends`).
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str = "",
        connections: int = 512,
        timeouts: Timeouts | None = None,
    ) -> None:
        self._pool = HttpPool(base_url, connections, timeouts or Timeouts())
        self._headers = {"Accept-Encoding": "identity", "User-Agent": "hermesh-agent"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    async def stream(self, request: ModelRequest) -> AsyncGenerator[Sequence[ModelEvent], None]:
        """See `Model.stream`."""
        body = wire.encode_request(request)
        headers = {**self._headers, "Accept": "text/event-stream"}
        if request.cache_key:
            headers["x-hermesh-affinity"] = request.cache_key
        request.asking()
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
