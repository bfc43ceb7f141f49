"""Errors over HTTP: RFC 9457 problem documents, and OpenAI's error object for its routes."""

from __future__ import annotations

import math
from http import HTTPStatus
from typing import Any

import orjson
from starlette.responses import Response

from meshkit.context import current_request_id
from meshkit.errors import (
    FieldViolation,
    HermeshError,
    InvalidArgumentError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnimplementedError,
    http_status,
)

TYPE_BASE = "urn:hermesh:problem:"
CLIENT_CLOSED = 499

# Where HTTP has a better word than the canonical code's.
_STATUS_OF_REASON = {"CURSOR_PAST_END": 416, "CURSOR_EXPIRED": 410, "INPUT_TOO_LARGE": 413}


class HttpError(HermeshError):
    """An error that only HTTP has; it brings its own status.

    Attributes:
        status: The HTTP status code.
        headers: More response headers.
    """

    status: int = 500
    headers: tuple[tuple[str, str], ...] = ()


class BodyTooLargeError(InvalidArgumentError, HttpError):
    """The body is over the limit."""

    default_reason = "INPUT_TOO_LARGE"
    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    # The rest of the body is not read.
    headers = (("connection", "close"),)


class BodyTimeoutError(InvalidArgumentError, HttpError):
    """The body did not arrive in time."""

    default_reason = "DEADLINE_EXCEEDED"
    status = HTTPStatus.REQUEST_TIMEOUT
    headers = (("connection", "close"),)


class UnsupportedCodingError(InvalidArgumentError, HttpError):
    """The body is compressed, which nothing here unpacks."""

    status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE
    # What RFC 9110 has such an answer say.
    headers = (("accept-encoding", "identity"), ("connection", "close"))


class UpgradeRequiredError(UnimplementedError, HttpError):
    """The path is a WebSocket's."""

    status = HTTPStatus.UPGRADE_REQUIRED
    headers = (("upgrade", "websocket"), ("connection", "upgrade"), ("sec-websocket-version", "13"))


class NoSuchPathError(UnimplementedError, HttpError):
    """Nothing is served at this path."""

    status = HTTPStatus.NOT_FOUND


class MethodNotAllowedError(UnimplementedError, HttpError):
    """The path is served, the method is not."""

    status = HTTPStatus.METHOD_NOT_ALLOWED

    def __init__(self, allowed: list[str]) -> None:
        """Names the methods that are served."""
        super().__init__(message=f"this path takes {', '.join(allowed)}")
        self.headers = (("allow", ", ".join(allowed)),)


class OriginRefusedError(PermissionDeniedError, HttpError):
    """A request that a browser made for another site."""

    default_reason = "ORIGIN_REFUSED"
    status = HTTPStatus.FORBIDDEN


class OpenAIError(HttpError):
    """An error of an OpenAI-compatible route, with what its error object holds beside the message.

    Attributes:
        kind: The object's `type`.
        openai_code: The object's `code`.
        param: The parameter at fault.
        retry: Whether the client may send the request again by itself; None leaves it to its rules.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        openai_code: str | None = None,
        param: str | None = None,
        reason: str = "INVALID_ARGUMENT",
        retry: bool | None = None,
    ) -> None:
        """Makes the error."""
        super().__init__(reason, message)
        self.status = status
        self.kind = kind
        self.openai_code = openai_code
        self.param = param
        self.retry = retry


def status_of(error: HermeshError) -> int:
    """Returns the HTTP status of an error."""
    if error.reason in _STATUS_OF_REASON:
        return _STATUS_OF_REASON[error.reason]
    return int(error.status) if isinstance(error, HttpError) else http_status(error)


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Client Closed Request" if status == CLIENT_CLOSED else "Error"


def error_headers(error: HermeshError) -> dict[str, str]:
    """Returns the headers that go with an error, in either form."""
    headers: dict[str, str] = {}
    if isinstance(error, HttpError):
        headers.update(error.headers)
    if isinstance(error, UnauthenticatedError):
        headers["www-authenticate"] = 'Bearer realm="hermesh"'
    if error.retry_after_ms is not None:
        # Retry-After has only seconds; clients that know the other one need not wait a whole one.
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_ms / 1000)))
        headers["retry-after-ms"] = str(error.retry_after_ms)
    if isinstance(error, OpenAIError) and error.retry is not None:
        headers["x-should-retry"] = "true" if error.retry else "false"
    return headers


def problem(error: HermeshError) -> dict[str, Any]:
    """Returns the problem document of an error."""
    status = status_of(error)
    document: dict[str, Any] = {
        "type": TYPE_BASE + error.reason.lower().replace("_", "-"),
        "title": _phrase(status),
        "status": status,
        "detail": error.message,
        "reason": error.reason,
        "request_id": current_request_id(),
    }
    if error.metadata:
        document["metadata"] = error.metadata
    if error.violations:
        document["violations"] = [
            {"field": item.field, "description": item.description} for item in error.violations
        ]
    return document


def problem_response(error: HermeshError) -> Response:
    """Returns the response for an error of the native API."""
    return Response(
        orjson.dumps(problem(error)),
        status_code=status_of(error),
        headers=error_headers(error),
        media_type="application/problem+json",
    )


def openai_object(error: HermeshError) -> dict[str, Any]:
    """Returns OpenAI's error object."""
    if isinstance(error, OpenAIError):
        kind, code, param = error.kind, error.openai_code, error.param
    else:
        kind, code, param = openai_kind(status_of(error)), error.reason.lower(), None
        if error.violations:
            param = error.violations[0].field or None
    message = error.message
    if error.violations:
        message = "; ".join(f"{item.field}: {item.description}" for item in error.violations)
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def openai_kind(status: int) -> str:
    """Returns the `type` of OpenAI's error object."""
    if status == HTTPStatus.UNAUTHORIZED:
        return "authentication_error"
    if status == HTTPStatus.FORBIDDEN:
        return "permission_error"
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"


def openai_response(error: HermeshError) -> Response:
    """Returns the response for an error of an OpenAI-compatible route."""
    status = status_of(error)
    document = openai_object(error)
    if status == HTTPStatus.UNAUTHORIZED:
        document["error"]["code"] = "invalid_api_key"
    elif error.reason == "MODEL_NOT_FOUND":
        document["error"]["code"] = "model_not_found"
        document["error"]["param"] = "model"
    return Response(
        orjson.dumps(document),
        status_code=status,
        headers=error_headers(error),
        media_type="application/json",
    )


def violation(field: str, description: str) -> InvalidArgumentError:
    """Returns the error for one wrong field."""
    return InvalidArgumentError(
        message=f"{field}: {description}", violations=[FieldViolation(field, description)]
    )


__all__ = [
    "BodyTimeoutError",
    "BodyTooLargeError",
    "HttpError",
    "MethodNotAllowedError",
    "NoSuchPathError",
    "OpenAIError",
    "OriginRefusedError",
    "UnsupportedCodingError",
    "UpgradeRequiredError",
    "error_headers",
    "openai_kind",
    "openai_object",
    "openai_response",
    "problem",
    "problem_response",
    "status_of",
    "violation",
]
