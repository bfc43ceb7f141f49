"""The real Envoy as the edge: its own answers, what it tries again, and how long it waits for whom."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any
from unittest import mock

import grpc
import grpc.aio
import httpx
import pytest

from launcher import envoy, replies
from meshkit.errors import from_rpc_error
from tests.hostile import HostileCalls, unfinished
from tests.integration.launcher.envoy_kit import SECONDS, Replica, Running, serving_envoy

GET_RUN = "/hermesh.session.v1.SessionService/GetRun"
WATCH_RUN = "/hermesh.session.v1.SessionService/WatchRun"
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


@pytest.fixture(scope="module")
def hasty() -> Iterator[Running]:
    """An Envoy that waits a second for a request, and takes 40 connections."""
    with (
        mock.patch.object(replies, "HEADERS_SECONDS", 1),
        mock.patch.object(replies, "REQUEST_SECONDS", 1),
        mock.patch.object(replies, "GRPC_REQUEST_SECONDS", 1),
        serving_envoy(max_connections=40) as found,
    ):
        yield found


@pytest.fixture(scope="module")
def impatient() -> Iterator[Running]:
    """An Envoy that waits two seconds for a silent gateway."""
    with mock.patch.object(replies, "SILENT_SECONDS", 2), serving_envoy() as found:
        yield found


class Upstream:
    """A gateway that does with each request what the test says; it is always healthy."""

    def __init__(self, act: Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]) -> None:
        self._act = act
        self.requests: list[bytes] = []

    async def __aenter__(self) -> Upstream:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if head.startswith(b"GET /health "):
                    writer.write(OK)
                    continue
                self.requests.append(head)
                await self._act(head, writer)
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


async def answer(head: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(OK)


async def die(head: bytes, writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


async def stream_until(end: asyncio.Event, head: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
    while not end.is_set():
        writer.write(b"6\r\ndata: \r\n")
        await writer.drain()
        await asyncio.sleep(0.05)
    writer.transport.abort()


@asynccontextmanager
async def gateways(running: Running, *acts: Any) -> AsyncIterator[list[Upstream]]:
    """Has Envoy know gateways that act so."""
    async with AsyncExitStack() as stack:
        found = [await stack.enter_async_context(Upstream(act)) for act in acts]
        envoy.write_endpoints(running.eds, "gateway", [upstream.address for upstream in found])
        await running.until("gateway", {f"gateway/{upstream.address}": True for upstream in found})
        yield found
        envoy.write_endpoints(running.eds, "gateway", ())
        await running.until("gateway", {})


async def raw(running: Running, request: str) -> tuple[int, dict[str, str], bytes]:
    """Sends bytes; returns status, headers and body, read to the connection's end."""
    async with asyncio.timeout(SECONDS):
        reader, writer = await connect(running.http)
        try:
            writer.write(request.encode("latin-1"))
            got = await reader.read()
        finally:
            writer.close()
    head, _, body = got.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    return int(status.split()[1]), dict(line.lower().split(": ", 1) for line in lines), body


