"""Two tenants on one mesh: through every public door the other's things look like nothing at all."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import httpx
import pytest
import websockets
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from bench.mesh import Mesh
from hermesh.agent.v1 import agent_service_pb2 as agent_pb
from hermesh.agent.v1.agent_service_pb2_grpc import AgentServiceStub
from hermesh.common.v1.event_pb2 import InputMessage
from hermesh.memory.v1 import memory_service_pb2 as memory_pb
from hermesh.memory.v1.memory_service_pb2_grpc import MemoryServiceStub
from hermesh.session.v1 import session_service_pb2 as session_pb
from hermesh.session.v1.session_service_pb2_grpc import SessionServiceStub
from tests.e2e.client import assert_whole, http, new_session, run_to_end, submit, watch, watch_to_end

SECRET = "the tulips are behind the shed"
USER = "gardener"


@dataclass(frozen=True)
class Owned:
    """What the first tenant has: a finished run in one session, a running one in another."""

    session: str
    run: str
    busy_session: str
    busy_run: str
    memory: str


def metadata(key: str, **more: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"), *((name.replace("_", "-"), more[name]) for name in more))


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@asynccontextmanager
async def owned_things(mesh: Mesh) -> AsyncIterator[Owned]:
    """Makes them, and ends what runs."""
    async with http(mesh) as client, grpc.aio.insecure_channel(mesh.grpc_address) as channel:
        session = await new_session(client, title=SECRET, metadata={"note": SECRET}, user=USER)
        frames = await run_to_end(client, session, f"{SECRET} [[tokens=3]]", options={"memory": False})
        kept = await MemoryServiceStub(channel).Remember(
            memory_pb.RememberRequest(scope=memory_pb.Scope(user=USER), text=SECRET),
            metadata=metadata(mesh.api_key),
            timeout=10,
        )
        busy_session = await new_session(client, title=SECRET)
        busy_run = await submit(client, busy_session, f"{SECRET} [[tokens=3000 rate=20]]")
        await watch(client, busy_run, 0, lambda frame: frame.event == "text.delta")
        try:
            yield Owned(session, frames[0].run_id, busy_session, busy_run, kept.memory.memory_id)
            run = (await client.get(f"/v1/runs/{busy_run}")).json()
            assert run["status"] == "running", "the stranger stopped it"
            assert (await client.get(f"/v1/sessions/{session}")).json()["title"] == SECRET
            messages = (await client.get(f"/v1/sessions/{session}/messages")).json()["messages"]
            assert len(messages) == 2
        finally:
            await client.post(f"/v1/runs/{busy_run}/cancel", json={})
            assert_whole(await watch_to_end(client, busy_run))


def same_but_for_the_id(answer: httpx.Response, unknown: httpx.Response, own: str, made_up: str) -> None:
    """The answer for a foreign id is, word by word, that for an id that nobody has."""
    assert answer.status_code == unknown.status_code == 404, answer.text
    assert SECRET not in answer.text
    documents = [json.loads(item.text.replace(own, made_up)) for item in (answer, unknown)]
    for document in documents:
        document.pop("request_id", None)
    assert documents[0] == documents[1]


async def test_http_shows_a_stranger_nothing(mesh: Mesh, other_key: str) -> None:
    made_up = str(uuid.uuid4())
    run_input = {"input": "hello [[tokens=1]]"}
    resolve = {"decision": "completed", "content": "x"}
    chat = {"model": "scripted", "messages": [{"role": "user", "content": "[[echo]] go on"}]}
    async with owned_things(mesh) as owned, http(mesh, **bearer(other_key)) as stranger:

        async def check(method: str, path: str, own: str, **request: Any) -> None:
            answers = []
            for identifier in (own, made_up):
                filled = json.loads(json.dumps(request).replace("{id}", identifier))
                answers.append(await stranger.request(method, path.replace("{id}", identifier), **filled))
            same_but_for_the_id(answers[0], answers[1], own, made_up)

        for session, run in ((owned.session, owned.run), (owned.busy_session, owned.busy_run)):
            await check("GET", "/v1/sessions/{id}", session)
            await check("PATCH", "/v1/sessions/{id}", session, json={"title": "mine"})
            await check("DELETE", "/v1/sessions/{id}", session)
            await check("GET", "/v1/sessions/{id}/messages", session)
            await check("GET", "/v1/sessions/{id}/runs", session)
            await check("GET", "/v1/sessions/{id}/events", session)
            await check("GET", "/v1/sessions/{id}/events", session, params={"after": f"{run}:1"})
            await check("POST", "/v1/sessions/{id}/runs", session, json=run_input)
            await check("POST", "/v1/sessions/{id}/runs", session, json=run_input | {"stream": True})
            await check("GET", "/v1/runs/{id}", run)
            await check("GET", "/v1/runs/{id}/events", run)
            await check("GET", "/v1/runs/{id}/events", run, headers={"Last-Event-ID": "{id}:1"})
            await check("POST", "/v1/runs/{id}/cancel", run, json={"reason": "mine"})
            await check("POST", "/v1/runs/{id}/actions/{id}:1:0", run, json=resolve)
            await check("GET", "/v1/runs/{id}/tool-calls/{id}:1:0/content", run)
            for stream in (True, False):
                body = chat | {"stream": stream}
                await check("POST", "/v1/chat/completions", session, json=body | {"session_id": "{id}"})
                await check(
                    "POST", "/v1/chat/completions", session, json=body, headers={"X-Hermesh-Session": "{id}"}
                )
        mine = await new_session(stranger)
        answer = await stranger.get(f"/v1/sessions/{mine}/events", params={"after": f"{owned.run}:1"})
        assert SECRET not in answer.text
        for path in ("/v1/sessions", f"/v1/sessions?user={USER}", "/v1/sessions?page_size=200"):
            listed = await stranger.get(path)
            assert listed.status_code == 200
            assert SECRET not in listed.text
            assert owned.session not in listed.text
        assert SECRET not in json.dumps(
            [frame.data for frame in await run_to_end(stranger, mine, "[[echo]]")]
        )


async def test_a_foreign_page_token_is_refused(mesh: Mesh, other_key: str) -> None:
    async with http(mesh) as client, http(mesh, **bearer(other_key)) as stranger:
        for _ in range(2):
            await new_session(client)
        page = (await client.get("/v1/sessions", params={"page_size": 1})).json()
        answer = await stranger.get("/v1/sessions", params={"page_token": page["next_page_token"]})
        assert answer.status_code == 400
        assert answer.json()["reason"] == "PAGE_TOKEN_INVALID"


async def test_an_idempotency_key_is_a_tenants_own(mesh: Mesh, other_key: str) -> None:
    key = {"Idempotency-Key": str(uuid.uuid4())}
    async with http(mesh) as client, http(mesh, **bearer(other_key)) as stranger:
        answers = [
            await one.post("/v1/sessions", json={"title": title}, headers=key)
            for one, title in ((client, SECRET), (stranger, "mine"))
        ]
        assert [answer.status_code for answer in answers] == [201, 201]
        first, second = (answer.json()["session_id"] for answer in answers)
        assert first != second
        runs = [
            await one.post(f"/v1/sessions/{session}/runs", json={"input": "[[tokens=2]]"}, headers=key)
            for one, session in ((client, first), (stranger, second))
        ]
        assert [answer.status_code for answer in runs] == [202, 202]
        assert runs[0].json()["run_id"] != runs[1].json()["run_id"]
        for one, run in ((client, runs[0]), (stranger, runs[1])):
            assert_whole(await watch_to_end(one, run.json()["run_id"]))


async def test_a_websocket_shows_a_stranger_nothing(mesh: Mesh, other_key: str) -> None:
    address = f"ws://127.0.0.1:{mesh.http_port}/v1/sessions"
    async with owned_things(mesh) as owned, http(mesh, **bearer(other_key)) as stranger:
        for session in (owned.session, owned.busy_session):
            async with websockets.connect(
                f"{address}/{session}/ws", additional_headers=bearer(other_key), open_timeout=10
            ) as socket:
                refused = json.loads(await asyncio.wait_for(socket.recv(), 10))
                assert refused["data"]["reason"] == "SESSION_NOT_FOUND"
                with pytest.raises(websockets.ConnectionClosed) as closed:
                    await asyncio.wait_for(socket.recv(), 10)
                assert closed.value.rcvd is not None
                assert closed.value.rcvd.code == 4404
        mine = await new_session(stranger)
        async with websockets.connect(
            f"{address}/{mine}/ws", additional_headers=bearer(other_key), open_timeout=10
        ) as socket:
            for message in (
                {"type": "cancel", "run_id": owned.busy_run},
                {
                    "type": "resolve",
                    "run_id": owned.busy_run,
                    "call_id": f"{owned.busy_run}:1:0",
                    "decision": "completed",
                },
            ):
                await socket.send(json.dumps(message))
                refused = json.loads(await asyncio.wait_for(socket.recv(), 10))
                assert refused["data"]["reason"] == "RUN_NOT_FOUND"


async def refusal(awaitable: Any) -> tuple[grpc.StatusCode, str]:
    """Returns code and reason of an RPC that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await awaitable
    assert SECRET not in str(refused.value)
    status = rpc_status.from_call(refused.value)
    info = error_details_pb2.ErrorInfo()
    for detail in status.details if status is not None else ():
        detail.Unpack(info)
    return refused.value.code(), info.reason


