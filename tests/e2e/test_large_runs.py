"""A run of many MB of tool results moves when its agent dies or drains, and every reader gets it all."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator

import pytest

from bench.mesh import Mesh
from tests.chaos.drills.large import Bulk, peak_mib, settings
from tests.chaos.drills.load import Load, Run, through_envoy
from tests.chaos.drills.parts import process
from tests.e2e.client import http, new_session, run_to_end, watch
from tests.e2e.conftest import tracebacks

WAIT_SECONDS = 60.0
# Four steps of 64 calls: 15 MB of results, more than the largest message between services.
SCRIPT = Bulk(4_000, 20, turns=4)


@pytest.fixture(scope="module")
def own_mesh() -> Iterator[Mesh]:
    bounds = {"HERMESH_MAX_RUN_BYTES": str(24 * 1024 * 1024)}
    with Mesh(replicas="gateway=1,agent=2,session=2,tool=1,memory=1", settings=settings() | bounds) as mesh:
        yield mesh
        found = tracebacks(mesh)
        assert not found, "the mesh logged what nobody expected:\n" + "\n".join(found)


@pytest.fixture
def mesh(own_mesh: Mesh) -> Mesh:
    """The module's mesh, healthy: what an earlier test broke has come back."""
    own_mesh.wait_healthy()
    return own_mesh


async def reached(run: Run, words: int) -> None:
    """Returns once the reply has so many words."""
    async with asyncio.timeout(WAIT_SECONDS):
        while len(run.reply.split()) < words:
            assert not run.ended, run.ended
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_a_run_of_15_mb_goes_on_when_its_agent_dies_or_drains(
    mesh: Mesh, number: signal.Signals
) -> None:
    seen = Load(mesh, through_envoy(mesh))
    run = Run(SCRIPT)
    async with http(mesh) as client:
        session_id = await new_session(client)
        following = asyncio.create_task(seen.follow(session_id, run))
        await reached(run, 5)
        first = run.attempts[0][0]
        process(mesh, first).send(number)
        async with asyncio.timeout(WAIT_SECONDS):
            while len(run.attempts) < 2:
                assert not run.ended, run.ended
                await asyncio.sleep(0.02)
        assert run.attempts[1][0] != first
        await reached(run, len(run.reply.split()) + 5)
        # A reader that comes now gets all of it, from whichever replica.
        async with asyncio.timeout(WAIT_SECONDS):
            frames = await watch(client, run.run_id, until=lambda frame: frame.event == "text.delta")
        assert [frame.seq for frame in frames] == list(range(1, len(frames) + 1))
        results = [frame.data["data"]["content"] for frame in frames if frame.event == "tool.result"]
        assert sum(map(len, results)) == SCRIPT.bytes
        answer = await client.get(f"/v1/runs/{run.run_id}")
        assert answer.json()["status"] == "running"
        messages, token = 0, ""
        while True:
            answer = await client.get(
                f"/v1/sessions/{session_id}/messages", params={"page_size": 500, "page_token": token}
            )
            assert answer.status_code == 200, answer.text
            assert len(answer.content) < 2 * 1024 * 1024
            messages += len(answer.json()["messages"])
            token = answer.json()["next_page_token"]
            if not token:
                break
        assert messages == 1 + 4 * 65
        (await client.post(f"/v1/runs/{run.run_id}/cancel", json={})).raise_for_status()
        await asyncio.wait_for(following, WAIT_SECONDS)
    assert run.ended == "run.cancelled"
    assert not seen.wrong
    assert not seen.errors
    for replica in mesh.of("session"):
        assert peak_mib(replica.pid) < 192


async def test_a_run_that_writes_more_than_it_may_fails_and_its_session_goes_on(mesh: Mesh) -> None:
    async with http(mesh) as client:
        session_id = await new_session(client)
        frames = await run_to_end(client, session_id, Bulk(10, 0, turns=20).text)
        assert frames[-1].event == "run.failed"
        failed = frames[-1].data["data"]
        assert (failed["code"], failed["reason"]) == ("RESOURCE_EXHAUSTED", "RUN_TOO_LARGE")
        assert not failed["retryable"]
        written = sum(len(frame.raw) for frame in frames)
        assert 24 * 1024 * 1024 < written < 36 * 1024 * 1024
        began = time.monotonic()
        again = await run_to_end(client, session_id, "[[tokens=5]]")
        assert again[-1].event == "run.completed"
        assert time.monotonic() - began < WAIT_SECONDS
