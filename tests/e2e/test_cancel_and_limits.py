"""Cancels and time limits, with processes that are frozen or killed between the promise and its keeping."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import grpc
import httpx
import pytest

from bench.mesh import Mesh
from hermesh.agent.v1 import agent_service_pb2 as agent_pb
from hermesh.agent.v1.agent_service_pb2_grpc import AgentServiceStub
from hermesh.common.v1.event_pb2 import InputMessage
from hermesh.session.v1 import resources_pb2 as resources
from tests.e2e.client import Frame, assert_whole, http, new_session, submit, watch, watch_to_end
from tests.e2e.conftest import tracebacks
from tests.e2e.tools_mesh import ToolsMesh, frozen, tools_mesh

LEASE_TTL_SECONDS = 10.0
SLOW = "[[tokens=3000 rate=50]]"
WAIT = "[[tool=wait {}]]"
SERVICES = ("gateway", "agent", "session", "tool", "memory", "valkey")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ToolsMesh]:
    with tools_mesh(tmp_path_factory.mktemp("tools")) as made:
        yield made
        assert not tracebacks(made.mesh)


@pytest.fixture
def tools(whole: ToolsMesh) -> ToolsMesh:
    """The mesh, healthy: what an earlier test broke has come back."""
    whole.mesh.wait_healthy()
    return whole


def options(**more: Any) -> dict[str, Any]:
    return {"options": {"memory": False, **more}}


async def begun(client: httpx.AsyncClient, text: str, event: str, **more: Any) -> tuple[str, Frame]:
    """A run that got as far as an event, and that event."""
    run = await submit(client, await new_session(client), text, **options(**more))
    async with asyncio.timeout(20):
        frames = await watch(client, run, 0, lambda frame: frame.event == event)
    return run, frames[-1]


async def ended(mesh: Mesh, run: str, seconds: float) -> tuple[list[Frame], float]:
    """The run's whole log, and how many seconds after this call it ended."""
    began = time.monotonic()
    async with asyncio.timeout(seconds):
        while True:
            # Gateways die here, too.
            with suppress(httpx.HTTPError, AssertionError):
                async with http(mesh) as client:
                    frames = await watch_to_end(client, run)
                    break
            await asyncio.sleep(0.2)
    assert_whole(frames)
    return frames, time.monotonic() - began


async def cancel(client: httpx.AsyncClient, run: str, reason: str = "enough") -> None:
    answer = await client.post(f"/v1/runs/{run}/cancel", json={"reason": reason})
    assert answer.status_code in (200, 202), answer.text


def holder(mesh: Mesh, started: list[Frame]) -> int:
    """The process of the agent that the last `run.started` names."""
    name = [f for f in started if f.event == "run.started"][-1].data["data"]["replica"]
    return next(row.pid for row in mesh.of("agent") if row.replica == name)


async def log_so_far(client: httpx.AsyncClient, run: str, event: str) -> list[Frame]:
    return await watch(client, run, 0, lambda frame: frame.event == event)


async def test_a_cancel_closes_the_models_stream_within_a_second(tools: ToolsMesh) -> None:
    async with http(tools.mesh) as client:
        for _ in range(4):
            run, _ = await begun(client, SLOW, "text.delta")
            _, aborted = await tools.model_streams()
            await cancel(client, run)
            assert await tools.model_gave_up(aborted, 5) < 1
            frames, took = await ended(tools.mesh, run, 10)
            assert took < 2
            assert frames[-1].data["data"] == {"reason": "enough"}


async def test_a_cancel_stops_the_tool_on_whichever_replica_it_runs(tools: ToolsMesh) -> None:
    places = set()
    async with http(tools.mesh) as client:
        for _ in range(8):
            run, _ = await begun(client, WAIT, "tool.call")
            await tools.did(run, "began")
            await cancel(client, run)
            assert await tools.did(run, "began", "stopped") < 1.5
            assert (await ended(tools.mesh, run, 10))[0][-1].event == "run.cancelled"
            places |= {deed.pid for deed in tools.deeds(run)}
    assert len(places) == 2


async def session_of(client: httpx.AsyncClient, run: str) -> str:
    return str((await client.get(f"/v1/runs/{run}")).json()["session_id"])


async def test_after_a_sessions_deletion_none_of_its_calls_acts(tools: ToolsMesh) -> None:
    async with http(tools.mesh) as client:
        for _ in range(4):
            run, _ = await begun(client, WAIT, "tool.call")
            session = await session_of(client, run)
            await tools.did(run, "began")
            answer = await client.delete(f"/v1/sessions/{session}")
            # Not a moment later: it had stopped when the answer was given.
            assert (answer.status_code, tools.words(run)) == (204, ["began", "stopped"]), answer.text
            assert (await client.get(f"/v1/sessions/{session}")).status_code == 404