async def test_grpc_shows_a_stranger_nothing(mesh: Mesh, other_key: str) -> None:
    as_other = metadata(other_key)
    async with owned_things(mesh) as owned, grpc.aio.insecure_channel(mesh.grpc_address) as channel:
        sessions: Any = SessionServiceStub(channel)
        agents: Any = AgentServiceStub(channel)
        memories: Any = MemoryServiceStub(channel)
        words = [InputMessage(role="user", content="x")]
        for session, run in ((owned.session, owned.run), (owned.busy_session, owned.busy_run)):
            by_session = [
                sessions.GetSession(session_pb.GetSessionRequest(session_id=session), metadata=as_other),
                sessions.UpdateSession(
                    session_pb.UpdateSessionRequest(session_id=session, title="x"), metadata=as_other
                ),
                sessions.DeleteSession(
                    session_pb.DeleteSessionRequest(session_id=session), metadata=as_other
                ),
                sessions.ListMessages(session_pb.ListMessagesRequest(session_id=session), metadata=as_other),
                sessions.ListRuns(session_pb.ListRunsRequest(session_id=session), metadata=as_other),
                sessions.SubmitRun(
                    session_pb.SubmitRunRequest(session_id=session, input=words), metadata=as_other
                ),
                sessions.WatchSession(
                    session_pb.WatchSessionRequest(session_id=session), metadata=as_other, timeout=10
                ).read(),
                agents.Run(
                    agent_pb.RunRequest(session_id=session, input=words), metadata=as_other, timeout=10
                ).read(),
            ]
            for call in by_session:
                assert await refusal(call) == (grpc.StatusCode.NOT_FOUND, "SESSION_NOT_FOUND")
            by_run = [
                sessions.GetRun(session_pb.GetRunRequest(run_id=run), metadata=as_other),
                sessions.CancelRun(session_pb.CancelRunRequest(run_id=run), metadata=as_other),
                sessions.ResolveAction(
                    session_pb.ResolveActionRequest(
                        run_id=run, call_id=f"{run}:1:0", decision=session_pb.ACTION_DECISION_COMPLETED
                    ),
                    metadata=as_other,
                ),
                sessions.WatchRun(
                    session_pb.WatchRunRequest(run_id=run), metadata=as_other, timeout=10
                ).read(),
            ]
            for call in by_run:
                assert await refusal(call) == (grpc.StatusCode.NOT_FOUND, "RUN_NOT_FOUND")
        gone = await memories.Forget(
            memory_pb.ForgetRequest(memory_id=owned.memory), metadata=as_other, timeout=10
        )
        assert gone.deleted == 0
        for scope in (memory_pb.Scope(user=USER), memory_pb.Scope(session_id=owned.session)):
            listed = await memories.ListMemories(
                memory_pb.ListMemoriesRequest(scope=scope), metadata=as_other, timeout=10
            )
            assert not listed.memories
            near = memories.Recall(
                memory_pb.RecallRequest(scope=scope, query=SECRET, min_score=-1),
                metadata=as_other,
                timeout=10,
            )
            assert [found async for found in near] == []
            gone = await memories.Forget(memory_pb.ForgetRequest(scope=scope), metadata=as_other, timeout=10)
            assert gone.deleted == 0
        assert not (
            await memories.GetPreferences(
                memory_pb.GetPreferencesRequest(user=USER), metadata=as_other, timeout=10
            )
        ).preferences
        still = await memories.ListMemories(
            memory_pb.ListMemoriesRequest(scope=memory_pb.Scope(user=USER)),
            metadata=metadata(mesh.api_key),
            timeout=10,
        )
        assert owned.memory in [item.memory_id for item in still.memories]


