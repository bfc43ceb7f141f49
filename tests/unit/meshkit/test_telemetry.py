from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from meshkit.telemetry import (
    LoopMetrics,
    _render_json,
    _Stderr,
    redact,
    render_metrics,
    rpc_metrics,
    watch_loop,
)

ROOT = Path(__file__).parents[3]
CHILD = """
import logging, sys
import structlog
from uuid import UUID
from meshkit.context import request_id_var, run_id_var
from meshkit.identity import Identity, identity_var
from meshkit.settings import MeshSettings
from meshkit import tracing
from meshkit.telemetry import setup_logging

setup_logging(MeshSettings(log_format=sys.argv[1], replica="r-1"), "svc")
log = structlog.get_logger("own")
log.debug("hidden")
request_id_var.set("req-1")
run_id_var.set("run-1")
identity_var.set(Identity(UUID(int=7), mesh=False))
tracing.start_server_span("/a/b", None).enter()
log.info("shown", authorization="Bearer hunter2", run="x")
logging.getLogger("lib").warning("from a %s", "library")
logging.getLogger("lib").info("hidden")
try:
    {}["x"]
except KeyError:
    log.exception("failed")
"""


def child(log_format: str, program: str = CHILD) -> list[str]:
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}"}
    done = subprocess.run(
        [sys.executable, "-c", program, log_format],
        env=env,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_every_line_is_json_with_the_context_of_its_request() -> None:
    lines = [json.loads(line) for line in child("json")]
    assert [line["event"] for line in lines] == ["shown", "from a library", "failed"]
    assert {line["service"] for line in lines} == {"svc"}
    assert {line["replica"] for line in lines} == {"r-1"}
    assert {line["request_id"] for line in lines} == {"req-1"}
    assert {line["run_id"] for line in lines} == {"run-1"}
    assert {line["tenant"] for line in lines} == {"00000000-0000-0000-0000-000000000007"}
    assert len({line["trace_id"] for line in lines}) == 1
    assert [line["logger"] for line in lines] == ["own", "lib", "own"]
    assert [line["level"] for line in lines] == ["info", "warning", "error"]
    assert lines[0]["authorization"] == "[redacted]"
    assert "KeyError" in lines[2]["exception"]


def test_console_lines_are_for_people() -> None:
    text = "\n".join(child("console"))
    assert "shown" in text
    assert "from a library" in text
    assert "hunter2" not in text
    assert "hidden" not in text


def test_secrets_are_redacted_by_key() -> None:
    event = redact(None, "info", {"Authorization": "x", "mesh_token": "x", "method": "m"})
    assert event == {"Authorization": "[redacted]", "mesh_token": "[redacted]", "method": "m"}


def test_a_line_that_json_cannot_hold_comes_out_all_the_same() -> None:
    for value in ("\ud800", 1 << 80, object()):
        assert json.loads(_render_json(None, "info", {"event": "e", "value": value}))["event"] == "e"


def test_a_log_that_cannot_be_written_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    _Stderr().info(b"x")
    _Stderr().error("x")


def test_rpcs_are_counted_by_method_and_code() -> None:
    registry = CollectorRegistry()
    metrics = rpc_metrics(registry)
    assert rpc_metrics(registry) is metrics
    for code in ("OK", "OK", "INTERNAL"):
        metrics.started("/a/b")
        metrics.handled("/a/b", code, 0.02)
    metrics.started("/a/b")
    assert registry.get_sample_value("hermesh_rpc_started_total", {"method": "/a/b"}) == 4
    assert registry.get_sample_value("hermesh_rpc_handled_total", {"method": "/a/b", "code": "OK"}) == 2
    assert registry.get_sample_value("hermesh_rpc_seconds_count", {"method": "/a/b"}) == 3
    assert registry.get_sample_value("hermesh_rpc_active") == 1


def test_the_processes_own_figures_are_part_of_metrics() -> None:
    text, kind = render_metrics()
    assert b"process_cpu_seconds_total" in text
    assert b"process_resident_memory_bytes" in text
    assert b"_created" not in text
    assert kind.startswith("text/plain")


@pytest.fixture
async def loop_figures(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[CollectorRegistry]:
    """What is measured of this test's event loop, again and again."""
    monkeypatch.setattr("meshkit.telemetry._LAG_PERIOD", 0.01)
    registry = CollectorRegistry()
    watching = asyncio.create_task(watch_loop(LoopMetrics(registry)))
    await asyncio.sleep(0)
    yield registry
    watching.cancel()


async def figure(registry: CollectorRegistry, name: str, good: Callable[[float], bool]) -> float:
    """A gauge's value as soon as it is good."""
    async with asyncio.timeout(5):
        while not good(value := registry.get_sample_value(name) or 0.0):  # noqa: ASYNC110 -- a gauge tells nobody
            await asyncio.sleep(0.001)
    return value


async def test_a_blocked_loop_shows(loop_figures: CollectorRegistry) -> None:
    time.sleep(0.05)  # noqa: ASYNC251 -- to block the loop is the test
    await figure(loop_figures, "hermesh_loop_lag_seconds", lambda lag: lag >= 0.03)


async def test_tasks_are_counted_as_long_as_they_live(loop_figures: CollectorRegistry) -> None:
    name = "hermesh_event_loop_tasks"
    before = await figure(loop_figures, name, lambda count: count > 0)
    sleepers = [asyncio.create_task(asyncio.sleep(60)) for _ in range(20)]
    await figure(loop_figures, name, lambda count: count == before + 20)
    for sleeper in sleepers:
        sleeper.cancel()
    await figure(loop_figures, name, lambda count: count == before)


async def test_what_python_holds_is_counted(loop_figures: CollectorRegistry) -> None:
    gc.collect()  # what other tests left would be freed meanwhile, and be missed
    before = sys.getallocatedblocks()
    held = [[number] for number in range(50_000)]
    await figure(loop_figures, "hermesh_memory_blocks", lambda blocks: blocks > before + len(held))


def test_importing_does_not_touch_logging() -> None:
    assert logging.getLogger("meshkit").handlers == []


HOSTILE = """
import logging, sys
import structlog
from meshkit.settings import MeshSettings
from meshkit.telemetry import setup_logging

setup_logging(MeshSettings(log_format=sys.argv[1], replica="r-1"), "svc")
log = structlog.get_logger("own")

def descend(secret, deep, levels):
    if levels == 0:
        raise ValueError("at the bottom " + "x" * 100_000)
    ascend(secret, deep, levels)

def ascend(secret, deep, levels):
    descend(secret, deep, levels - 1)

deep = []
for _ in range(900):
    deep = [deep, {"key": "hm_" + "very-secret", "more": "y" * 1_000}]
for library in (False, True):
    try:
        try:
            descend("hm_" + "very-secret", deep, 400)
        except ValueError as error:
            raise ExceptionGroup("several", [error] * 50) from error
    except ExceptionGroup:
        if library:
            logging.getLogger("lib").exception("it failed")
        else:
            log.exception("it failed", deep=[[[[[[["z" * 10_000]]]]]]])
path = "/x\\n2026 [info] forged\\x1b[2J"
log.warning("a text\\nwith lines", path=path, many=list(range(100_000)), big=1 << 40_000)
"""


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_deep_traceback_is_short_and_names_no_variable(log_format: str) -> None:
    lines = child(log_format, HOSTILE)
    text = "\n".join(lines)
    assert "ValueError: at the bottom xxx" in text
    assert "frames left out" in text
    assert "in descend" in text
    assert "very-secret" not in text
    assert "1 of 50" in text
    assert "forged" in text
    assert "\x1b" not in text
    assert len(text) < 40_000
    if log_format == "json":
        assert len(lines) == 3
        assert all(len(line) < 12_000 for line in lines)
    else:
        assert not any(line.startswith("2026 [info]") for line in lines)
