"""Requests at the rim of HTTP: each gets the status that HTTP has for it, in our form.

The mesh behind is the FAKE of tests/fakes/mesh.py.
"""

from __future__ import annotations

import asyncio
import gzip
import json
from typing import Any

import httpx
import openai
import pytest

from tests.fakes.mesh import API_KEY

KEY = f"Authorization: Bearer {API_KEY}\r\n"
SECONDS = 10


async def raw(served: Any, request: str) -> tuple[int, dict[str, str], bytes]:
    """Sends bytes on a connection of their own; returns status, headers and body, read to the end of it."""
    host, _, port = served.host.partition(":")
    async with asyncio.timeout(SECONDS):
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(request.encode("latin-1"))
            answer = await reader.read()
        finally:
            writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(status.split()[1]), headers, body


def assert_problem(answer: tuple[int, dict[str, str], bytes], status: int, reason: str) -> None:
    found, headers, body = answer
    assert found == status
    assert headers["content-type"] == "application/problem+json"
    problem = json.loads(body)
    assert (problem["status"], problem["reason"]) == (status, reason)
    assert problem["request_id"] == headers["x-request-id"]


@pytest.mark.parametrize(
    "request_text",
    [
        "nonsense\r\n\r\n",
        "GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: x\r\na\x00b: c\r\n\r\n",
        "POST /v1/sessions HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n",
        "FOO / HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
async def test_what_is_not_http_gets_a_problem_document(served: Any, request_text: str) -> None:
    assert_problem(await raw(served, request_text), 400, "INVALID_ARGUMENT")


@pytest.mark.parametrize("coding", ["gzip", "br", "deflate", "GZIP", "identity, gzip"])
async def test_a_compressed_body_is_refused_by_name(served: Any, coding: str) -> None:
    body = gzip.compress(b'{"title": "x"}')
    answer = await served.client.post("/v1/sessions", content=body, headers={"content-encoding": coding})
    assert answer.status_code == 415
    assert answer.json()["reason"] == "INVALID_ARGUMENT"
    assert coding.lower() in answer.json()["detail"]
    assert answer.headers["accept-encoding"] == "identity"
    answer = await served.client.post(
        "/v1/chat/completions", content=body, headers={"content-encoding": coding}
    )
    assert (answer.status_code, answer.json()["error"]["type"]) == (415, "invalid_request_error")


async def test_identity_is_no_compression(served: Any) -> None:
    answer = await served.client.post("/v1/sessions", json={}, headers={"content-encoding": "identity"})
    assert answer.status_code == 201


async def test_options_tells_what_a_path_takes_without_a_key(served: Any) -> None:
    async with httpx.AsyncClient(base_url=served.url) as nobody:
        for path, allowed in (
            ("/v1/sessions", "GET, HEAD, OPTIONS, POST"),
            ("/v1/chat/completions", "OPTIONS, POST"),
            ("/health", "GET, HEAD, OPTIONS"),
        ):
            answer = await nobody.options(path)
            assert (answer.status_code, answer.headers["allow"], answer.content) == (204, allowed, b"")
            # Another site's page may not read anything here.
            assert not any(name.startswith("access-control") for name in answer.headers)
        assert (await nobody.options("/v1/nothing")).status_code == 404


async def test_head_is_get_without_the_body(served: Any) -> None:
    session = served.mesh.add_session()
    for path in ("/v1/sessions", f"/v1/sessions/{session.session_id}", "/v1/models", "/openapi.json", "/"):
        got, told = await served.client.get(path), await served.client.head(path)
        assert (told.status_code, told.content) == (200, b"")
        for name in ("content-type", "content-length"):
            assert told.headers[name] == got.headers[name]
    missing = await served.client.head(f"/v1/sessions/{'0' * 8}-0000-7000-8000-{'0' * 12}")
    assert (missing.status_code, missing.content) == (404, b"")
    async with httpx.AsyncClient(base_url=served.url) as nobody:
        assert (await nobody.head("/v1/sessions")).status_code == 401


async def test_head_of_a_stream_ends_at_its_headers(served: Any) -> None:
    session = served.mesh.add_session()
    async with asyncio.timeout(SECONDS):
        told = await served.client.head(f"/v1/sessions/{session.session_id}/events")
    assert (told.status_code, told.headers["content-type"]) == (200, "text/event-stream")
    # The connection goes on: nothing was left in it.
    assert (await served.client.get("/health")).status_code == 200


@pytest.mark.parametrize("method", ["PUT", "TRACE", "PROPFIND", "LOCK"])
async def test_a_method_that_a_path_does_not_take_is_405(served: Any, method: str) -> None:
    answer = await served.client.request(method, "/v1/sessions")
    assert (answer.status_code, answer.json()["reason"]) == (405, "UNIMPLEMENTED")
    assert answer.headers["allow"] == "GET, HEAD, OPTIONS, POST"
    answer = await served.client.request(method, "/v1/models")
    assert (answer.status_code, answer.json()["error"]["type"]) == (405, "invalid_request_error")


async def test_a_model_whose_name_has_a_slash_is_retrieved(served: Any) -> None:
    served.mesh.models = ["meta-llama/Llama-3.1-8B", "scripted"]
    client = openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key=API_KEY, max_retries=0)
    async with client:
        assert (await client.models.retrieve("meta-llama/Llama-3.1-8B")).id == "meta-llama/Llama-3.1-8B"
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("meta-llama/other")
    for path in ("/v1/models/meta-llama%2FLlama-3.1-8B", "/v1/models/meta-llama/Llama-3.1-8B"):
        assert (await served.client.get(path)).json()["id"] == "meta-llama/Llama-3.1-8B"


@pytest.mark.parametrize("slash", ["%2f", "%2F", "%5c", "%5C"])
async def test_an_escaped_slash_never_leads_to_another_path(served: Any, slash: str) -> None:
    session = served.mesh.add_session()
    for path in (f"/v1/sessions/{session.session_id}{slash}runs", f"/v1{slash}sessions"):
        answer = await raw(served, f"GET {path} HTTP/1.1\r\nHost: x\r\n{KEY}Connection: close\r\n\r\n")
        assert answer[0] in (400, 404)
    answer = await raw(
        served, f"GET /v1/models/..{slash}sessions HTTP/1.1\r\nHost: x\r\n{KEY}Connection: close\r\n\r\n"
    )
    assert (answer[0], json.loads(answer[2])["error"]["code"]) == (404, "model_not_found")


async def test_a_header_with_an_underscore_is_named(served: Any) -> None:
    answer = await served.client.get("/v1/sessions", headers={"x_hermesh_tenant": "1"})
    assert answer.status_code == 400
    assert answer.json()["violations"][0]["field"] == "x_hermesh_tenant"
    answer = await served.client.get("/v1/models", headers={"x_hermesh_tenant": "1"})
    assert answer.json()["error"]["param"] == "x_hermesh_tenant"


async def test_a_websockets_path_asks_for_an_upgrade(served: Any) -> None:
    path = f"/v1/sessions/{served.mesh.add_session().session_id}/ws"
    answer = await served.client.get(path)
    assert (answer.status_code, answer.json()["reason"]) == (426, "UNIMPLEMENTED")
    assert (answer.headers["upgrade"], answer.headers["sec-websocket-version"]) == ("websocket", "13")


@pytest.mark.parametrize(
    ("path", "more", "status"),
    [
        ("/v1/sessions/x/ws", "", 426),
        ("/v1/sessions/x/ws", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n", 426),
        ("/v1/sessions/x/ws", "Sec-WebSocket-Version: 13\r\n", 426),
        ("/v1/ws", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n", 404),
    ],
)
async def test_a_handshake_that_is_none_gets_a_problem_document(
    served: Any, path: str, more: str, status: int
) -> None:
    request = (
        f"GET {path} HTTP/1.1\r\nHost: x\r\n{KEY}Connection: Upgrade\r\nUpgrade: websocket\r\n{more}\r\n"
    )
    assert_problem(await raw(served, request), status, "UNIMPLEMENTED")


async def test_an_upgrade_that_is_not_taken_ends_the_connection_and_not_the_answer(served: Any) -> None:
    """After such a request the parser reads no other: a client that kept the connection would hang."""
    request = "GET /health HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
    status, headers, _ = await raw(served, request)
    assert (status, headers["connection"]) == (200, "close")


async def test_a_sign_in_has_a_small_body(served: Any) -> None:
    headers = {"origin": served.url, "content-type": "application/json"}
    body = json.dumps({"api_key": "x" * 5000})
    answer = await served.client.post("/auth/login", content=body, headers=headers)
    assert (answer.status_code, answer.json()["reason"]) == (413, "INPUT_TOO_LARGE")
