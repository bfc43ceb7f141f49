"""Page tokens: opaque to callers, bound to what they continue, and checked before they are used."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Sequence

from meshkit.errors import FieldViolation, InvalidArgumentError

_DIGEST_BYTES = 8


def make_page_token(method: str, bound: Sequence[object], position: str) -> str:
    """Returns the token of the page after `position`.

    Args:
        method: What is listed, for example `ListMemories`.
        bound: What the list depends on (tenant, filters): a token does not fit another list.
        position: Where the next page begins, in the method's own words.
    """
    data = _digest(method, bound) + position.encode("utf-8")
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def read_page_token(method: str, bound: Sequence[object], token: str) -> str:
    """Returns the position that a token was made for; an empty token gives an empty position.

    The digest finds mistakes and not attacks: whoever forges a position can only ask for another page of
    what they may list anyway.

    Raises:
        InvalidArgumentError: The token is not one of this list (PAGE_TOKEN_INVALID).
    """
    if not token:
        return ""
    try:
        data = base64.b64decode(
            token.encode("ascii") + b"=" * (-len(token) % 4), altchars=b"-_", validate=True
        )
        position = data[_DIGEST_BYTES:].decode("utf-8")
    except (binascii.Error, ValueError):
        raise _invalid() from None
    if len(data) <= _DIGEST_BYTES or data[:_DIGEST_BYTES] != _digest(method, bound):
        raise _invalid()
    return position


def _digest(method: str, bound: Sequence[object]) -> bytes:
    text = "\x1f".join((method, *(f"{len(str(part))}:{part}" for part in bound)))
    return hashlib.blake2b(text.encode("utf-8"), digest_size=_DIGEST_BYTES).digest()


def _invalid() -> InvalidArgumentError:
    text = "is not a token of this list"
    return InvalidArgumentError(
        "PAGE_TOKEN_INVALID", f"page_token {text}", violations=[FieldViolation("page_token", text)]
    )
