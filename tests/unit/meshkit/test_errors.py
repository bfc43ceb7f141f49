import re
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from hermesh.common.v1 import error_reason_pb2
from meshkit import errors
from meshkit.context import request_id_var
from meshkit.errors import (
    DOMAIN,
    AbortedError,
    CancelledCallError,
    DeadlineError,
    FieldViolation,
    HermeshError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    OutOfRangeError,
    ResourceExhaustedError,
    UnavailableError,
    from_rpc_error,
    from_status,
    http_status,
    to_status,
)

ROOT = Path(__file__).parents[3]
REASONS = {name.removeprefix("ERROR_REASON_") for name in error_reason_pb2.ErrorReason.keys()}  # noqa: SIM118 -- not a dict
TREE = errors._TREE


class FakeRpcError(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode, details: str = "", trailers: object = ()) -> None:
        super().__init__(details)
        self._code, self._details, self._trailers = code, details, trailers

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> object:
        return self._trailers


def wire(error: HermeshError) -> FakeRpcError:
    status = rpc_status.to_status(to_status(error))
    return FakeRpcError(status.code, status.details, status.trailing_metadata)


def test_an_error_survives_the_wire_whole() -> None:
    sent = InvalidArgumentError(
        reason="INPUT_TOO_LARGE",
        message="the input is larger than 1 MiB",
        metadata={"limit": "1048576"},
        violations=[FieldViolation("input[0].content", "is too long")],
        retry_after_ms=1_250,
    )
    got = from_rpc_error(wire(sent))
    assert type(got) is InvalidArgumentError
    assert (got.code, got.reason, got.message) == (sent.code, sent.reason, sent.message)
    assert got.metadata == sent.metadata
    assert got.violations == sent.violations
    assert got.retry_after_ms == 1_250


@pytest.mark.parametrize("kind", TREE)
def test_each_class_comes_back_as_itself(kind: type[HermeshError]) -> None:
    got = from_rpc_error(wire(kind(message="why")))
    assert type(got) is kind
    assert got.message == "why"


def test_codes_are_distinct_and_have_an_http_status() -> None:
    codes = [kind.default_code for kind in TREE]
    assert len(set(codes)) == len(codes)
    assert all(400 <= http_status(kind(message="x")) <= 504 for kind in TREE)
    assert http_status(NotFoundError(reason="RUN_NOT_FOUND", message="x")) == 404
    assert http_status(InternalError()) == 500


def test_status_names_domain_reason_and_request() -> None:
    token = request_id_var.set("req-9")
    status = to_status(NotFoundError(reason="RUN_NOT_FOUND", message="no such run"))
    request_id_var.reset(token)
    info, request = error_details_pb2.ErrorInfo(), error_details_pb2.RequestInfo()
    assert status.details[0].Unpack(info)
    assert (info.domain, info.reason) == (DOMAIN, "RUN_NOT_FOUND")
    assert status.details[-1].Unpack(request)
    assert request.request_id == "req-9"


def test_a_status_stays_small_enough_for_trailers() -> None:
    error = InvalidArgumentError(
        message="m" * 100_000,
        metadata={f"k{i}": "v" * 10_000 for i in range(100)},
        violations=[FieldViolation("f" * 5_000, "d" * 5_000) for _ in range(500)],
    )
    assert to_status(error).ByteSize() < 14_000


@pytest.mark.parametrize(
    ("code", "kind", "reason"),
    [
        (grpc.StatusCode.UNAVAILABLE, UnavailableError, "SERVICE_UNAVAILABLE"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineError, "DEADLINE_EXCEEDED"),
        (grpc.StatusCode.CANCELLED, CancelledCallError, "CANCELLED"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, ResourceExhaustedError, "OVERLOADED"),
        (grpc.StatusCode.UNKNOWN, InternalError, "INTERNAL"),
        (grpc.StatusCode.DATA_LOSS, InternalError, "INTERNAL"),
    ],
)
def test_foreign_errors_get_a_reason_and_lose_their_text(
    code: grpc.StatusCode, kind: type[HermeshError], reason: str
) -> None:
    got = from_rpc_error(FakeRpcError(code, "failed to connect to 10.1.2.3:5432"))
    assert type(got) is kind
    assert got.reason == reason
    assert "10.1.2.3" not in got.message
    assert got.message


def test_an_error_of_another_domain_is_foreign() -> None:
    status = status_pb2.Status(code=5, message="secret host db-7")
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="X", domain="elsewhere.example"))
    got = from_status(status)
    assert type(got) is NotFoundError
    assert got.reason == "INTERNAL"
    assert "db-7" not in got.message


def test_a_message_over_the_size_limit_is_input_too_large() -> None:
    got = from_rpc_error(
        FakeRpcError(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "SERVER: Received message larger than max (17000000 vs. 16777216)",
        )
    )
    assert type(got) is InvalidArgumentError
    assert got.reason == "INPUT_TOO_LARGE"


def test_broken_details_do_not_hide_the_code() -> None:
    error = FakeRpcError(grpc.StatusCode.ABORTED, "x", (("grpc-status-details-bin", b"\xff\xff"),))
    assert type(from_rpc_error(error)) is AbortedError


def test_an_rpc_error_without_a_code_is_internal() -> None:
    assert type(from_rpc_error(grpc.RpcError("?"))) is InternalError


def test_negative_retry_time_becomes_zero() -> None:
    got = from_status(to_status(UnavailableError(message="x", retry_after_ms=-5)))
    assert got.retry_after_ms == 0


def test_every_reason_used_in_the_code_is_in_the_enum() -> None:
    found: dict[str, str] = {}
    raising = re.compile(r'\b\w+Error(?:_)?\(\s*(?:reason=)?"([A-Z][A-Z0-9_]+)"')
    keyword = re.compile(r'\breason="([A-Z][A-Z0-9_]+)"')
    default = re.compile(r'\bdefault_reason(?:: [^=]+)? = "([A-Z][A-Z0-9_]+)"')
    for folder in ("meshkit", "services", "gateway"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            for pattern in (raising, keyword, default):
                for match in pattern.finditer(text):
                    found[match[1]] = str(path.relative_to(ROOT))
    assert "MESH_ONLY" in found
    assert {reason: path for reason, path in found.items() if reason not in REASONS} == {}


def test_defaults_of_the_tree_are_in_the_enum() -> None:
    assert {kind.default_reason for kind in TREE} <= REASONS
    assert OutOfRangeError(message="x").code is grpc.StatusCode.OUT_OF_RANGE