async def test_a_session_is_deleted_though_the_agent_that_should_stop_its_call_hangs(
    tools: ToolsMesh,
) -> None:
    mesh = tools.mesh
    async with http(mesh) as client:
        run, _ = await begun(client, WAIT, "tool.call")
        session = await session_of(client, run)
        await tools.did(run, "began")
        with frozen(*(row.pid for row in mesh.of("agent"))):
            answer = await client.delete(f"/v1/sessions/{session}")
            assert (answer.status_code, tools.words(run)) == (204, ["began", "stopped"]), answer.text
    mesh.wait_healthy()


async def test_a_deletion_names_the_call_that_does_not_stop_and_is_done_once_it_has(tools: ToolsMesh) -> None:
    async with http(tools.mesh) as client:
        run, _ = await begun(client, "[[tool=stubborn {}]]", "tool.call")
        session = await session_of(client, run)
        await tools.did(run, "began")
        answer = await client.delete(f"/v1/sessions/{session}")
        assert answer.status_code == 409, answer.text
        assert answer.json()["reason"] == "CALLS_UNDER_WAY"
        assert run in answer.json()["metadata"]["calls"]
        assert int(answer.headers["retry-after"]) >= 1
        assert "acted" not in tools.words(run)
        async with asyncio.timeout(30):
            while (answer := await client.delete(f"/v1/sessions/{session}")).status_code == 409:
                assert answer.json()["reason"] == "CALLS_UNDER_WAY"
        assert answer.status_code == 204
        assert tools.words(run)[-1] == "acted"


async def test_a_cancel_of_a_queued_run_is_done_at_once(tools: ToolsMesh) -> None:
    async with http(tools.mesh) as client:
        session = await new_session(client)
        first = await submit(client, session, SLOW, **options())
        second = await submit(client, session, "never", **options())
        third = await submit(client, session, "[[tokens=3]]", **options())
        await cancel(client, second)
        assert (await client.get(f"/v1/runs/{second}")).json()["status"] == "cancelled"
        await cancel(client, first)
        assert (await ended(tools.mesh, third, 20))[0][-1].event == "run.completed"


async def test_a_cancel_outlives_every_process_there_is(tools: ToolsMesh) -> None:
    """The agent that should hear of it is frozen, the cancel is acknowledged, and then everything dies."""
    mesh = tools.mesh
    async with http(mesh) as client:
        run, _ = await begun(client, SLOW, "text.delta")
        agent = holder(mesh, await log_so_far(client, run, "run.started"))
        rows = [row for service in SERVICES for row in mesh.of(service)]
        database = mesh.of("postgresql")[0].pid
        os.kill(agent, signal.SIGSTOP)
        await cancel(client, run, "the last word")
        for pid in [row.pid for row in rows] + [database]:
            os.kill(pid, signal.SIGKILL)
    frames, _ = await ended(mesh, run, 90)
    assert frames[-1].event == "run.cancelled"
    assert frames[-1].data["data"] == {"reason": "the last word"}
    # Whoever took it over did no more than end it.
    assert [frame.event for frame in frames].count("run.started") == 1
    mesh.wait_healthy()


async def test_a_cancel_reaches_a_run_whose_agent_hangs_in_silence(tools: ToolsMesh) -> None:
    mesh = tools.mesh
    async with http(mesh) as client:
        run, _ = await begun(client, SLOW, "text.delta")
        agent = holder(mesh, await log_so_far(client, run, "run.started"))
        with frozen(agent):
            await cancel(client, run)
            frames, took = await ended(mesh, run, 30)
        assert took < LEASE_TTL_SECONDS + 3
        # The agent wakes, is fenced, and gives its model's stream up; the log stays as it is.
        await tools.model_is_idle(10)
        again, _ = await ended(mesh, run, 10)
        assert [frame.raw for frame in again] == [frame.raw for frame in frames]
        assert frames[-1].event == "run.cancelled"


async def test_a_takeover_does_not_prolong_a_run(tools: ToolsMesh) -> None:
    mesh = tools.mesh
    goes_on = {"run.started", "run.failed"}
    async with http(mesh) as client:
        run, last = await begun(client, SLOW, "run.started", timeout_ms=5000)
        began = last.data["time"] / 1000
        for _ in range(2):
            if last.event == "run.failed":
                break
            os.kill(holder(mesh, [last]), signal.SIGKILL)
            async with asyncio.timeout(20):
                last = (await watch(client, run, last.seq, lambda frame: frame.event in goes_on))[-1]
        frames, _ = await ended(mesh, run, 30)
    assert frames[-1].event == "run.failed"
    assert frames[-1].data["data"]["reason"] == "RUN_TIMEOUT"
    assert len([frame for frame in frames if frame.event == "run.started"]) >= 2
    # A fresh limit at each takeover would end it five seconds after the last of them.
    assert 4.5 < frames[-1].data["time"] / 1000 - began < 8


