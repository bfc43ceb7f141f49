"""docs/degradation.md on a whole mesh: a part is taken away; what works, waits and is refused is as told."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.mesh import Mesh, wait_until
from tests.e2e.client import (
    Frame,
    assert_whole,
    frames_of,
    http,
    new_session,
    run_stream,
    run_to_end,
    submit,
    text_of,
    watch,
    watch_to_end,
)
from tests.e2e.conftest import tracebacks
from tests.e2e.faults import Models, down, no_object_store
from tests.e2e.large_tool import LINE

HERE = Path(__file__).parent
# Long enough to be seen, short enough for a test.
COMPLETE_SECONDS = 4
LINES = 3000


@pytest.fixture(scope="module")
def models() -> Iterator[Models]:
    with Models.serving() as models:
        yield models


@pytest.fixture(scope="module")
def own_mesh(models: Models) -> Iterator[Mesh]:
    settings = {
        "HERMESH_LLM_BASE_URL": models.urls,
        "HERMESH_LLM_MODEL": "scripted",
        "HERMESH_TOOL_MODULES": "large_tool",
        "HERMESH_TOOL_COMPLETE_SECONDS": str(COMPLETE_SECONDS),
        "PYTHONPATH": str(HERE),
    }
    replicas = "gateway=1,agent=1,session=2,tool=1,memory=1"
    with Mesh(replicas=replicas, settings=settings, scripted_model=False) as mesh:
        yield mesh
        found = tracebacks(mesh)
        assert not found, "the mesh logged what nobody expected:\n" + "\n".join(found)


@pytest.fixture
def mesh(own_mesh: Mesh) -> Mesh:
    """The module's mesh, healthy and not degraded: what an earlier test took away has come back."""
    own_mesh.wait_healthy()
    return own_mesh


class Probe:
    """/ready and /metrics of a process, asked directly: Envoy or the supervisor may be what is down."""

    def __init__(self, mesh: Mesh, replica: str) -> None:
        record = json.loads((mesh.data_dir / "ready" / f"{replica}.json").read_text())
        self.address = record["address"]
        self._url = f"http://{record['metrics_address']}"

    def ready(self) -> dict[str, Any]:
        """What /ready says; degraded or not, the process serves."""
        answer = httpx.get(f"{self._url}/ready", timeout=10, trust_env=False)
        assert answer.status_code == 200
        return dict(answer.json())

    def degraded(self, part: str) -> str:
        """Why a part degrades the process, once it does; and its gauge says the same."""
        wait_until(lambda: not self.ready()["checks"][part]["ok"], 10, f"{part} to be missed")
        document = self.ready()
        assert document["status"] == "degraded"
        assert self.figure(f'hermesh_dependency_up{{dependency="{part}"}}') == 0
        return str(document["checks"][part]["reason"])

    def figure(self, name: str) -> float:
        """The value of a metric's sample; 0 for one that does not exist yet."""
        text = httpx.get(f"{self._url}/metrics", timeout=10, trust_env=False).text
        samples = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return next((float(value) for found, value in samples if found == name), 0.0)


def parts_of(frames: list[Frame]) -> list[str]:
    """What a run went on without."""
    return [frame.data["data"]["part"] for frame in frames if frame.event == "context.degraded"]


def data_of(frames: list[Frame], kind: str) -> list[dict[str, Any]]:
    return [frame.data["data"] for frame in frames if frame.event == kind]


def refused(answer: httpx.Response, reason: str) -> None:
    """A problem document that says what is wrong and when to come back."""
    assert answer.status_code == 503, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["reason"] == reason
    assert int(answer.headers["retry-after"]) >= 1


