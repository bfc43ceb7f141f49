"""How a route is declared: once, for the router and for the OpenAPI document."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal

import orjson
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from gateway.body import MAX_BODY, M, parse_json, read_body, validate
from gateway.context import Gateway
from gateway.cursor import canonical_id
from gateway.problems import violation
from meshkit.context import run_id_var
from meshkit.errors import NotFoundError
from meshkit.ids import uuid7

Handler = Callable[[Gateway, Request], Awaitable[ASGIApp]]
ErrorForm = Literal["problem", "openai"]

MAX_REQUEST_ID = 200


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter in the path, the query or a header."""

    name: str
    place: Literal["path", "query", "header"]
    description: str
    kind: Literal["string", "integer", "boolean"] = "string"
    required: bool = False
    format: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """One response that a route gives.

    Attributes:
        description: What it means.
        model: The body, JSON; None for another media type or none.
        media_type: Of a body without a model.
    """

    description: str
    model: type[BaseModel] | None = None
    media_type: str | None = None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One method of one path.

    Attributes:
        method: The HTTP method.
        path: Starlette's path, `/v1/sessions/{session_id}`.
        handler: Answers it; what it raises becomes an error response.
        summary: One line for the documentation.
        answers: By status code.
        body: The request body's model.
        params: Beside those of the path, which are found there.
        tag: Its group in the documentation.
        public: Whether it needs no key.
        errors: The form of its errors.
        description: More for the documentation.
    """

    method: str
    path: str
    handler: Handler
    summary: str
    answers: dict[int, Answer]
    body: type[BaseModel] | None = None
    params: tuple[Param, ...] = ()
    tag: str = "native"
    public: bool = False
    errors: ErrorForm = "problem"
    description: str = ""


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Returns a JSON response."""
    return Response(orjson.dumps(value), status_code=status, headers=headers, media_type="application/json")


async def read_model(
    gateway: Gateway, request: Request, model: type[M], *, optional: bool = False, limit: int = MAX_BODY
) -> M:
    """Reads, parses and checks the body.

    Args:
        gateway: For its limits.
        request: The request.
        model: What the body must be.
        optional: An empty body counts as an empty object.
        limit: The most bytes of the body.
    """
    body = await read_body(request, limit=limit, timeout=gateway.settings.body_timeout_seconds)
    if optional and not body.strip():
        return validate(model, {})
    return validate(model, parse_json(body))


def session_id_of(request: Request) -> str:
    """Returns the path's session id in canonical text.

    Raises:
        NotFoundError: It is no id at all, so that no session has it.
    """
    text = request.path_params["session_id"]
    try:
        return canonical_id(text)
    except ValueError:
        raise NotFoundError("SESSION_NOT_FOUND", "there is no such session") from None


def run_id_of(request: Request) -> str:
    """Returns the path's run id in canonical text.

    Raises:
        NotFoundError: It is no id at all, so that no run has it.
    """
    text = request.path_params["run_id"]
    try:
        run_id = canonical_id(text)
    except ValueError:
        raise NotFoundError("RUN_NOT_FOUND", "there is no such run") from None
    run_id_var.set(run_id)
    return run_id


def idempotency_key(request: Request, *, always: bool = False) -> str:
    """Returns the caller's Idempotency-Key.

    Args:
        request: The request.
        always: Make one if the caller has none: then the gateway itself may safely try again.

    Raises:
        InvalidArgumentError: It is too long.
    """
    key = request.headers.get("idempotency-key", "").strip()
    if len(key) > MAX_REQUEST_ID:
        raise violation("Idempotency-Key", f"must have at most {MAX_REQUEST_ID} characters")
    return key or (str(uuid7()) if always else "")


def query_int(request: Request, name: str, least: int, most: int, default: int = 0) -> int:
    """Returns a number of the query.

    Raises:
        InvalidArgumentError: It is none, or out of its range.
    """
    text = request.query_params.get(name)
    if text is None or text == "":
        return default
    if not text.isascii() or not text.isdigit() or len(text) > 10 or not least <= int(text) <= most:
        raise violation(name, f"must be a number from {least} to {most}")
    return int(text)


def query_bool(request: Request, name: str) -> bool:
    """Returns a flag of the query.

    Raises:
        InvalidArgumentError: It is neither true nor false.
    """
    text = request.query_params.get(name, "").lower()
    if text not in ("", "true", "false", "1", "0"):
        raise violation(name, "must be true or false")
    return text in ("true", "1")


def query_text(request: Request, name: str, most: int) -> str:
    """Returns a text of the query.

    Raises:
        InvalidArgumentError: It is too long, or has a NUL character, which nothing here stores.
    """
    text = request.query_params.get(name, "")
    if len(text) > most or "\0" in text:
        raise violation(name, f"must have at most {most} characters, and no NUL")
    return text
