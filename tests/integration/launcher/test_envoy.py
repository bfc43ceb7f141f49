"""The real Envoy with the rendered configuration: who gets a call, what it carries, who may be called."""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest

from launcher import envoy
from tests.integration.launcher.envoy_kit import CHUNK, NOT_SERVING, SECONDS, SERVING, Replica, Running


async def call(address: str, method: str, metadata: dict[str, str] | None = None) -> dict[str, Any]:
    async with grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        answer = await channel.unary_unary(method)(b"", metadata=tuple((metadata or {}).items()), timeout=10)
    found: dict[str, Any] = json.loads(answer)
    return found


async def ask(address: str, count: int) -> Counter[str]:
    answers = await asyncio.gather(
        *(call(address, "/hermesh.session.v1.SessionService/GetRun") for _ in range(count))
    )
    return Counter(answer["replica"] for answer in answers)


async def test_calls_follow_the_endpoint_files(running: Running, replicas: list[Replica]) -> None:
    a, b, c = replicas
    await running.endpoints("session", [a, b])
    assert set(await ask(running.mesh, 40)) == {"a", "b"}
    await running.endpoints("session", [b, c])
    assert set(await ask(running.mesh, 40)) == {"b", "c"}
    await running.endpoints("session", [a])
    assert set(await ask(running.mesh, 10)) == {"a"}


async def test_a_replica_that_went_away_unannounced_costs_no_call(
    running: Running, replicas: list[Replica]
) -> None:
    await running.endpoints("session", replicas)
    await replicas[0].server.stop(0)
    # Nobody told Envoy: a call that meets the closed port is tried elsewhere.
    assert set(await ask(running.mesh, 60)) == {"b", "c"}
    gone = f"session/{replicas[0].address}"
    wanted = {f"session/{replica.address}": True for replica in replicas} | {gone: False}
    await running.until("session", wanted)


async def test_a_replica_that_says_it_is_not_serving_gets_no_call(
    running: Running, replicas: list[Replica]
) -> None:
    a, b, _ = replicas
    await running.endpoints("session", [a, b])
    await a.health.set("", NOT_SERVING)
    await running.until("session", {f"session/{a.address}": False, f"session/{b.address}": True})
    assert set(await ask(running.mesh, 20)) == {"b"}
    await a.health.set("", SERVING)
    await running.until("session", {f"session/{a.address}": True, f"session/{b.address}": True})
    assert set(await ask(running.mesh, 40)) == {"a", "b"}


async def test_where_nobody_is_well_nobody_gets_a_call(running: Running, replicas: list[Replica]) -> None:
    await running.endpoints("session", replicas[:1])
    await replicas[0].health.set("", NOT_SERVING)
    await running.until("session", {f"session/{replicas[0].address}": False})
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await ask(running.mesh, 1)
    assert failed.value.code() == grpc.StatusCode.UNAVAILABLE
    assert replicas[0].calls == 0


async def test_what_services_tell_each_other_does_not_come_in_from_outside(
    running: Running, replicas: list[Replica]
) -> None:
    await running.endpoints("session", replicas[:1])
    sent = {"x-hermesh-mesh": "a guess", "x-hermesh-tenant": "someone", "authorization": "Bearer key"}
    method = "/hermesh.session.v1.SessionService/GetRun"
    outside = (await call(running.grpc, method, sent))["metadata"]
    assert outside["authorization"] == "Bearer key"
    assert not any(name.startswith("x-hermesh") for name in outside)
    inside = (await call(running.mesh, method, sent))["metadata"]
    assert {name: inside[name] for name in sent} == sent


@pytest.mark.parametrize(
    "method",
    [
        "agent.v1.AgentService/Execute",
        "tool.v1.ToolService/Execute",
        "tool.v1.ToolService/Cancel",
        "session.v1.SessionInternalService/ClaimRun",
        "session.v1.SessionInternalService/Append",
    ],
)
async def test_what_is_for_the_mesh_is_not_there_from_outside(
    running: Running, replicas: list[Replica], method: str
) -> None:
    cluster = method.partition(".")[0]
    await running.endpoints(cluster, replicas[:1])
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call(running.grpc, f"/hermesh.{method}")
    assert failed.value.code() == grpc.StatusCode.UNIMPLEMENTED
    assert replicas[0].calls == 0
    assert (await call(running.mesh, f"/hermesh.{method}"))["replica"] == "a"


@pytest.mark.parametrize(
    "method",
    [
        "session.v1.SessionService/ListSessions",
        "agent.v1.AgentService/ListModels",
        "tool.v1.ToolService/ListTools",
        "memory.v1.MemoryService/Remember",
    ],
)
async def test_the_public_services_are_there(running: Running, replicas: list[Replica], method: str) -> None:
    await running.endpoints(method.partition(".")[0], replicas[1:2])
    assert (await call(running.grpc, f"/hermesh.{method}"))["replica"] == "b"


