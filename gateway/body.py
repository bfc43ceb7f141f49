"""Reading a request's body: bounded in size and time, strict in encoding and types."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import ClientDisconnect, Request

from gateway.problems import BodyTimeoutError, BodyTooLargeError, UnsupportedCodingError
from hermesh.common.v1.event_pb2 import InputMessage
from meshkit.errors import CancelledCallError, FieldViolation, InvalidArgumentError
from meshkit.outside_json import JsonError, has_nul, read_json

MAX_BODY = 1024 * 1024
# New input: its text, as every way in counts it, and the JSON around it, which may spell a byte as six.
MAX_INPUT = 1024 * 1024
MAX_INPUT_BODY = 8 * 1024 * 1024
_DISCARD_BYTES = 16 * 1024 * 1024
_DISCARD_SECONDS = 5.0

M = TypeVar("M", bound=BaseModel)


class StrictModel(BaseModel):
    """A request body: no silent conversion between types, no member that is not documented."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, hide_input_in_errors=True)


async def read_body(request: Request, *, limit: int = MAX_BODY, timeout: float = 30.0) -> bytes:
    """Reads the whole body.

    Raises:
        BodyTooLargeError: It is larger than `limit` bytes, by its header or while it arrives.
        BodyTimeoutError: It did not arrive within `timeout` seconds.
        UnsupportedCodingError: It is compressed.
        CancelledCallError: The client left before its end.
    """
    coding = request.headers.get("content-encoding", "").strip().lower()
    if coding not in ("", "identity"):
        await _discard(request)
        raise UnsupportedCodingError(message=f"the body is {coding[:40]}; send it without Content-Encoding")
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and int(declared) > limit:
        await _discard(request)
        raise _too_large(limit)
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(timeout) as deadline:
            async for part in request.stream():
                if size <= limit < size + len(part):
                    deadline.reschedule(asyncio.get_running_loop().time() + _DISCARD_SECONDS)
                size += len(part)
                if size <= limit:
                    parts.append(part)
                elif size > limit + _DISCARD_BYTES:
                    break
    except TimeoutError:
        if size <= limit:
            raise BodyTimeoutError(message=f"the body did not arrive within {timeout:g} s") from None
    except ClientDisconnect:
        raise CancelledCallError(message="the client left before its request was complete") from None
    if size > limit:
        raise _too_large(limit)
    return b"".join(parts)


async def _discard(request: Request) -> None:
    """Reads on for a while: many clients read no answer before they sent all."""
    size = 0
    try:
        async with asyncio.timeout(_DISCARD_SECONDS):
            while size < _DISCARD_BYTES:
                message = await request.receive()
                size += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
    except TimeoutError:
        return


def _too_large(limit: int) -> BodyTooLargeError:
    return BodyTooLargeError(
        message=f"the body is larger than {limit} bytes", metadata={"limit_bytes": str(limit)}
    )


def check_input(messages: Iterable[InputMessage]) -> None:
    """Checks the size of new input.

    Raises:
        InvalidArgumentError: INPUT_TOO_LARGE: its texts have more than `MAX_INPUT` bytes in all.
    """
    size = sum(len(message.content.encode()) for message in messages)
    if size > MAX_INPUT:
        raise InvalidArgumentError(
            "INPUT_TOO_LARGE",
            f"the input has {size} bytes; at most {MAX_INPUT} are accepted",
            metadata={"limit_bytes": str(MAX_INPUT), "size_bytes": str(size)},
        )


def parse_json(body: bytes) -> Any:
    """Parses JSON.

    Raises:
        InvalidArgumentError: It is not UTF-8, not JSON, too deep, or has a NUL character, which nothing here
            stores.
    """
    try:
        value = read_json(body)
    except JsonError as error:
        raise InvalidArgumentError(message=f"the body {error}") from None
    # NUL as an escape or, which JSON forbids, raw: only the escape gets here.
    if b"\\u0000" in body and has_nul(value):
        raise InvalidArgumentError(message="the body has a NUL character, which text must not contain")
    return value


def validate(model: type[M], value: Any) -> M:
    """Checks a parsed body against its model.

    Raises:
        InvalidArgumentError: With each wrong field as a violation.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        violations = [
            FieldViolation(_path(item["loc"]), str(item["msg"]).removeprefix("Value error, "))
            for item in error.errors(include_input=False, include_url=False, include_context=False)[:16]
        ]
    if not isinstance(value, dict):
        raise InvalidArgumentError(message="the body must be a JSON object")
    first = violations[0]
    raise InvalidArgumentError(message=f"{first.field}: {first.description}", violations=violations)


def _path(location: tuple[int | str, ...]) -> str:
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif "[" in part or part in ("str", "list"):
            # pydantic names the branch of a union; the caller wrote none.
            continue
        else:
            path += f".{part}" if path else part
    return path or "body"
