"""The one tree of errors, and its two pictures: gRPC rich status and HTTP.

    HermeshError
    ├── InvalidArgumentError      INVALID_ARGUMENT     400
    ├── OutOfRangeError           OUT_OF_RANGE         400
    ├── UnauthenticatedError      UNAUTHENTICATED      401
    ├── PermissionDeniedError     PERMISSION_DENIED    403
    ├── NotFoundError             NOT_FOUND            404
    ├── AlreadyExistsError        ALREADY_EXISTS       409
    ├── AbortedError              ABORTED              409
    ├── FailedPreconditionError   FAILED_PRECONDITION  409
    ├── ResourceExhaustedError    RESOURCE_EXHAUSTED   429
    ├── CancelledCallError        CANCELLED            499
    ├── InternalError             INTERNAL             500
    ├── UnimplementedError        UNIMPLEMENTED        501
    ├── UnavailableError          UNAVAILABLE          503
    └── DeadlineError             DEADLINE_EXCEEDED    504

Code below a servicer raises these and knows no gRPC; the server's interceptor writes them on the wire; a
client reads them back with `from_rpc_error`. A message is for the caller: it never holds a driver's text, a
secret or a stack trace.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from meshkit.context import current_request_id

DOMAIN = "hermesh"
DETAILS_KEY = "grpc-status-details-bin"

# A status travels in HTTP/2 trailers, which peers bound at 8 KiB by default.
_MAX_MESSAGE = 1024
_MAX_VIOLATIONS = 16
_MAX_VIOLATION = 200
_MAX_METADATA = 16
_MAX_METADATA_VALUE = 256


class StartupError(Exception):
    """A process cannot start. Its text is one line that says what is wrong and what to do."""


class StoreAwayError(StartupError):
    """What a process needs is not there, and may come: whoever can wait tries again."""


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One wrong field of a request: its path, and what is wrong with it."""

    field: str
    description: str


class HermeshError(Exception):
    """Base of all errors that may reach a caller.

    Attributes:
        code: The canonical gRPC code.
        reason: Name in `hermesh.common.v1.ErrorReason` without its prefix; what programs decide on.
        message: One sentence for a person.
        metadata: Facts about the error, such as the id that was not found.
        violations: Wrong fields, for INVALID_ARGUMENT.
        retry_after_ms: When a retry can help, the milliseconds to wait before it.
    """

    default_code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    default_reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        reason: str | None = None,
        message: str = "",
        *,
        metadata: Mapping[str, str] | None = None,
        violations: Iterable[FieldViolation] = (),
        retry_after_ms: int | None = None,
        code: grpc.StatusCode | None = None,
    ) -> None:
        """Makes an error.

        `reason` and `code` default to the class's own. Where the list of reasons has no general one
        (NOT_FOUND has none: say what was not found) the default is INTERNAL, for errors of foreign code.
        """
        self.code: grpc.StatusCode = code if code is not None else self.default_code
        self.reason: str = reason if reason is not None else self.default_reason
        self.message: str = message or _PUBLIC_MESSAGES.get(self.code, "the call failed")
        self.metadata: dict[str, str] = dict(metadata or {})
        self.violations: tuple[FieldViolation, ...] = tuple(violations)
        self.retry_after_ms: int | None = retry_after_ms
        super().__init__(f"{self.reason}: {self.message}")


class InvalidArgumentError(HermeshError):
    """The request is wrong whatever the state of the system."""

    default_code = grpc.StatusCode.INVALID_ARGUMENT
    default_reason = "INVALID_ARGUMENT"


class OutOfRangeError(HermeshError):
    """The request asks past the end of something."""

    default_code = grpc.StatusCode.OUT_OF_RANGE
    default_reason = "INVALID_ARGUMENT"


class UnauthenticatedError(HermeshError):
    """The caller did not prove who it is."""

    default_code = grpc.StatusCode.UNAUTHENTICATED
    default_reason = "API_KEY_INVALID"


class PermissionDeniedError(HermeshError):
    """The caller is known and may not do this."""

    default_code = grpc.StatusCode.PERMISSION_DENIED
    default_reason = "INTERNAL"


class NotFoundError(HermeshError):
    """What the request names does not exist, or belongs to another tenant."""

    default_code = grpc.StatusCode.NOT_FOUND
    default_reason = "INTERNAL"


class AlreadyExistsError(HermeshError):
    """What the request would create exists already, with other content."""

    default_code = grpc.StatusCode.ALREADY_EXISTS
    default_reason = "INTERNAL"


