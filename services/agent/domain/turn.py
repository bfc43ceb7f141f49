"""Puts the pieces of a model turn together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import orjson

from meshkit import verbatim
from services.agent.domain.loop import Call, CallState, Turn
from services.agent.model.errors import ModelProtocolError
from services.agent.model.port import (
    Finished,
    Kept,
    ModelEvent,
    ReasoningDelta,
    RefusalDelta,
    TextDelta,
    ToolCallDelta,
    Usage,
)

MAX_CALLS = 64
# Bytes of one turn's text and reasoning, and of its calls' arguments: what one write to the store can hold.
MAX_TEXT = 1024 * 1024
# Bytes of what a backend may want to have back with one call.
MAX_PROVIDER = 64 * 1024
BAD_ARGUMENTS = (
    "The arguments are not a JSON object, or hold a number beyond all bounds, or are nested deeper than "
    f"{verbatim.MAX_DEPTH} levels. Call the tool again with valid arguments."
)
LONG_ARGUMENTS = (
    f"The arguments of this turn's calls are longer than {MAX_TEXT} bytes and were not kept. "
    "Call the tool again with shorter ones."
)


def call_id(run_id: str, step: int, index: int) -> str:
    """Return a call's id, the same on every replica that works on the run."""
    return f"{run_id}:{step}:{index}"


class TurnBuilder:
    """Collects the events of one model turn.

    Args:
        run_id, step: where the turn stands; call ids are made from them.
        prefix: text that the turn already had, when it is continued.
        constrained: the text is a tool call as JSON (`{"name", "arguments"}`), not a reply.
    """

    def __init__(self, run_id: str, step: int, prefix: str = "", constrained: bool = False) -> None:
        self._run_id = run_id
        self._step = step
        self._constrained = constrained
        self._text = [prefix] if prefix else []
        self._names: dict[int, str] = {}
        self._arguments: dict[int, list[str]] = {}
        self._size = _bytes(prefix)
        self._calls_size = 0
        self._too_long: set[int] = set()
        self._most_calls = 0
        self._ids: dict[int, str] = {}
        self._fields: dict[int, dict[str, Any]] = {}
        self._kept: Mapping[str, Any] | None = None
        self._refused = False
        self._usage = Usage()
        self._finish = ""

    def add(self, events: Sequence[ModelEvent]) -> tuple[str, str]:
        """Take a batch in.

        Returns:
            The text and the reasoning of the batch that readers may see now.
        """
        text: list[str] = []
        reasoning: list[str] = []
        for event in events:
            if isinstance(event, TextDelta):
                text.append(event.text)
            elif isinstance(event, ReasoningDelta):
                reasoning.append(event.text)
            elif isinstance(event, ToolCallDelta):
                self._add_call(event)
            elif isinstance(event, RefusalDelta):
                text.append(event.text)
                self._refused = True
            elif isinstance(event, Kept):
                self._kept = event.fields
            elif isinstance(event, Usage):
                if event != Usage():  # some send zeros with each piece
                    self._usage = event
            elif isinstance(event, Finished):
                self._finish = event.reason
        said, thought = storable("".join(text)), storable("".join(reasoning))
        self._text.append(said)
        self._size += _bytes(said) + _bytes(thought)
        if self.full:
            self._finish = "length"
        return ("" if self._constrained else said), thought

    @property
    def full(self) -> bool:
        """Whether the turn has as much text and reasoning as a turn may have: the reply ends here."""
        return max(self._size, self._calls_size) > MAX_TEXT

    def _add_call(self, delta: ToolCallDelta) -> None:
        self._most_calls = max(self._most_calls, delta.index + 1)
        if delta.index not in self._arguments and len(self._arguments) > MAX_CALLS:
            return  # the first one too many is kept, to tell the model
        pieces = self._arguments.setdefault(delta.index, [])
        if delta.name:
            self._names[delta.index] = delta.name
        if delta.id:
            self._ids[delta.index] = delta.id
        if delta.fields:
            self._fields.setdefault(delta.index, {}).update(delta.fields)
        self._calls_size += _bytes(delta.arguments)
        if self._calls_size > MAX_TEXT:
            self._too_long.add(delta.index)
        else:
            pieces.append(delta.arguments)

    def build(self) -> Turn:
        """Return the whole turn.

        Raises:
            ModelProtocolError: a constrained reply is not the call it had to be.
        """
        text = "".join(self._text)
        if self._constrained and not self._refused:
            name, arguments = _constrained_call(text)
            call = self._call(0, name, arguments)
            return Turn("", (call,), "tool_calls", self._usage)
        calls = tuple(self._made(place, index) for place, index in enumerate(sorted(self._arguments)))
        finish = self._finish or "stop"
        if self._refused and finish == "stop":
            finish = "refusal"
        if finish == "tool_calls" and not calls:
            finish = "stop"
        provider = _json(self._kept) if self._kept and calls else ""
        return Turn(text, calls, finish, self._usage, provider)

    def _made(self, place: int, index: int) -> Call:
        """Make a call of its pieces, with what its backend may want to have back."""
        call = self._call(place, self._names.get(index, ""), "".join(self._arguments[index]))
        if place >= MAX_CALLS:
            content = (
                f"{self._most_calls} calls were made at once, and only the first {MAX_CALLS} are run: "
                "this one and all after it are not. Make them again in the next turn."
            )
            call = replace(call, state=CallState.FAILED, content=content)
        elif index in self._too_long:
            call = replace(call, arguments="{}", state=CallState.FAILED, content=LONG_ARGUMENTS)
        back: dict[str, Any] = {}
        if index in self._ids:
            back["id"] = storable(self._ids[index])
        if index in self._fields:
            back["fields"] = self._fields[index]
        provider = _json(back) if back else ""
        return replace(call, provider=provider if len(provider) <= MAX_PROVIDER else "")

    def _call(self, place: int, name: str, arguments: str) -> Call:
        """Make a call; one that cannot be made at all is already failed, so that the model may repair it."""
        identity = call_id(self._run_id, self._step, place)
        name = storable(name) or "unnamed"
        arguments = mended_arguments(arguments).strip(" \t\r\n")
        if not verbatim.is_object(arguments):
            return Call(identity, name[:200], "{}", CallState.FAILED, BAD_ARGUMENTS)
        return Call(identity, name[:200], arguments)


