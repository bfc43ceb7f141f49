"""JSON whose parts are kept as they were written: nothing is lost to a parser's idea of a number.

Parsers make floats of long numbers, and renderers refuse what they cannot hold. What somebody wrote and
somebody else has to read as it is (the arguments of a tool call) goes from text to text instead.
"""

from __future__ import annotations

import re

import msgspec
import orjson

# The deepest nesting that is taken: renderers give up at 254 levels, and what is kept is put into other JSON.
MAX_DEPTH = 249

_OBJECT = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ARRAY = msgspec.json.Decoder(list[msgspec.Raw])
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_BRACKET = re.compile(r"[\[\]{}]")


def members(text: str) -> dict[str, str]:
    """Return the members of a JSON object, each value's text as it stands there.

    Of a name that comes twice the last value counts, as for every parser.

    Raises:
        ValueError: the text is not one JSON object.
    """
    try:
        return {name: str(value, "utf-8") for name, value in _OBJECT.decode(text).items()}
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError("not a JSON object") from error


def elements(text: str) -> list[str]:
    """Return the elements of a JSON array, each one's text as it stands there.

    Raises:
        ValueError: the text is not one JSON array.
    """
    try:
        return [str(value, "utf-8") for value in _ARRAY.decode(text)]
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError("not a JSON array") from error


def depth(text: str) -> int:
    """Return how deep arrays and objects are nested in JSON; of a text that is none, no certain number."""
    deepest = now = 0
    for bracket in _BRACKET.findall(_STRING.sub("", text)):
        if bracket in "[{":
            now += 1
            deepest = max(deepest, now)
        else:
            now -= 1
    return deepest


def is_object(text: str) -> bool:
    """Whether the text is one JSON object that everybody can read and pass on.

    Its JSON is strict, a float can come near its numbers, and it is nested at most `MAX_DEPTH` deep.
    """
    try:
        if not isinstance(orjson.loads(text), dict):
            return False
    except orjson.JSONDecodeError:
        return False
    # It takes more brackets than that to be nested deeper.
    return text.count("{") + text.count("[") <= MAX_DEPTH or depth(text) <= MAX_DEPTH


def fragment(text: str, default: str) -> orjson.Fragment:
    """Return JSON to be put into other JSON as it stands; `default` in place of what is none."""
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        text = default
    return orjson.Fragment(text)
