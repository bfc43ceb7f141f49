"""`python -m services.tool` as a process."""

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from hermesh.tool.v1.tool_service_pb2 import ListToolsRequest
from hermesh.tool.v1.tool_service_pb2_grpc import ToolServiceStub
from tests.integration.tool.process import COMMAND, DEADLINE, ToolProcess, environment

MODULE = """
from services.tool.registry import Effect, tool

@tool("shout", description="Shouts.", input_schema={"type": "object"}, effect=Effect.PURE)
async def shout(arguments, context):
    return "A"
"""


@pytest.fixture
def replica(tmp_path: Path) -> Iterator[ToolProcess]:
    (tmp_path / "own_tools.py").write_text(MODULE)
    replica = ToolProcess(tmp_path, HERMESH_TOOL_MODULES="own_tools", PYTHONPATH=str(tmp_path))
    yield replica
    replica.kill()


def test_it_starts_serves_its_own_and_foreign_tools_and_stops(replica: ToolProcess) -> None:
    replica.wait_ready()
    with grpc.insecure_channel(replica.address) as channel:
        stub = ToolServiceStub(channel)
        answer = stub.ListTools(ListToolsRequest(), metadata=(("x-hermesh-mesh", "token"),), timeout=DEADLINE)
    assert [tool.name for tool in answer.tools] == ["calculator", "current_time", "fetch_page", "shout"]
    replica.process.send_signal(signal.SIGTERM)
    assert replica.process.wait(timeout=DEADLINE) == 0
    assert not replica.ready.exists()


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
        COMMAND,
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
