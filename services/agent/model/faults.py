"""Which error an answer of a model server is, in all the forms that servers give it."""

from __future__ import annotations

import re
from collections.abc import Mapping
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

MAX_MESSAGE = 300
# What stands for a status where a server says it in words, as a code, a type or a status. The first that a
# server's word contains counts.
_WORDS = (
    ("insufficient_quota", 402),
    ("context_length", 400),
    ("rate_limit", 429),
    ("ratelimit", 429),
    ("resource_exhausted", 429),
    ("too_many_requests", 429),
    ("over_capacity", 503),
    ("overloaded", 503),
    ("unavailable", 503),
    ("invalid_api_key", 401),
    ("authentication", 401),
    ("unauthenticated", 401),
    ("unauthorized", 401),
    ("permission", 403),
    ("forbidden", 403),
    ("not_found", 404),
    ("notfound", 404),
    ("timeout", 504),
    ("deadline", 504),
    ("internal", 500),
    ("server_error", 500),
    ("api_error", 500),
    ("invalid", 400),
    ("bad_request", 400),
    ("badrequest", 400),
    ("tool_use_failed", 400),
    ("content_filter", 400),
    ("unsupported", 400),
    ("failed_precondition", 400),
)
# In a message, only what says it beyond doubt.
_SAID = (
    (re.compile(r"maximum context length|context (length|window|size)|too many tokens", re.I), 400),
    (re.compile(r"rate limit|too many requests", re.I), 429),
    (re.compile(r"overloaded|over capacity", re.I), 503),
)
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_SECRETS = re.compile(
    r"\b(?:sk|pk|gsk|xai|hf|AIza|key)[-_][A-Za-z0-9_\-*.]{6,}|\bAIza[A-Za-z0-9_\-]{8,}|\bBearer\s+\S+", re.I
)
_LONG_WORDS = re.compile(r"[^\s'\"`]*(?:\*{2,}|(?=[A-Za-z_\-.]*\d)[A-Za-z0-9_\-./+=]{12,})[^\s'\"`]*")
_TRACE = re.compile(r"\s*(?:Received Model Group|Traceback \(most recent call last\)).*", re.S)


def error_of_body(body: object) -> ModelError:
    """Make the typed error of what came inside a stream in place of a piece of the reply.

    Args:
        body: what the server sent, decoded: an object of any of the forms that servers use, a list of one, or
            its text.
    """
    status, message = _read(body)
    return error_of_status(status if 400 <= status < 600 else 500, message, None)


def is_error(chunk: Mapping[str, Any]) -> bool:
    """Whether an object without choices is an error, in a form other than `{"error": ...}`."""
    if chunk.get("object") == "error" or chunk.get("type") == "error":
        return True
    if chunk.get("detail"):
        return True
    return isinstance(chunk.get("message"), str) and any(
        chunk.get(name) for name in ("code", "status", "status_code", "error_type", "type")
    )


def _read(body: object, depth: int = 0) -> tuple[int, str]:
    """Return the status and the message that an error says; 0 and "" where it does not."""
    if isinstance(body, list):
        return _read(body[0], depth) if body else (0, "")
    if not isinstance(body, Mapping):
        message = _text(body)
        return _status_said(message), message
    inner = body.get("error")
    if inner and depth < 4 and not isinstance(inner, bool):
        status, message = _read(inner, depth + 1)
        outer = _status(body)
        return status or outer, message or message_of(body)
    message = message_of(body)
    return _status(body) or _status_said(message), message


def _status(body: Mapping[str, Any]) -> int:
    """Return the status that an error's own fields say, 0 for none."""
    words: list[str] = []
    for name in ("status_code", "code", "status", "type", "error_type"):
        value = body.get(name)
        if isinstance(value, str):
            if value.isascii() and value.isdigit():
                value = int(value[:9])
            elif value:
                words.append(_CAMEL.sub("_", value).lower().replace("-", "_").replace(" ", "_"))
        if isinstance(value, int) and not isinstance(value, bool) and 400 <= value < 600:
            return value
    # The code says more than the type: `invalid_request_error` is the type of half of all errors.
    for word in words:
        for part, status in _WORDS:
            if part in word:
                return status
    return 0


def _status_said(message: str) -> int:
    return next((status for pattern, status in _SAID if pattern.search(message)), 0)


def status_of_answer(status: int, body: bytes) -> int:
    """Return the status that an answer means: a used-up quota comes as 429, and waiting does not help."""
    if status != 429:
        return status
    try:
        return 402 if _read(orjson.loads(body))[0] == 402 else status
    except orjson.JSONDecodeError:
        return status


def error_of_status(status: int, message: str, retry_after: float | None) -> ModelError:
    """Make the typed error of an HTTP status.

    Args:
        status: the backend's status, 400 or above (or a redirect, which is not followed).
        message: what the backend said, fit for people.
        retry_after: seconds, from the Retry-After header.
    """
    said = f": {message}" if message else ""
    if status in (401, 403):
        # What the backend said may quote the key, or a part of it.
        return ModelAuthError(
            f"the model backend refused the API key (HTTP {status}){_LONG_WORDS.sub('[key]', said)}"
        )
    if status == 429:
        return ModelRateLimitedError(f"the model backend's rate limit was reached{said}", retry_after)
    if status == 402:
        spent = ModelRateLimitedError(f"the model backend's quota is used up{said}")
        spent.retryable = False
        return spent
    if status == 408 or status >= 500:
        return ModelUnavailableError(f"the model backend failed (HTTP {status}){said}", retry_after)
    if status >= 400:
        return ModelRejectedError(f"the model backend refused the request (HTTP {status}){said}")
    return ModelProtocolError(f"the model backend answered HTTP {status}")


def message_of_body(body: bytes) -> str:
    """Return the message of an error answer's body, "" if it has none."""
    try:
        return _read(orjson.loads(body))[1]
    except orjson.JSONDecodeError:
        return ""


def message_of(body: Mapping[str, Any]) -> str:
    """Return the message of an error object."""
    for name in ("message", "detail", "msg", "error_message", "title"):
        found = _text(body.get(name))
        if found:
            return found
    return ""


def _text(value: object, depth: int = 0) -> str:
    """Return what a message says, whether it is text, an object or a list of those (FastAPI's `detail`)."""
    if isinstance(value, str):
        return _fit(value)
    if depth > 4:
        return ""
    if isinstance(value, list):
        return _fit("; ".join(filter(None, (_text(one, depth + 1) for one in value[:5]))))
    if isinstance(value, Mapping):
        said = next(filter(None, (_text(value.get(n), depth + 1) for n in ("message", "msg", "detail"))), "")
        place = value.get("loc")
        if isinstance(place, list) and said:
            return _fit(f"{'.'.join(str(step) for step in place[:8])}: {said}")
        return said
    return ""


def _fit(text: str) -> str:
    """Make a server's text one line for people, without keys and traces."""
    text = _TRACE.sub("", text[: 20 * MAX_MESSAGE].replace("\x00", ""))
    text = text.encode("utf-8", "replace").decode()
    return _SECRETS.sub("[key]", " ".join(text.split()))[:MAX_MESSAGE]


def retry_after_of(headers: Mapping[str, str]) -> float | None:
    """Return the seconds of a Retry-After header; dates and nonsense count as absent."""
    try:
        seconds = float(headers.get("retry-after", ""))
    except ValueError:
        return None
    return seconds if 0 <= seconds < 86_400 else None
