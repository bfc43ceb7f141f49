"""What Envoy answers by itself, in the forms of our API: `local_reply_config` of its two public listeners.

A caller cannot know which process answers, so every answer has one form: on the HTTP port a problem document,
or OpenAI's error object on OpenAI's paths; on the gRPC port a status with `ErrorInfo`. The bodies are made by
the code that makes them in the gateway and in the services, so that they cannot drift apart.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from meshkit.errors import DETAILS_KEY, HermeshError, to_status

# Envoy makes the id where a caller sent none. What it could not read as a request has none; a text of two
# parts is then empty, where one part alone would be null.
REQUEST_ID = "%REQ(X-REQUEST-ID)%"
_REQUEST_ID_TEXT = REQUEST_ID + "%DYNAMIC_METADATA(none)%"
# What HTTP knows. Any other word is refused here: the gateway's parser does not read it.
METHODS = "GET|HEAD|POST|PUT|PATCH|DELETE|OPTIONS|TRACE"
ALLOWED = "DELETE, GET, HEAD, OPTIONS, PATCH, POST"
MAX_HEADERS_KB = 60
MAX_HEADERS = 100
HEADERS_SECONDS = 10
REQUEST_SECONDS = 60
GRPC_REQUEST_SECONDS = 30
# Longer than the 15 s heartbeat of an event stream; and what a reply that is not streamed may take.
SILENT_SECONDS = 300
WHOLE_ANSWER_SECONDS = 3600
# New input has 1 MiB of text at most, and whatever goes with it is small.
MAX_GRPC_REQUEST = 2 * 1024 * 1024
_RETRY_MS = 500
_OVERLOADED_RETRY_MS = 2000

_OPENAI_PATHS = r"/v1/(chat/completions|models)([/?].*)?"
# The request had reached an upstream when the connection to it broke, or nothing came from it for too long.
_LOST = ("UC", "UR", "LR", "UPE", "UT", "SI")


@dataclass(frozen=True, slots=True)
class Reply:
    """One kind of answer.

    Attributes:
        when: Envoy's filter for it.
        error: What the caller is told.
        status: The HTTP status.
        headers: More of them, over HTTP.
    """

    when: dict[str, Any]
    error: HermeshError
    status: int
    headers: tuple[tuple[str, str], ...] = ()


def _status(code: int, op: str = "EQ") -> dict[str, Any]:
    value = {"default_value": code, "runtime_key": f"hermesh.reply.{op.lower()}_{code}"}
    return {"status_code_filter": {"comparison": {"op": op, "value": value}}}


def _flags(*names: str) -> dict[str, Any]:
    return {"response_flag_filter": {"flags": list(names)}}


def _header(name: str, pattern: str) -> dict[str, Any]:
    return {"header_filter": {"header": {"name": name, "string_match": {"safe_regex": {"regex": pattern}}}}}


def _all(*filters: dict[str, Any]) -> dict[str, Any]:
    return {"and_filter": {"filters": list(filters)}}


def _error(code: str, reason: str, message: str, **more: Any) -> HermeshError:
    return HermeshError(reason, message, code=grpc.StatusCode[code], **more)


def _overloaded() -> Reply:
    return Reply(
        _flags("OM"),
        _error(
            "RESOURCE_EXHAUSTED",
            "OVERLOADED",
            "there is no room for another request now; nothing was done, try again later",
            retry_after_ms=_OVERLOADED_RETRY_MS,
        ),
        429,
    )


def _unavailable() -> Reply:
    return Reply(
        _status(500, "GE"),
        _error(
            "UNAVAILABLE",
            "SERVICE_UNAVAILABLE",
            "no replica can be reached; nothing was done, try again",
            retry_after_ms=_RETRY_MS,
        ),
        503,
    )


def _too_slow(seconds: int) -> Reply:
    message = f"the request did not arrive within {seconds} s; nothing was done"
    return Reply(_status(408), _error("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED", message), 408)


def _headers_too_large() -> Reply:
    message = f"the headers are larger than {MAX_HEADERS_KB} KiB, or more than {MAX_HEADERS}"
    return Reply(_status(431), _error("INVALID_ARGUMENT", "INVALID_ARGUMENT", message), 431)


def http_replies() -> list[Reply]:
    """Returns what Envoy answers on the HTTP port; the first that fits counts."""
    lost = _error(
        "UNAVAILABLE",
        "SERVICE_UNAVAILABLE",
        "the gateway was lost, or silent for too long, before it answered: what was asked for may have been "
        "done; send it again with the same Idempotency-Key, or look first",
        retry_after_ms=_RETRY_MS,
    )
    # It was tried on several gateways: that the last one was not reached says nothing of the first.
    keyed = _error(
        "UNAVAILABLE",
        "SERVICE_UNAVAILABLE",
        "no gateway answered: what was asked for may have been done; send it again with the same "
        "Idempotency-Key",
        retry_after_ms=_RETRY_MS,
    )
    return [
        _overloaded(),
        Reply(
            _header(":method", "CONNECT"),
            _error("UNIMPLEMENTED", "UNIMPLEMENTED", "this is no proxy: CONNECT is not taken"),
            405,
            (("allow", ALLOWED),),
        ),
        Reply(
            _status(501),
            _error("UNIMPLEMENTED", "UNIMPLEMENTED", "of transfer codings only chunked is taken"),
            501,
        ),
        # Reading again repeats nothing.
        Reply(_all(_flags(*_LOST), _header(":method", "GET|HEAD|OPTIONS")), _unavailable().error, 503),
        Reply(_all(_status(500, "GE"), _header("idempotency-key", ".+")), keyed, 503),
        # Such a client would by itself send a second message for the one whose answer was lost.
        Reply(_flags(*_LOST), lost, 503, (("x-should-retry", "false"),)),
        _unavailable(),
        _too_slow(REQUEST_SECONDS),
        _headers_too_large(),
        Reply(
            _status(405),
            _error("UNIMPLEMENTED", "UNIMPLEMENTED", f"no path takes this method; they take {ALLOWED}"),
            405,
            (("allow", ALLOWED),),
        ),
        Reply(
            _status(404),
            _error("UNIMPLEMENTED", "UNIMPLEMENTED", "nothing is served at this path"),
            404,
        ),
        Reply(
            _status(403),
            _error("INVALID_ARGUMENT", "INVALID_ARGUMENT", "a connection can be upgraded to websocket only"),
            400,
        ),
        Reply(
            _status(400, "GE"),
            _error(
                "INVALID_ARGUMENT",
                "INVALID_ARGUMENT",
                "the request is not HTTP as it is taken here: its first line, its path, a header or its body "
                "is malformed",
            ),
            400,
        ),
    ]


def grpc_replies() -> list[Reply]:
    """Returns what Envoy answers on the gRPC port; the first that fits counts."""
    lost = _error(
        "UNAVAILABLE",
        "SERVICE_UNAVAILABLE",
        "the replica was lost, or silent for too long, before it answered: what was asked for may have been "
        "done; send it again with the same request_id, or look first",
        retry_after_ms=_RETRY_MS,
    )
    too_large = _error(
        "INVALID_ARGUMENT",
        "INPUT_TOO_LARGE",
        f"the request has more than {MAX_GRPC_REQUEST} bytes",
        metadata={"limit_bytes": str(MAX_GRPC_REQUEST)},
    )
    return [
        _overloaded(),
        Reply(_flags(*_LOST), lost, 503),
        _unavailable(),
        _too_slow(GRPC_REQUEST_SECONDS),
        Reply(_status(413), too_large, 413),
        _headers_too_large(),
        Reply(
            _status(404),
            _error("UNIMPLEMENTED", "UNIMPLEMENTED", "this method is not served here"),
            404,
        ),
        Reply(
            _status(400, "GE"),
            _error("INVALID_ARGUMENT", "INVALID_ARGUMENT", "the request is no gRPC that is taken here"),
            400,
        ),
    ]


def http_config(listed: Sequence[Reply] = ()) -> str:
    """Returns `local_reply_config` of an HTTP listener as JSON, which is YAML; by default the mesh's own."""
    # The one answer that is no error, in the gateway's form.
    healthy = {
        "filter": _status(200),
        "headers_to_add": [_set("x-request-id", REQUEST_ID)],
        "body_format_override": {"json_format": {"status": "ok"}, "content_type": "application/json"},
    }
    mappers: list[dict[str, Any]] = [healthy]
    for reply in listed or http_replies():
        mappers.append(_http_mapper(reply, openai=True))
        mappers.append(_http_mapper(reply, openai=False))
    return json.dumps({"mappers": mappers})


