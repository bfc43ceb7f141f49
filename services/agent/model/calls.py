"""Which tool call a streamed piece belongs to, whatever of index, id and name a server sends with it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from services.agent.model.port import ToolCallDelta
from services.agent.model.torn import is_torn, mended, whole

# Characters of a call that are remembered to know whether it is whole.
MAX_REMEMBERED = 1024 * 1024
MAX_NAME = 1000
MAX_ID = 200


@dataclass(slots=True)
class _Call:
    number: int
    id: str = ""
    name: str = ""
    pieces: list[str] = field(default_factory=list)
    size: int = 0
    half: str = ""

    @property
    def text(self) -> str:
        return "".join(self.pieces).strip()

    @property
    def whole(self) -> bool:
        """Whether its arguments are a JSON object already."""
        if not self.size or self.size > MAX_REMEMBERED:
            return False
        try:
            return isinstance(orjson.loads(self.text), dict)
        except orjson.JSONDecodeError:
            return False


class CallPieces:
    """Numbers the calls of one reply in the order in which they begin.

    The rules, for all servers: an id that was not seen begins a call, unless the piece has no name and the
    call before is not whole (a new id with each piece); an index that was not seen begins one, too; without
    either, a name does, once the call before is whole.

    Args:
        fields: what a server may want to have back with a call.
    """

    def __init__(self, fields: Sequence[str]) -> None:
        self._fields = fields
        self._calls: list[_Call] = []
        self._by_index: dict[int, _Call] = {}
        self._by_id: dict[str, _Call] = {}

    def piece(self, call: Mapping[str, Any]) -> ToolCallDelta:
        """Take a piece in.

        Args:
            call: an entry of `tool_calls`, or `{"function": ...}` made of a `function_call`.
        """
        function = call.get("function") or {}
        if not isinstance(function, Mapping):
            raise TypeError
        said = call.get("id")
        identity = whole(said)[:MAX_ID] if isinstance(said, str) else ""
        name = function.get("name")
        name = whole(name)[:MAX_NAME] if isinstance(name, str) else ""
        arguments = text_of_arguments(function.get("arguments"))
        found = self._place(_index(call.get("index")), identity, name, arguments)
        if identity and not found.id:
            found.id = identity
            self._by_id.setdefault(identity, found)
        if found.half or is_torn(arguments):
            arguments, found.half = mended(found.half + arguments)
        new_name = self._named(found, name)
        if arguments:
            found.size += len(arguments)
            if found.size <= MAX_REMEMBERED:
                found.pieces.append(arguments)
            else:
                found.pieces.clear()
        extra = {key: call[key] for key in self._fields if isinstance(call.get(key), dict)}
        return ToolCallDelta(found.number, new_name, arguments, found.id, extra or None)

    def _place(self, index: int | None, identity: str, name: str, arguments: str) -> _Call:
        last = self._calls[-1] if self._calls else None
        known = self._by_id.get(identity) if identity else None
        if index is not None:
            last = self._by_index.get(index)
            if last is None:
                # The same id under another index is another call, if it has a name of its own.
                return known if known is not None and not name else self._begin(index, identity)
        if last is None:
            return self._begin(index, identity)
        if known is not None and known is not last:
            return known
        if identity and last.id and identity != last.id:
            begins = name or (arguments.lstrip().startswith("{") and last.whole)
            return self._begin(index, identity) if begins else last
        if identity and not last.id and index is None and name and last.name:
            return self._begin(index, identity)
        return self._begin(index, identity) if self._again(last, name, arguments) else last

    def _again(self, last: _Call, name: str, arguments: str) -> bool:
        """Whether a piece with no other index or id begins a call all the same."""
        new = arguments.strip()
        if not name or not new.startswith("{") or not last.whole:
            return False
        if name != last.name:
            return True
        # The same once more, and what follows an empty object, is of the same call.
        return new != last.text and last.text != "{}"

    def _begin(self, index: int | None, identity: str) -> _Call:
        call = _Call(len(self._calls), identity)
        self._calls.append(call)
        if index is not None:
            self._by_index[index] = call
        if identity:
            self._by_id[identity] = call
        return call

    def _named(self, call: _Call, name: str) -> str:
        """Add a piece of a name; return the name if that changed it."""
        before = call.name
        if not name or name == before:
            return ""  # repeated whole
        if not before or name.startswith(before):
            call.name = name
        elif not call.size and len(before) + len(name) <= MAX_NAME:
            call.name = before + name
        return call.name if call.name != before else ""


def _index(value: object) -> int | None:
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value[:9])
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def text_of_arguments(value: object) -> str:
    """Return arguments as text: most servers send text, some the object itself."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
