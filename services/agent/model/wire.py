"""The Chat Completions protocol: requests as bytes, and a streamed reply's bytes as events."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from services.agent.model.errors import (
    ModelAuthError,
    ModelError,
    ModelProtocolError,
    ModelRateLimitedError,
    ModelRejectedError,
    ModelUnavailableError,
)
from services.agent.model.numbers import usage_of, whole
from services.agent.model.port import (
    ChatMessage,
    Finished,
    ModelEvent,
    ModelRequest,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    ToolOffer,
)

# One SSE line may not grow without end: a backend that never sends a newline is broken.
MAX_LINE = 4 * 1024 * 1024
TEMPLATE_TRIES = 8
_PROBE = b"where the token stands"
_FINISH = {"tool_calls": "tool_calls", "function_call": "tool_calls", "length": "length"}


def encode_request(request: ModelRequest) -> bytes:
    """Render the body of POST /chat/completions; only what is set is sent."""
    body: dict[str, Any] = {
        "model": request.model,
        "messages": _messages(request.messages),
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if request.tools and request.tool_choice != "none":
        body["tools"] = [_tool(tool) for tool in request.tools]
        if request.tool_choice not in ("", "auto"):
            body["tool_choice"] = (
                "required"
                if request.tool_choice == "required"
                else {"type": "function", "function": {"name": request.tool_choice}}
            )
    if request.max_tokens:
        body["max_tokens"] = request.max_tokens
    if request.temperature is not None:
        body["temperature"] = request.temperature
    if request.top_p is not None:
        body["top_p"] = request.top_p
    if request.seed is not None:
        body["seed"] = request.seed
    if request.stop:
        body["stop"] = list(request.stop)
    if request.response_schema is not None:
        body["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "reply", "strict": True, "schema": request.response_schema},
        }
    return orjson.dumps(body)


def _messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Render messages; call ids become short ones by their order, as some backends bound their length."""
    short: dict[str, str] = {}
    out: list[dict[str, Any]] = []
    for message in messages:
        entry: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.tool_calls:
            entry["tool_calls"] = [
                {
                    "id": short.setdefault(call.call_id, f"call_{len(short)}"),
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in message.tool_calls
            ]
        if message.tool_call_id:
            entry["tool_call_id"] = short.setdefault(message.tool_call_id, f"call_{len(short)}")
        out.append(entry)
    return out


def _tool(tool: ToolOffer) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.schema}
    return {"type": "function", "function": function}


