"""`python -m gateway` as the launcher runs it. The mesh behind is the FAKE of tests/fakes/mesh.py."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import connect

from meshkit.identity import MESH_TOKEN_KEY
from tests.fakes.mesh import API_KEY, FakeMesh, FakeRun

KEY = {"Authorization": f"Bearer {API_KEY}"}
SECONDS = 30


def environment(mesh: FakeMesh, **more: str) -> dict[str, str]:
    outside = {name: value for name, value in os.environ.items() if not name.startswith("HERMESH_")}
    return outside | {
        "HERMESH_MESH_ADDRESS": mesh.address,
        "HERMESH_MESH_TOKEN": "the-mesh-secret",
        "HERMESH_DRAIN_DELAY_SECONDS": "0.2",
        "HERMESH_DRAIN_SECONDS": "5",
        **more,
    }


@asynccontextmanager
async def process(env: dict[str, str]) -> AsyncIterator[asyncio.subprocess.Process]:
    started = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", env=env, stderr=asyncio.subprocess.PIPE
    )
    try:
        yield started
    finally:
        if started.returncode is None:
            started.kill()
        await started.communicate()


async def ready(started: asyncio.subprocess.Process, path: Path) -> dict[str, Any]:
    """Waits for the ready file; the process's first log line tells when it is there."""
    assert started.stderr is not None
    async with asyncio.timeout(SECONDS):
        while not exists(path):
            line = await started.stderr.readline()
            assert line, "the gateway ended early"
    found: dict[str, Any] = json.loads(read(path))
    return found


def exists(path: Path) -> bool:
    return path.exists()


def read(path: Path) -> str:
    return path.read_text()


async def test_it_serves_says_so_and_drains(mesh: FakeMesh, tmp_path: Path) -> None:
    file = tmp_path / "gateway-1.json"
    go = asyncio.Event()

    async def slow(run: FakeRun) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        yield "text.delta", {"text": "a"}
        await go.wait()

    mesh.script = slow
    env = environment(mesh, HERMESH_READY_FILE=str(file), HERMESH_REPLICA="gateway-1")
    async with process(env) as started:
        found = await ready(started, file)
        assert (found["service"], found["replica"], found["pid"]) == ("gateway", "gateway-1", started.pid)
        assert started.stderr is not None
        url = f"http://{found['address']}"
        async with httpx.AsyncClient(base_url=url, headers=KEY, timeout=SECONDS) as client:
            assert (await client.get("/health")).status_code == 200
            metrics = await client.get(f"http://{found['metrics_address']}/metrics")
            assert "hermesh_gateway_streams" in metrics.text
            assert "hermesh_loop_lag_seconds" in metrics.text
            session = mesh.add_session()
            body = {"input": "x", "stream": True}
            async with client.stream("POST", f"/v1/sessions/{session.session_id}/runs", json=body) as answer:
                parts = answer.aiter_text()
                text = ""
                while "text.delta" not in text:
                    text += await anext(parts)
                os.kill(started.pid, signal.SIGTERM)
                # The balancer is told first; what is open goes on for a moment, then is asked to come back.
                async with httpx.AsyncClient(base_url=url, timeout=SECONDS) as other:
                    while (await other.get("/health")).status_code == 200:
                        pass
                async for part in parts:
                    text += part
            assert "event: reconnect" in text
        async with asyncio.timeout(SECONDS):
            log = (await started.stderr.read()).decode()
            assert await started.wait() == 0
    assert not exists(file)
    assert "Traceback" not in log
    assert API_KEY not in log
    assert "the-mesh-secret" not in log
    assert all(MESH_TOKEN_KEY in entry for entry in mesh.metadata)


async def test_each_of_many_websockets_is_asked_to_come_back_before_the_process_ends(
    mesh: FakeMesh, tmp_path: Path
) -> None:
    file = tmp_path / "gateway-1.json"
    async with process(environment(mesh, HERMESH_READY_FILE=str(file))) as started, AsyncExitStack() as stack:
        found = await ready(started, file)
        address = f"ws://{found['address']}/v1/sessions/{mesh.add_session().session_id}/ws"
        sockets = [
            await stack.enter_async_context(connect(address, additional_headers=KEY)) for _ in range(200)
        ]
        os.kill(started.pid, signal.SIGTERM)
        async with asyncio.timeout(SECONDS):
            said = [[json.loads(text)["type"] async for text in socket] for socket in sockets]
        assert said == [["reconnect"]] * len(sockets)


async def test_a_port_in_use_is_one_clear_line(mesh: FakeMesh) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        async with process(environment(mesh, HERMESH_LISTEN=address)) as started:
            async with asyncio.timeout(SECONDS):
                _, err = await started.communicate()
    assert started.returncode == 1
    lines = err.decode().strip().splitlines()
    assert len(lines) == 1
    assert address in lines[0]
    assert "HERMESH_LISTEN" in lines[0]


@pytest.mark.parametrize(
    ("name", "value"), [("HERMESH_LISTEN", "nonsense"), ("HERMESH_HEARTBEAT_SECONDS", "-1")]
)
async def test_a_bad_setting_is_one_clear_line(mesh: FakeMesh, name: str, value: str) -> None:
    async with process(environment(mesh, **{name: value})) as started:
        async with asyncio.timeout(SECONDS):
            _, err = await started.communicate()
    assert started.returncode == 1
    lines = err.decode().strip().splitlines()
    assert len(lines) == 1
    assert name in lines[0]


async def test_the_servers_span_is_below_the_callers(mesh: FakeMesh, tmp_path: Path) -> None:
    file, spans = tmp_path / "ready.json", tmp_path / "spans.jsonl"
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    env = environment(mesh, HERMESH_READY_FILE=str(file), HERMESH_TRACE_FILE=str(spans))
    async with process(env) as started:
        found = await ready(started, file)
        async with httpx.AsyncClient(base_url=f"http://{found['address']}", headers=KEY) as client:
            headers = {"traceparent": f"00-{trace}-{parent}-01"}
            assert (await client.get("/v1/sessions", headers=headers)).status_code == 200
        os.kill(started.pid, signal.SIGTERM)
        async with asyncio.timeout(SECONDS):
            await started.communicate()
    records = [json.loads(line) for line in read(spans).splitlines()]
    mine = [record for record in records if record["trace_id"] == trace]
    server = next(record for record in mine if record["kind"] == "server")
    assert server["parent_span_id"] == parent
    assert {record["parent_span_id"] for record in mine if record["kind"] == "client"} == {server["span_id"]}
