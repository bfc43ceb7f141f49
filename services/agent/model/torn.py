"""Text that a server tore apart: halves of a character that come in two pieces.

A server that sends token by token may cut within a character. Its bytes then come as half a UTF-8 sequence in
each of two events (kept here as Python's surrogate escapes), or as half a surrogate pair in each of two JSON
strings. Both are put together again; a half that stays alone becomes U+FFFD.
"""

from __future__ import annotations

import re

_BYTES = re.compile(r"(?<![\ud800-\udbff])[\udc80-\udcff]+")
_PAIR = re.compile(r"[\ud800-\udbff][\udc00-\udfff]")
_ALONE = re.compile(r"[\ud800-\udfff]")
_TAIL = re.compile(r"(?:[\ud800-\udbff]|(?<![\ud800-\udbff])[\udc80-\udcff]{1,3})\Z")


def is_torn(text: str) -> bool:
    """Whether the text has halves of characters."""
    return not text.isascii() and _ALONE.search(text) is not None


def mended(text: str) -> tuple[str, str]:
    """Put halves together.

    Returns:
        The text without halves, and what at its end may be the beginning of a character.
    """
    text = _PAIR.sub(lambda pair: pair[0].encode("utf-16-le", "surrogatepass").decode("utf-16-le"), text)
    text = _BYTES.sub(_decoded, text)
    tail = _TAIL.search(text)
    rest = tail[0] if tail is not None else ""
    if rest:
        text = text[: -len(rest)]
    return whole(text), rest


def _decoded(match: re.Match[str]) -> str:
    raw = match[0].encode("utf-8", "surrogateescape")
    at_end = match.end() == len(match.string)
    for cut in range(min(3, len(raw)) + 1) if at_end else (0,):
        head, tail = raw[: len(raw) - cut], raw[len(raw) - cut :]
        if cut and not _may_begin(tail):
            continue
        try:
            return head.decode() + tail.decode("utf-8", "surrogateescape")
        except UnicodeDecodeError:
            continue
    return raw.decode("utf-8", "replace")


def _may_begin(raw: bytes) -> bool:
    """Whether bytes are the first of a UTF-8 sequence of several."""
    first = raw[0]
    length = 2 if 0xC2 <= first <= 0xDF else 3 if 0xE0 <= first <= 0xEF else 4 if 0xF0 <= first <= 0xF4 else 0
    return len(raw) < length and all(0x80 <= one <= 0xBF for one in raw[1:])


def whole(text: str) -> str:
    """Return the text with U+FFFD for each half that stayed alone."""
    return _ALONE.sub("\ufffd", text)
