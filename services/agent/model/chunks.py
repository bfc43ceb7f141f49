"""The chunks of a streamed reply as events, whatever server of the Chat Completions protocol wrote them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import orjson

from meshkit import verbatim
from services.agent.model.calls import CallPieces
from services.agent.model.errors import (
    ModelError,
    ModelProtocolError,
    ModelTruncatedError,
    ModelUnavailableError,
)
from services.agent.model.faults import error_of_body, is_error
from services.agent.model.kept import KeptFields
from services.agent.model.numbers import usage_of
from services.agent.model.port import Finished, ModelEvent, ReasoningDelta, RefusalDelta, TextDelta
from services.agent.model.profiles import TOLERANT, Profile
from services.agent.model.torn import mended, whole

TEMPLATE_TRIES = 8
NOT_JSON = object()
# Python itself refuses more than 4,300.
_MOST_DIGITS = 400
_PROBE = b"where the token stands"
_FINISH = {
    **dict.fromkeys(("tool_calls", "function_call", "tool_use", "tool_call"), "tool_calls"),
    **dict.fromkeys(("length", "max_tokens", "model_length"), "length"),
    **dict.fromkeys(("content_filter", "safety", "recitation", "prohibited_content"), "content_filter"),
    "refusal": "refusal",
}
# Reasons that say that the reply is no reply. Of these a server may well give one when it is asked again.
_FAILED = ("error", "insufficient_system_resource", "malformed_function_call")


class ChunkReader:
    """Turns chunks into events, batch by batch.

    Neighbouring text deltas of one batch are joined: what costs is the message, not the token.

    The chunks of one reply differ in their token and in nothing else. So the bytes around the token of a
    parsed chunk are kept, and one that has the same around a plain token is known without parsing it.

    Args:
        profile: what the server wants to have back is kept.
    """

    def __init__(self, profile: Profile = TOLERANT) -> None:
        self._before = self._after = b""
        self._tries = TEMPLATE_TRIES
        self._finish = ""
        self._text: list[str] = []
        self._reasoning: list[str] = []
        # Whether the chunk was JSON only by a loose reading, or half a character waits for the other half.
        self._careful = False
        self._halves: dict[str, str] = {}
        # The field in which the server sends reasoning.
        self._thought = ""
        self._calls = CallPieces(profile.call_fields)
        self._kept = KeptFields(profile.message_fields)
        self.said_anything = False

    @property
    def finish_reason(self) -> str:
        """The finish reason, "" while there was none."""
        return self._finish

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

    def _loads(self, payload: bytes) -> Any:
        """Decode JSON: strictly, or as loosely as servers write it (NaN, halves of characters)."""
        try:
            return orjson.loads(payload)
        except orjson.JSONDecodeError:
            self._careful = True
            return _exact(payload)

    def _chunk(self, payload: bytes, out: list[ModelEvent]) -> bool:
        """Take a chunk in; False if it is not JSON."""
        try:
            chunk = orjson.loads(payload)
            if self._careful:
                self._careful = bool(self._halves)
        except orjson.JSONDecodeError:
            chunk = self._loads(payload)
            if chunk is NOT_JSON:
                return False
        try:
            if type(chunk) is list:  # Gemini's errors
                chunk = chunk[0]
            if chunk.get("error"):
                if self._finish:
                    return True
                raise error_of_body(chunk)
            choices = chunk.get("choices")
            for choice in choices or ():
                delta = choice.get("delta") or {}
                if (
                    len(delta) == 1
                    and type(content := delta.get("content")) is str
                    and not (self._reasoning or self._careful)
                ):
                    # A token of text and nothing else, as nearly all chunks are.
                    if content:
                        self._text.append(content)
                        self.said_anything = True
                        if (
                            self._tries
                            and len(choices) == 1
                            and not (choice.get("finish_reason") or chunk.get("usage"))
                        ):
                            self._keep(payload, content)
                else:
                    if not delta and not self.said_anything:
                        delta = choice.get("message") or {}  # a whole reply, not streamed
                    self._delta(delta, out, payload, choices.index(choice))
                reason = choice.get("finish_reason")
                if reason:
                    self._finishes(str(reason))
                    self._count(choice.get("usage"), out)
            if chunk.get("usage"):
                self._count(chunk["usage"], out)
            elif not choices or self._finish:
                self._aside(chunk, out)
        except ModelError:
            raise
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, RecursionError) as error:
            if not self._finish:
                raise ModelProtocolError("the model's stream is not the protocol's JSON") from error
        return True

    def _aside(self, chunk: Mapping[str, Any], out: list[ModelEvent]) -> None:
        """Look at a chunk that ends a reply, or says nothing of one."""
        groq = chunk.get("x_groq")
        if isinstance(groq, Mapping):
            self._count(groq.get("usage"), out)
            if groq.get("error") and not self._finish:
                raise error_of_body(groq)
        if not self._finish and not chunk.get("choices") and is_error(chunk):
            raise error_of_body(chunk)

    def _count(self, usage: object, out: list[ModelEvent]) -> None:
        if usage:
            self._flush(out)
            out.append(usage_of(usage))

    def _finishes(self, reason: str) -> None:
        said = reason.lower()
        if said in _FAILED or said.startswith("function_call_filter"):
            raise ModelUnavailableError(f"the model backend ended its reply with {reason[:100]!r}")
        if said == "abort":
            raise ModelTruncatedError("the model backend aborted its reply")
        if self._finish in ("", "stop"):
            self._finish = _FINISH.get(said, "stop")

    def _delta(self, delta: Mapping[str, Any], out: list[ModelEvent], payload: bytes, place: int) -> None:
        thought = delta.get("reasoning_content")
        if thought:
            self._thought = "reasoning_content"
        elif thought := delta.get("reasoning"):
            self._thought = "reasoning"
        details = delta.get("reasoning_details")
        if details:
            self._kept.entries("reasoning_details", details)
        if thought and type(thought) is str:
            self._think(thought, out)
            if len(delta) == 1:
                return
        elif details:
            self._think("".join(_texts(details)), out)
        content = delta.get("content")
        if content:
            self._content(content, out)
        if refusal := delta.get("refusal"):
            self._refuse(str(refusal), out)
        calls = delta.get("tool_calls")
        if isinstance(calls, Mapping):
            calls = [calls]
        if not calls and (old := delta.get("function_call")):
            calls = [{"function": old}]
        if calls:
            self._flush(out)
            self.said_anything = True
            for number, call in enumerate(calls):
                function = call.get("function")
                if function and not isinstance(function.get("arguments"), str | None):
                    arguments = _exactly(payload, place, number) or function["arguments"]
                    call = {**call, "function": {**function, "arguments": arguments}}
                out.append(self._calls.piece(call))

    def _content(self, content: object, out: list[ModelEvent]) -> None:
        """Take content in: text, or a list of parts of several kinds."""
        if isinstance(content, str):
            self._say(content, out)
            return
        if isinstance(content, Mapping):
            content = [content]
        if not isinstance(content, list):
            raise TypeError
        for part in content:
            if isinstance(part, str):
                self._say(part, out)
                continue
            kind = part.get("type")
            if kind in ("thinking", "reasoning"):
                inner = part.get("thinking") or part.get("reasoning") or part.get("text") or ""
                self._think(inner if isinstance(inner, str) else "".join(_texts(inner)), out)
            elif kind == "refusal":
                self._refuse(str(part.get("refusal") or ""), out)
            elif isinstance(part.get("text"), str):
                self._say(part["text"], out)

    def _mended(self, channel: str, text: str) -> str:
        """Return a text with halves of characters put together, those of the pieces before among them."""
        if not self._careful:
            return text
        text, half = mended(self._halves.pop(channel, "") + text)
        if half:
            self._halves[channel] = half
            self._before = b""  # the token after it is not to be taken unparsed
        return text

    def _say(self, text: str, out: list[ModelEvent]) -> None:
        text = self._mended("text", text)
        if text:
            if self._reasoning:
                self._flush(out)
            self._text.append(text)
            self.said_anything = True

    def _think(self, text: str, out: list[ModelEvent]) -> None:
        if self._careful:
            text = self._mended("reasoning", text)
        if text:
            if self._text:
                self._flush(out)
            self._reasoning.append(text)
            self.said_anything = True

    def _refuse(self, text: str, out: list[ModelEvent]) -> None:
        text = self._mended("refusal", text)
        if text:
            self._flush(out)
            out.append(RefusalDelta(text))
            self.said_anything = True

    def _flush(self, out: list[ModelEvent]) -> None:
        if self._text:
            out.append(TextDelta("".join(self._text)))
            self._text = []
        if self._reasoning:
            text = "".join(self._reasoning)
            out.append(ReasoningDelta(text))
            self._kept.text(self._thought, text)
            self._reasoning = []

    def _last_halves(self, out: list[ModelEvent]) -> None:
        """Say what waits for the other half of a character that will not come."""
        rest, self._halves = {channel: whole(half) for channel, half in self._halves.items()}, {}
        if text := rest.get("text", "") + rest.get("refusal", ""):
            out.append(TextDelta(text))
        if thought := rest.get("reasoning"):
            out.append(ReasoningDelta(thought))

    def end(self) -> tuple[ModelEvent, ...]:
        """Return the reply's last events, once the stream is over."""
        kept = self._kept.event()
        finished = Finished(self._finish or "stop")
        return (finished,) if kept is None else (kept, finished)