async def test_forged_mesh_headers_change_nothing(mesh: Mesh, other_key: str) -> None:
    """Whoever writes the headers of the mesh itself is no more, and no less, than their key says."""
    async with http(mesh) as client:
        session = await new_session(client, title=SECRET)
        tenant = str(uuid.uuid4())
    guesses = [
        {"x-hermesh-mesh": "guess", "x-hermesh-tenant": tenant},
        {"X-Hermesh-Mesh": "", "X-Hermesh-Tenant": tenant},
        {"x-hermesh-tenant": tenant},
        {"x-hermesh-mesh": "guess", "x-hermesh-tenant": "not a uuid"},
    ]
    async with http(mesh, **bearer(other_key)) as stranger:
        for forged in guesses:
            answer = await stranger.get(f"/v1/sessions/{session}", headers=forged)
            assert (answer.status_code, answer.json()["reason"]) == (404, "SESSION_NOT_FOUND")
            listed = await stranger.get("/v1/sessions", headers=forged)
            assert listed.status_code == 200
            assert SECRET not in listed.text
    async with httpx.AsyncClient(base_url=mesh.url, timeout=10) as nobody:
        for forged in guesses:
            answer = await nobody.get("/v1/sessions", headers=forged)
            assert (answer.status_code, answer.json()["reason"]) == (401, "API_KEY_MISSING")
    async with grpc.aio.insecure_channel(mesh.grpc_address) as channel:
        sessions: Any = SessionServiceStub(channel)
        request = session_pb.GetSessionRequest(session_id=session)
        for forged in guesses:
            extra = tuple((name.lower(), value) for name, value in forged.items())
            code, reason = await refusal(
                sessions.GetSession(request, metadata=metadata(other_key) + extra, timeout=10)
            )
            assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "SESSION_NOT_FOUND")
            code, reason = await refusal(sessions.GetSession(request, metadata=extra, timeout=10))
            assert (code, reason) == (grpc.StatusCode.UNAUTHENTICATED, "API_KEY_MISSING")
            mine = await sessions.GetSession(request, metadata=metadata(mesh.api_key) + extra, timeout=10)
            assert mine.session.title == SECRET


async def test_a_lease_is_not_for_the_public(mesh: Mesh) -> None:
    """SubmitRun's claim_owner would hand a run to whoever asks: only the mesh may."""
    async with http(mesh) as client:
        session = await new_session(client)
    async with grpc.aio.insecure_channel(mesh.grpc_address) as channel:
        sessions: Any = SessionServiceStub(channel)
        request = session_pb.SubmitRunRequest(
            session_id=session, input=[InputMessage(role="user", content="x")], claim_owner="me"
        )
        code, reason = await refusal(
            sessions.SubmitRun(request, metadata=metadata(mesh.api_key, x_hermesh_mesh="x"), timeout=10)
        )
        assert (code, reason) == (grpc.StatusCode.PERMISSION_DENIED, "MESH_ONLY")
