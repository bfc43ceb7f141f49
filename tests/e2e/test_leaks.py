"""Clients that come and go, runs that are cancelled: afterwards every process is as it was before."""

import asyncio
import json
import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import grpc
import httpx
from prometheus_client.parser import text_string_to_metric_families

from bench.mesh import Mesh
from hermesh.session.v1 import session_service_pb2 as session_pb
from hermesh.session.v1.session_service_pb2_grpc import SessionServiceStub
from tests.e2e.client import assert_whole, http, new_session, run_stream, submit, watch, watch_to_end

# In each of two rounds.
CLIENTS = 50
CANCELS = 25
SETTLE_SECONDS = 20.0
# Pools and caches may keep so many more descriptors open in a process; a leak would be one a client.
SPARE_FDS = 20

# Whatever of these stays up when nobody is there is a leak: streams, watches, runs, tasks.
GAUGES = (
    "hermes_active_sessions",
    "hermesh_gateway_streams",
    "hermesh_gateway_lingering_streams",
    "hermesh_session_attached_runs",
    "hermesh_session_watchers",
    "hermesh_session_dispatched_runs",
    "hermesh_tool_running",
)
ACTIVE = "hermesh_rpc_active"
# Each may keep its append stream open, on whichever session replica.
AGENTS = 2


async def gauges(mesh: Mesh) -> dict[str, float]:
    """The gauges of all processes, by replica."""
    found: dict[str, float] = {}
    async with httpx.AsyncClient(timeout=10) as client:
        for ready in sorted((mesh.data_dir / "ready").glob("*.json")):
            facts = json.loads(ready.read_text())
            text = (await client.get(f"http://{facts['metrics_address']}/metrics")).text
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    if sample.name in (*GAUGES, ACTIVE):
                        name = f"{facts['replica']} {sample.name} {sorted(sample.labels.items())}"
                        found[name] = sample.value
    return found


def descriptors(mesh: Mesh) -> Counter[str]:
    """How many files and sockets each process has open."""
    parts = ("gateway", "agent", "session", "tool", "memory", "envoy", "valkey")
    return Counter(
        {
            f"{row.replica} {row.pid}": len(os.listdir(f"/proc/{row.pid}/fd"))
            for row in mesh.status()
            if row.service in parts
        }
    )


async def model_streams(mesh: Mesh) -> int:
    """How many replies the model server is in the middle of."""
    assert mesh.model is not None
    async with httpx.AsyncClient(timeout=10) as client:
        stats = (await client.get(mesh.model.url.removesuffix("/v1") + "/stats")).json()
    return int(stats["open"])


