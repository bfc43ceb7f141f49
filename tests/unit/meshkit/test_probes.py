from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator

import pytest
from prometheus_client import CollectorRegistry

from meshkit.errors import StartupError
from meshkit.probes import ProbeServer, Readiness
from meshkit.settings import parse_address
from meshkit.telemetry import rpc_metrics


async def ask(probes: ProbeServer, raw: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(*parse_address(probes.address))
    try:
        writer.write(raw)
        async with asyncio.timeout(5):
            return await reader.read()
    finally:
        writer.close()


async def get(probes: ProbeServer, path: str) -> tuple[int, str]:
    answer = (await ask(probes, f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())).decode()
    head, _, body = answer.partition("\r\n\r\n")
    return int(head.split(" ")[1]), body


@pytest.fixture
async def probes() -> AsyncIterator[ProbeServer]:
    registry = CollectorRegistry()
    rpc_metrics(registry).started("/a/b")
    async with ProbeServer("127.0.0.1:0", registry=registry, io_timeout=1.0) as server:
        yield server


async def test_health_answers_while_the_loop_lives(probes: ProbeServer) -> None:
    assert await get(probes, "/health") == (200, '{"status":"alive"}\n')


async def test_ready_follows_the_start_the_checks_and_the_drain(probes: ProbeServer) -> None:
    why: str | None = None

    async def check() -> str | None:
        return why

    own: str | None = None

    async def own_check() -> str | None:
        return own

    probes.readiness.add("postgresql", check)
    probes.readiness.add("embedder", own_check, own=True)
    status, body = await get(probes, "/ready")
    assert (status, json.loads(body)["reason"]) == (503, "starting")
    probes.set_ready()
    status, body = await get(probes, "/ready")
    assert status == 200
    fine = {"ok": True, "reason": None}
    assert json.loads(body) == {"status": "ready", "checks": {"postgresql": fine, "embedder": fine}}
    # What all replicas share degrades; what is wrong with this one alone takes it out.
    why = "no answer"
    status, body = await get(probes, "/ready")
    assert (status, json.loads(body)["status"]) == (200, "degraded")
    assert json.loads(body)["checks"]["postgresql"] == {"ok": False, "reason": "no answer"}
    assert 'hermesh_dependency_up{dependency="postgresql"} 0.0' in (await get(probes, "/metrics"))[1]
    own = "gives no vectors"
    status, body = await get(probes, "/ready")
    assert (status, json.loads(body)["status"]) == (503, "not ready")
    why = own = None
    assert (await get(probes, "/ready"))[0] == 200
    assert 'hermesh_dependency_up{dependency="postgresql"} 1.0' in (await get(probes, "/metrics"))[1]
    probes.set_ready("draining")
    assert (await get(probes, "/ready"))[0] == 503


async def test_the_gauges_are_true_without_anybody_asking_for_ready(probes: ProbeServer) -> None:
    looked = asyncio.Event()

    async def check() -> str | None:
        looked.set()
        return "no answer"

    probes.readiness.add("redis", check)
    assert "hermesh_dependency_up{" not in (await get(probes, "/metrics"))[1]
    probes.set_ready()
    async with asyncio.timeout(5):
        await looked.wait()
    assert 'hermesh_dependency_up{dependency="redis"} 0.0' in (await get(probes, "/metrics"))[1]


async def test_a_check_that_hangs_or_fails_is_a_reason_without_its_text() -> None:
    readiness = Readiness(timeout=0.05, registry=CollectorRegistry())

    async def hang() -> str | None:
        await asyncio.Event().wait()
        return None

    async def broken() -> str | None:
        raise RuntimeError("password=hunter2")

    readiness.add("hang", hang)
    readiness.add("broken", broken)
    problems = await readiness.problems()
    assert problems == {"hang": "no answer within 0.05 s", "broken": "the check failed"}


async def test_ready_answers_soon_with_what_is_known_of_a_part_that_hangs() -> None:
    readiness = Readiness(timeout=0.05, registry=CollectorRegistry())
    hangs = asyncio.Event()

    async def check() -> str | None:
        if hangs.is_set():
            await asyncio.Event().wait()
        return None

    readiness.add("redis", check)
    assert await readiness.soon(0.01) == {"redis": None}
    hangs.set()
    assert await readiness.soon(0.01) == {"redis": None}
    await readiness.problems()
    assert await readiness.soon(0.01) == {"redis": "no answer within 0.05 s"}


async def test_metrics_are_in_the_text_format(probes: ProbeServer) -> None:
    status, body = await get(probes, "/metrics?x=1")
    assert status == 200
    assert 'hermesh_rpc_started_total{method="/a/b"} 1.0' in body


async def test_other_paths_and_methods_are_refused(probes: ProbeServer) -> None:
    assert (await get(probes, "/"))[0] == 404
    assert b" 405 " in await ask(probes, b"POST /health HTTP/1.1\r\n\r\n")
    head = await ask(probes, b"HEAD /health HTTP/1.1\r\n\r\n")
    assert b" 200 " in head
    assert head.endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    "raw",
    [
        b"\xff\xfe\r\n\r\n",
        b"hello\r\n\r\n",
        b"GET /health SMTP\r\n\r\n",
        b"GET / HTTP/1.1\r\nx: " + b"a" * 20_000,
    ],
)
async def test_what_is_not_a_small_http_request_gets_nothing(probes: ProbeServer, raw: bytes) -> None:
    try:
        assert await ask(probes, raw) == b""
    except ConnectionResetError:
        pass
    assert (await get(probes, "/health"))[0] == 200


async def test_a_client_that_sends_nothing_is_dropped(probes: ProbeServer) -> None:
    assert await ask(probes, b"GET /health") == b""


async def test_many_idle_clients_do_not_take_the_place_of_all(
    probes: ProbeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshkit.probes._MAX_CONNECTIONS", 2)
    first = await asyncio.open_connection(*parse_address(probes.address))
    second = await asyncio.open_connection(*parse_address(probes.address))
    async with asyncio.timeout(5):
        # Both are dropped once their time is over, and others are served again.
        assert await first[0].read() == b""
        assert await second[0].read() == b""
    first[1].close()
    second[1].close()
    assert (await get(probes, "/health"))[0] == 200


async def test_a_port_in_use_names_the_variable() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(StartupError, match="already in use; free it or set HERMESH_METRICS_LISTEN"):
            async with ProbeServer(f"127.0.0.1:{taken.getsockname()[1]}"):
                pass
