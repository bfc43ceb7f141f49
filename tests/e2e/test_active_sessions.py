"""`hermes_active_sessions`, which autoscalers go by, is the number of runs that each agent works on now."""

import asyncio
import json

import httpx

from bench.exported import exported
from bench.hpa import METRIC
from bench.mesh import Mesh
from tests.e2e.client import http, new_session, run_to_end, submit

RUNS = 12
# Generous: what waits is a busy machine.
SECONDS = 30.0


async def active(mesh: Mesh) -> dict[str, float]:
    """What each agent exports."""
    found: dict[str, float] = {}
    async with httpx.AsyncClient(timeout=10) as client:
        for ready in sorted((mesh.data_dir / "ready").glob("agent-*.json")):
            facts = json.loads(ready.read_text())
            found[facts["replica"]] = await exported(client, facts["metrics_address"], METRIC)
    return found


async def until(mesh: Mesh, total: int) -> dict[str, float]:
    """Waits until all agents together export this."""
    async with asyncio.timeout(SECONDS):
        while True:
            found = await active(mesh)
            if sum(found.values()) == total:
                return found
            await asyncio.sleep(0.05)


async def test_the_metric_rises_and_falls_with_the_runs_of_each_agent(mesh: Mesh) -> None:
    await until(mesh, 0)
    async with http(mesh) as client:
        sessions = [await new_session(client) for _ in range(RUNS)]
        # Streamed and queued ones; each has text for far longer than the test.
        streamed = [
            asyncio.create_task(run_to_end(client, session, "[[tokens=3000 rate=25]]"))
            for session in sessions[: RUNS // 2]
        ]
        queued = [
            await submit(client, session, "[[tokens=3000 rate=25]]") for session in sessions[RUNS // 2 :]
        ]
        at_work = await until(mesh, RUNS)
        # Envoy gives each run to the agent with the fewest.
        assert len(at_work) >= 2
        assert all(value > 0 for value in at_work.values()), at_work
        for run in queued:
            await client.post(f"/v1/runs/{run}/cancel")
        await until(mesh, RUNS // 2)
        for session in sessions[: RUNS // 2]:
            answer = (await client.get(f"/v1/sessions/{session}/runs")).raise_for_status()
            (run,) = answer.json()["runs"]
            await client.post(f"/v1/runs/{run['run_id']}/cancel")
        for stream in streamed:
            assert (await stream)[-1].event == "run.cancelled"
        await until(mesh, 0)
