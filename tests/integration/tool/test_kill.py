"""A tool replica that dies in mid-act: what was done is counted by the tool's own side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from hermesh.session.v1 import resources_pb2 as resources
from hermesh.tool.v1 import tool_service_pb2 as pb
from hermesh.tool.v1.tool_service_pb2_grpc import ToolServiceStub
from meshkit.channel import mesh_metadata, open_channel
from services.tool.domain import CallRequest
from services.tool.journal import MeshJournal
from services.tool.registry import Effect
from tests.integration.session.process import MESH_TOKEN, SessionProcess, connect
from tests.integration.tool.journal_server import mesh_settings
from tests.integration.tool.process import ToolProcess
from tests.integration.tool.session_bench import SessionBench
from tests.unit.session.calls import new_writer

DEADLINE = 20.0
MODULE = """
import asyncio
from pathlib import Path
from services.tool.registry import Effect, tool

FOLDER = Path({folder!r})

def declare(name, effect):
    @tool(name, description="Acts.", input_schema={{"type": "object"}}, effect=effect, timeout=30.0)
    async def act(arguments, context):
        with (FOLDER / "effects").open("a") as effects:
            effects.write(f"{{name}} {{context.idempotency_key}}\\n")
        context.progress("acted")
        while not (FOLDER / "release").exists():
            await asyncio.sleep(0.01)
        return "done"
    return act

once = declare("act_once", Effect.NON_IDEMPOTENT)
again = declare("act_again", Effect.IDEMPOTENT)
"""

Start = Callable[[], ToolProcess]


@pytest.fixture
def start(tmp_path: Path, session_process: SessionProcess) -> Iterator[Start]:
    (tmp_path / "effect_tools.py").write_text(MODULE.format(folder=str(tmp_path)))
    started: list[ToolProcess] = []

    def start() -> ToolProcess:
        replica = ToolProcess(
            tmp_path / f"tool-{len(started)}",
            HERMESH_TOOL_MODULES="effect_tools",
            HERMESH_MESH_TOKEN=MESH_TOKEN,
            HERMESH_MESH_ADDRESS=session_process.address,
            HERMESH_TOOL_COMPLETE_SECONDS="10",
            HERMESH_DRAIN_SECONDS="2.5",
            PYTHONPATH=str(tmp_path),
        )
        started.append(replica)
        replica.wait_ready()
        return replica

    yield start
    for replica in started:
        replica.kill()


@pytest.fixture
async def bench(session_process: SessionProcess) -> AsyncIterator[SessionBench]:
    settings = mesh_settings(token=MESH_TOKEN, mesh_address=session_process.address)
    async with open_channel(settings) as channel, connect(session_process) as client:
        yield SessionBench(MeshJournal(channel, settings), client, await new_writer(client))


@asynccontextmanager
async def executing(replica: ToolProcess, request: CallRequest, name: str) -> AsyncIterator[Any]:
    settings = mesh_settings(token=MESH_TOKEN)
    async with open_channel(settings, replica.address) as channel:
        yield ToolServiceStub(channel).Execute(
            pb.ExecuteRequest(
                call_id=request.call_id,
                session_id=str(request.session_id),
                run_id=str(request.run_id),
                fence=request.fence,
                name=name,
                arguments="{}",
            ),
            metadata=mesh_metadata(settings, request.tenant_id),
            timeout=DEADLINE,
        )


async def result(replica: ToolProcess, request: CallRequest, name: str) -> pb.Result:
    async with executing(replica, request, name) as call:
        updates = [update async for update in call]
    last: pb.Result = updates[-1].result
    return last


def effects(folder: Path) -> list[str]:
    return (folder / "effects").read_text().splitlines()


@pytest.mark.parametrize("moved", [False, True])
async def test_what_must_not_run_twice_runs_once(
    start: Start, bench: SessionBench, tmp_path: Path, moved: bool
) -> None:
    first = await asyncio.to_thread(start)
    request = await bench.intend(Effect.NON_IDEMPOTENT)
    async with executing(first, request, "act_once") as call:
        assert (await call.read()).progress.text == "acted"
        first.kill()
        with pytest.raises(grpc.aio.AioRpcError):
            await call.read()
    second = await asyncio.to_thread(start)
    if moved:
        request = await bench.take_over(request)
    (tmp_path / "release").touch()
    for _ in range(2):
        got = await result(second, request, "act_once")
        assert (got.state, got.reason) == (resources.TOOL_CALL_STATE_UNKNOWN, "TOOL_CALL_UNKNOWN")
    assert effects(tmp_path) == [f"act_once key-{request.call_id}"]


async def test_what_may_run_again_does_so_with_the_same_key(
    start: Start, bench: SessionBench, tmp_path: Path
) -> None:
    first = await asyncio.to_thread(start)
    request = await bench.intend(Effect.IDEMPOTENT)
    async with executing(first, request, "act_again") as call:
        await call.read()
        first.kill()
    second = await asyncio.to_thread(start)
    (tmp_path / "release").touch()
    got = await result(second, await bench.take_over(request), "act_again")
    assert (got.state, got.content) == (resources.TOOL_CALL_STATE_COMPLETED, "done")
    assert effects(tmp_path) == [f"act_again key-{request.call_id}"] * 2


async def test_two_replicas_asked_for_one_call_act_once(
    start: Start, bench: SessionBench, tmp_path: Path
) -> None:
    first, second = await asyncio.to_thread(start), await asyncio.to_thread(start)
    request = await bench.intend(Effect.NON_IDEMPOTENT)
    async with executing(first, request, "act_once") as call:
        await call.read()
        assert (await result(second, request, "act_once")).state == resources.TOOL_CALL_STATE_UNKNOWN
        (tmp_path / "release").touch()
        # The act that was begun tells how it ended, and that is the call's outcome from now on.
        assert (await call.read()).result.state == resources.TOOL_CALL_STATE_COMPLETED
    later = await result(second, request, "act_once")
    assert (later.state, later.content, later.reused) == (resources.TOOL_CALL_STATE_COMPLETED, "done", True)
    assert len(effects(tmp_path)) == 1


async def test_a_drain_that_is_too_short_records_what_is_known(
    start: Start, bench: SessionBench, tmp_path: Path
) -> None:
    first = await asyncio.to_thread(start)
    request = await bench.intend(Effect.NON_IDEMPOTENT)
    async with executing(first, request, "act_once") as call:
        await call.read()
        first.process.terminate()
        assert (await call.read()).result.state == resources.TOOL_CALL_STATE_UNKNOWN
    assert await asyncio.to_thread(first.process.wait, DEADLINE) == 0
    second = await asyncio.to_thread(start)
    got = await result(second, await bench.take_over(request), "act_once")
    assert got.state == resources.TOOL_CALL_STATE_UNKNOWN
    assert len(effects(tmp_path)) == 1
