"""Calls that are made to fill a server: without a key, without a message, or with one that never ends."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hermesh.session.v1 import session_internal_service_pb2 as pb
from hermesh.session.v1 import session_internal_service_pb2_grpc as pb_grpc
from meshkit.auth import CachingAuthenticator
from meshkit.errors import (
    CancelledCallError,
    DeadlineError,
    HermeshError,
    InvalidArgumentError,
    ResourceExhaustedError,
    from_rpc_error,
)
from meshkit.floods import Floods
from meshkit.server import Server
from meshkit.settings import MeshSettings
from tests.hostile import HostileCalls, unfinished
from tests.unit.meshkit.support import KEY, SERVICE, TOKEN, Keys, Logs, Servicer, serve

Stub = pb_grpc.SessionInternalServiceStub
MESH = (("x-hermesh-mesh", TOKEN),)
REQUEST = pb.AuthenticateRequest(api_key="x")
AUTHENTICATE = f"/{SERVICE}/Authenticate"
CHECK = "/grpc.health.v1.Health/Check"


def patient(settings: MeshSettings, seconds: float) -> MeshSettings:
    return settings.model_copy(update={"arrival_seconds": seconds})


async def failure(call: Any) -> HermeshError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


async def is_healthy(server: Server) -> bool:
    async with grpc.aio.insecure_channel(server.address) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def test_calls_without_a_key_that_never_send_their_message_are_refused_from_their_headers(
    settings: MeshSettings, logs: Logs
) -> None:
    async with (
        serve(patient(settings, 600), Servicer(), max_calls=5) as server,
        HostileCalls(server.address) as raw,
    ):
        for metadata in ({}, {"authorization": "Bearer hm_bad"}, {"x-hermesh-mesh": "wrong"}):
            silent = [raw.begin(AUTHENTICATE, metadata) for _ in range(30)]
            await raw.until_answered(set(silent))
        assert {line["code"] for line in await logs.rpcs(10)} == {"UNAUTHENTICATED"}
        async with grpc.aio.insecure_channel(server.address) as channel:
            await Stub(channel).Authenticate(REQUEST, metadata=MESH)


async def test_an_unfinished_message_without_a_key_is_never_waited_for(settings: MeshSettings) -> None:
    async with serve(patient(settings, 600), Servicer()) as server:
        for _ in range(5):
            async with HostileCalls(server.address) as raw:
                stream = raw.begin(AUTHENTICATE)
                await raw.send(stream, unfinished(16 * 1024 * 1024))
                # What was under way when the answer came; nobody asked for it.
                assert raw.sent[stream] < 16 * 1024 * 1024


async def test_silent_calls_with_a_key_fill_the_places_but_not_those_of_health_checks_and_end_in_time(
    settings: MeshSettings, logs: Logs
) -> None:
    async with (
        serve(patient(settings, 1.0), Servicer(), max_calls=3) as server,
        HostileCalls(server.address) as raw,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        silent = [raw.begin(AUTHENTICATE, dict(MESH)) for _ in range(20)]
        # All but three are refused at once; while three wait, nobody else is served, but for health.
        error = None
        while not isinstance(error, ResourceExhaustedError):
            try:
                await Stub(channel).Authenticate(REQUEST, metadata=MESH)
            except grpc.aio.AioRpcError as caught:
                error = from_rpc_error(caught)
        assert (error.reason, error.retry_after_ms) == ("OVERLOADED", 500)
        assert await is_healthy(server)
        await raw.until_answered(set(silent))
        await Stub(channel).Authenticate(REQUEST, metadata=MESH)
        codes = [line["code"] for line in await logs.rpcs(21)]
        assert codes.count("DEADLINE_EXCEEDED") == 3


async def test_a_message_that_stops_half_way_is_given_up(settings: MeshSettings, logs: Logs) -> None:
    async with (
        serve(patient(settings, 0.2), Servicer()) as server,
        HostileCalls(server.address) as raw,
    ):
        stream = raw.begin(AUTHENTICATE, dict(MESH))
        await raw.send(stream, unfinished(1000)[:500])
        await raw.until_answered({stream})
        assert (await logs.rpcs())[0]["code"] == "DEADLINE_EXCEEDED"


async def test_the_reason_of_a_call_that_gave_no_message_in_time_is_told(settings: MeshSettings) -> None:
    async with (
        serve(patient(settings, 0.1), Servicer()) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        for path, kind in ((AUTHENTICATE, channel.stream_unary), (CHECK, channel.stream_unary)):
            error = await failure(kind(path)(metadata=MESH))
            assert isinstance(error, DeadlineError)
            assert "did not arrive" in error.message
        ended = channel.stream_unary(AUTHENTICATE)(metadata=MESH)
        await ended.done_writing()
        assert isinstance(await failure(ended), CancelledCallError)


async def test_silent_health_checks_neither_fill_a_place_nor_stay(
    settings: MeshSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshkit.interceptor._HEALTH_SECONDS", 0.5)
    async with (
        serve(settings, Servicer(), max_calls=1) as server,
        HostileCalls(server.address) as raw,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        silent = [raw.begin(CHECK) for _ in range(90)]
        assert await is_healthy(server)
        await Stub(channel).Authenticate(REQUEST, metadata=MESH)
        await raw.until_answered(set(silent))


async def test_health_watches_are_few(settings: MeshSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshkit.interceptor._MAX_WATCHES", 3)
    async with serve(settings, Servicer()) as server, grpc.aio.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watches = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(3)]
        for watch in watches:
            await watch.read()
        error = await failure(stub.Watch(health_pb2.HealthCheckRequest()).read())
        assert (type(error), error.reason) == (ResourceExhaustedError, "OVERLOADED")
        assert await is_healthy(server)
        for watch in watches:
            watch.cancel()
        async with asyncio.timeout(5):
            while True:
                again = stub.Watch(health_pb2.HealthCheckRequest())
                try:
                    await again.read()
                    break
                except grpc.aio.AioRpcError:
                    continue
        again.cancel()


async def test_a_message_over_a_services_own_limit_has_a_reason(settings: MeshSettings) -> None:
    servicer = Servicer()
    async with (
        serve(settings, servicer, max_request_bytes=100_000) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        for size, reason in ((90_000, "INVALID_ARGUMENT"), (110_000, "INPUT_TOO_LARGE")):
            request = pb.AuthenticateRequest(api_key="x" * size)
            error = await failure(Stub(channel).Authenticate(request, metadata=MESH))
            assert (type(error), error.reason) == (InvalidArgumentError, reason)
        assert servicer.calls == 0


async def test_wrong_keys_of_one_address_are_told_to_wait_and_harm_nobody_else(
    settings: MeshSettings,
) -> None:
    keys = CachingAuthenticator(Keys(), burst=5, rate=0.1)
    async with (
        serve(settings, Servicer(), authenticator=keys) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):

        async def ask(key: str, forwarded: str) -> HermeshError:
            metadata = (("authorization", f"Bearer {key}"), ("x-forwarded-for", forwarded))
            return await failure(Stub(channel).Authenticate(REQUEST, metadata=metadata))

        # A right key gets as far as the method, which is not for it.
        assert (await ask(KEY, "203.0.113.7")).reason == "MESH_ONLY"
        # Whatever the caller wrote before it: Envoy's word is the last.
        errors = [await ask(f"hm_{number}", f"10.0.0.{number}, 203.0.113.7") for number in range(20)]
        assert [error.reason for error in errors] == ["API_KEY_INVALID"] * 5 + ["TOO_MANY_WRONG_KEYS"] * 15
        assert errors[-1].code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert errors[-1].retry_after_ms
        assert (await ask(KEY, "203.0.113.7")).reason == "MESH_ONLY"
        assert (await ask("hm_other", "203.0.113.8")).reason == "API_KEY_INVALID"


async def test_a_flood_of_calls_without_a_key_writes_few_lines(
    server: Server, plain: Stub, logs: Logs
) -> None:
    for _ in range(100):
        assert (await failure(plain.Authenticate(REQUEST))).reason == "API_KEY_MISSING"
    assert len(logs.entries) < 100
    assert logs.entries[0]["client"] == "127.0.0.1"


def test_lines_that_were_left_out_are_counted_in_the_next() -> None:
    now = 0.0
    floods = Floods(2, lambda: now)
    assert [floods.take("a") for _ in range(5)] == [True, True, False, False, False]
    assert floods.take("b")
    assert floods.left_out("b") == {}
    now = 1.0
    assert floods.take("a")
    assert floods.left_out("a") == {"left_out": 3}
    assert floods.left_out("a") == {}
    for number in range(1_000):
        floods.take(f"kind-{number}")
    assert len(floods._kinds) == 100
    # Whoever had all kinds taken does not keep others out of the log for ever.
    now = 2.0
    assert floods.take("another")