async def test_a_run_is_failed_at_its_limit_though_no_agent_is_left(tools: ToolsMesh) -> None:
    mesh = tools.mesh
    async with http(mesh) as client:
        run, started = await begun(client, SLOW, "run.started", timeout_ms=2000)
        began = started.data["time"] / 1000
        with frozen(*(row.pid for row in mesh.of("agent"))):
            frames, _ = await ended(mesh, run, 30)
    assert frames[-1].data["data"]["reason"] == "RUN_TIMEOUT"
    # The lease of an agent that hangs in silence has to run out first.
    assert frames[-1].data["time"] / 1000 - began < LEASE_TTL_SECONDS + 3


async def test_a_tool_does_not_outlive_its_run(tools: ToolsMesh) -> None:
    """What it did is unknown, so a person decides, however late it is; then the run ends at its limit."""
    async with http(tools.mesh) as client:
        run, started = await begun(client, WAIT, "run.started", timeout_ms=2000)
        async with asyncio.timeout(20):
            log = await log_so_far(client, run, "action.required")
        assert 1.8 < (log[-1].data["time"] - started.data["time"]) / 1000 < 4
        assert log[-1].data["data"]["kind"] == "unknown"
        await tools.did(run, "began", "stopped", seconds=3)
        settled = await client.post(
            f"/v1/runs/{run}/actions/{run}:1:0", json={"decision": "completed", "content": "it was done"}
        )
        assert settled.status_code == 200, settled.text
        frames, took = await ended(tools.mesh, run, 20)
    assert frames[-1].event == "run.failed"
    assert frames[-1].data["data"]["reason"] == "RUN_TIMEOUT"
    assert took < 5


async def test_a_tool_does_not_outlive_a_run_whose_agent_is_dead(tools: ToolsMesh) -> None:
    """Nobody tells the tool to stop: it was told how long it may take."""
    mesh = tools.mesh
    async with http(mesh) as client:
        run, _ = await begun(client, WAIT, "tool.call", timeout_ms=4000)
        await tools.did(run, "began")
        with frozen(*(row.pid for row in mesh.of("agent"))):
            await tools.did(run, "began", "stopped", seconds=8)


async def test_a_cancel_stops_the_tool_of_an_agent_that_cannot(tools: ToolsMesh) -> None:
    """Dead or frozen, it tells its tool nothing; and whoever ends its run does not know where the tool is."""
    mesh = tools.mesh
    async with http(mesh) as client:
        run, _ = await begun(client, WAIT, "tool.call")
        await tools.did(run, "began")
        agent = holder(mesh, await log_so_far(client, run, "run.started"))
        with frozen(agent):
            await cancel(client, run)
            await tools.did(run, "began", "stopped", seconds=6)
            os.kill(agent, signal.SIGKILL)
        frames, _ = await ended(mesh, run, 30)
        assert frames[-1].event == "run.cancelled"


async def test_a_turn_has_its_limit(tools: ToolsMesh) -> None:
    async with http(tools.mesh) as client:
        run, _ = await begun(client, SLOW, "text.delta", turn_timeout_ms=1500)
        frames, _ = await ended(tools.mesh, run, 20)
    events = [frame.event for frame in frames]
    # Taken up again once, as after any break, and then given up.
    assert events.count("attempt.reset") == 1
    assert frames[-1].data["data"]["reason"] == "MODEL_TIMEOUT"


async def test_a_callers_deadline_ends_the_call_and_not_the_run(tools: ToolsMesh) -> None:
    async with http(tools.mesh) as client, grpc.aio.insecure_channel(tools.mesh.grpc_address) as channel:
        stub: Any = AgentServiceStub(channel)  # type: ignore[no-untyped-call]
        request = agent_pb.RunRequest(
            session_id=await new_session(client),
            input=[InputMessage(role="user", content="[[tokens=100 rate=40]]")],
            options=resources.RunOptions(memory=False),
        )
        seen: list[str] = []
        metadata = (("authorization", f"Bearer {tools.mesh.api_key}"),)

        async def read() -> None:
            async for response in stub.Run(request, metadata=metadata, timeout=1.0):
                seen.extend(event.run_id for event in response.frame.events)

        with pytest.raises(grpc.aio.AioRpcError) as late:
            await read()
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        frames, _ = await ended(tools.mesh, seen[0], 20)
        assert frames[-1].event == "run.completed"
        completed = next(frame for frame in frames if frame.event == "message.completed")
        assert len(completed.data["data"]["content"].split()) == 100
