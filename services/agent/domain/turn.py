"""Puts the pieces of a model turn together."""

from __future__ import annotations

from collections.abc import Sequence

import orjson

from services.agent.domain.loop import Call, CallState, Turn
from services.agent.model.errors import ModelProtocolError
from services.agent.model.port import (
    Finished,
    ModelEvent,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    Usage,
)

MAX_CALLS = 64
# Bytes of one turn's text and reasoning, and of its calls' arguments: what one write to the store can surely hold.
MAX_TEXT = 1024 * 1024
BAD_ARGUMENTS = "The arguments are not a JSON object. Call the tool again with valid arguments."


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
            elif isinstance(event, Usage):
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
        return self._size > MAX_TEXT

    def _add_call(self, delta: ToolCallDelta) -> None:
        if delta.index not in self._arguments and len(self._arguments) >= MAX_CALLS:
            raise ModelProtocolError(f"the model made more than {MAX_CALLS} tool calls at once")
        pieces = self._arguments.setdefault(delta.index, [])
        pieces.append(delta.arguments)
        self._calls_size += _bytes(delta.arguments)
        if self._calls_size > MAX_TEXT:
            raise ModelProtocolError(f"the arguments of a turn's tool calls are longer than {MAX_TEXT}")
        if delta.name:
            self._names[delta.index] = delta.name

    def build(self) -> Turn:
        """Return the whole turn.

        Raises:
            ModelProtocolError: a constrained reply is not the call it had to be.
        """
        text = "".join(self._text)
        if self._constrained:
            name, arguments = _constrained_call(text)
            call = self._call(0, name, arguments)
            return Turn("", (call,), "tool_calls", self._usage)
        calls = tuple(
            self._call(place, self._names.get(index, ""), "".join(self._arguments[index]))
            for place, index in enumerate(sorted(self._arguments))
        )
        return Turn(text, calls, self._finish or "stop", self._usage)

    def _call(self, place: int, name: str, arguments: str) -> Call:
        """Make a call; one that cannot be made at all is already failed, so that the model may repair it."""
        identity = call_id(self._run_id, self._step, place)
        name = storable(name) or "unnamed"
        if not is_json_object(arguments or "{}"):
            return Call(identity, name[:200], "{}", CallState.FAILED, BAD_ARGUMENTS)
        return Call(identity, name[:200], arguments or "{}")


def storable(text: str) -> str:
    """Return a text without the one character that PostgreSQL cannot store."""
    return text.replace("\x00", "") if "\x00" in text else text


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def is_json_object(text: str) -> bool:
    """Whether the text is one JSON object."""
    try:
        return isinstance(orjson.loads(text), dict)
    except orjson.JSONDecodeError:
        return False


def _constrained_call(text: str) -> tuple[str, str]:
    try:
        call = orjson.loads(text)
        name, arguments = call["name"], call["arguments"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        raise ModelProtocolError("the model's tool call is not the JSON it had to be") from None
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ModelProtocolError("the model's tool call is not the JSON it had to be")
    return name, orjson.dumps(arguments).decode()