async def connect(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = url.removeprefix("http://").rpartition(":")
    return await asyncio.open_connection(host, int(port))


def assert_problem(found: httpx.Response, status: int, reason: str) -> dict[str, Any]:
    assert found.status_code == status, found.text
    assert found.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = found.json()
    assert set(problem) == {"type", "title", "status", "detail", "reason", "request_id"}
    assert (problem["status"], problem["reason"]) == (status, reason)
    assert problem["request_id"] == found.headers["x-request-id"]
    return problem


async def test_without_a_gateway_every_answer_has_our_form(running: Running) -> None:
    envoy.write_endpoints(running.eds, "gateway", ())
    await running.until("gateway", {})
    async with httpx.AsyncClient(base_url=running.http) as client:
        for path in ("/health", "/v1/sessions", "/v1/modelsx", "/"):
            found = await client.get(path)
            problem = assert_problem(found, 503, "SERVICE_UNAVAILABLE")
            assert "nothing was done" in problem["detail"]
            assert (found.headers["retry-after"], found.headers["retry-after-ms"]) == ("1", "500")
        found = await client.get("/v1/runs/x", headers={"x-request-id": 'mine"\\'})
        assert assert_problem(found, 503, "SERVICE_UNAVAILABLE")["request_id"] == 'mine"\\'
        for method, path in (
            ("POST", "/v1/chat/completions"),
            ("GET", "/v1/models"),
            ("GET", "/v1/models/a%2Fb?x"),
        ):
            found = await client.request(method, path)
            assert (found.status_code, found.headers["content-type"]) == (503, "application/json")
            assert found.json() == {
                "error": {
                    "message": problem["detail"],
                    "type": "server_error",
                    "param": None,
                    "code": "service_unavailable",
                }
            }
            assert found.headers["retry-after-ms"] == "500"
            assert found.headers["x-request-id"]
        assert (await client.head("/v1/sessions")).content == b""


@pytest.mark.parametrize(
    ("request_text", "status", "reason"),
    [
        ("nonsense\r\n\r\n", 400, "INVALID_ARGUMENT"),
        ("GET / HTTP/1.1\r\n\r\n", 400, "INVALID_ARGUMENT"),
        ("GET /v1/sessions/%00 HTTP/1.1\r\nHost: x\r\n\r\n", 400, "INVALID_ARGUMENT"),
        ("GET / HTTP/1.1\r\nHost: x\r\na : b\r\n\r\n", 400, "INVALID_ARGUMENT"),
        (
            "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n",
            400,
            "INVALID_ARGUMENT",
        ),
        ("POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n", 501, "UNIMPLEMENTED"),
        (f"GET / HTTP/1.1\r\nHost: x\r\na: {'x' * 70_000}\r\n\r\n", 431, "INVALID_ARGUMENT"),
        ("GET / HTTP/1.1\r\nHost: x\r\n" + "a: b\r\n" * 101 + "\r\n", 431, "INVALID_ARGUMENT"),
        ("FOO / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 405, "UNIMPLEMENTED"),
        ("CONNECT x:1 HTTP/1.1\r\nHost: x:1\r\n\r\n", 405, "UNIMPLEMENTED"),
        (
            "GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: other\r\n\r\n",
            400,
            "INVALID_ARGUMENT",
        ),
    ],
)
async def test_what_envoy_refuses_gets_a_problem_document(
    running: Running, request_text: str, status: int, reason: str
) -> None:
    found, headers, body = await raw(running, request_text)
    assert found == status
    assert headers["content-type"] == "application/problem+json"
    problem = json.loads(body)
    assert (problem["status"], problem["reason"]) == (status, reason)
    assert isinstance(problem["request_id"], str)
    assert ("allow" in headers) == (status == 405)


async def test_http_1_0_is_answered(running: Running) -> None:
    """nginx speaks it to its upstreams unless told otherwise, and so do checks of health."""
    async with gateways(running, answer) as [upstream]:
        found, headers, body = await raw(running, "GET /v1/sessions HTTP/1.0\r\n\r\n")
        assert (found, headers["connection"], body) == (200, "close", b"ok")
        assert b"HTTP/1.1\r\n" in upstream.requests[0]


async def test_an_escaped_slash_reaches_the_gateway_as_it_is(running: Running) -> None:
    async with gateways(running, answer) as [upstream], httpx.AsyncClient(base_url=running.http) as client:
        assert (await client.get("/v1/models/a%2Fb")).status_code == 200
        assert upstream.requests[0].startswith(b"GET /v1/models/a%2Fb HTTP/1.1\r\n")


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_reading_is_tried_again_when_a_gateway_dies_before_it_answers(
    running: Running, method: str
) -> None:
    async with (
        gateways(running, die, answer) as [dying, well],
        httpx.AsyncClient(base_url=running.http) as client,
    ):
        while not dying.requests:
            assert (await client.request(method, "/v1/sessions")).status_code == 200
        assert len(well.requests) >= len(dying.requests)


async def test_a_message_is_sent_once_and_its_sender_told_that_it_may_have_arrived(running: Running) -> None:
    # Nobody from outside tells Envoy how often to try.
    hints = {"x-envoy-retry-on": "reset,5xx", "x-envoy-max-retries": "3", "x-envoy-internal": "true"}
    async with (
        gateways(running, die, die) as both,
        httpx.AsyncClient(base_url=running.http, headers=hints) as client,
    ):
        problem = assert_problem(await client.post("/v1/sessions/x/runs"), 503, "SERVICE_UNAVAILABLE")
        assert "may have been done" in problem["detail"]
        assert sum(len(upstream.requests) for upstream in both) == 1
        found = await client.post("/v1/chat/completions")
        assert (found.status_code, found.json()["error"]["type"]) == (503, "server_error")
        assert found.headers["x-should-retry"] == "false"
        assert sum(len(upstream.requests) for upstream in both) == 2


async def test_a_message_with_a_key_is_sent_again(running: Running) -> None:
    async with (
        gateways(running, die, answer) as [dying, well],
        httpx.AsyncClient(base_url=running.http, headers={"idempotency-key": "k"}) as client,
    ):
        while not dying.requests:
            assert (await client.post("/v1/sessions/x/runs")).status_code == 200
        assert len(well.requests) >= len(dying.requests)


async def test_of_a_message_with_a_key_nobody_says_that_nothing_was_done(running: Running) -> None:
    """Its first gateway may have done it, although the next one could not even be reached."""

    async def leave(head: bytes, writer: asyncio.StreamWriter) -> None:
        only._server.close()
        writer.transport.abort()

    async with (
        gateways(running, leave) as [only],
        httpx.AsyncClient(base_url=running.http, headers={"idempotency-key": "k"}) as client,
    ):
        problem = assert_problem(await client.post("/v1/sessions/x/runs"), 503, "SERVICE_UNAVAILABLE")
        assert only.requests
        assert "may have been done" in problem["detail"]


async def test_of_a_message_whose_gateway_is_silent_nobody_says_that_nothing_was_done(
    impatient: Running,
) -> None:
    end = asyncio.Event()

    async def act(head: bytes, writer: asyncio.StreamWriter) -> None:
        await end.wait()

    async with (
        gateways(impatient, act) as [silent],
        httpx.AsyncClient(base_url=impatient.http, timeout=SECONDS) as client,
    ):
        found = await client.post("/v1/sessions/x/runs")
        problem = assert_problem(found, 503, "SERVICE_UNAVAILABLE")
        assert "may have been done" in problem["detail"]
        assert found.headers["x-should-retry"] == "false"
        assert len(silent.requests) == 1
        end.set()


@pytest.mark.parametrize("headers", [{}, {"idempotency-key": "k"}])
async def test_a_reply_that_is_not_streamed_takes_as_long_as_its_run(
    impatient: Running, headers: dict[str, str]
) -> None:
    end = asyncio.Event()

    async def act(head: bytes, writer: asyncio.StreamWriter) -> None:
        await end.wait()
        writer.write(OK)

    async with (
        gateways(impatient, act),
        httpx.AsyncClient(base_url=impatient.http, timeout=SECONDS) as client,
    ):
        reply = asyncio.create_task(client.post("/v1/chat/completions?x=1", headers=headers))
        # As long as it takes Envoy to give up on another one.
        for _ in range(2):
            assert (await client.post("/v1/sessions/x/runs")).status_code == 503
        end.set()
        assert (await reply).status_code == 200


async def test_a_client_learns_of_its_gateways_death_at_once(running: Running) -> None:
    """Of HTTP/1.1, which has only the connection's end to tell it by; a busy machine has a few tries."""
    quickest = SECONDS
    for _ in range(5):
        end = asyncio.Event()

        async def act(head: bytes, writer: asyncio.StreamWriter, end: asyncio.Event = end) -> None:
            await stream_until(end, head, writer)

        async with (
            gateways(running, act),
            httpx.AsyncClient(base_url=running.http, timeout=SECONDS) as client,
            client.stream("GET", "/v1/runs/x/events") as response,
        ):
            parts = response.aiter_raw()
            await anext(parts)
            end.set()
            last = time.monotonic()
            try:
                async for _ in parts:
                    last = time.monotonic()
            except httpx.RemoteProtocolError:
                quickest = min(quickest, time.monotonic() - last)
        if quickest < 0.8:
            break
    # Envoy's own default is a second.
    assert quickest < 0.8


async def test_a_slow_reader_of_a_connection_that_closes_gets_all_of_its_answer(running: Running) -> None:
    """A pause between two reads is shorter than the wait before Envoy closes, all of them are longer."""
    body = b"x" * 4_000_000

    async def act(head: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)

    async with gateways(running, act), asyncio.timeout(60):
        host, _, port = running.http.removeprefix("http://").rpartition(":")
        loop = asyncio.get_running_loop()
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
            sock.setblocking(False)
            await loop.sock_connect(sock, (host, int(port)))
            await loop.sock_sendall(sock, b"GET /x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            got = b""
            while part := await loop.sock_recv(sock, 16_384):
                got += part
                await asyncio.sleep(0.01)
    assert got.endswith(b"\r\n\r\n" + body)


async def test_the_time_for_a_request_does_not_cut_its_answer(hasty: Running) -> None:
    """A stream goes on for longer than a request may take, and so does a WebSocket."""
    end = asyncio.Event()

    async def act(head: bytes, writer: asyncio.StreamWriter) -> None:
        if b"upgrade: websocket" in head.lower():
            writer.write(
                b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n"
            )
            await end.wait()
            writer.write(b"the end")
        elif head.startswith(b"GET"):
            await stream_until(end, head, writer)

    async with gateways(hasty, act), httpx.AsyncClient(base_url=hasty.http, timeout=SECONDS) as client:
        reader, writer = await connect(hasty.http)
        writer.write(
            b"GET /v1/sessions/x/ws HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
        )
        assert b"101 Switching" in await reader.readuntil(b"\r\n\r\n")
        async with client.stream("GET", "/v1/runs/x/events") as response:
            parts = response.aiter_raw()
            await anext(parts)
            # As long as it takes Envoy to give up on a body.
            found, headers, body = await raw(
                hasty, "POST /v1/sessions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{"
            )
            assert (found, json.loads(body)["reason"]) == (408, "DEADLINE_EXCEEDED")
            assert headers["content-type"] == "application/problem+json"
            for _ in range(3):
                assert await anext(parts)
            end.set()
        async with asyncio.timeout(SECONDS):
            assert await reader.readexactly(7) == b"the end"
        writer.close()


async def refused(call: Awaitable[Any]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call
    return failed.value


async def test_envoys_own_grpc_errors_have_a_reason(running: Running) -> None:
    envoy.write_endpoints(running.eds, "session", ())
    await running.until("session", {})
    async with grpc.aio.insecure_channel(running.grpc) as channel:
        nobody = await refused(channel.unary_unary(GET_RUN)(b"", timeout=SECONDS))
        assert nobody.code() is grpc.StatusCode.UNAVAILABLE
        assert "nothing was done" in (nobody.details() or "")
        error = from_rpc_error(nobody)
        assert (error.reason, error.retry_after_ms) == ("SERVICE_UNAVAILABLE", 500)
        assert "x-request-id" in dict(nobody.trailing_metadata() or ())
        inside = await refused(
            channel.unary_unary("/hermesh.session.v1.SessionInternalService/ClaimRun")(b"", timeout=SECONDS)
        )
        assert inside.code() is grpc.StatusCode.UNIMPLEMENTED
        assert from_rpc_error(inside).reason == "UNIMPLEMENTED"


async def test_a_message_over_the_limit_is_refused_by_name_and_reaches_nobody(
    running: Running, replicas: list[Replica]
) -> None:
    await running.endpoints("session", replicas[:1])
    async with grpc.aio.insecure_channel(running.grpc) as channel:
        whole = b"x" * (replies.MAX_GRPC_REQUEST - 5)
        assert await channel.unary_unary(GET_RUN)(whole, timeout=SECONDS)
        for size in (len(whole) + 1, 16 * 1024 * 1024):
            over = await refused(channel.unary_unary(GET_RUN)(b"x" * size, timeout=SECONDS))
            error = from_rpc_error(over)
            assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INPUT_TOO_LARGE")
            assert error.metadata == {"limit_bytes": str(replies.MAX_GRPC_REQUEST)}
    assert replicas[0].begun == 1


async def test_a_call_that_never_sends_its_message_reaches_no_service_and_ends(
    hasty: Running, replicas: list[Replica]
) -> None:
    a = replicas[0]
    await hasty.endpoints("session", [a])
    async with (
        HostileCalls(hasty.grpc) as hostile,
        grpc.aio.insecure_channel(hasty.grpc) as channel,
        asyncio.timeout(SECONDS),
    ):
        streams = {hostile.begin(GET_RUN) for _ in range(500)}
        half = hostile.begin(GET_RUN)
        await hostile.send(half, unfinished(1_000_000))
        good = channel.unary_unary(GET_RUN)
        answers = [json.loads(await good(b"", timeout=SECONDS))["replica"] for _ in range(20)]
        assert answers == ["a"] * 20
        await hostile.until_answered(streams | {half})
        assert not hostile.ended
        assert a.begun == len(answers)

        async def silent() -> AsyncIterator[bytes]:
            await asyncio.Event().wait()
            yield b""

        late = await refused(channel.stream_unary(GET_RUN)(silent(), timeout=SECONDS))
        assert from_rpc_error(late).reason == "DEADLINE_EXCEEDED"
        # What is answered for longer than a request may take goes on.
        watch = channel.unary_stream(WATCH_RUN)(b"", timeout=SECONDS)
        assert await watch.read()
        await refused(channel.stream_unary(GET_RUN)(silent(), timeout=SECONDS))
        assert await watch.read()
        watch.cancel()


async def test_reflection_which_streams_its_requests_is_not_held_back(
    running: Running, replicas: list[Replica]
) -> None:
    await running.endpoints("session", replicas[:1])
    async with grpc.aio.insecure_channel(running.grpc) as channel:
        call = channel.stream_stream("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo")()
        await call.write(b"")
        async with asyncio.timeout(SECONDS):
            await replicas[0].reached.wait()
        call.cancel()


async def test_outsiders_connections_are_bounded_and_the_meshs_own_are_not(
    hasty: Running, replicas: list[Replica]
) -> None:
    await hasty.endpoints("session", replicas[:1])
    async with grpc.aio.insecure_channel(hasty.grpc) as channel, AsyncExitStack() as stack:
        good = channel.unary_unary(GET_RUN)
        assert await good(b"", timeout=SECONDS)
        async with asyncio.timeout(SECONDS):
            ended = 0
            held = []
            while not ended:
                reader, writer = await connect(hasty.http)
                stack.callback(writer.close)
                held.append(reader)
                try:
                    async with asyncio.timeout(0.05):
                        ended += await reader.read(1) == b""
                except TimeoutError:
                    continue
                except OSError:
                    ended += 1
        assert len(held) <= 41
        # Who is connected goes on, and the mesh connects anew.
        assert await good(b"", timeout=SECONDS)
        async with grpc.aio.insecure_channel(hasty.mesh) as inner:
            assert await inner.unary_unary(GET_RUN)(b"", timeout=SECONDS)


async def test_headers_that_do_not_end_are_not_waited_for(hasty: Running) -> None:
    async with asyncio.timeout(SECONDS):
        reader, writer = await connect(hasty.http)
        writer.write(b"GET / HTTP/1.1\r\nHost:")
        got = await reader.read()
        writer.close()
    assert b" 408 " in got.partition(b"\r\n")[0]
    assert b'"DEADLINE_EXCEEDED"' in got


@pytest.fixture(scope="module")
def small() -> Iterator[Running]:
    """An Envoy that has little memory."""
    with serving_envoy(max_heap_mib=128) as found:
        yield found


async def test_unfinished_messages_make_room_for_those_that_are_sent_whole(
    small: Running, replicas: list[Replica]
) -> None:
    """More than Envoy may hold: it resets the largest ones, and no good call is among them."""
    a = replicas[0]
    await small.endpoints("session", [a])
    async with AsyncExitStack() as stack, asyncio.timeout(60):
        floods = [await stack.enter_async_context(HostileCalls(small.grpc)) for _ in range(4)]
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(small.grpc))
        good = channel.unary_unary(GET_RUN)
        most = 0

        async def flood(hostile: HostileCalls) -> None:
            message = unfinished(replies.MAX_GRPC_REQUEST - 5)
            streams = [hostile.begin(GET_RUN) for _ in range(25)]
            await asyncio.gather(*(hostile.send(stream, message) for stream in streams))

        served = 0
        async with asyncio.TaskGroup() as group:
            flooding = [group.create_task(flood(hostile)) for hostile in floods]
            while not all(task.done() for task in flooding):
                # For the moment that it takes to make room some are refused.
                with suppress(grpc.aio.AioRpcError):
                    served += bool(await good(b"", timeout=SECONDS))
                most = max(most, resident_mib(small.pid))
        assert served
        assert sum(len(hostile.answered) for hostile in floods)
        # 200 MiB were sent, and Envoy began with some 70.
        assert most < 230
        # Room has been made, and stays.
        while True:
            with suppress(grpc.aio.AioRpcError):
                assert await good(b"", timeout=SECONDS)
                break
            await asyncio.sleep(0.1)
        assert a.begun == a.calls


def resident_mib(pid: int) -> int:
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) // 1024 for line in file if line.startswith("VmRSS"))
