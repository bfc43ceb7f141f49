"""What is sent to break a gateway, with a key and without. The mesh behind is a FAKE, tests/fakes/mesh.py."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import structlog
from websockets.asyncio.client import connect

from gateway.routes.login import MAX_LOGIN_BODY
from meshkit.outside_json import MAX_DEPTH
from tests.fakes.mesh import API_KEY

# From one level too deep for us, over too deep for Python, to too deep for any parser.
LEVELS = [MAX_DEPTH + 1, 900, 1_020, 100_000]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []

    def keep(_logger: Any, _level: str, event: dict[str, Any]) -> Any:
        lines.append(event)
        raise structlog.DropEvent

    monkeypatch.setattr("gateway.edge._log", structlog.wrap_logger(None, processors=[keep]))
    return lines


def deep(levels: int, kind: str, around: str = "%s") -> bytes:
    value = "[" * levels + "]" * levels if kind == "[" else '{"a":' * levels + "0" + "}" * levels
    return (around % value).encode()


@pytest.mark.parametrize("kind", ["[", "{"])
@pytest.mark.parametrize("levels", LEVELS)
async def test_a_deeply_nested_body_without_a_key_is_a_bad_request_of_one_line(
    served: Any, log: list[dict[str, Any]], levels: int, kind: str
) -> None:
    async with httpx.AsyncClient(base_url=served.url, timeout=10) as stranger:
        for around in ("%s", '{"api_key": %s}', '{"api_key": "x", "more": %s}'):
            content = deep(levels, kind, around)
            answer = await stranger.post("/auth/login", content=content, headers={"origin": served.url})
            too_large = len(content) > MAX_LOGIN_BODY
            assert answer.status_code == (413 if too_large else 400), answer.text
            assert answer.json()["reason"] == ("INPUT_TOO_LARGE" if too_large else "INVALID_ARGUMENT")
            assert len(answer.content) < 1_000
    assert [line["event"] for line in log] == ["request"] * 3
    assert all(len(str(line)) < 500 for line in log)


@pytest.mark.parametrize("kind", ["[", "{"])
@pytest.mark.parametrize("levels", LEVELS)
async def test_a_deeply_nested_body_with_a_key_is_a_bad_request(
    served: Any, log: list[dict[str, Any]], levels: int, kind: str
) -> None:
    session_id = served.mesh.add_session().session_id
    places = {
        "/v1/sessions": ("%s", '{"metadata": %s}', '{"title": %s}'),
        f"/v1/sessions/{session_id}/runs": ("%s", '{"input": %s}', '{"input": "x", "options": %s}'),
        "/v1/chat/completions": (
            "%s",
            '{"messages": %s}',
            '{"messages": [{"role": "user", "content": %s}]}',
            '{"messages": [{"role": "user", "content": "x"}], "tools": %s}',
        ),
    }
    for path, bodies in places.items():
        for around in bodies:
            answer = await served.client.post(path, content=deep(levels, kind, around))
            assert answer.status_code == 400, (path, around, answer.text)
            assert len(answer.content) < 2_000
    assert {line["event"] for line in log} == {"request"}


async def test_the_deepest_body_that_may_enter_is_judged_by_its_model(served: Any) -> None:
    for kind in "[{":
        answer = await served.client.post(
            "/v1/sessions", content=deep(MAX_DEPTH - 1, kind, '{"metadata": %s}')
        )
        assert answer.status_code == 400
        assert answer.json()["violations"]


async def test_a_deeply_nested_message_leaves_the_socket_open(served: Any) -> None:
    session = served.mesh.add_session()
    address = f"ws://{served.host}/v1/sessions/{session.session_id}/ws"
    async with (
        asyncio.timeout(10),
        connect(address, additional_headers={"Authorization": f"Bearer {API_KEY}"}) as socket,
    ):
        for levels in LEVELS:
            await socket.send(deep(levels, "[", '{"type": "input", "input": %s}').decode())
            assert json.loads(await socket.recv())["data"]["reason"] == "INVALID_ARGUMENT"
        await socket.send('{"type": "ping"}')
        assert json.loads(await socket.recv())["type"] == "pong"


async def test_wrong_keys_of_one_address_are_told_to_wait_and_right_ones_go_on(
    served: Any, log: list[dict[str, Any]]
) -> None:
    async def ask(key: str, forwarded: str) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}", "x-forwarded-for": forwarded}
        return await served.client.get("/v1/sessions", headers=headers)

    assert (await ask(API_KEY, "203.0.113.7")).status_code == 200
    # Whatever the caller wrote before it: Envoy's word is the last.
    answers = [await ask(f"hm_wrong_{number}", f"10.0.0.{number}, 203.0.113.7") for number in range(80)]
    codes = [answer.status_code for answer in answers]
    # The bucket fills again while this goes on, by five a second.
    assert set(codes[:50]) == {401}
    assert codes.count(429) > 10
    told = next(answer for answer in answers if answer.status_code == 429)
    assert told.json()["reason"] == "TOO_MANY_WRONG_KEYS"
    assert int(told.headers["retry-after"]) >= 1
    assert (await ask(API_KEY, "203.0.113.7")).status_code == 200
    assert (await ask("hm_wrong", "203.0.113.8")).status_code == 401
    chat = await served.client.post(
        "/v1/chat/completions",
        json={},
        headers={"authorization": "Bearer hm_more", "x-forwarded-for": "203.0.113.7"},
    )
    assert chat.json()["error"]["type"] in ("rate_limit_error", "authentication_error")
    # A flood is not a line a request.
    assert len(log) < 60
    assert log[1]["client"] == "203.0.113.7"


async def test_signing_in_with_wrong_keys_is_held_up_the_same_way(served: Any) -> None:
    async with httpx.AsyncClient(base_url=served.url, timeout=10) as stranger:
        codes = [
            (
                await stranger.post(
                    "/auth/login", json={"api_key": f"hm_wrong_{number}"}, headers={"origin": served.url}
                )
            ).status_code
            for number in range(80)
        ]
    assert set(codes[:50]) == {401}
    assert codes.count(429) > 10


async def test_clients_behind_a_trusted_proxy_are_told_apart(
    start: Callable[..., Any], log: list[dict[str, Any]]
) -> None:
    served = await start(trusted_proxies="10.0.0.0/8")

    async def ask(key: str, *lines: str) -> int:
        headers = [("authorization", f"Bearer {key}"), *(("x-forwarded-for", line) for line in lines)]
        found: httpx.Response = await served.client.get("/v1/sessions", headers=headers)
        return found.status_code

    # As Envoy adds to the proxy's line, and as a proxy that adds a line of its own.
    for number in range(300):
        if await ask(f"hm_{number}", "203.0.113.7, 10.0.0.5") == 429:
            break
    else:
        raise AssertionError("nobody was told to wait")
    assert await ask("hm_wrong", "203.0.113.8, 10.0.0.5") == 401
    assert await ask("hm_wrong_again", "203.0.113.9", "10.0.0.5") == 401
    assert await ask(API_KEY, "203.0.113.7, 203.0.113.10", "10.0.0.5") == 200
    assert (log[0]["client"], log[-1]["client"]) == ("203.0.113.7", "203.0.113.10")
