"""JSON that comes from outside, read within bounds: request bodies, options, tool arguments and results.

Depth is a size of its own. Whatever walks a value calls itself once a level: pydantic, jsonschema, `json`,
our own folds; and what orjson reads at 1,024 levels it writes at 254. So a value is measured once, where it
enters, by a loop that does not call itself, and what is deeper is refused there with a typed error. Behind
that point nothing has to expect a RecursionError.
"""

from __future__ import annotations

from typing import Any

import orjson

# What every reader and writer behind the entry carries: orjson writes 254 levels, and an event wraps a value
# in a few of its own.
MAX_DEPTH = 249


class JsonError(ValueError):
    """A text is no JSON that may enter. Its message is for whoever sent it and never quotes the text."""


class JsonTooLargeError(JsonError):
    """The text has more bytes than may enter.

    Attributes:
        limit: The most bytes.
        size: The bytes that it has.
    """

    def __init__(self, limit: int, size: int) -> None:
        """Names both sizes."""
        super().__init__(f"has {size} bytes; at most {limit} are accepted")
        self.limit = limit
        self.size = size


class JsonTooDeepError(JsonError):
    """The value is nested deeper than may enter.

    Attributes:
        limit: The most levels.
    """

    def __init__(self, limit: int) -> None:
        """Names the limit."""
        super().__init__(f"is nested too deeply; at most {limit} levels are accepted")
        self.limit = limit


def read_json(text: bytes | str, *, max_bytes: int | None = None, max_depth: int = MAX_DEPTH) -> Any:
    """Reads JSON as RFC 8259 has it: UTF-8, no NaN, no Infinity, no lone surrogate.

    Args:
        text: The text, or its UTF-8.
        max_bytes: The most bytes of UTF-8; None where whoever read the text bounded it.
        max_depth: The most arrays and objects inside of one another; `[]` has one level.

    Raises:
        JsonTooLargeError: It is too large; nothing was parsed.
        JsonTooDeepError: It is nested too deeply.
        JsonError: It is not UTF-8 or not JSON.
    """
    try:
        data = text.encode() if isinstance(text, str) else text
    except UnicodeEncodeError:
        raise JsonError("is not UTF-8: it has half of a surrogate pair") from None
    if max_bytes is not None and len(data) > max_bytes:
        raise JsonTooLargeError(max_bytes, len(data))
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        if _too_deep_for_orjson(error):
            raise JsonTooDeepError(max_depth) from None
        raise JsonError(_why(data)) from None
    # No text nests deeper than it has brackets: most need no look at the value.
    if data.count(b"[") + data.count(b"{") > max_depth and not within_depth(value, max_depth):
        raise JsonTooDeepError(max_depth)
    return value


def within_depth(value: Any, max_depth: int = MAX_DEPTH) -> bool:
    """Returns whether a parsed value nests at most so deep; level by level, so that no stack grows."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(max_depth):
        if not level:
            return True
        level = [
            item
            for holder in level
            for item in (holder.values() if isinstance(holder, dict) else holder)
            if isinstance(item, dict | list)
        ]
    return not level


def has_nul(value: Any) -> bool:
    """Returns whether a text or a key of a parsed value has U+0000, which PostgreSQL's text cannot hold."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            if "\0" in item:
                return True
        elif isinstance(item, dict):
            pending.extend(item)
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)
    return False


def _too_deep_for_orjson(error: orjson.JSONDecodeError) -> bool:
    # Its own bound, 1,024 levels, is above every one of ours.
    return "depth" in error.msg or "recursion" in error.msg.lower()


def _why(data: bytes) -> str:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"is not UTF-8: byte {error.start} is wrong"
    return "is not JSON" if data.strip() else "is empty, JSON is needed"