async def settled(check: Callable[[], Any], what: str) -> None:
    """Waits until `check` returns nothing to complain about."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while complaint := await check():
        assert time.monotonic() < deadline, f"{what}: {complaint}"
        await asyncio.sleep(0.1)


async def assert_as_before(mesh: Mesh, before: dict[str, float] | None) -> None:
    """Nothing that was begun is still there; of streams between processes as many as before, if known."""

    def active(values: dict[str, float]) -> float:
        return sum(value for name, value in values.items() if ACTIVE in name)

    async def busy() -> dict[str, float]:
        now = await gauges(mesh)
        left = {name: value for name, value in now.items() if ACTIVE not in name and value}
        if before is not None and active(now) > active(before) + AGENTS:
            left |= {name: value for name, value in now.items() if ACTIVE in name and value}
        return left

    await settled(busy, "gauges")
    await settled(lambda: model_streams(mesh), "replies of the model")


async def come_and_go(mesh: Mesh) -> None:
    """Clients connect by every way there is and leave mid-stream; every run is cancelled."""
    gate = asyncio.Semaphore(20)
    async with http(mesh) as client:
        session = await new_session(client)
        shared = await submit(client, session, "[[tokens=4000 rate=50]]")
        await watch(client, shared, 0, lambda frame: frame.event == "text.delta")

        async def leave_a_watch(number: int) -> None:
            async with gate, http(mesh) as one:
                path = f"/v1/runs/{shared}/events" if number % 2 else f"/v1/sessions/{session}/events"
                async with one.stream("GET", path) as response:
                    await anext(response.aiter_bytes())

        async def leave_a_call() -> None:
            async with gate, grpc.aio.insecure_channel(mesh.grpc_address) as channel:
                stub: Any = SessionServiceStub(channel)  # type: ignore[no-untyped-call]
                key = (("authorization", f"Bearer {mesh.api_key}"),)
                call = stub.WatchRun(session_pb.WatchRunRequest(run_id=shared), metadata=key, timeout=30)
                await call.read()
                call.cancel()

        async def leave_a_reply() -> str:
            async with gate, http(mesh) as one:
                own = await new_session(one)
                async with run_stream(one, own, "[[tokens=4000 rate=20]]") as frames:
                    return (await anext(frames)).run_id

        async def cancel(run: str) -> None:
            async with gate:
                answer = await client.post(f"/v1/runs/{run}/cancel", json={"reason": "enough"})
                assert answer.status_code == 202, answer.text
                frames = await watch_to_end(client, run)
                assert_whole(frames)
                assert frames[-1].event == "run.cancelled"

        watches = CLIENTS - CANCELS
        await asyncio.gather(
            *(leave_a_watch(number) for number in range(watches // 2)),
            *(leave_a_call() for _ in range(watches - watches // 2)),
        )
        abandoned = await asyncio.gather(*(leave_a_reply() for _ in range(CANCELS)))
        assert len(set(abandoned)) == CANCELS
        await asyncio.gather(*(cancel(run) for run in [*abandoned, shared]))


async def test_clients_that_leave_and_runs_that_are_cancelled_leave_nothing(mesh: Mesh) -> None:
    async def quiet() -> dict[str, float]:
        values = await gauges(mesh)
        return {name: value for name, value in values.items() if ACTIVE not in name and value}

    await settled(quiet, "earlier tests")
    before: dict[str, float] | None = None
    # The first round fills the pools: connections to stores and between processes are kept, with streams.
    levels = []
    for _ in range(2):
        await come_and_go(mesh)
        await assert_as_before(mesh, before)
        before = await gauges(mesh)
        levels.append(await asyncio.to_thread(descriptors, mesh))
    more = {name: levels[1][name] - count for name, count in levels[0].items() if name in levels[1]}
    assert max(more.values()) <= SPARE_FDS, more


async def test_a_session_deleted_in_mid_reply_ends_all_that_belongs_to_it(mesh: Mesh) -> None:
    async with http(mesh) as client:
        session = await new_session(client)

        async def follow(path: str) -> str:
            async with http(mesh) as one, one.stream("GET", path) as response:
                return (await response.aread()).decode()[-200:]

        async with asyncio.timeout(30), run_stream(client, session, "[[tokens=4000 rate=50]]") as frames:
            run = (await anext(frames)).run_id
            waiting = await submit(client, session, "[[tokens=2]]")
            await watch(client, run, 0, lambda frame: frame.event == "text.delta")
            paths = (f"/v1/runs/{run}/events", f"/v1/sessions/{session}/events", f"/v1/runs/{waiting}/events")
            followers = [asyncio.create_task(follow(path)) for path in paths]
            assert (await client.delete(f"/v1/sessions/{session}")).status_code == 204
            last = [frame async for frame in frames][-1]
            assert (last.event, last.id) == ("reconnect", "")
            for ended in await asyncio.gather(*followers):
                # A watch that had not begun yet is told at once.
                assert "event: reconnect" in ended or "RUN_NOT_FOUND" in ended or "SESSION_NOT_FOUND" in ended
            for path in (f"/v1/sessions/{session}", f"/v1/runs/{run}", f"/v1/runs/{waiting}"):
                assert (await client.get(path)).status_code == 404
        await settled(lambda: model_streams(mesh), "replies of the model")