@asynccontextmanager
async def direct(mesh: Mesh, gateway: Probe) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the gateway itself, without Envoy in front."""
    async with http(mesh) as client:
        client.base_url = f"http://{gateway.address}"
        yield client


async def test_without_redis_everything_works_and_tails_come_from_postgresql(mesh: Mesh) -> None:
    sessions = [Probe(mesh, name) for name in ("session-1", "session-2")]
    async with http(mesh) as client:
        session = await new_session(client)
        with down(mesh, "valkey"):
            run = await submit(client, session, "[[tokens=40 rate=40]]")
            # Of several watchers some are on the replica where the run is not written.
            logs = await asyncio.gather(*(watch_to_end(client, run) for _ in range(4)))
            for log in logs:
                assert_whole(log)
                assert [frame.raw for frame in log] == [frame.raw for frame in logs[0]]
            assert len((await client.get(f"/v1/sessions/{session}/messages")).json()["messages"]) == 2
            for probe in sessions:
                assert "Redis cannot be reached" in await asyncio.to_thread(probe.degraded, "redis")
            assert (await client.get("/ready")).json()["status"] == "ready"


async def test_without_postgresql_new_input_is_refused_and_open_runs_go_on_when_it_is_back(
    mesh: Mesh,
) -> None:
    session_probe, memory_probe = Probe(mesh, "session-1"), Probe(mesh, "memory-1")
    frames: list[Frame] = []
    async with http(mesh) as client:
        session, other = await new_session(client), await new_session(client)
        async with run_stream(client, session, "[[tokens=120 rate=40]]") as stream:
            async for frame in stream:
                frames.append(frame)
                if frame.event == "text.delta":
                    break
            with down(mesh, "postgresql"):
                began = time.monotonic()
                body = {"input": "hi"}
                refused(await client.post(f"/v1/sessions/{other}/runs", json=body), "DATABASE_UNAVAILABLE")
                streamed = body | {"stream": True}
                refused(
                    await client.post(f"/v1/sessions/{other}/runs", json=streamed), "DATABASE_UNAVAILABLE"
                )
                refused(await client.post("/v1/sessions", json={}), "DATABASE_UNAVAILABLE")
                refused(await client.get(f"/v1/sessions/{session}"), "DATABASE_UNAVAILABLE")
                assert time.monotonic() - began < 8
                reason = await asyncio.to_thread(session_probe.degraded, "postgresql")
                assert reason == "PostgreSQL does not answer"
                await asyncio.to_thread(memory_probe.degraded, "postgresql")
                ready = await client.get("/ready")
                assert (ready.status_code, ready.json()["status"]) == (200, "degraded")
                assert ready.json()["checks"]["session"] == "DATABASE_UNAVAILABLE"
            async with asyncio.timeout(60):
                frames += [frame async for frame in stream]
        assert_whole(frames)
        assert frames[-1].event == "run.completed"
        assert len(text_of(frames).split()) == 120
        assert [frame.raw for frame in await watch_to_end(client, frames[0].run_id)] == [
            frame.raw for frame in frames
        ]


async def test_without_memory_a_run_recalls_nothing_and_says_so(mesh: Mesh) -> None:
    agent = Probe(mesh, "agent-1")
    lost = 'hermesh_agent_degraded_contexts_total{part="memory"}'
    async with http(mesh) as client:
        session = await new_session(client, user="ada")
        with down(mesh, "memory"):
            before = await asyncio.to_thread(agent.figure, lost)
            frames = await run_to_end(client, session, "[[tokens=3]]")
            assert frames[-1].event == "run.completed"
            assert parts_of(frames) == ["memory", "preferences"]
            assert await asyncio.to_thread(agent.figure, lost) == before + 1
            assert "memory" in await asyncio.to_thread(agent.degraded, "memory")
        await asyncio.to_thread(mesh.wait_healthy)
        assert parts_of(await run_to_end(client, session, "[[tokens=3]]")) == []


async def test_without_tools_a_call_that_never_began_is_told_to_the_model_as_failed(mesh: Mesh) -> None:
    agent = Probe(mesh, "agent-1")
    unreached = "hermesh_agent_unreached_tool_calls_total"
    ask = '[[tool=calculator {"expression":"6*7"}]]'
    async with http(mesh) as client:
        session = await new_session(client)
        with down(mesh, "tool"):
            before = await asyncio.to_thread(agent.figure, unreached)
            frames = await run_to_end(client, session, ask)
            [result] = data_of(frames, "tool.result")
            assert (result["status"], result["content"]) == ("failed", "The tool could not be reached.")
            assert frames[-1].event == "run.completed"
            assert "could not be reached" in text_of(frames)
            assert await asyncio.to_thread(agent.figure, unreached) == before + 1
            assert "tool service" in await asyncio.to_thread(agent.degraded, "tools")
        await asyncio.to_thread(mesh.wait_healthy)
        [result] = data_of(await run_to_end(client, session, ask), "tool.result")
        assert (result["status"], result["content"]) == ("completed", "42")


async def test_a_model_backend_stands_in_for_another_and_without_any_a_run_fails_retryably(
    mesh: Mesh, models: Models
) -> None:
    agent = Probe(mesh, "agent-1")
    first = f"model/127.0.0.1:{models.ports[0]}"
    async with http(mesh) as client:
        session = await new_session(client)
        frames: list[Frame] = []
        async with run_stream(client, session, "[[tokens=60 rate=30]]") as stream:
            async for frame in stream:
                frames.append(frame)
                if frame.event == "text.delta" and models.servers[0] is not None:
                    # In the middle of its reply: the turn is said anew by the other one.
                    await asyncio.to_thread(models.stop, 0)
        assert_whole(frames)
        assert frames[-1].event == "run.completed"
        assert [data["reason"] for data in data_of(frames, "attempt.reset")] == ["model_stream_broke"]
        assert len(text_of(frames).split()) == 60
        # Before the first token nobody notices.
        frames = await run_to_end(client, session, "[[tokens=3]]")
        assert (frames[-1].event, data_of(frames, "attempt.reset")) == ("run.completed", [])
        assert "MODEL_UNAVAILABLE" in await asyncio.to_thread(agent.degraded, first)
        assert (await asyncio.to_thread(agent.ready))["checks"]["model"]["ok"]
        [row] = await asyncio.to_thread(mesh.of, "agent")
        assert row.health == "degraded"
        await asyncio.to_thread(models.stop, 1)
        [failed] = data_of(await run_to_end(client, session, "[[tokens=3]]"), "run.failed")
        assert (failed["code"], failed["reason"]) == ("UNAVAILABLE", "MODEL_UNAVAILABLE")
        assert failed["retryable"]
        assert await asyncio.to_thread(agent.degraded, "model") == "no model backend works"
        for number in (0, 1):
            await asyncio.to_thread(models.start, number)
        assert (await run_to_end(client, session, "[[tokens=3]]"))[-1].event == "run.completed"


async def test_without_the_object_store_large_results_wait_and_then_are_cut_in_the_open(mesh: Mesh) -> None:
    tool = Probe(mesh, "tool-1")
    large = f'[[tool=long_answer {{"lines": {LINES}}}]]'
    async with http(mesh) as client:
        session = await new_session(client)
        with no_object_store(mesh):
            began = time.monotonic()
            [result] = data_of(await run_to_end(client, session, large), "tool.result")
            assert time.monotonic() - began >= COMPLETE_SECONDS
            assert result["status"] == "completed"
            assert result["content"].startswith(LINE)
            cut = f"[cut: the beginning of {LINES * len(LINE)} bytes; the rest is lost, because "
            assert f"{cut}the object store did not take it" in result["content"]
            assert "object store" in await asyncio.to_thread(tool.degraded, "object_store")
            assert tool.figure('hermesh_tool_results_cut_total{reason="store_down"}') == 1
            # A small one needs no store; and a large one is stored if that comes back while it waits.
            frames = await run_to_end(client, session, '[[tool=calculator {"expression":"6*7"}]]')
            assert data_of(frames, "tool.result")[0]["content"] == "42"
            run = await submit(client, session, large)
            frames = await watch(client, run, until=lambda frame: frame.event == "tool.progress")
            assert frames[-1].data["data"]["text"] == "the result waits for the store"
            assert tool.figure("hermesh_tool_results_storing") == 1
        frames = await watch_to_end(client, run)
        [result] = data_of(frames, "tool.result")
        assert "all of it is stored" in result["content"]
        assert frames[-1].event == "run.completed"
    stored = [file.read_text() for file in (mesh.data_dir / "objects").glob("tool-results/*/*/*")]
    assert stored == [LINE * LINES]


async def test_without_envoy_a_gateway_refuses_at_once_and_its_streams_go_on_when_it_is_back(
    mesh: Mesh,
) -> None:
    gateway = Probe(mesh, "gateway-1")
    others = [Probe(mesh, name) for name in ("session-1", "agent-1", "tool-1", "memory-1")]
    async with direct(mesh, gateway) as client:
        session = await new_session(client)
        run = await submit(client, session, "[[tokens=150 rate=40]]")
        frames: list[Frame] = []
        async with client.stream("GET", f"/v1/runs/{run}/events") as response:
            stream = frames_of(response)
            async for frame in stream:
                frames.append(frame)
                if frame.event == "text.delta":
                    break
            with down(mesh, "envoy"):
                for ask in (
                    client.post("/v1/sessions", json={}),
                    client.post(f"/v1/sessions/{session}/runs", json={"input": "hi", "stream": True}),
                    client.get(f"/v1/sessions/{session}"),
                ):
                    began = time.monotonic()
                    refused(await ask, "SERVICE_UNAVAILABLE")
                    assert time.monotonic() - began < 4
                for probe in (gateway, *others):
                    assert await asyncio.to_thread(probe.degraded, "mesh") == "the mesh cannot be reached"
                assert (await client.get("/health")).status_code == 200
            async with asyncio.timeout(60):
                frames += [frame async for frame in stream]
        assert_whole(frames)
        assert frames[-1].event == "run.completed"
        assert len(text_of(frames).split()) == 150