def _http_mapper(reply: Reply, *, openai: bool) -> dict[str, Any]:
    from gateway.problems import HttpError, error_headers, openai_object, problem

    class _Error(HttpError):
        status = reply.status
        headers = reply.headers

    error = _Error(
        reply.error.reason,
        reply.error.message,
        code=reply.error.code,
        metadata=reply.error.metadata,
        retry_after_ms=reply.error.retry_after_ms,
    )
    document = openai_object(error) if openai else problem(error) | {"request_id": _REQUEST_ID_TEXT}
    headers = error_headers(error) | {"x-request-id": REQUEST_ID}
    return {
        "filter": _all(reply.when, _header(":path", _OPENAI_PATHS)) if openai else reply.when,
        "status_code": reply.status,
        "headers_to_add": [_set(name, value) for name, value in headers.items()],
        "body_format_override": {
            "json_format": document,
            "omit_empty_values": not openai,
            "content_type": "application/json" if openai else "application/problem+json",
        },
    }


def grpc_config(listed: Sequence[Reply] = ()) -> str:
    """Returns `local_reply_config` of a gRPC listener, as JSON; by default the mesh's own."""
    return json.dumps({"mappers": [_grpc_mapper(reply) for reply in listed or grpc_replies()]})


def _grpc_mapper(reply: Reply) -> dict[str, Any]:
    details = base64.b64encode(to_status(reply.error).SerializeToString()).decode().rstrip("=")
    headers = {
        "grpc-status": str(reply.error.code.value[0]),
        DETAILS_KEY: details,
        "x-request-id": REQUEST_ID,
    }
    return {
        "filter": reply.when,
        "status_code": reply.status,
        "headers_to_add": [_set(name, value) for name, value in headers.items()],
        # Becomes `grpc-message`.
        "body_format_override": {"text_format_source": {"inline_string": reply.error.message}},
    }


def _set(name: str, value: str) -> dict[str, Any]:
    return {"header": {"key": name, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}
