"""New input while a run is unfinished: whatever the run does just then, and by whichever door it comes."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest
import websockets

from bench.mesh import Mesh
from hermesh.agent.v1 import agent_service_pb2 as agent_pb
from hermesh.agent.v1.agent_service_pb2_grpc import AgentServiceStub
from hermesh.common.v1.event_pb2 import InputMessage
from hermesh.session.v1 import resources_pb2 as resources
from hermesh.session.v1 import session_service_pb2 as session_pb
from hermesh.session.v1.session_service_pb2_grpc import SessionServiceStub
from meshkit.errors import HermeshError, from_rpc_error
from tests.e2e.client import (
    TERMINAL,
    Frame,
    assert_whole,
    frames_of,
    http,
    new_session,
    run_to_end,
    submit,
    watch,
    watch_to_end,
)
from tests.e2e.conftest import tracebacks
from tests.e2e.tools_mesh import ToolsMesh, tools_mesh

NO_MEMORY = {"options": {"memory": False}}
SLOW = "[[tokens=2000 rate=50]]"
WAIT = "[[tool=wait {}]]"
LOSE = "[[tool=lose {}]]"


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ToolsMesh]:
    with tools_mesh(tmp_path_factory.mktemp("tools")) as made:
        yield made
        assert not tracebacks(made.mesh)


async def text_of(client: httpx.AsyncClient, session: str) -> list[tuple[str, str]]:
    """The conversation, as role and text."""
    found = (await client.get(f"/v1/sessions/{session}/messages")).json()["messages"]
    return [(message["role"], message["content"]) for message in found]


async def session_order(client: httpx.AsyncClient, session: str, last_run: str) -> list[str]:
    """The runs in the order in which the session's stream has them, each whole, up to one run's end."""
    by_run: dict[str, list[Frame]] = {}
    async with client.stream("GET", f"/v1/sessions/{session}/events") as response:
        async for frame in frames_of(response):
            if not frame.id:
                continue
            assert frame.run_id not in by_run or next(reversed(by_run)) == frame.run_id, "runs are mixed"
            by_run.setdefault(frame.run_id, []).append(frame)
            if frame.run_id == last_run and frame.event in TERMINAL:
                break
    for frames in by_run.values():
        assert_whole(frames)
    return list(by_run)


async def ended(client: httpx.AsyncClient, run: str, seconds: float = 20) -> list[Frame]:
    async with asyncio.timeout(seconds):
        frames = await watch_to_end(client, run)
    assert_whole(frames)
    return frames


async def begun(client: httpx.AsyncClient, session: str, text: str, event: str) -> str:
    """A run that got as far as an event."""
    run = await submit(client, session, text, **NO_MEMORY)
    async with asyncio.timeout(20):
        await watch(client, run, 0, lambda frame: frame.event == event)
    return run


@pytest.mark.parametrize("policy", ["interrupt", "rollback"])
async def test_input_while_the_model_streams(tools: ToolsMesh, policy: str) -> None:
    async with http(tools.mesh) as client:
        session = await new_session(client)
        await run_to_end(client, session, "kept [[tokens=3]]", **NO_MEMORY)
        kept = await text_of(client, session)
        first = await begun(client, session, f"dropped {SLOW}", "text.delta")
        _, aborted = await tools.model_streams()
        second = await submit(client, session, "next [[tokens=3]]", concurrency=policy, **NO_MEMORY)
        assert await tools.model_gave_up(aborted, 5) < 1
        cancelled = await ended(client, first)
        assert cancelled[-1].event == "run.cancelled"
        assert cancelled[-1].data["data"] == {"reason": "interrupted by new input"}
        reply = await ended(client, second)
        assert reply[-1].event == "run.completed"
        texts = await text_of(client, session)
        assert texts[: len(kept)] == kept
        rest = texts[len(kept) :]
        assert rest[-2:] == [("user", "next [[tokens=3]]"), ("assistant", texts[-1][1])]
        if policy == "interrupt":
            partial = next(f for f in cancelled if f.event == "message.completed").data["data"]["content"]
            assert rest[:-2] == [("user", f"dropped {SLOW}"), ("assistant", partial)]
        else:
            assert len(rest) == 2
        # What the model was given, by its own count (a token is four characters): the conversation, no more.
        usage = next(frame for frame in reply if frame.event == "usage").data["data"]
        assert usage["input_tokens"] == sum(len(text) for _, text in texts[:-1]) // 4 + 1
        assert (await session_order(client, session, second))[-2:] == [first, second]


async def test_input_while_a_tool_acts_stops_the_tool_wherever_it_runs(tools: ToolsMesh) -> None:
    places = set()
    async with http(tools.mesh) as client:
        for _ in range(8):
            session = await new_session(client)
            first = await begun(client, session, WAIT, "tool.call")
            await tools.did(first, "began")
            second = await submit(client, session, "next [[tokens=3]]", concurrency="interrupt", **NO_MEMORY)
            assert await tools.did(first, "began", "stopped") < 1.5
            assert (await ended(client, first))[-1].event == "run.cancelled"
            assert (await ended(client, second))[-1].event == "run.completed"
            assert await session_order(client, session, second) == [first, second]
            places |= {deed.pid for deed in tools.deeds(first)}
    # With one replica this would prove nothing.
    assert len(places) == 2


@pytest.mark.parametrize("policy", ["interrupt", "rollback"])
async def test_input_while_a_run_waits_for_a_person_abandons_it(tools: ToolsMesh, policy: str) -> None:
    async with http(tools.mesh) as client:
        session = await new_session(client)
        first = await begun(client, session, f"dropped {LOSE}", "action.required")
        behind = await submit(client, session, "behind [[tokens=3]]", **NO_MEMORY)
        second = await submit(client, session, "next [[tokens=3]]", concurrency=policy, **NO_MEMORY)
        assert (await ended(client, first))[-1].event == "run.cancelled"
        assert [f.event for f in await ended(client, behind)] == ["run.created", "run.cancelled"]
        assert (await ended(client, second))[-1].event == "run.completed"
        said = [text for role, text in await text_of(client, session) if role == "user"]
        kept = [f"dropped {LOSE}", "behind [[tokens=3]]"] if policy == "interrupt" else []
        assert said == [*kept, "next [[tokens=3]]"]
        call = f"{first}:1:0"
        late = await client.post(f"/v1/runs/{first}/actions/{call}", json={"decision": "retry"})
        assert late.status_code in (409, 412), late.text
        assert await session_order(client, session, second) == [first, behind, second]


async def test_input_that_waits_its_turn_waits_for_the_person_too(tools: ToolsMesh) -> None:
    async with http(tools.mesh) as client:
        session = await new_session(client)
        first = await begun(client, session, LOSE, "action.required")
        second = await submit(client, session, "next [[tokens=3]]", concurrency="enqueue", **NO_MEMORY)
        refused = await client.post(
            f"/v1/sessions/{session}/runs", json={"input": "x", "concurrency": "reject"}
        )
        assert (refused.status_code, refused.json()["reason"]) == (409, "SESSION_BUSY")
        assert (await client.get(f"/v1/runs/{second}")).json()["status"] == "queued"
        settled = await client.post(
            f"/v1/runs/{first}/actions/{first}:1:0", json={"decision": "completed", "content": "done by hand"}
        )
        assert settled.status_code == 200, settled.text
        assert (await ended(client, first))[-1].event == "run.completed"
        assert (await ended(client, second))[-1].event == "run.completed"
        assert await session_order(client, session, second) == [first, second]


@pytest.mark.parametrize("policy", ["interrupt", "rollback"])
async def test_input_passes_by_all_that_are_queued(tools: ToolsMesh, policy: str) -> None:
    async with http(tools.mesh) as client:
        session = await new_session(client)
        first = await begun(client, session, f"first {SLOW}", "text.delta")
        queued = [await submit(client, session, f"queued {n}", **NO_MEMORY) for n in range(3)]
        last = await submit(client, session, "last [[tokens=3]]", concurrency=policy, **NO_MEMORY)
        for run in queued:
            assert [frame.event for frame in await ended(client, run)] == ["run.created", "run.cancelled"]
        assert (await ended(client, first))[-1].event == "run.cancelled"
        assert (await ended(client, last))[-1].event == "run.completed"
        said = [text for role, text in await text_of(client, session) if role == "user"]
        kept = [f"first {SLOW}", *(f"queued {n}" for n in range(3))] if policy == "interrupt" else []
        assert said == [*kept, "last [[tokens=3]]"]
        assert await session_order(client, session, last) == [first, *queued, last]


async def test_interrupts_of_interrupts_leave_the_last_one(tools: ToolsMesh) -> None:
    async with http(tools.mesh) as client:
        session = await new_session(client)
        runs = [await begun(client, session, SLOW, "text.delta")]
        for number in range(6):
            policy = "rollback" if number % 2 else "interrupt"
            runs.append(await submit(client, session, SLOW, concurrency=policy, **NO_MEMORY))
        runs.append(await submit(client, session, "last [[tokens=3]]", concurrency="interrupt", **NO_MEMORY))
        for run in runs[:-1]:
            assert (await ended(client, run))[-1].event == "run.cancelled"
        assert (await ended(client, runs[-1]))[-1].event == "run.completed"
        assert await session_order(client, session, runs[-1]) == runs


# By which door new input comes; each returns its run, or raises what it was refused with.


def refusal(status: int, reason: str) -> HermeshError:
    return HermeshError(reason, f"HTTP {status}")


async def by_rest(mesh: Mesh, key: str, session: str, policy: str | None) -> str:
    async with http(mesh, Authorization=f"Bearer {key}") as client:
        body = {"input": "[[tokens=3]]", **NO_MEMORY} | ({"concurrency": policy} if policy else {})
        answer = await client.post(f"/v1/sessions/{session}/runs", json=body)
        if answer.status_code != 202:
            raise refusal(answer.status_code, answer.json()["reason"])
        return str(answer.json()["run_id"])


async def by_sse(mesh: Mesh, key: str, session: str, policy: str | None) -> str:
    async with http(mesh, Authorization=f"Bearer {key}") as client:
        body = {"input": "[[tokens=3]]", "stream": True, **NO_MEMORY}
        body |= {"concurrency": policy} if policy else {}
        async with client.stream("POST", f"/v1/sessions/{session}/runs", json=body) as answer:
            if answer.status_code != 200:
                raise refusal(answer.status_code, json.loads(await answer.aread())["reason"])
            return [frame async for frame in frames_of(answer) if frame.id][-1].run_id


async def by_websocket(mesh: Mesh, key: str, session: str, policy: str | None) -> str:
    url = f"{mesh.url.replace('http', 'ws')}/v1/sessions/{session}/ws?only_new=true"
    async with websockets.connect(url, additional_headers={"Authorization": f"Bearer {key}"}) as socket:
        message = {"type": "input", "input": "[[tokens=3]]", **NO_MEMORY}
        await socket.send(json.dumps(message | ({"concurrency": policy} if policy else {})))
        async with asyncio.timeout(20):
            while True:
                answer = json.loads(await socket.recv())
                if answer["type"] == "error":
                    raise refusal(answer["data"]["status"], answer["data"]["reason"])
                if answer["type"] == "accepted":
                    return str(answer["data"]["run_id"])


async def by_chat(mesh: Mesh, key: str, session: str, policy: str | None) -> str:
    headers = {"X-Hermesh-Session": session} | ({"X-Hermesh-Concurrency": policy} if policy else {})
    async with http(mesh, Authorization=f"Bearer {key}") as client:
        body = {"model": "default", "messages": [{"role": "user", "content": "[[tokens=3]]"}]}
        answer = await client.post("/v1/chat/completions", json=body, headers=headers)
        if answer.status_code != 200:
            raise refusal(answer.status_code, answer.json()["error"]["code"].upper())
        runs = (await client.get(f"/v1/sessions/{session}/runs")).json()["runs"]
        return str(runs[0]["run_id"])


def _fields(session: str, policy: str | None) -> dict[str, Any]:
    return {
        "session_id": session,
        "input": [InputMessage(role="user", content="[[tokens=3]]")],
        "options": resources.RunOptions(memory=False),
        "concurrency": f"CONCURRENCY_POLICY_{(policy or 'unspecified').upper()}",
    }


async def by_grpc_run(mesh: Mesh, key: str, session: str, policy: str | None) -> str:
    async with grpc.aio.insecure_channel(mesh.grpc_address) as channel:
        stub: Any = AgentServiceStub(channel)  # type: ignore[no-untyped-call]
        call = stub.Run(
            agent_pb.RunRequest(**_fields(session, policy)),
            metadata=(("authorization", f"Bearer {key}"),),
            timeout=20,
        )
        try:
            return [e.run_id async for response in call for e in response.frame.events][-1]
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error


async def by_grpc_submit(mesh: Mesh, key: str, session: str, policy: str | None) -> str:
    async with grpc.aio.insecure_channel(mesh.grpc_address) as channel:
        stub: Any = SessionServiceStub(channel)  # type: ignore[no-untyped-call]
        request = session_pb.SubmitRunRequest(**_fields(session, policy))
        try:
            answer = await stub.SubmitRun(request, metadata=(("authorization", f"Bearer {key}"),), timeout=20)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        return str(answer.run.run_id)


DOORS = [by_rest, by_sse, by_websocket, by_chat, by_grpc_run, by_grpc_submit]


def set_default(mesh: Mesh, name: str, policy: str) -> None:
    """Sets a tenant's default, as an operator does beside a running mesh."""
    database = mesh.command("env", "HERMESH_DATABASE_URL").strip()
    done = subprocess.run(
        [sys.executable, "-m", "services.session", "tenant", "--name", name, "--concurrency", policy],
        env=mesh.environment | {"HERMESH_DATABASE_URL": database},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
async def test_every_door_takes_the_policy_and_else_the_tenants(tools: ToolsMesh, door: Any) -> None:
    mesh = tools.mesh
    tenant = f"tenant-{door.__name__}"
    key = await asyncio.to_thread(mesh.new_tenant, tenant)
    await asyncio.to_thread(set_default, mesh, tenant, "reject")
    async with http(mesh, Authorization=f"Bearer {key}") as client:
        session = await new_session(client)
        first = await begun(client, session, SLOW, "text.delta")
        for policy in (None, "reject"):
            with pytest.raises(HermeshError) as refused:
                await door(mesh, key, session, policy)
            assert refused.value.reason == "SESSION_BUSY"
        second = await door(mesh, key, session, "interrupt")
        assert second != first
        assert (await ended(client, first))[-1].event == "run.cancelled"
        assert (await ended(client, second))[-1].event == "run.completed"
        # And a default that does something, without a word in the request.
        await asyncio.to_thread(set_default, mesh, tenant, "rollback")
        third = await begun(client, session, SLOW, "text.delta")
        fourth = await door(mesh, key, session, None)
        assert (await ended(client, third))[-1].event == "run.cancelled"
        assert (await ended(client, fourth))[-1].event == "run.completed"
        assert SLOW not in [text for _, text in (await text_of(client, session))[-2:]]
