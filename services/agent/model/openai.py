"""The adapter for servers of the Chat Completions protocol, local and hosted ones, each by its profile."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack

import orjson
import structlog

from meshkit import tracing
from services.agent.model import faults, wire
from services.agent.model.errors import (
    ModelError,
    ModelProtocolError,
    ModelTimeoutError,
    ModelTruncatedError,
    ModelUnavailableError,
)
from services.agent.model.http import HttpPool, Response, Timeouts
from services.agent.model.port import ModelEvent, ModelInfo, ModelRequest
from services.agent.model.profiles import TOLERANT, Profile, Profiles
from services.agent.model.request import NOTHING, Learned, encode_request, learn

_log = structlog.get_logger("agent.model")

# A request that is refused is sent again without the parameter that the refusal names, so often at most: each
# time it names another one.
MAX_SECOND_TRIES = 3
_MAX_MODELS = 256
_MAX_ERROR = 64 * 1024


class OpenAIModel:
    """A `Model` over HTTP.

    Args:
        base_url: the backend's URL with its /v1.
        api_key: sent as the profile says when not empty.
        connections: the most at once.
        timeouts: of one request; nothing is sent again here (see `Backends`), except what was refused for a
            parameter that it can do without.
        profile: what kind of server it is; None = it is found out by `profiles`.
        profiles: the kinds that there are.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str = "",
        connections: int = 512,
        timeouts: Timeouts | None = None,
        profile: Profile | None = None,
        profiles: Profiles | None = None,
    ) -> None:
        self._pool = HttpPool(base_url, connections, timeouts or Timeouts())
        self._profiles = profiles or Profiles()
        known = profile or self._profiles.by_host(self._pool.origin.host)
        self._certain = known is not None
        self.profile = known or TOLERANT
        self._learned: dict[str, Learned] = {}
        self._headers = {"Accept-Encoding": "identity", "User-Agent": "hermesh-agent"}
        if api_key and self.profile.auth == "api-key":
            self._headers["api-key"] = api_key
        elif api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    async def stream(self, request: ModelRequest) -> AsyncGenerator[Sequence[ModelEvent], None]:
        """See `Model.stream`."""
        async with AsyncExitStack() as stack:
            response = await self._ask(request, stack)
            parser = wire.StreamParser(self.profile)
            try:
                while not parser.done and (data := await response.read()):
                    events = parser.feed(data)
                    if events:
                        yield events
                    if parser.failed is not None:
                        raise parser.failed
                cut = None
            except (ModelTruncatedError, ModelTimeoutError) as error:
                # A server that says no more after its reply's end, and does not close, takes nothing from it.
                late = isinstance(error, ModelTimeoutError) and not parser.finish_reason
                if late or parser.failed is not None:
                    raise
                cut = error
            events = parser.close()  # a last line may lack its newline
            if events:
                yield events
            if parser.failed is not None:
                raise parser.failed
            if not parser.finish_reason and not (parser.done and parser.said_anything):
                if not parser.said_anything:
                    if cut is not None or parser.done:
                        raise ModelUnavailableError("the backend broke off before its first token")
                    raise ModelProtocolError("the model's answer is not a stream of events")
                raise cut or ModelTruncatedError("the model's stream ended before its reply did")
            response.release()
            yield parser.end()

    async def _ask(self, request: ModelRequest, stack: AsyncExitStack) -> Response:
        """Send a request, again without what it is refused for, and return the reply that begins.

        Raises:
            ModelError: it is refused.
        """
        headers = {**self._headers, "Accept": "text/event-stream"}
        if request.cache_key:
            headers["x-hermesh-affinity"] = request.cache_key
        if tracing.recording():
            headers["traceparent"] = tracing.current_traceparent()
        tries = 0
        body = self._body(request)
        while True:
            request.asking()
            response = await stack.enter_async_context(
                self._pool.request("POST", "/chat/completions", headers, body)
            )
            if not self._certain:
                self._recognize(response.headers)
            if response.status == 200:
                return response
            answer = await _error_body(response)
            tries += 1
            refused = body
            if tries <= MAX_SECOND_TRIES and self._learn(request.model, response.status, answer, refused):
                body = self._body(request)
            if body == refused:  # it would be refused again
                raise _error_of(response, answer)
            await stack.aclose()

    def _body(self, request: ModelRequest) -> bytes:
        return encode_request(request, self.profile, self._learned.get(request.model, NOTHING))

    async def list_models(self) -> Sequence[ModelInfo]:
        """See `Model.list_models`."""
        async with self._pool.request("GET", "/models", self._headers) as response:
            if response.status != 200:
                raise _error_of(response, await _error_body(response))
            body = await response.read_all()
        try:
            data = orjson.loads(body)
            entries = data if isinstance(data, list) else data["data"]
            models = [
                ModelInfo(str(entry["id"]), str(entry.get("owned_by") or ""))
                for entry in entries
                if isinstance(entry.get("id"), str)
            ]
        except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ModelProtocolError("the backend's list of models is not the protocol's JSON") from error
        if not self._certain:
            self._recognize(response.headers, {model.owned_by for model in models})
        return models

    async def aclose(self) -> None:
        """Close the pooled connections."""
        await self._pool.aclose()

    def _recognize(self, headers: Mapping[str, str], owners: set[str] | None = None) -> None:
        """See by an answer what kind of server this is."""
        found = self._profiles.by_answer(headers, owners or ())
        if found is not None:
            self.profile, self._certain = found, True
            _log.info("a model backend is known", backend=self._pool.origin.place, profile=found.name)

    def _learn(self, model: str, status: int, answer: bytes, sent: bytes) -> bool:
        """Note what a refusal names; whether a second try may go better."""
        known = self._learned.get(model, NOTHING)
        learned = learn(known, status, answer, sent)
        if learned is None:
            return False
        if learned == known:
            return True
        if len(self._learned) >= _MAX_MODELS:
            self._learned.clear()
        self._learned[model] = learned
        _log.warning(
            "a model backend refused a request for what it can do without",
            backend=self._pool.origin.place,
            profile=self.profile.name,
            model=model,
            refused=sorted(learned.refused - known.refused),
            wanted=sorted(learned.wanted - known.wanted),
        )
        return True


async def _error_body(response: Response) -> bytes:
    """Read an error answer; one that cannot be read still has its status."""
    with contextlib.suppress(ModelError):
        return await response.read_all(limit=_MAX_ERROR)
    return b""


def _error_of(response: Response, body: bytes) -> ModelError:
    return faults.error_of_status(
        faults.status_of_answer(response.status, body),
        faults.message_of_body(body),
        faults.retry_after_of(response.headers),
    )
