"""RPCs through a real server on loopback: identity, errors, validation, deadlines and logs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import grpc
import pytest
import redis.exceptions
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from prometheus_client import CollectorRegistry

from hermesh.session.v1 import session_internal_service_pb2 as pb
from hermesh.session.v1 import session_internal_service_pb2_grpc as pb_grpc
from meshkit.channel import open_channel, stream_call
from meshkit.context import current_request_id, remaining
from meshkit.errors import (
    DeadlineError,
    HermeshError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
    from_rpc_error,
)
from meshkit.identity import PROBE_TENANT, Identity, current_identity, use_identity
from meshkit.interceptor import RpcInterceptor
from meshkit.server import Server
from meshkit.settings import MeshSettings
from meshkit.telemetry import rpc_metrics
from tests.unit.meshkit.support import KEY, SERVICE, TENANT, TOKEN, Logs, Servicer, serve

Stub = pb_grpc.SessionInternalServiceStub
MESH = (("x-hermesh-mesh", TOKEN),)
REQUEST = pb.AuthenticateRequest(api_key="x")


async def failure(call: Any) -> HermeshError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


async def test_a_call_from_the_mesh_carries_the_tenant(
    server: Server, plain: Stub, servicer: Servicer
) -> None:
    seen: list[Identity] = []

    async def unary(request: Any, context: Any) -> Any:
        seen.append(current_identity())
        return pb.AuthenticateResponse()

    servicer.unary = unary
    await plain.Authenticate(REQUEST, metadata=MESH)
    await plain.Authenticate(REQUEST, metadata=(*MESH, ("x-hermesh-tenant", str(TENANT))))
    assert seen == [Identity(None, mesh=True), Identity(TENANT, mesh=True)]


@pytest.mark.parametrize(
    ("metadata", "kind", "reason"),
    [
        ((), UnauthenticatedError, "API_KEY_MISSING"),
        ((("authorization", "Bearer hm_bad"),), UnauthenticatedError, "API_KEY_INVALID"),
        ((("authorization", KEY),), UnauthenticatedError, "API_KEY_INVALID"),
        ((("authorization", ""),), UnauthenticatedError, "API_KEY_INVALID"),
        ((("x-hermesh-mesh", "wrong"),), UnauthenticatedError, "API_KEY_INVALID"),
        ((("x-hermesh-mesh", ""),), UnauthenticatedError, "API_KEY_INVALID"),
        ((("x-hermesh-tenant", str(TENANT)),), UnauthenticatedError, "API_KEY_MISSING"),
        ((*MESH, ("x-hermesh-tenant", "me")), InvalidArgumentError, "INVALID_ARGUMENT"),
        ((("authorization", f"Bearer {KEY}"),), PermissionDeniedError, "MESH_ONLY"),
    ],
)
async def test_callers_are_checked(
    server: Server,
    plain: Stub,
    servicer: Servicer,
    metadata: tuple[tuple[str, str], ...],
    kind: type[HermeshError],
    reason: str,
) -> None:
    error = await failure(plain.Authenticate(REQUEST, metadata=metadata))
    assert (type(error), error.reason) == (kind, reason)
    assert servicer.calls == 0


async def test_reflection_by_either_name_needs_a_key(server: Server) -> None:
    ask = reflection_pb2.ServerReflectionRequest(list_services="*")
    async with grpc.aio.insecure_channel(server.address) as channel:
        for version in ("v1", "v1alpha"):
            stub = channel.stream_stream(
                f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
                request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
                response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
            )
            answer = await _first(stub(iter([ask]), metadata=(("authorization", f"bearer {KEY}"),)))
            listed = {service.name for service in answer.list_services_response.service}
            assert "hermesh.tool.v1.ToolService" in listed
            assert SERVICE not in listed, "what is for the mesh only is not shown"
            error = await failure(_first(stub(iter([ask]))))
            assert error.reason == "API_KEY_MISSING"


async def _first(call: Any) -> Any:
    async for message in call:
        return message
    return None


async def test_without_a_mesh_token_nobody_is_of_the_mesh(settings: MeshSettings) -> None:
    bare = settings.model_copy(update={"mesh_token": type(settings.mesh_token)("")})
    async with serve(bare, Servicer()) as server, grpc.aio.insecure_channel(server.address) as channel:
        error = await failure(Stub(channel).Authenticate(REQUEST, metadata=(("x-hermesh-mesh", ""),)))
    assert type(error) is UnauthenticatedError


async def test_health_needs_no_key_and_reports_each_service(server: Server) -> None:
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_an_error_keeps_its_reason_and_gets_the_request_id(
    server: Server, plain: Stub, servicer: Servicer
) -> None:
    async def unary(request: Any, context: Any) -> Any:
        raise NotFoundError(
            "RUN_NOT_FOUND", "no such run", metadata={"run_id": "r"}, retry_after_ms=current_id_length()
        )

    def current_id_length() -> int:
        return len(current_request_id())

    servicer.unary = unary
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await plain.Authenticate(REQUEST, metadata=(*MESH, ("x-request-id", "edge-7")))
    error = from_rpc_error(caught.value)
    assert (type(error), error.reason, error.message) == (NotFoundError, "RUN_NOT_FOUND", "no such run")
    assert error.metadata == {"run_id": "r"}
    assert error.retry_after_ms == 6
    assert dict(caught.value.trailing_metadata())["x-request-id"] == "edge-7"


async def test_the_request_id_is_echoed_on_success(server: Server, plain: Stub) -> None:
    call = plain.Authenticate(REQUEST, metadata=(*MESH, ("x-request-id", "edge-8")))
    await call
    assert dict(await call.trailing_metadata())["x-request-id"] == "edge-8"


@pytest.mark.parametrize("where", ["unary", "stream"])
async def test_an_unexpected_error_is_logged_here_and_says_nothing_on_the_wire(
    server: Server, plain: Stub, servicer: Servicer, logs: Logs, where: str
) -> None:
    async def unary(request: Any, context: Any) -> Any:
        raise KeyError("password=hunter2")

    async def stream(requests: Any, context: Any) -> AsyncIterator[Any]:
        yield pb.AppendResponse()
        raise KeyError("password=hunter2")

    servicer.unary, servicer.stream = unary, stream
    call = (
        plain.Authenticate(REQUEST, metadata=MESH) if where == "unary" else _all(plain.Append(metadata=MESH))
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = from_rpc_error(caught.value)
    assert (type(error), error.reason) == (InternalError, "INTERNAL")
    assert "hunter2" not in str(caught.value)
    assert "KeyError" not in str(caught.value)
    line = (await logs.rpcs())[0]
    assert (line["code"], line["log_level"]) == ("INTERNAL", "error")
    assert any(isinstance(entry.get("exc_info"), KeyError) for entry in logs.entries)


async def _all(call: Any) -> list[Any]:
    return [message async for message in call]


async def test_an_error_in_mid_stream_comes_after_the_messages(
    server: Server, plain: Stub, servicer: Servicer
) -> None:
    async def stream(requests: Any, context: Any) -> AsyncIterator[Any]:
        for _ in range(3):
            yield pb.AppendResponse()
        raise ResourceExhaustedError("READER_TOO_SLOW", "too slow")

    servicer.stream = stream
    call = plain.Append(metadata=MESH)
    got = [await call.read() for _ in range(3)]
    assert len(got) == 3
    error = await failure(call.read())
    assert error.reason == "READER_TOO_SLOW"


async def test_a_reason_survives_a_second_hop(server: Server, plain: Stub, servicer: Servicer) -> None:
    async def unary(request: Any, context: Any) -> Any:
        if request.api_key == "inner":
            raise UnavailableError("DATABASE_UNAVAILABLE", "the database does not answer", retry_after_ms=500)
        return await plain.Authenticate(pb.AuthenticateRequest(api_key="inner"), metadata=MESH)

    servicer.unary = unary
    error = await failure(plain.Authenticate(REQUEST, metadata=MESH))
    assert (type(error), error.reason, error.retry_after_ms) == (
        UnavailableError,
        "DATABASE_UNAVAILABLE",
        500,
    )


@pytest.mark.parametrize(
    ("raised", "kind", "reason"),
    [
        (asyncpg.ConnectionDoesNotExistError("db-7 is gone"), UnavailableError, "DATABASE_UNAVAILABLE"),
        (redis.exceptions.ConnectionError("redis-7 is gone"), UnavailableError, "SERVICE_UNAVAILABLE"),
        (asyncpg.UndefinedTableError("secret_table"), InternalError, "INTERNAL"),
        (ConnectionResetError("db-7"), InternalError, "INTERNAL"),
        (grpc.RpcError("db-7"), InternalError, "INTERNAL"),
    ],
)
async def test_errors_of_drivers_are_translated(
    server: Server,
    plain: Stub,
    servicer: Servicer,
    raised: Exception,
    kind: type[HermeshError],
    reason: str,
) -> None:
    async def unary(request: Any, context: Any) -> Any:
        raise raised

    servicer.unary = unary
    error = await failure(plain.Authenticate(REQUEST, metadata=MESH))
    assert (type(error), error.reason) == (kind, reason)
    assert "db-7" not in error.message
    assert "secret" not in error.message


async def test_a_database_that_refuses_connections_is_unavailable(
    server: Server, plain: Stub, servicer: Servicer
) -> None:
    async def unary(request: Any, context: Any) -> Any:
        await asyncpg.connect("postgresql://u:p@127.0.0.1:1/d", timeout=2)

    servicer.unary = unary
    error = await failure(plain.Authenticate(REQUEST, metadata=MESH))
    assert error.reason == "DATABASE_UNAVAILABLE"


async def test_a_bad_request_names_each_wrong_field(server: Server, plain: Stub, servicer: Servicer) -> None:
    error = await failure(plain.ClaimRun(pb.ClaimRunRequest(run_id="r", owner=""), metadata=MESH))
    assert (type(error), error.reason) == (InvalidArgumentError, "INVALID_ARGUMENT")
    assert [violation.field for violation in error.violations] == ["run_id", "owner"]
    assert servicer.calls == 0


async def test_bytes_that_are_no_message_are_a_bad_request(server: Server) -> None:
    async with grpc.aio.insecure_channel(server.address) as channel:
        raw = channel.unary_unary(f"/{SERVICE}/Authenticate")
        error = await failure(raw(b"\x0a\x02\xff\xfe", metadata=MESH))
    assert (type(error), error.reason) == (InvalidArgumentError, "INVALID_ARGUMENT")


async def test_a_method_that_a_servicer_lacks_is_unimplemented(server: Server, plain: Stub) -> None:
    error = await failure(
        plain.RenewLeases(
            pb.RenewLeasesRequest(
                owner="o", leases=[pb.LeaseRef(session_id=str(TENANT), run_id=str(TENANT))]
            ),
            metadata=MESH,
        )
    )
    assert (type(error), error.reason) == (UnimplementedError, "UNIMPLEMENTED")


async def test_a_servicer_may_abort_by_itself(
    server: Server, plain: Stub, servicer: Servicer, logs: Logs
) -> None:
    async def unary(request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.OUT_OF_RANGE, "past the end")

    servicer.unary = unary
    error = await failure(plain.Authenticate(REQUEST, metadata=MESH))
    assert error.code is grpc.StatusCode.OUT_OF_RANGE
    assert (await logs.rpcs())[0]["code"] == "OUT_OF_RANGE"


async def test_the_deadline_is_known_inside_and_ends_the_work(
    server: Server, plain: Stub, servicer: Servicer, logs: Logs
) -> None:
    seen: list[float | None] = []
    cancelled = asyncio.Event()

    async def unary(request: Any, context: Any) -> Any:
        seen.append(remaining())
        if request.api_key == "wait":
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()
        return pb.AuthenticateResponse()

    servicer.unary = unary
    await plain.Authenticate(REQUEST, metadata=MESH, timeout=30)
    await plain.Authenticate(REQUEST, metadata=MESH)
    assert seen[0] is not None
    assert 20 < seen[0] < 31  # gRPC rounds a deadline up on the wire
    assert seen[1] is None
    error = await failure(
        plain.Authenticate(pb.AuthenticateRequest(api_key="wait"), metadata=MESH, timeout=0.1)
    )
    assert type(error) is DeadlineError
    async with asyncio.timeout(5):
        await cancelled.wait()
    assert (await logs.rpcs(3))[2]["code"] in ("DEADLINE_EXCEEDED", "CANCELLED")


async def test_a_client_that_leaves_ends_the_generator(
    server: Server, plain: Stub, servicer: Servicer, logs: Logs
) -> None:
    closed = asyncio.Event()

    async def stream(requests: Any, context: Any) -> AsyncIterator[Any]:
        try:
            while True:
                yield pb.AppendResponse()
                await asyncio.sleep(0.001)
        finally:
            closed.set()

    servicer.stream = stream
    async with stream_call(plain.Append(metadata=MESH)) as call:
        await call.read()
    async with asyncio.timeout(5):
        await closed.wait()
    assert (await logs.rpcs())[0]["code"] == "CANCELLED"


async def test_a_client_that_leaves_a_full_stream_is_no_fault_of_ours(
    server: Server, plain: Stub, servicer: Servicer, logs: Logs
) -> None:
    """Its window is full, so that the server is in the middle of a write."""
    written = asyncio.Event()
    closed = asyncio.Event()
    big = pb.AppendResponse(cancelled_run_ids=["x" * 1_000_000])

    async def stream(requests: Any, context: Any) -> AsyncIterator[Any]:
        try:
            while True:
                yield big
                written.set()
        finally:
            closed.set()

    async def blocked() -> None:
        while True:
            written.clear()
            try:
                async with asyncio.timeout(0.2):
                    await written.wait()
            except TimeoutError:
                return

    servicer.stream = stream
    async with stream_call(plain.Append(metadata=MESH)) as call:
        await call.read()
        await blocked()
    async with asyncio.timeout(5):
        await closed.wait()
    line = (await logs.rpcs())[0]
    assert (line["code"], line["log_level"]) == ("CANCELLED", "info")
    assert [entry for entry in logs.entries if entry["log_level"] in ("warning", "error")] == []


async def test_one_line_is_logged_for_each_rpc_and_no_secret(
    server: Server, plain: Stub, servicer: Servicer, logs: Logs
) -> None:
    async def stream(requests: Any, context: Any) -> AsyncIterator[Any]:
        for _ in range(50):
            yield pb.AppendResponse()

    servicer.stream = stream
    metadata = (*MESH, ("x-hermesh-tenant", str(TENANT)), ("x-request-id", "r-1"))
    assert len(await _all(plain.Append(metadata=metadata))) == 50
    await failure(plain.Authenticate(REQUEST, metadata=(("authorization", "Bearer hm_secret"),)))
    lines = await logs.rpcs(2)
    assert len(logs.entries) == 2
    assert lines[0]["method"] == f"{SERVICE}/Append"
    assert (lines[0]["code"], lines[0]["log_level"]) == ("OK", "info")
    assert (lines[0]["tenant"], lines[0]["request_id"]) == (str(TENANT), "r-1")
    assert lines[0]["duration_ms"] >= 0
    assert (lines[1]["code"], lines[1]["log_level"]) == ("UNAUTHENTICATED", "warning")
    assert "secret" not in json.dumps(logs.entries, default=str)
    assert TOKEN not in json.dumps(logs.entries, default=str)


async def test_a_probe_of_another_service_is_logged_only_when_it_fails(
    server: Server, plain: Stub, servicer: Servicer, logs: Logs
) -> None:
    broken = False

    async def unary(request: Any, context: Any) -> Any:
        if broken:
            raise UnavailableError("DATABASE_UNAVAILABLE", "away")
        return pb.AuthenticateResponse()

    servicer.unary = unary
    metadata = (*MESH, ("x-hermesh-tenant", str(PROBE_TENANT)))
    await plain.Authenticate(REQUEST, metadata=metadata)
    broken = True
    await failure(plain.Authenticate(REQUEST, metadata=metadata))
    lines = await logs.rpcs(1)
    assert [line["code"] for line in lines] == ["UNAVAILABLE"]


async def test_the_channel_adds_token_tenant_and_request_id(
    server: Server, settings: MeshSettings, servicer: Servicer
) -> None:
    seen: list[dict[str, Any]] = []

    async def unary(request: Any, context: Any) -> Any:
        seen.append(dict(context.invocation_metadata()) | {"left": remaining()})
        if request.api_key == "outer":
            await stub.Authenticate(pb.AuthenticateRequest(api_key="inner"))
        return pb.AuthenticateResponse()

    servicer.unary = unary
    async with open_channel(settings, server.address) as channel:
        stub = Stub(channel)
        with use_identity(Identity(TENANT, mesh=False)):
            await stub.Authenticate(
                pb.AuthenticateRequest(api_key="outer"), metadata=(("x-request-id", "r-9"),), timeout=3
            )
    outer, inner = seen
    assert outer["x-hermesh-tenant"] == inner["x-hermesh-tenant"] == str(TENANT)
    assert outer["x-request-id"] == inner["x-request-id"] == "r-9"
    assert outer["traceparent"].split("-")[1] == inner["traceparent"].split("-")[1]
    assert outer["traceparent"] != inner["traceparent"]
    assert 0 < inner["left"] < 3.5
    assert 0 < outer["left"] < 3.5


async def test_a_message_over_the_limit_has_a_reason(server: Server, plain: Stub) -> None:
    big = pb.AuthenticateRequest(api_key="x" * (17 * 1024 * 1024))
    error = await failure(plain.Authenticate(big, metadata=MESH))
    assert (type(error), error.reason) == (InvalidArgumentError, "INPUT_TOO_LARGE")


async def test_a_service_may_add_interceptors_inside_of_ours(settings: MeshSettings) -> None:
    order: list[str] = []

    class Own(grpc.aio.ServerInterceptor):
        async def intercept_service(self, continuation: Any, details: Any) -> Any:
            order.append(details.method)
            return await continuation(details)

    async with (
        serve(settings, Servicer(), interceptors=(Own(),)) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        await Stub(channel).Authenticate(REQUEST, metadata=MESH)
    assert order == [f"/{SERVICE}/Authenticate"]


async def test_work_cancelled_from_inside_tells_the_client_to_try_again(
    server: Server, plain: Stub, servicer: Servicer, logs: Logs
) -> None:
    async def unary(request: Any, context: Any) -> Any:
        raise asyncio.CancelledError

    async def stream(requests: Any, context: Any) -> AsyncIterator[Any]:
        yield pb.AppendResponse()
        raise asyncio.CancelledError

    servicer.unary, servicer.stream = unary, stream
    for call in (plain.Authenticate(REQUEST, metadata=MESH, timeout=5), _all(plain.Append(metadata=MESH))):
        error = await failure(call)
        assert (type(error), error.reason) == (UnavailableError, "SERVICE_UNAVAILABLE")
        assert error.retry_after_ms
    assert [line["code"] for line in await logs.rpcs(2)] == ["UNAVAILABLE", "UNAVAILABLE"]


async def test_an_error_after_the_client_left_harms_nothing(
    server: Server, plain: Stub, servicer: Servicer, logs: Logs
) -> None:
    waiting = asyncio.Event()

    async def unary(request: Any, context: Any) -> Any:
        waiting.set()
        try:
            await asyncio.Event().wait()
        finally:
            raise NotFoundError("RUN_NOT_FOUND", "too late")

    servicer.unary = unary
    call = plain.Authenticate(REQUEST, metadata=MESH)
    await waiting.wait()
    call.cancel()
    assert (await logs.rpcs())[0]["code"] == "NOT_FOUND"
    servicer.unary = None
    await plain.Authenticate(REQUEST, metadata=MESH)


async def test_a_call_whose_deadline_has_passed_is_not_begun(logs: Logs) -> None:
    class Context:
        """What grpc.aio gives for a call that waited too long in its queue."""

        sent: tuple[Any, ...] = ()

        def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
            return MESH

        def set_trailing_metadata(self, trailers: Any) -> None:
            pass

        def time_remaining(self) -> float:
            return 0.0

        async def abort(self, *sent: Any) -> None:
            self.sent = sent
            raise grpc.aio.AbortError

    called = False

    async def method(request: Any, context: Any) -> bytes:
        nonlocal called
        called = True
        return b""

    async def continuation(details: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(method)

    class Details:
        method = "/t.S/M"

    interceptor = RpcInterceptor(
        authenticator=None, mesh_token=TOKEN, metrics=rpc_metrics(CollectorRegistry())
    )
    handler = await interceptor.intercept_service(continuation, Details())
    context = Context()
    with pytest.raises(grpc.aio.AbortError):
        await handler.stream_unary(None, context)
    assert context.sent[0] is grpc.StatusCode.DEADLINE_EXCEEDED
    assert not called
    assert logs.entries[0]["code"] == "DEADLINE_EXCEEDED"