def mended_arguments(text: str) -> str:
    """Return arguments as the model meant them, where a server wrote them in one of the known wrong ways.

    Nothing, blanks and null are an empty object; an empty object before the real one is left out, as is the
    same object a second time; an object within a JSON string is taken out of it. Everything else is returned
    as it is.
    """
    bare = text.strip()
    if bare in ("", "null", '""', '"{}"'):
        return "{}"
    if verbatim.is_object(text):
        return text
    if bare.startswith("{}") and verbatim.is_object(bare[2:]):
        return bare[2:].strip()
    half = bare[: len(bare) // 2]
    if half and bare == half + half and verbatim.is_object(half):
        return half
    if bare.startswith('"'):
        try:
            inner = orjson.loads(bare)
        except orjson.JSONDecodeError:
            return text
        if isinstance(inner, str) and verbatim.is_object(inner):
            return inner
    return text


def _json(value: Mapping[str, Any]) -> str:
    """Return what a backend sent, as text to be stored; what cannot be is left out."""
    try:
        return orjson.dumps(value).decode()
    except (TypeError, orjson.JSONEncodeError):
        return ""


def storable(text: str) -> str:
    """Return a text without what cannot be stored: U+0000 in PostgreSQL, half a character in UTF-8."""
    if "\x00" in text:
        text = text.replace("\x00", "")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            text = text.encode("utf-8", "replace").decode()
    return text


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _constrained_call(text: str) -> tuple[str, str]:
    try:
        call = verbatim.members(text)
        name, arguments = orjson.loads(call["name"]), call["arguments"]
    except (ValueError, KeyError):
        raise ModelProtocolError("the model's tool call is not the JSON it had to be") from None
    if not isinstance(name, str) or not arguments.startswith("{"):
        raise ModelProtocolError("the model's tool call is not the JSON it had to be")
    return name, arguments
