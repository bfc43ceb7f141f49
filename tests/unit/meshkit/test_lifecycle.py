"""Start and end of a process: signals, drain, ready file, addresses in use."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hermesh.session.v1 import session_internal_service_pb2 as pb
from hermesh.session.v1 import session_internal_service_pb2_grpc as pb_grpc
from meshkit.channel import stream_call
from meshkit.errors import StartupError
from meshkit.lifecycle import StopSignals, check_free, fail, reachable, remove_ready_file, write_ready_file
from meshkit.server import Server
from meshkit.settings import MeshSettings
from tests.unit.meshkit.support import SERVICE, TOKEN, Servicer, serve

ROOT = Path(__file__).parents[3]
MESH = (("x-hermesh-mesh", TOKEN),)
CHILD = """
import asyncio
from meshkit.server import Server, run
from meshkit.settings import MeshSettings, load

async def main():
    async with Server(load(MeshSettings), service="child") as server:
        await server.serve()

run(main)
"""


async def watch_health(address: str, states: list[int], changed: asyncio.Event) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            async with stream_call(stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE))) as call:
                async for answer in call:
                    states.append(answer.status)
                    changed.set()
        except grpc.aio.AioRpcError:
            return


async def test_a_drain_reports_it_finishes_calls_and_returns(
    settings: MeshSettings, servicer: Servicer
) -> None:
    working, go, drained = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def unary(request: Any, context: Any) -> Any:
        working.set()
        await go.wait()
        return pb.AuthenticateResponse(tenant_id="done")

    async def callback() -> None:
        drained.set()
        go.set()

    servicer.unary = unary
    states: list[int] = []
    changed = asyncio.Event()
    async with serve(settings, servicer) as server:
        server.on_drain(callback)
        serving = asyncio.create_task(server.serve())
        health = asyncio.create_task(watch_health(server.address, states, changed))
        await changed.wait()
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub = pb_grpc.SessionInternalServiceStub(channel)
            call = stub.Authenticate(pb.AuthenticateRequest(api_key="x"), metadata=MESH)
            await working.wait()
            server.signals.trigger()
            assert (await call).tenant_id == "done"
            await serving
        await health
    assert drained.is_set()
    assert server.draining.is_set()
    assert states == [
        health_pb2.HealthCheckResponse.SERVING,
        health_pb2.HealthCheckResponse.NOT_SERVING,
    ]


async def test_calls_are_still_served_during_the_drain_delay(
    settings: MeshSettings, servicer: Servicer
) -> None:
    slow = settings.model_copy(update={"drain_delay_seconds": 30.0})
    async with serve(slow, servicer) as server, grpc.aio.insecure_channel(server.address) as channel:
        serving = asyncio.create_task(server.serve())
        server.signals.trigger()
        await server.draining.wait()
        stub = pb_grpc.SessionInternalServiceStub(channel)
        answer = await stub.Authenticate(pb.AuthenticateRequest(api_key="late"), metadata=MESH)
        assert answer.tenant_id == "late"
        server.signals.trigger()
        await serving


async def test_a_second_signal_ends_a_drain_that_hangs(settings: MeshSettings, servicer: Servicer) -> None:
    started = asyncio.Event()

    async def hang() -> None:
        started.set()
        await asyncio.Event().wait()

    patient = settings.model_copy(update={"drain_seconds": 600.0})
    async with serve(patient, servicer) as server:
        server.on_drain(hang)
        serving = asyncio.create_task(server.serve())
        server.signals.trigger()
        await started.wait()
        assert not serving.done()
        server.signals.trigger()
        await serving


async def test_callbacks_after_the_delay_run_after_it(settings: MeshSettings, servicer: Servicer) -> None:
    order: list[str] = []

    async def note(name: str) -> None:
        order.append(name)

    delayed = settings.model_copy(update={"drain_delay_seconds": 0.05})
    async with serve(delayed, servicer) as server:
        server.on_drain(lambda: note("late"), after_delay=True)
        server.on_drain(lambda: note("early"))
        server.signals.trigger()
        await server.serve()
    assert order == ["early", "late"]


async def test_a_callback_that_hangs_or_fails_costs_only_the_grace(
    settings: MeshSettings, servicer: Servicer
) -> None:
    async def hang() -> None:
        await asyncio.Event().wait()

    async def broken() -> None:
        raise KeyError("x")

    brief = settings.model_copy(update={"drain_seconds": 0.1})
    async with serve(brief, servicer) as server:
        server.on_drain(hang)
        server.on_drain(broken)
        server.signals.trigger()
        async with asyncio.timeout(5):
            await server.serve()


async def test_a_gate_that_fails_takes_the_replica_out(
    settings: MeshSettings, servicer: Servicer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshkit.server._HEALTH_PERIOD", 0.01)
    why: str | None = None
    states: list[int] = []
    changed = asyncio.Event()

    async def check() -> str | None:
        return why

    async with asyncio.timeout(10), Server(settings, service="t", configure_logging=False) as server:
        server.add(pb_grpc.add_SessionInternalServiceServicer_to_server, servicer, SERVICE)
        server.add_readiness("disk", check, gates_health=True)
        await server.start()
        watching = asyncio.create_task(watch_health(server.address, states, changed))
        for why in (None, "full", None):
            while not states or (states[-1] == health_pb2.HealthCheckResponse.SERVING) == bool(why):
                changed.clear()
                await changed.wait()
        await server.stop()
        await watching
    assert states[:3] == [
        health_pb2.HealthCheckResponse.SERVING,
        health_pb2.HealthCheckResponse.NOT_SERVING,
        health_pb2.HealthCheckResponse.SERVING,
    ]


async def test_the_ready_file_tells_the_addresses_and_goes_away(
    settings: MeshSettings, servicer: Servicer, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "ready.json"
    async with serve(settings.model_copy(update={"ready_file": path}), servicer) as server:
        assert json.loads(path.read_text()) == {
            "service": "test",
            "replica": "test-1",
            "pid": os.getpid(),
            "address": server.address,
            "metrics_address": server.metrics_address,
        }
        assert [item.name for item in path.parent.iterdir()] == ["ready.json"]
    assert not path.exists()


def test_a_ready_file_of_another_process_stays(tmp_path: Path) -> None:
    path = tmp_path / "ready.json"
    for text in (json.dumps({"pid": os.getpid() + 1}), "broken", "[]"):
        path.write_text(text)
        remove_ready_file(path)
        assert path.exists()
    remove_ready_file(tmp_path / "absent")
    remove_ready_file(None)


def test_a_ready_file_that_cannot_be_written_is_one_line(settings: MeshSettings, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    broken = settings.model_copy(update={"ready_file": tmp_path / "file" / "ready.json"})
    with pytest.raises(StartupError, match="HERMESH_READY_FILE"):
        write_ready_file(broken, "x", "a:1", "a:2")


@pytest.mark.parametrize("variable", ["HERMESH_LISTEN", "HERMESH_METRICS_LISTEN"])
def test_a_port_in_use_is_one_line_and_status_1(variable: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        env = {**os.environ, variable: f"127.0.0.1:{port}", "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}"}
        done = subprocess.run(
            [sys.executable, "-c", CHILD], env=env, capture_output=True, text=True, timeout=30, check=False
        )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"cannot listen on 127.0.0.1:{port}: address already in use" in done.stderr
    assert variable in done.stderr


def test_a_process_logs_json_and_ends_with_0_on_sigterm(tmp_path: Path) -> None:
    ready = tmp_path / "ready.json"
    env = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}",
        "HERMESH_READY_FILE": str(ready),
        "HERMESH_REPLICA": "child-1",
        "HERMESH_DRAIN_DELAY_SECONDS": "0",
    }
    child = subprocess.Popen([sys.executable, "-c", CHILD], env=env, stderr=subprocess.PIPE, text=True)
    try:
        assert child.stderr is not None
        first = json.loads(child.stderr.readline())
        assert first["event"] == "serving"
        assert (first["service"], first["replica"], first["level"]) == ("child", "child-1", "info")
        assert first["timestamp"].endswith("Z")
        assert json.loads(ready.read_text())["address"] == first["address"]
        child.send_signal(signal.SIGTERM)
        rest = [json.loads(line) for line in child.stderr]
        assert child.wait(timeout=20) == 0
    finally:
        child.kill()
        child.wait(timeout=20)
        assert child.stderr is not None
        child.stderr.close()
    assert [line["event"] for line in rest] == ["draining", "stopped"]
    assert not ready.exists()


async def test_signals_set_events_and_their_handlers_are_removed() -> None:
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(5):
            await signals.stop.wait()
        assert not signals.now.is_set()
        assert not await signals.pause(0.001)
        os.kill(os.getpid(), signal.SIGINT)
        assert await signals.pause(5)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_an_address_that_is_not_ours_is_one_line() -> None:
    with pytest.raises(StartupError, match=r"cannot listen on 192\.0\.2\.1:80: .*HERMESH_LISTEN"):
        check_free("192.0.2.1:80", "HERMESH_LISTEN")


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("0.0.0.0", "127.0.0.1:5"),
        ("::", "[::1]:5"),
        ("10.0.0.1", "10.0.0.1:5"),
        ("::1", "[::1]:5"),
        ("no.such.invalid", "no.such.invalid:5"),
    ],
)
def test_wildcard_hosts_become_loopback(host: str, expected: str) -> None:
    assert reachable(host, 5) == expected


def test_a_name_becomes_an_address() -> None:
    assert reachable("localhost", 5) in ("127.0.0.1:5", "[::1]:5")


def test_failing_writes_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        fail("first\nsecond")
    assert end.value.code == 1
    assert capsys.readouterr().err == "hermesh: first second\n"


POLICY = """
import os
from meshkit import lifecycle

async def main():
    print(os.sched_getscheduler(0), lifecycle.scheduling())

os.sched_setscheduler(0, int(os.environ["BEFORE"]), os.sched_param(0))
lifecycle.run(main)
"""


@pytest.mark.parametrize(
    ("before", "then", "name"),
    [(os.SCHED_OTHER, os.SCHED_BATCH, "batch"), (os.SCHED_IDLE, os.SCHED_IDLE, "idle")],
)
def test_a_process_interrupts_no_other_unless_a_policy_was_chosen_for_it(
    before: int, then: int, name: str
) -> None:
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}", "BEFORE": str(before)}
    done = subprocess.run(
        [sys.executable, "-c", POLICY], env=env, capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.split() == [f"{then}", name]
