"""Clients that know nothing of us: the openai package, grpcurl, a plain gRPC stub."""

import json
import subprocess
import sys
from pathlib import Path

import grpc
import httpx
import openai
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from bench.mesh import Mesh
from hermesh.agent.v1 import agent_service_pb2, agent_service_pb2_grpc
from hermesh.common.v1 import event_pb2
from hermesh.session.v1 import (
    session_internal_service_pb2,
    session_internal_service_pb2_grpc,
    session_service_pb2,
    session_service_pb2_grpc,
)

BIN = Path(sys.executable).parent
PUBLIC_SERVICES = {
    "hermesh.agent.v1.AgentService",
    "hermesh.memory.v1.MemoryService",
    "hermesh.session.v1.SessionService",
    "hermesh.tool.v1.ToolService",
}


def openai_client(mesh: Mesh) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{mesh.url}/v1", api_key=mesh.api_key, max_retries=0, timeout=30)


def test_the_openai_package_streams(mesh: Mesh) -> None:
    with openai_client(mesh) as client:
        stream = client.chat.completions.create(
            model="scripted",
            messages=[{"role": "user", "content": "[[tokens=30]]"}],
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert len(text.split()) == 30
    assert len({chunk.id for chunk in chunks}) == 1
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 30


def test_the_openai_package_gets_a_whole_reply(mesh: Mesh) -> None:
    with openai_client(mesh) as client:
        reply = client.chat.completions.create(
            model="scripted",
            messages=[
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "one"},
                {"role": "assistant", "content": "two"},
                {"role": "user", "content": "[[echo]] three"},
            ],
        )
        assert "three" in (reply.choices[0].message.content or "")
        assert "scripted" in [model.id for model in client.models.list()]


def test_the_openai_package_sees_typed_errors(mesh: Mesh) -> None:
    messages: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "hello"}]
    with openai_client(mesh) as client:
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="no-such-model", messages=messages)
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="scripted", messages=[])
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="wrong").chat.completions.create(model="scripted", messages=messages)
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(
                model="scripted", messages=[{"role": "user", "content": "[[status=429]]"}]
            )


def grpcurl(mesh: Mesh, *arguments: str, key: bool = True) -> subprocess.CompletedProcess[str]:
    headers = ["-H", f"authorization: Bearer {mesh.api_key}"] if key else []
    return subprocess.run(
        [str(BIN / "grpcurl"), "-plaintext", *headers, *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_grpcurl_lists_and_calls_the_public_services_by_reflection(mesh: Mesh) -> None:
    listed = grpcurl(mesh, mesh.grpc_address, "list")
    assert listed.returncode == 0, listed.stderr
    assert set(listed.stdout.split()) >= PUBLIC_SERVICES
    assert "hermesh.session.v1.SessionInternalService" not in listed.stdout
    made = grpcurl(
        mesh,
        "-d",
        '{"title": "by hand"}',
        mesh.grpc_address,
        "hermesh.session.v1.SessionService/CreateSession",
    )
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["session"]["title"] == "by hand"
    for method in (
        "hermesh.agent.v1.AgentService/ListModels",
        "hermesh.tool.v1.ToolService/ListTools",
        "hermesh.session.v1.SessionService/ListSessions",
    ):
        called = grpcurl(mesh, mesh.grpc_address, method)
        assert called.returncode == 0, called.stderr
    assert grpcurl(mesh, mesh.grpc_address, "list", key=False).returncode != 0


async def test_a_grpc_client_streams_a_run(mesh: Mesh) -> None:
    key = (("authorization", f"Bearer {mesh.api_key}"),)
    async with grpc.aio.insecure_channel(mesh.grpc_address) as channel:
        sessions = session_service_pb2_grpc.SessionServiceStub(channel)
        agents = agent_service_pb2_grpc.AgentServiceStub(channel)
        made = await sessions.CreateSession(
            session_service_pb2.CreateSessionRequest(), metadata=key, timeout=10
        )
        call = agents.Run(
            agent_service_pb2.RunRequest(
                session_id=made.session.session_id,
                input=[event_pb2.InputMessage(role="user", content="[[tokens=20]]")],
            ),
            metadata=key,
            timeout=30,
        )
        events = [event async for response in call for event in response.frame.events]
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert events[-1].type == "run.completed"


async def test_mesh_only_methods_refuse_the_public(mesh: Mesh) -> None:
    forged = (
        ("authorization", f"Bearer {mesh.api_key}"),
        ("x-hermesh-mesh", "guess"),
        ("x-hermesh-tenant", "00000000-0000-0000-0000-000000000000"),
    )
    async with grpc.aio.insecure_channel(mesh.grpc_address) as channel:
        internal = session_internal_service_pb2_grpc.SessionInternalServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await internal.Authenticate(
                session_internal_service_pb2.AuthenticateRequest(api_key="x"), metadata=forged, timeout=10
            )
        assert refused.value.code() in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.PERMISSION_DENIED)
        agents = agent_service_pb2_grpc.AgentServiceStub(channel)
        request = agent_service_pb2.ExecuteRequest(run_id="01890000-0000-7000-8000-000000000000")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await agents.Execute(request, metadata=forged, timeout=10).read()
        assert refused.value.code() in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.PERMISSION_DENIED)


async def test_grpc_errors_carry_reason_and_fields(mesh: Mesh) -> None:
    key = (("authorization", f"Bearer {mesh.api_key}"),)
    async with grpc.aio.insecure_channel(mesh.grpc_address) as channel:
        sessions = session_service_pb2_grpc.SessionServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await sessions.GetSession(
                session_service_pb2.GetSessionRequest(session_id="x"), metadata=key, timeout=10
            )
        status = rpc_status.from_call(refused.value)
        assert status is not None
        info, fields = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        for detail in status.details:
            detail.Unpack(info)
            detail.Unpack(fields)
        assert (info.domain, info.reason) == ("hermesh", "INVALID_ARGUMENT")
        assert [violation.field for violation in fields.field_violations] == ["session_id"]
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await sessions.ListSessions(session_service_pb2.ListSessionsRequest(), timeout=10)
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_the_edge_answers_about_itself(mesh: Mesh) -> None:
    with httpx.Client(base_url=mesh.url, timeout=10) as client:
        assert client.get("/health").status_code == 200
        assert client.get("/ready").status_code == 200
        assert "hermesh_rpc" in client.get("/metrics").text or "hermesh_http" in client.get("/metrics").text
        document = client.get("/openapi.json").json()
        assert document["openapi"].startswith("3.")
        assert "/v1/sessions/{session_id}/runs" in document["paths"]
        assert "text/html" in client.get("/").headers["content-type"]