TOOLS = "/hermesh.tool.v1.ToolService"
TOOL_REPLICA = "x-hermesh-tool-replica"


async def place_of_execute(address: str, named: str = "") -> tuple[str, str]:
    """Executes something; returns who did it, and how the answer's headers name that replica."""
    metadata = ((TOOL_REPLICA, named),) if named else ()
    async with grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        execute = channel.unary_unary(f"{TOOLS}/Execute")(b"", metadata=metadata, timeout=10)
        headers = {key: str(value) for key, value in await execute.initial_metadata()}
        return json.loads(await execute)["replica"], headers.get(TOOL_REPLICA, named)


async def test_a_cancel_reaches_the_replica_that_its_call_went_to(
    running: Running, replicas: list[Replica]
) -> None:
    await running.endpoints("tool", replicas)
    places: dict[str, str] = {}
    async with asyncio.timeout(SECONDS):
        while len(places) < 3:
            replica, place = await place_of_execute(running.mesh)
            assert place
            assert places.setdefault(replica, place) == place
    for name, place in places.items():
        answers = [await call(running.mesh, f"{TOOLS}/Cancel", {TOOL_REPLICA: place}) for _ in range(10)]
        assert {answer["replica"] for answer in answers} == {name}
        # One that asks for its call again meets the same replica, too.
        assert {(await place_of_execute(running.mesh, place))[0] for _ in range(5)} == {name}


async def test_a_cancel_reaches_a_replica_that_drains_and_never_another_than_its_own(
    running: Running, replicas: list[Replica]
) -> None:
    a, b, _ = replicas
    await running.endpoints("tool", [a])
    _, place = await place_of_execute(running.mesh)
    await running.endpoints("tool", [a, b])
    await a.health.set("", NOT_SERVING)
    await running.until("tool", {f"tool/{a.address}": False, f"tool/{b.address}": True})
    assert (await call(running.mesh, f"{TOOLS}/Cancel", {TOOL_REPLICA: place}))["replica"] == "a"
    await a.server.stop(0)
    await running.endpoints("tool", [b])
    calls = b.calls
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call(running.mesh, f"{TOOLS}/Cancel", {TOOL_REPLICA: place})
    assert failed.value.code() == grpc.StatusCode.UNAVAILABLE
    assert b.calls == calls
    # A call that is asked for again goes to whoever is there: the journal says what may be done.
    assert (await place_of_execute(running.mesh, place))[0] == "b"


async def test_other_calls_are_neither_marked_nor_led(running: Running, replicas: list[Replica]) -> None:
    await running.endpoints("tool", replicas[:1])
    _, place = await place_of_execute(running.mesh)
    await running.endpoints("tool", replicas[:2])
    listed = {
        (await call(running.mesh, f"{TOOLS}/ListTools", {TOOL_REPLICA: place}))["replica"] for _ in range(40)
    }
    assert listed == {"a", "b"}


async def test_a_reader_that_stops_reading_holds_only_its_window(
    running: Running, replicas: list[Replica]
) -> None:
    a = replicas[0]
    await running.endpoints("session", [a])
    async with grpc.aio.insecure_channel(running.mesh) as channel:
        slow = channel.unary_stream("/hermesh.session.v1.SessionService/WatchRun")(b"")
        try:
            assert await slow.read() == CHUNK
            async with asyncio.timeout(SECONDS):
                seen = -1
                while seen != a.sent:
                    seen = a.sent
                    await asyncio.sleep(0.5)
            # 256 MiB wait to be sent; what is under way fits into the windows and buffers.
            assert a.sent < 8 * 1024 * 1024
            other = channel.unary_unary("/hermesh.session.v1.SessionService/GetRun")
            assert json.loads(await other(b"", timeout=10))["replica"] == "a"
        finally:
            slow.cancel()


async def test_a_gateway_that_is_not_there_is_a_503(running: Running) -> None:
    envoy.write_endpoints(running.eds, "gateway", ())
    await running.until("gateway", {})
    async with httpx.AsyncClient(base_url=running.http) as client:
        assert (await client.get("/health")).status_code == 503


async def test_the_admin_interface_is_on_a_private_socket(running: Running) -> None:
    assert running.admin.socket.stat().st_mode & 0o777 == 0o600
    assert running.admin.socket.stat().st_uid == os.getuid()


def test_an_endpoint_file_is_replaced_whole(tmp_path: Path) -> None:
    envoy.write_endpoints(tmp_path, "agent", ["127.0.0.1:1"])
    first = (tmp_path / "agent.yaml").stat().st_ino
    envoy.write_endpoints(tmp_path, "agent", ["127.0.0.1:1"])
    assert (tmp_path / "agent.yaml").stat().st_ino == first
    envoy.write_endpoints(tmp_path, "agent", ["127.0.0.1:1", "127.0.0.1:2"])
    assert (tmp_path / "agent.yaml").stat().st_ino != first
    assert [path.name for path in tmp_path.iterdir()] == ["agent.yaml"]