class AbortedError(HermeshError):
    """A concurrent change won, for example a stale fence; the caller starts over at a higher level."""

    default_code = grpc.StatusCode.ABORTED
    default_reason = "INTERNAL"


class FailedPreconditionError(HermeshError):
    """The system is not in the state that the request needs."""

    default_code = grpc.StatusCode.FAILED_PRECONDITION
    default_reason = "INTERNAL"


class ResourceExhaustedError(HermeshError):
    """A quota or a capacity is used up."""

    default_code = grpc.StatusCode.RESOURCE_EXHAUSTED
    default_reason = "OVERLOADED"


class CancelledCallError(HermeshError):
    """The peer cancelled the call (`asyncio.CancelledError`, a task's end, is never turned into this)."""

    default_code = grpc.StatusCode.CANCELLED
    default_reason = "CANCELLED"


class InternalError(HermeshError):
    """An invariant is broken: a bug of ours."""

    default_code = grpc.StatusCode.INTERNAL
    default_reason = "INTERNAL"


class UnimplementedError(HermeshError):
    """The method is not offered here."""

    default_code = grpc.StatusCode.UNIMPLEMENTED
    default_reason = "UNIMPLEMENTED"


class UnavailableError(HermeshError):
    """Something is down for now; a retry after `retry_after_ms` can help."""

    default_code = grpc.StatusCode.UNAVAILABLE
    default_reason = "SERVICE_UNAVAILABLE"


class DeadlineError(HermeshError):
    """The deadline passed before the work was done."""

    default_code = grpc.StatusCode.DEADLINE_EXCEEDED
    default_reason = "DEADLINE_EXCEEDED"


_TREE: tuple[type[HermeshError], ...] = (
    InvalidArgumentError,
    OutOfRangeError,
    UnauthenticatedError,
    PermissionDeniedError,
    NotFoundError,
    AlreadyExistsError,
    AbortedError,
    FailedPreconditionError,
    ResourceExhaustedError,
    CancelledCallError,
    InternalError,
    UnimplementedError,
    UnavailableError,
    DeadlineError,
)
_BY_CODE: dict[grpc.StatusCode, type[HermeshError]] = {kind.default_code: kind for kind in _TREE}

_HTTP: dict[grpc.StatusCode, int] = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.OUT_OF_RANGE: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.FAILED_PRECONDITION: 409,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}

# What a caller reads when the text at hand is not ours: a driver's, gRPC's or Envoy's words name addresses.
_PUBLIC_MESSAGES: dict[grpc.StatusCode, str] = {
    grpc.StatusCode.INVALID_ARGUMENT: "the request is not valid",
    grpc.StatusCode.OUT_OF_RANGE: "the request asks past the end",
    grpc.StatusCode.UNAUTHENTICATED: "the API key is missing or not valid",
    grpc.StatusCode.PERMISSION_DENIED: "this is not allowed",
    grpc.StatusCode.NOT_FOUND: "not found",
    grpc.StatusCode.ALREADY_EXISTS: "it exists already",
    grpc.StatusCode.ABORTED: "a concurrent change won; start over",
    grpc.StatusCode.FAILED_PRECONDITION: "the state does not allow this",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "a limit is reached; try again later",
    grpc.StatusCode.CANCELLED: "the call was cancelled",
    grpc.StatusCode.INTERNAL: "an internal error happened; quote the request id when you report it",
    grpc.StatusCode.UNIMPLEMENTED: "this method is not offered here",
    grpc.StatusCode.UNAVAILABLE: "a part of the service is not reachable; try again",
    grpc.StatusCode.DEADLINE_EXCEEDED: "the deadline passed before the work was done",
}


def to_status(err: HermeshError, request_id: str | None = None) -> status_pb2.Status:
    """Returns the rich status of an error.

    Args:
        err: The error.
        request_id: For RequestInfo; that of the RPC being served if None.

    Returns:
        A `google.rpc.Status` with ErrorInfo (domain `hermesh`), and BadRequest, RetryInfo and RequestInfo
        where they apply, cut to a size that fits in HTTP/2 trailers.
    """
    status = status_pb2.Status(code=err.code.value[0], message=err.message[:_MAX_MESSAGE])
    metadata = {k[:64]: v[:_MAX_METADATA_VALUE] for k, v in list(err.metadata.items())[:_MAX_METADATA]}
    status.details.append(
        _pack(error_details_pb2.ErrorInfo(reason=err.reason, domain=DOMAIN, metadata=metadata))
    )
    if err.violations:
        status.details.append(
            _pack(
                error_details_pb2.BadRequest(
                    field_violations=[
                        error_details_pb2.BadRequest.FieldViolation(
                            field=violation.field[:_MAX_VIOLATION],
                            description=violation.description[:_MAX_VIOLATION],
                        )
                        for violation in err.violations[:_MAX_VIOLATIONS]
                    ]
                )
            )
        )
    if err.retry_after_ms is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(max(0, err.retry_after_ms))
        status.details.append(_pack(error_details_pb2.RetryInfo(retry_delay=delay)))
    if request_id is None:
        request_id = current_request_id()
    if request_id:
        status.details.append(_pack(error_details_pb2.RequestInfo(request_id=request_id)))
    return status