def _texts(parts: Iterable[object]) -> Iterable[str]:
    """Yield the texts of parts, whatever they are of."""
    for part in parts:
        if isinstance(part, Mapping):
            part = part.get("text") or part.get("summary")
        if isinstance(part, str):
            yield part


def _exact(payload: bytes) -> Any:
    """Decode JSON loosely and without loss: whole numbers of any size, halves of characters, NaN."""
    try:
        return json.loads(payload.decode("utf-8", "surrogateescape"), strict=False, parse_int=_number)
    except (ValueError, RecursionError):
        return NOT_JSON


def _number(digits: str) -> int | float:
    """Read a whole number; one that no double holds is as good as infinite, and costs no time."""
    return int(digits) if len(digits) <= _MOST_DIGITS else float(digits)


def _exactly(payload: bytes, place: int, number: int) -> str:
    """Return arguments that are an object as they were written, "" where they are not found so."""
    try:
        choice = verbatim.members(verbatim.elements(verbatim.members(payload.decode())["choices"])[place])
        calls = verbatim.members(choice.get("delta") or choice["message"])["tool_calls"]
        call = verbatim.elements(calls)[number] if calls.startswith("[") else calls
        return verbatim.members(verbatim.members(call)["function"])["arguments"]
    except (ValueError, KeyError, IndexError):
        return ""
