"""Kill a process in the middle of a reply: the run is finished, and the watcher's log has no gap."""

import asyncio
import os
import signal
import time

import pytest

from bench.mesh import Mesh
from tests.e2e.client import Frame, assert_whole, http, new_session, submit, text_of, watch, watch_to_end

LEASE_TTL_SECONDS = 10.0
TEXT = "[[tokens=120 rate=30]]"


def expected_text(frames: list[Frame]) -> None:
    """The reply is the scripted one, whole, whoever wrote which half."""
    words = text_of(frames).split()
    assert len(words) == 120
    completed = next(frame for frame in frames if frame.event == "message.completed")
    assert completed.data["data"]["content"] == text_of(frames)


async def start(mesh: Mesh) -> tuple[str, asyncio.Task[list[Frame]], Frame]:
    """Submits a run, waits for its text to flow, and goes on watching it."""
    async with http(mesh) as client:
        run = await submit(client, await new_session(client), TEXT)
        seen = await watch(client, run, 0, lambda frame: frame.event == "text.delta")

    async def follow() -> list[Frame]:
        async with http(mesh) as client:
            return await watch_to_end(client, run)

    return run, asyncio.create_task(follow()), seen[-1]


async def holder(mesh: Mesh, run: str) -> str:
    """The name of the agent that works on the run."""
    async with http(mesh) as client:
        log = await watch(client, run, 0, lambda frame: frame.event == "run.started")
    return str(log[-1].data["data"]["replica"])


async def test_a_killed_agents_run_is_finished_by_another(mesh: Mesh) -> None:
    pids = {row.replica: row.pid for row in mesh.of("agent")}
    run, follower, _ = await start(mesh)
    os.kill(pids[await holder(mesh, run)], signal.SIGKILL)
    killed = time.time()
    frames = await asyncio.wait_for(follower, 60)
    assert_whole(frames)
    assert frames[-1].event == "run.completed"
    expected_text(frames)
    starts = [frame for frame in frames if frame.event == "run.started"]
    assert len(starts) == 2
    # By another process for certain: usually the other replica, now and then the dead one's quick successor.
    assert [frame.data["data"]["attempt"] for frame in starts] == [1, 2]
    assert "attempt.reset" in [frame.event for frame in frames]
    assert starts[1].data["time"] / 1000 - killed < LEASE_TTL_SECONDS + 2


async def test_an_agent_killed_together_with_all_that_knew_of_it_costs_no_lease(mesh: Mesh) -> None:
    pids = {row.replica: row.pid for row in mesh.of("agent")}
    run, follower, _ = await start(mesh)
    # Nobody sees its append stream break: only the next process of its name tells that it is gone.
    for pid in (*(row.pid for row in mesh.of("session")), pids[await holder(mesh, run)]):
        os.kill(pid, signal.SIGKILL)
    killed = time.time()
    frames = await asyncio.wait_for(follower, 60)
    assert_whole(frames)
    assert frames[-1].event == "run.completed"
    expected_text(frames)
    starts = [frame for frame in frames if frame.event == "run.started"]
    assert len(starts) == 2
    assert starts[1].data["time"] / 1000 - killed < LEASE_TTL_SECONDS * 0.7


@pytest.mark.parametrize("service", ["session", "gateway"])
async def test_a_killed_replica_of_what_runs_pass_through_costs_none(mesh: Mesh, service: str) -> None:
    pid = mesh.of(service)[0].pid
    runs = [await start(mesh) for _ in range(4)]
    os.kill(pid, signal.SIGKILL)
    for _, follower, _ in runs:
        frames = await asyncio.wait_for(follower, 60)
        assert_whole(frames)
        assert frames[-1].event == "run.completed"
        expected_text(frames)


async def test_a_killed_valkey_costs_nothing(mesh: Mesh) -> None:
    pid = mesh.of("valkey")[0].pid
    _, follower, _ = await start(mesh)
    os.kill(pid, signal.SIGKILL)
    frames = await asyncio.wait_for(follower, 60)
    assert_whole(frames)
    assert frames[-1].event == "run.completed"
    expected_text(frames)


async def test_a_killed_postgresql_comes_back_and_the_run_goes_on(mesh: Mesh) -> None:
    before = mesh.of("postgresql")[0]
    _, follower, _ = await start(mesh)
    os.kill(before.pid, signal.SIGKILL)
    frames = await asyncio.wait_for(follower, 90)
    assert_whole(frames)
    assert frames[-1].event == "run.completed"
    expected_text(frames)
    mesh.wait_healthy()
    after = mesh.of("postgresql")[0]
    assert after.pid != before.pid
    assert after.restarts == before.restarts + 1