def _pack(message: Any) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def from_rpc_error(error: grpc.RpcError) -> HermeshError:
    """Rebuilds, on the client's side, the error that a server raised.

    Args:
        error: What a gRPC call raised.

    Returns:
        The typed error with its reason, metadata, violations and retry time. An error that is not of this
        mesh (gRPC's or Envoy's own) gets its class's reason and a fixed message: foreign text names inner
        addresses.
    """
    code = _code_of(error)
    rich = _status_of(error)
    if rich is not None:
        return from_status(rich)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and _TOO_LARGE in _details_of(error):
        return InvalidArgumentError("INPUT_TOO_LARGE", "the message is larger than the service takes")
    return _plain(code)


def from_status(status: status_pb2.Status) -> HermeshError:
    """Rebuilds the error that `to_status` described."""
    code = _STATUS_CODES.get(status.code, grpc.StatusCode.UNKNOWN)
    info: error_details_pb2.ErrorInfo | None = None
    violations: list[FieldViolation] = []
    retry_after_ms: int | None = None
    for detail in status.details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            candidate = error_details_pb2.ErrorInfo()
            detail.Unpack(candidate)
            if candidate.domain == DOMAIN:
                info = candidate
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            bad = error_details_pb2.BadRequest()
            detail.Unpack(bad)
            violations.extend(FieldViolation(v.field, v.description) for v in bad.field_violations)
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            detail.Unpack(retry)
            retry_after_ms = retry.retry_delay.ToMilliseconds()
    if info is None:
        return _plain(code)
    return _BY_CODE.get(code, InternalError)(
        info.reason,
        status.message,
        metadata=dict(info.metadata),
        violations=violations,
        retry_after_ms=retry_after_ms,
    )


_STATUS_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}
# gRPC's own words where either end refuses a message.
_TOO_LARGE = "message larger than max"
# Where a retry of a foreign error can help, how long to wait.
_FOREIGN_RETRY_MS = 500


def _plain(code: grpc.StatusCode) -> HermeshError:
    kind = _BY_CODE.get(code, InternalError)
    retry = _FOREIGN_RETRY_MS if kind is UnavailableError else None
    return kind(retry_after_ms=retry)


def _code_of(error: grpc.RpcError) -> grpc.StatusCode:
    read = getattr(error, "code", None)
    code = read() if callable(read) else None
    return code if isinstance(code, grpc.StatusCode) else grpc.StatusCode.UNKNOWN


def _details_of(error: grpc.RpcError) -> str:
    read = getattr(error, "details", None)
    return str(read() or "") if callable(read) else ""


def _status_of(error: grpc.RpcError) -> status_pb2.Status | None:
    read = getattr(error, "trailing_metadata", None)
    trailers = read() if callable(read) else None
    for key, value in trailers or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            try:
                return status_pb2.Status.FromString(value)
            except Exception:
                return None
    return None


def http_status(err: HermeshError) -> int:
    """Returns the HTTP status code of an error: 400 to 504, 500 for what has no better one."""
    return _HTTP.get(err.code, 500)


def is_client_fault(code: grpc.StatusCode) -> bool:
    """Returns True if the caller, not the mesh, has to act for the call to succeed."""
    return _HTTP.get(code, 500) < 500


__all__ = [
    "DOMAIN",
    "AbortedError",
    "AlreadyExistsError",
    "CancelledCallError",
    "DeadlineError",
    "FailedPreconditionError",
    "FieldViolation",
    "HermeshError",
    "InternalError",
    "InvalidArgumentError",
    "NotFoundError",
    "OutOfRangeError",
    "PermissionDeniedError",
    "ResourceExhaustedError",
    "StartupError",
    "UnauthenticatedError",
    "UnavailableError",
    "UnimplementedError",
    "from_rpc_error",
    "from_status",
    "http_status",
    "is_client_fault",
    "to_status",
]
