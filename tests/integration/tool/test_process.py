"""`python -m services.tool` as a process."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from hermesh.tool.v1.tool_service_pb2 import ListToolsRequest
from hermesh.tool.v1.tool_service_pb2_grpc import ToolServiceStub

DEADLINE = 30.0
MODULE = """
from services.tool.registry import Effect, tool

@tool("shout", description="Shouts.", input_schema={"type": "object"}, effect=Effect.PURE)
async def shout(arguments, context):
    return "A"
"""


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    return {
        **{key: value for key, value in os.environ.items() if not key.startswith("HERMESH_")},
        "HERMESH_MESH_TOKEN": "token",
        "HERMESH_READY_FILE": str(tmp_path / "ready.json"),
        "HERMESH_DRAIN_DELAY_SECONDS": "0",
        **more,
    }


@pytest.fixture
def process(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    (tmp_path / "own_tools.py").write_text(MODULE)
    env = environment(tmp_path, HERMESH_TOOL_MODULES="own_tools", PYTHONPATH=str(tmp_path))
    started = subprocess.Popen(
        [sys.executable, "-m", "services.tool"], env=env, cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    yield started
    if started.poll() is None:
        started.kill()
    started.communicate(timeout=DEADLINE)


def ready(process: subprocess.Popen[str], path: Path) -> dict[str, str]:
    end = time.monotonic() + DEADLINE
    while not path.exists():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < end, "it did not become ready"
        time.sleep(0.02)
    found: dict[str, str] = json.loads(path.read_text())
    return found


def test_it_starts_serves_its_own_and_foreign_tools_and_stops(
    process: subprocess.Popen[str], tmp_path: Path
) -> None:
    address = ready(process, tmp_path / "ready.json")["address"]
    with grpc.insecure_channel(address) as channel:
        stub = ToolServiceStub(channel)
        answer = stub.ListTools(ListToolsRequest(), metadata=(("x-hermesh-mesh", "token"),), timeout=DEADLINE)
    assert [tool.name for tool in answer.tools] == ["calculator", "current_time", "fetch_page", "shout"]
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=DEADLINE) == 0
    assert not (tmp_path / "ready.json").exists()


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"HERMESH_TOOL_MODULES": "no_such_module"}, "HERMESH_TOOL_MODULES"),
        ({"HERMESH_TOOL_DISABLED": "nothing"}, "HERMESH_TOOL_DISABLED"),
        ({"HERMESH_TOOL_FETCH_ALLOW": "nowhere"}, "HERMESH_TOOL_FETCH_ALLOW"),
        ({"HERMESH_TOOL_MAX_CALLS": "0"}, "HERMESH_TOOL_MAX_CALLS"),
        ({"HERMESH_OBJECT_STORE_URL": "nonsense"}, "HERMESH_OBJECT_STORE_URL"),
        ({"HERMESH_OBJECT_STORE_URL": "file:///proc/nope/x"}, "HERMESH_OBJECT_STORE_URL"),
        ({"HERMESH_LISTEN": "nowhere"}, "HERMESH_LISTEN"),
    ],
)
def test_what_is_wrong_at_the_start_is_one_line(tmp_path: Path, more: dict[str, str], word: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "services.tool"],
        env=environment(tmp_path, **more),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert word in line
    assert "Traceback" not in line
