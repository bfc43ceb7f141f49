"""A session over WebSocket. The mesh behind is the FAKE of tests/fakes/mesh.py."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any
from uuid import uuid4

import grpc
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from gateway.body import MAX_INPUT_BODY
from gateway.login import COOKIE
from tests.fakes.mesh import API_KEY, FakeRun

KEY = {"Authorization": f"Bearer {API_KEY}"}


def address(served: Any, session_id: str, query: str = "") -> str:
    return f"ws://{served.host}/v1/sessions/{session_id}/ws{query}"


async def receive(socket: ClientConnection) -> dict[str, Any]:
    async with asyncio.timeout(5):
        message: dict[str, Any] = json.loads(await socket.recv())
        return message


async def until(socket: ClientConnection, kind: str) -> list[dict[str, Any]]:
    got = [await receive(socket)]
    while got[-1]["type"] != kind:
        got.append(await receive(socket))
    return got


async def closed(socket: ClientConnection) -> int:
    async def read_out() -> None:
        while True:
            await receive(socket)

    with pytest.raises(ConnectionClosed) as ended:
        await read_out()
    assert ended.value.rcvd is not None
    return ended.value.rcvd.code


async def test_a_socket_counts_once_and_those_that_come_together_are_counted(
    start: Callable[..., Any],
) -> None:
    served = await start(max_streams=3)
    url = address(served, served.mesh.add_session().session_id)

    async def open_one() -> ClientConnection | None:
        socket = await connect(url, additional_headers=KEY)
        try:
            async with asyncio.timeout(0.3):
                refused = json.loads(await socket.recv())
        except TimeoutError:
            return socket
        assert (refused["type"], refused["data"]["reason"]) == ("error", "OVERLOADED")
        assert await closed(socket) == 4429
        return None

    sockets = [socket for socket in await asyncio.gather(*(open_one() for _ in range(8))) if socket]
    assert len(sockets) == 3
    for socket in sockets:
        await socket.close()
    while served.gateway.hub.open:  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def test_input_goes_in_and_events_come_out(served: Any) -> None:
    session = served.mesh.add_session()
    async with connect(address(served, session.session_id), additional_headers=KEY) as socket:
        await socket.send(json.dumps({"type": "input", "input": "a b", "request_id": "r1"}))
        got = await until(socket, "run.completed")
        accepted = [item for item in got if item["type"] == "accepted"]
        events = [item for item in got if "seq" in item]
        assert accepted[0]["data"]["run_id"] == events[0]["run_id"]
        assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
        assert set(events[0]) == {"run_id", "seq", "type", "time", "data"}
        await socket.send(json.dumps({"type": "input", "input": "a b", "request_id": "r1"}))
        assert (await until(socket, "accepted"))[-1]["data"]["run_id"] == events[0]["run_id"]
        await socket.send('{"type":"ping"}')
        assert await receive(socket) == {"type": "pong"}
    assert len(session.runs) == 1


async def test_a_cursor_goes_on_where_the_last_connection_ended(served: Any) -> None:
    session = served.mesh.add_session()
    async with connect(address(served, session.session_id), additional_headers=KEY) as socket:
        await socket.send(json.dumps({"type": "input", "input": "a b"}))
        first = [item for item in await until(socket, "step.started") if "seq" in item]
    last = first[-1]
    query = f"?after={last['run_id']}:{last['seq']}"
    async with connect(address(served, session.session_id, query), additional_headers=KEY) as socket:
        rest = await until(socket, "run.completed")
    assert [event["seq"] for event in first + rest] == list(range(1, len(first + rest) + 1))


async def test_a_broken_stream_behind_is_not_noticed(served: Any) -> None:
    served.mesh.watch_cuts = [(2, grpc.StatusCode.UNAVAILABLE), (1, grpc.StatusCode.UNAVAILABLE)]
    session = served.mesh.add_session()
    async with connect(address(served, session.session_id), additional_headers=KEY) as socket:
        await socket.send(json.dumps({"type": "input", "input": "a b c"}))
        events = [item for item in await until(socket, "run.completed") if "seq" in item]
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))


async def test_a_run_is_cancelled(served: Any) -> None:
    async def slow(run: FakeRun) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        yield "text.delta", {"text": "a"}
        await run.cancelled.wait()
        yield "run.cancelled", {"reason": "asked"}

    served.mesh.script = slow
    session = served.mesh.add_session()
    async with connect(address(served, session.session_id), additional_headers=KEY) as socket:
        await socket.send(json.dumps({"type": "input", "input": "a"}))
        run_id = (await until(socket, "text.delta"))[-1]["run_id"]
        await socket.send(json.dumps({"type": "cancel", "run_id": run_id}))
        assert "run.cancelled" in [item["type"] for item in await until(socket, "run.cancelled")]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("{", "INVALID_ARGUMENT"),
        ("[]", "INVALID_ARGUMENT"),
        ('{"type":"dance"}', "INVALID_ARGUMENT"),
        ('{"type":"input"}', "INVALID_ARGUMENT"),
        ('{"type":"input","input":"  "}', "INVALID_ARGUMENT"),
        ('{"type":"input","input":"x","model":"no-such"}', "MODEL_NOT_FOUND"),
        ('{"type":"cancel","run_id":"x"}', "RUN_NOT_FOUND"),
        ('{"type":"resolve","run_id":"x","call_id":"c","decision":"maybe"}', "INVALID_ARGUMENT"),
    ],
)
async def test_a_bad_message_gets_an_error_and_the_connection_stays(
    served: Any, message: str, reason: str
) -> None:
    session = served.mesh.add_session()
    async with connect(address(served, session.session_id), additional_headers=KEY) as socket:
        await socket.send(message)
        answer = await receive(socket)
        assert (answer["type"], answer["data"]["reason"]) == ("error", reason)
        await socket.send('{"type":"ping"}')
        assert (await receive(socket))["type"] == "pong"


async def test_a_message_that_is_no_text_or_too_large_ends_the_connection(served: Any) -> None:
    session = served.mesh.add_session()
    for message, code in ((b"{}", 1003), ("x" * (MAX_INPUT_BODY + 1), 1009)):
        async with connect(address(served, session.session_id), additional_headers=KEY) as socket:
            await socket.send(message)
            assert await closed(socket) == code


async def test_who_may_not_connect_is_told_why(served: Any) -> None:
    session = served.mesh.add_session()
    cases = [
        (session.session_id, {}, 4401),
        (session.session_id, {"Authorization": "Bearer hm_wrong"}, 4401),
        (str(uuid4()), KEY, 4404),
        ("nonsense", KEY, 4404),
    ]
    for session_id, headers, code in cases:
        async with connect(address(served, session_id), additional_headers=headers) as socket:
            assert (await receive(socket))["type"] == "error"
            assert await closed(socket) == code


async def test_a_cookie_connects_only_from_the_page(served: Any) -> None:
    session = served.mesh.add_session()
    cookie = {"Cookie": f"{COOKIE}={served.gateway.seal.seal(API_KEY)}"}
    url = address(served, session.session_id)
    async with connect(url, additional_headers=cookie, origin=served.url) as socket:
        await socket.send('{"type":"ping"}')
        assert (await receive(socket))["type"] == "pong"
    async with connect(url, additional_headers=cookie, origin="http://evil.example") as socket:
        assert (await receive(socket))["data"]["reason"] == "ORIGIN_REFUSED"
        assert await closed(socket) == 4403


async def test_a_drain_tells_to_come_back(served: Any) -> None:
    session = served.mesh.add_session()
    async with connect(address(served, session.session_id), additional_headers=KEY) as socket:
        await socket.send('{"type":"ping"}')
        await receive(socket)
        served.gateway.hub.drain()
        assert (await receive(socket)) == {"type": "reconnect", "data": {"reason": "drain", "after_ms": 100}}
        assert await closed(socket) == 1001


async def test_a_client_that_leaves_leaves_nothing_behind(served: Any) -> None:
    session = served.mesh.add_session()
    async with connect(address(served, session.session_id), additional_headers=KEY):
        await served.mesh.until(lambda: "WatchSession" in served.mesh.calls)
    assert await served.gateway.hub.owner.wait_idle(5)
