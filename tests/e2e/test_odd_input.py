"""Big and odd input through every door: served to the last byte of a limit, refused by name past it."""

import asyncio
import base64
import json
import uuid
from typing import Any

import grpc
import httpx
import pytest
import websockets

from bench.mesh import Mesh
from hermesh.agent.v1 import agent_service_pb2 as agent_pb
from hermesh.agent.v1.agent_service_pb2_grpc import AgentServiceStub
from hermesh.common.v1.event_pb2 import InputMessage
from hermesh.session.v1 import session_service_pb2 as session_pb
from hermesh.session.v1.session_service_pb2_grpc import SessionServiceStub
from meshkit.errors import from_rpc_error
from tests.e2e.client import assert_whole, http, new_session, watch_to_end

LIMIT = 1024 * 1024
DIRECTIVE = "[[tokens=2]] "
# Four bytes a character in UTF-8, and twelve in JSON that keeps to ASCII.
FULL = DIRECTIVE + "aaa" + "\U0001f337" * ((LIMIT - len(DIRECTIVE) - 3) // 4)
assert len(FULL.encode()) == LIMIT
OVER = FULL + "x"
JSON = {"Content-Type": "application/json"}
NO_MEMORY = {"options": {"memory": False}}


def body(value: Any, *, ascii_only: bool = False) -> bytes:
    return json.dumps(value, ensure_ascii=ascii_only).encode()


def assert_refused(answer: httpx.Response, status: int, reason: str) -> None:
    assert answer.status_code == status, answer.text[:500]
    problem = answer.json()
    assert problem["reason"] == reason, problem
    assert "Traceback" not in answer.text


async def kept_input(client: httpx.AsyncClient, run: str) -> str:
    frames = await watch_to_end(client, run)
    assert_whole(frames)
    assert frames[-1].event == "run.completed"
    content: str = frames[0].data["data"]["input"][0]["content"]
    return content


@pytest.mark.parametrize("ascii_only", [True, False])
async def test_http_takes_a_whole_mebibyte_of_text_and_no_byte_more(mesh: Mesh, ascii_only: bool) -> None:
    async with http(mesh) as client:
        session = await new_session(client)
        url = f"/v1/sessions/{session}/runs"
        full = body({"input": FULL} | NO_MEMORY, ascii_only=ascii_only)
        answer = await client.post(url, content=full, headers=JSON)
        assert answer.status_code == 202, answer.text[:500]
        assert await kept_input(client, answer.json()["run_id"]) == FULL
        for stream in (True, False):
            over = body({"input": OVER, "stream": stream}, ascii_only=ascii_only)
            assert_refused(await client.post(url, content=over, headers=JSON), 413, "INPUT_TOO_LARGE")
        assert len((await client.get(url)).json()["runs"]) == 1


async def test_chat_completions_take_the_same(mesh: Mesh) -> None:
    async with http(mesh) as client:
        for stream in (True, False):
            request = {"model": "scripted", "stream": stream}
            for text, status in ((FULL, 200), (OVER, 413)):
                content = body(request | {"messages": [{"role": "user", "content": text}]})
                answer = await client.post("/v1/chat/completions", content=content, headers=JSON)
                assert answer.status_code == status, answer.text[:500]


async def test_a_websocket_takes_the_same(mesh: Mesh) -> None:
    async with http(mesh) as client:
        session = await new_session(client)
        url = f"ws://127.0.0.1:{mesh.http_port}/v1/sessions/{session}/ws?only_new=1"
        async with websockets.connect(url, additional_headers=mesh.headers, max_size=None) as socket:

            async def answer(kind: str) -> dict[str, Any]:
                async with asyncio.timeout(20):
                    while True:
                        message: dict[str, Any] = json.loads(await socket.recv())
                        if message["type"] == kind:
                            return message["data"]  # type: ignore[no-any-return]

            await socket.send(body({"type": "input", "input": OVER}, ascii_only=True).decode())
            assert (await answer("error"))["reason"] == "INPUT_TOO_LARGE"
            full = {"type": "input", "input": FULL} | NO_MEMORY
            await socket.send(body(full, ascii_only=True).decode())
            run = (await answer("accepted"))["run_id"]
            assert await kept_input(client, run) == FULL


async def test_grpc_takes_the_same(mesh: Mesh) -> None:
    key = (("authorization", f"Bearer {mesh.api_key}"),)
    async with http(mesh) as client, grpc.aio.insecure_channel(mesh.grpc_address) as channel:
        session = await new_session(client)
        sessions: Any = SessionServiceStub(channel)  # type: ignore[no-untyped-call]
        agents: Any = AgentServiceStub(channel)  # type: ignore[no-untyped-call]

        def submit(text: str) -> Any:
            words = [InputMessage(role="user", content=text)]
            request = session_pb.SubmitRunRequest(session_id=session, input=words)
            return sessions.SubmitRun(request, metadata=key, timeout=20)

        def run(text: str) -> Any:
            words = [InputMessage(role="user", content=text)]
            request = agent_pb.RunRequest(session_id=session, input=words)
            return agents.Run(request, metadata=key, timeout=20)

        assert await kept_input(client, (await submit(FULL)).run.run_id) == FULL
        events = [event async for answer in run(FULL) for event in answer.frame.events]
        assert events[-1].type == "run.completed"
        # By the service, and what is much too large by Envoy: with the same words.
        for text in (OVER, "x" * 3_000_000, "x" * 17_000_000):
            for call in (submit(text), run(text).read()):
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await call
                assert from_rpc_error(refused.value).reason == "INPUT_TOO_LARGE"


ODD_BODIES = {
    "an escaped NUL": b'{"input":"a\\u0000b"}',
    "a NUL in a name": b'{"input":"a","metadata":{"\\u0000":"x"}}',
    "a raw NUL": b'{"input":"a\x00b"}',
    "half a surrogate pair": b'{"input":"a\\ud83cb"}',
    "the other half": b'{"input":"\\udf37"}',
    "a surrogate as bytes": b'{"input":"\xed\xa0\xbc"}',
    "an overlong slash": b'{"input":"\xc0\xaf"}',
    "UTF-16": '{"input":"x"}'.encode("utf-16"),
    "deep arrays": b"[" * 200_000 + b"]" * 200_000,
    "deep objects": b'{"input":' * 20_000 + b"1" + b"}" * 20_000,
    "never closed": b'{"input":[' + b"[" * 100_000,
    "a number of 9,000 digits": b'{"input":"x","options":{"seed":' + b"9" * 9000 + b"}}",
    "infinity": b'{"input":"x","options":{"temperature":1e999}}',
    "not a number": b'{"input":"x","options":{"temperature":NaN}}',
    "two documents": b'{"input":"x"}{"input":"y"}',
    "257 messages": body({"input": [{"role": "user", "content": "x"}] * 257}),
}


async def test_an_odd_body_is_refused_and_nothing_is_kept(mesh: Mesh) -> None:
    async with http(mesh) as client:
        session = await new_session(client)
        for name, content in ODD_BODIES.items():
            for path in (f"/v1/sessions/{session}/runs", "/v1/sessions"):
                answer = await client.post(path, content=content, headers=JSON)
                assert_refused(answer, 400, "INVALID_ARGUMENT")
            answer = await client.post("/v1/chat/completions", content=content, headers=JSON)
            assert answer.status_code == 400, name
            assert answer.json()["error"]["type"] == "invalid_request_error", name
        assert (await client.get(f"/v1/sessions/{session}/runs")).json()["runs"] == []


async def test_odd_paths_queries_and_headers_are_answered(mesh: Mesh) -> None:
    long = "k" * 30_000
    async with http(mesh) as client:
        session = await new_session(client)
        cases: list[tuple[str, dict[str, str], int]] = [
            ("/v1/sessions/%00", {}, 400),
            ("/v1/sessions/%ff%fe", {}, 404),
            (f"/v1/sessions/{session}%2fruns", {}, 400),
            ("/v1/models/a%2fb", {}, 404),
            (f"/v1/sessions/../sessions/{session}", {}, 200),
            (f"/v1/sessions/{session.upper()}", {}, 200),
            (f"/v1/sessions/{{{session[:-2]}}}", {}, 404),
            ("/v1/sessions?user=%00", {}, 400),
            ("/v1/sessions?page_size=9999999999999999999", {}, 400),
            ("/v1/sessions?page_size=%D9%A1", {}, 400),
            (f"/v1/sessions/{session}/events?after=x:1", {}, 400),
            (f"/v1/sessions/{session}/events?after={session}:99999999999", {}, 400),
            (f"/v1/sessions?user={long}", {}, 400),
            ("/v1/sessions", {"X-Long": long}, 200),
            ("/v1/sessions", {"X-Long": long * 3}, 431),
            ("/v1/sessions", {f"X-{number}": "v" for number in range(1000)}, 431),
            ("/v1/sessions", {"X-Request-Id": "a\tb" * 100, "traceparent": "00-zz"}, 200),
            ("/v1/sessions", {"Authorization": "Bearer " + long}, 401),
            ("/v1/sessions", {"x_hermesh_tenant": "1"}, 400),
        ]
        for path, headers, status in cases:
            answer = await client.get(path, headers=headers)
            assert answer.status_code == status, (path[:80], list(headers)[:1], answer.text[:300])


async def test_odd_metadata_and_bytes_hurt_nobody_else(mesh: Mesh) -> None:
    key = (("authorization", f"Bearer {mesh.api_key}"),)
    request = session_pb.ListSessionsRequest(page_size=1)
    async with grpc.aio.insecure_channel(mesh.grpc_address) as channel, http(mesh) as client:
        sessions: Any = SessionServiceStub(channel)  # type: ignore[no-untyped-call]
        session = await new_session(client)
        many = tuple((f"k{number}", "v") for number in range(3000))
        for more in (many, (("long", "v" * 200_000),)):
            with pytest.raises(grpc.aio.AioRpcError):
                await sessions.ListSessions(request, metadata=key + more, timeout=20)
            # On a connection of its own: Envoy may end one that carries such a thing.
            async with grpc.aio.insecure_channel(mesh.grpc_address) as another:
                stub: Any = SessionServiceStub(another)  # type: ignore[no-untyped-call]
                assert (await stub.ListSessions(request, metadata=key, timeout=20)).sessions
        odd = (("binary-bin", b"\x00\xff"), ("traceparent", "zz"), ("x-request-id", "~" * 300))
        await sessions.ListSessions(request, metadata=key + odd, timeout=20, wait_for_ready=True)
        raw = channel.unary_unary("/hermesh.session.v1.SessionService/GetSession")
        for data in (b"\xff\xff\xff", b"\x0a\x02\xff\xfe", b"\x0a\xff\xff\xff\xff\x0f"):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await raw(data, metadata=key, timeout=20)
            assert from_rpc_error(refused.value).reason == "INVALID_ARGUMENT"
        words = [InputMessage(role="user", content="x")]
        for call in (
            sessions.CreateSession(session_pb.CreateSessionRequest(request_id="a\0"), metadata=key),
            sessions.CreateSession(session_pb.CreateSessionRequest(title="a\0"), metadata=key),
            sessions.CreateSession(session_pb.CreateSessionRequest(metadata={"a\0": "b"}), metadata=key),
            sessions.ListSessions(session_pb.ListSessionsRequest(user="a\0"), metadata=key),
            sessions.SubmitRun(
                session_pb.SubmitRunRequest(session_id=session, input=words, request_id="\0"), metadata=key
            ),
            sessions.CancelRun(session_pb.CancelRunRequest(run_id=session, reason="\0"), metadata=key),
            sessions.ResolveAction(
                session_pb.ResolveActionRequest(run_id=session, call_id="\0", decision=1), metadata=key
            ),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call
            assert from_rpc_error(refused.value).reason == "INVALID_ARGUMENT"


async def test_pages_meet_each_session_once_and_a_tampered_token_is_refused(mesh: Mesh) -> None:
    user = f"pager-{uuid.uuid4()}"
    async with http(mesh) as client:
        made = {await new_session(client, user=user) for _ in range(23)}
        seen: list[str] = []
        tokens: list[str] = []
        while True:
            params = {"user": user, "page_size": "5", "page_token": tokens[-1] if tokens else ""}
            page = (await client.get("/v1/sessions", params=params)).json()
            seen += [session["session_id"] for session in page["sessions"]]
            if not page["next_page_token"]:
                break
            tokens.append(page["next_page_token"])
        assert len(seen) == len(set(seen)) == 23
        assert set(seen) == made
        assert len(set(tokens)) == 4
        raw = base64.urlsafe_b64decode(tokens[0] + "=" * (-len(tokens[0]) % 4))
        flipped = [
            bytes(byte ^ 0x40 if place == at else byte for place, byte in enumerate(raw)) for at in range(8)
        ]
        forged = [
            raw[:8] + b"9" * 60 + raw[raw.index(b":", 8) :],
            raw[:8],
            raw[:-1],
            raw + b"x",
            b"",
            b"\0" * 99,
        ]
        texts = [base64.urlsafe_b64encode(item).rstrip(b"=").decode() for item in flipped + forged if item]
        for token in [*texts, "%", "\u00e9", "=" * 40, "a" * 400]:
            params = {"user": user, "page_size": "5", "page_token": token}
            answer = await client.get("/v1/sessions", params=params)
            assert_refused(answer, 400, "PAGE_TOKEN_INVALID")
        for query in ({"user": "other"}, {}):
            answer = await client.get("/v1/sessions", params=query | {"page_token": tokens[0]})
            assert_refused(answer, 400, "PAGE_TOKEN_INVALID")