class StreamParser:
    """Turns the bytes of one streamed reply into events, batch by batch.

    Neighbouring text deltas of one batch are joined: what costs is the message, not the token.

    The chunks of one reply differ in their token and in nothing else. So the bytes around the token of a
    parsed chunk are kept, and one that has the same around a plain token is known without parsing it.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._before = self._after = b""
        self._tries = TEMPLATE_TRIES
        self._finish = ""
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self.done = False
        self.said_anything = False

    @property
    def finish_reason(self) -> str:
        """The finish reason, "" while there was none."""
        return self._finish

    def feed(self, data: bytes) -> list[ModelEvent]:
        """Parse what arrived.

        Args:
            data: body bytes, cut anywhere.

        Raises:
            ModelError: the backend reported an error, or the bytes are not the protocol.
        """
        if self._rest:
            data = self._rest + data
        end = data.rfind(b"\n") + 1
        self._rest = data[end:]
        if len(self._rest) > MAX_LINE:
            raise ModelProtocolError("the model's stream has a line without end")
        out: list[ModelEvent] = []
        for line in data[:end].split(b"\n"):
            if not line:
                continue
            if line.startswith(b"data:"):
                payload = line[5:].strip()
                if payload == b"[DONE]":
                    self.done = True
                elif payload and not self._plain(payload):
                    self._chunk(payload, out)
            elif line.startswith(b"error:"):  # llama.cpp's way to fail in mid-stream
                self._chunk(b'{"error":' + (line[6:].strip() or b"null") + b"}", out)
            elif line.startswith((b"{", b"<")):
                raise ModelProtocolError("the model's answer is not a stream of events")
        self._flush(out)
        return out

    def _plain(self, payload: bytes) -> bool:
        """Take a chunk that is as the one that was kept, but for a token without escapes."""
        before, after = self._before, self._after
        end = len(payload) - len(after)
        if not before or end < len(before) or self._reasoning:
            return False
        if not (payload.startswith(before) and payload.endswith(after)):
            return False
        token = payload[len(before) : end]
        # ASCII that can be printed stands for itself in JSON, but for two; all else is left to the parser.
        if (
            not token.isascii()
            or b'"' in token
            or b"\\" in token
            or not (text := token.decode()).isprintable()
        ):
            return False
        if text:
            self._text.append(text)
            self.said_anything = True
        self._tries = TEMPLATE_TRIES
        return True

    def _keep(self, payload: bytes, content: str) -> None:
        """Keep what is around a chunk's token, if it is certain where that stands.

        A backend whose chunks differ in more than that is found out after some tries.
        """
        self._tries -= 1
        for name in (b'"content":"', b'"content": "'):
            before, found, after = payload.partition(name + content.encode() + b'"')
            if not found:
                continue
            before, after = before + name, b'"' + after
            with contextlib.suppress(orjson.JSONDecodeError, AttributeError, LookupError, TypeError):
                if orjson.loads(before + _PROBE + after)["choices"][0]["delta"]["content"] == _PROBE.decode():
                    self._before, self._after = before, after
            return

    def _chunk(self, payload: bytes, out: list[ModelEvent]) -> None:
        try:
            chunk = orjson.loads(payload)
            if chunk.get("error"):
                raise error_of_body(chunk)
            for choice in chunk.get("choices") or ():
                delta = choice.get("delta") or {}
                if len(delta) == 1 and type(content := delta.get("content")) is str and not self._reasoning:
                    # A token of text and nothing else, as nearly all chunks are.
                    if content:
                        self._text.append(content)
                        self.said_anything = True
                        if (
                            self._tries
                            and len(chunk["choices"]) == 1
                            and not (choice.get("finish_reason") or chunk.get("usage"))
                        ):
                            self._keep(payload, content)
                else:
                    self._delta(delta, out)
                reason = choice.get("finish_reason")
                if reason:
                    self._finish = _FINISH.get(reason, str(reason))
            if chunk.get("usage"):
                self._flush(out)
                out.append(usage_of(chunk["usage"]))
        except ModelError:
            raise
        except (orjson.JSONDecodeError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise ModelProtocolError("the model's stream is not the protocol's JSON") from error

    def _delta(self, delta: Mapping[str, Any], out: list[ModelEvent]) -> None:
        content = delta.get("content")
        if content:
            if not isinstance(content, str):
                raise TypeError
            if self._reasoning:
                self._flush(out)
            self._text.append(content)
            self.said_anything = True
        thought = delta.get("reasoning_content") or delta.get("reasoning")
        if isinstance(thought, str) and thought:
            if self._text:
                self._flush(out)
            self._reasoning.append(thought)
            self.said_anything = True
        calls = delta.get("tool_calls")
        if calls:
            self._flush(out)
            self.said_anything = True
            for call in calls:
                function = call.get("function") or {}
                out.append(
                    ToolCallDelta(
                        whole(call.get("index")),
                        str(function.get("name") or ""),
                        str(function.get("arguments") or ""),
                    )
                )

    def _flush(self, out: list[ModelEvent]) -> None:
        if self._text:
            out.append(TextDelta("".join(self._text)))
            self._text = []
        if self._reasoning:
            out.append(ReasoningDelta("".join(self._reasoning)))
            self._reasoning = []

    def finished(self) -> Finished:
        """Return the reply's end, once the stream is over."""
        return Finished(self._finish or "stop")


def error_of_body(body: object) -> ModelError:
    """Make the typed error of an error object that came inside a stream."""
    error = body.get("error") if isinstance(body, dict) else None
    code = error.get("code") if isinstance(error, dict) else None
    status = code if isinstance(code, int) else 500
    return error_of_status(status if status >= 400 else 500, _message_of(error), None)


def error_of_status(status: int, message: str, retry_after: float | None) -> ModelError:
    """Make the typed error of an HTTP status.

    Args:
        status: the backend's status, 400 or above (or a redirect, which is not followed).
        message: what the backend said; only used where it speaks about the request.
        retry_after: seconds, from the Retry-After header.
    """
    if status in (401, 403):
        # What the backend said may quote the key: it stays in the log.
        return ModelAuthError(f"the model backend refused the API key (HTTP {status})")
    if status == 429:
        return ModelRateLimitedError("the model backend's rate limit was reached", retry_after)
    if status == 408 or status >= 500:
        return ModelUnavailableError(f"the model backend failed (HTTP {status})", retry_after)
    if status >= 400:
        said = f": {message}" if message else ""
        return ModelRejectedError(f"the model backend refused the request (HTTP {status}){said}")
    return ModelProtocolError(f"the model backend answered HTTP {status}")


def message_of_body(body: bytes) -> str:
    """Return the message of an error body, "" if it has none."""
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError:
        return ""
    return _message_of(data.get("error", data.get("detail")) if isinstance(data, dict) else None)


def _message_of(error: object) -> str:
    message = error.get("message") if isinstance(error, dict) else error
    return " ".join(message.replace("\x00", "").split())[:300] if isinstance(message, str) else ""


def retry_after_of(headers: Mapping[str, str]) -> float | None:
    """Return the seconds of a Retry-After header; dates and nonsense count as absent."""
    try:
        seconds = float(headers.get("retry-after", ""))
    except ValueError:
        return None
    return seconds if 0 <= seconds < 86_400 else None
