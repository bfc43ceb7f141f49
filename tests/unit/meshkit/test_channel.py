from __future__ import annotations

import asyncio
import json
from typing import Any

import grpc
import grpc.aio
import pytest

from hermesh.session.v1 import session_internal_service_pb2 as pb
from hermesh.session.v1 import session_internal_service_pb2_grpc as pb_grpc
from meshkit.channel import channel_options, mesh_check, mesh_metadata, open_channel, stream_call
from meshkit.errors import UnavailableError
from meshkit.server import Server
from meshkit.settings import MeshSettings
from tests.unit.meshkit.support import SERVICE, TENANT, TOKEN, Servicer

REQUEST = pb.AuthenticateRequest(api_key="x")


def test_only_the_safe_list_is_tried_again() -> None:
    assert dict(channel_options())["grpc.enable_retries"] == 0
    options = dict(channel_options([f"{SERVICE}/GetRun"]))
    config = json.loads(options["grpc.service_config"])["methodConfig"]
    assert options["grpc.enable_retries"] == 1
    assert config[0]["name"] == [{"service": SERVICE, "method": "GetRun"}]
    assert config[0]["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE"]
    with pytest.raises(ValueError, match=r"package\.Service/Method"):
        channel_options(["GetRun"])


def test_mesh_metadata_carries_the_token_and_the_tenant(settings: MeshSettings) -> None:
    assert mesh_metadata(settings) == (("x-hermesh-mesh", TOKEN),)
    assert mesh_metadata(settings, TENANT) == (
        ("x-hermesh-mesh", TOKEN),
        ("x-hermesh-tenant", str(TENANT)),
    )


@pytest.mark.parametrize(("safe", "calls"), [((), 1), ((f"{SERVICE}/Authenticate",), 3)])
async def test_a_safe_method_is_tried_three_times(
    server: Server, settings: MeshSettings, servicer: Servicer, safe: tuple[str, ...], calls: int
) -> None:
    async def unary(request: Any, context: Any) -> Any:
        raise UnavailableError(message="down")

    servicer.unary = unary
    async with open_channel(settings, server.address, safe=safe) as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await pb_grpc.SessionInternalServiceStub(channel).Authenticate(REQUEST)
    assert servicer.calls == calls


async def test_a_unary_call_has_a_deadline_of_its_own(
    server: Server, settings: MeshSettings, servicer: Servicer
) -> None:
    async def unary(request: Any, context: Any) -> Any:
        await asyncio.Event().wait()

    servicer.unary = unary
    async with open_channel(settings, server.address, unary_timeout=0.1) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await pb_grpc.SessionInternalServiceStub(channel).Authenticate(REQUEST)
    assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_stream_has_no_deadline_of_its_own_and_is_cancelled_at_the_end(
    server: Server, settings: MeshSettings, servicer: Servicer
) -> None:
    ended = asyncio.Event()
    seen: list[float | None] = []

    async def stream(requests: Any, context: Any) -> Any:
        seen.append(context.time_remaining())
        try:
            async for _ in requests:
                yield pb.AppendResponse()
            await asyncio.Event().wait()
        finally:
            ended.set()

    servicer.stream = stream
    async with open_channel(settings, server.address, unary_timeout=0.1) as channel:
        stub = pb_grpc.SessionInternalServiceStub(channel)
        async with stream_call(stub.Append()) as call:
            await call.write(pb.AppendRequest())
            assert await call.read() is not grpc.aio.EOF
        assert call.cancelled()
        async with asyncio.timeout(5):
            await ended.wait()
    assert seen == [None]


async def test_the_callers_own_metadata_wins(
    server: Server, settings: MeshSettings, servicer: Servicer
) -> None:
    seen: dict[str, Any] = {}

    async def unary(request: Any, context: Any) -> Any:
        seen.update(context.invocation_metadata())
        return pb.AuthenticateResponse()

    servicer.unary = unary
    given = (*mesh_metadata(settings, TENANT), ("x-request-id", "mine"))
    async with open_channel(settings, server.address) as channel:
        await pb_grpc.SessionInternalServiceStub(channel).Authenticate(REQUEST, metadata=given)
    assert seen["x-hermesh-tenant"] == str(TENANT)
    assert seen["x-request-id"] == "mine"


async def test_a_peer_outside_of_the_mesh_gets_no_token(
    server: Server, settings: MeshSettings, servicer: Servicer
) -> None:
    async with open_channel(settings, server.address, mesh=False) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await pb_grpc.SessionInternalServiceStub(channel).Authenticate(REQUEST)
    assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_mesh_that_cannot_be_reached_is_told_and_one_that_can_is_not() -> None:
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    settings = MeshSettings(mesh_address=f"127.0.0.1:{port}")
    async with open_channel(settings) as channel:
        await server.start()
        check = mesh_check(channel)
        async with asyncio.timeout(10):
            assert await check() is None
            await server.stop(0)
            await channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
        assert await check() == "the mesh cannot be reached"
