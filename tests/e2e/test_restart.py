"""Replicas are replaced under load, and processes that hang are: on a mesh of this module's own."""

import asyncio
import dataclasses
import os
import signal
import time
from collections.abc import Iterator

import pytest

from bench.mesh import Mesh, MeshError, wait_until
from launcher.state import State
from tests.chaos.drills.load import Script, load
from tests.e2e.client import http, new_session, run_to_end

HANG_SECONDS = 11.0


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    settings = {"HERMESH_HANG_SECONDS": str(HANG_SECONDS), "HERMESH_DRAIN_SECONDS": "4"}
    with Mesh(replicas="gateway=1,agent=2,session=2,tool=1,memory=1", settings=settings) as mesh:
        yield mesh


async def test_a_rolling_restart_of_all_is_unnoticed(mesh: Mesh) -> None:
    before = {row.pid for row in mesh.status() if row.service in ("agent", "session", "gateway")}
    async with load(mesh, 6, [Script(20, 10), Script(200, 10), Script(20, 10, tool=True)]) as seen:
        said = await asyncio.to_thread(mesh.command, "restart", "all", "--rolling", seconds=100)
    assert said.count("ended after") == 7
    assert (seen.errors, seen.refused, seen.wrong) == ([], [], [])
    assert seen.completed == len(seen.runs)
    assert seen.reconnects > 0
    # Replies longer than the agents' grace went on elsewhere.
    assert seen.takeovers > 0
    mesh.wait_healthy()
    after = mesh.status()
    assert not before & {row.pid for row in after}
    assert [row.restarts for row in after if row.pid] == [0] * sum(row.pid > 0 for row in after)


@pytest.mark.timeout(300)
async def test_a_mesh_of_another_version_is_replaced_part_by_part_and_nobody_notices(mesh: Mesh) -> None:
    before = {row.replica: row.pid for row in mesh.status()}
    path = mesh.data_dir / "state.json"
    state = State.load(path)
    # As an earlier version left it: it did not say what it ran.
    state.code = ""
    state.children = [dataclasses.replace(child, code="") for child in state.children]
    async with load(mesh, 6, [Script(20, 10), Script(200, 10), Script(20, 10, tool=True)]) as seen:
        state.save(path)
        said = await asyncio.to_thread(mesh.command, "up", "--no-reply", seconds=200)
    assert "started by another version" in said
    assert said.count("ended after") == 8
    assert (seen.errors, seen.refused, seen.wrong) == ([], [], [])
    assert seen.completed == len(seen.runs)
    mesh.wait_healthy()
    after = {row.replica: row.pid for row in mesh.status()}
    kept = ("postgresql", "valkey", "model")
    assert {name for name, pid in after.items() if pid and pid in before.values()} == {
        name for name, pid in before.items() if pid and name.startswith(kept)
    }
    assert "envoy-2" in after
    assert "starting" not in mesh.command("up", "--no-reply")


def test_what_cannot_be_restarted_is_said(mesh: Mesh) -> None:
    with pytest.raises(MeshError, match="'envoy' is not one of agent, gateway"):
        mesh.command("restart", "envoy")
    mesh.command("scale", "memory=0")
    with pytest.raises(MeshError, match="no memory runs"):
        mesh.command("restart", "memory", "--rolling")
    mesh.command("scale", "memory=1")


async def test_all_replicas_at_once(mesh: Mesh) -> None:
    before = {row.replica: row.pid for row in mesh.of("agent")}
    await asyncio.to_thread(mesh.command, "restart", "agent")
    after = {row.replica: row.pid for row in mesh.of("agent")}
    assert after.keys() == before.keys()
    assert not set(after.values()) & set(before.values())
    async with http(mesh) as client:
        frames = await run_to_end(client, await new_session(client), "[[tokens=5]]")
        assert frames[-1].event == "run.completed"


def test_a_process_that_hangs_is_started_again(mesh: Mesh) -> None:
    before = mesh.of("tool")[0]
    os.kill(before.pid, signal.SIGSTOP)
    stopped = time.monotonic()
    wait_until(lambda: mesh.of("tool")[0].restarts == 1, 3 * HANG_SECONDS, "a new tool service")
    assert time.monotonic() - stopped >= HANG_SECONDS
    mesh.wait_healthy()
    assert "did not answer for" in mesh.command("status")
