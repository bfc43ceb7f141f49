"""Several model backends as one, each a server on a port of its own."""

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from bench.mesh import free_ports
from bench.model_server import ModelServer
from services.agent.model.backends import COOL_FIRST, SILENT_SECONDS, Backends, Retry
from services.agent.model.errors import (
    ModelAuthError,
    ModelProtocolError,
    ModelRateLimitedError,
    ModelRejectedError,
    ModelTimeoutError,
    ModelTruncatedError,
    ModelUnavailableError,
)
from services.agent.model.http import Origin, Timeouts
from services.agent.model.openai import OpenAIModel
from services.agent.model.port import ChatMessage, ModelRequest, TextDelta

FAST = Timeouts(connect=1, first_byte=0.3, idle=0.3)
RETRY = Retry(attempts=3, base=0.001)
SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
TOKEN = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'
BUSY = b"HTTP/1.1 429 Busy\r\nRetry-After: 20\r\nContent-Length: 0\r\n\r\n"
BROKEN = b"HTTP/1.1 503 Broken\r\nContent-Length: 0\r\n\r\n"


class Clock:
    """A clock that a test moves."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Canned:
    """A backend that gives the same bytes to everything, or nothing at all, and counts who asks."""

    def __init__(self, reply):
        self.reply = reply
        self.asked = 0

    async def __aenter__(self):
        async def answer(reader, writer):
            try:
                await reader.readuntil(b"\r\n\r\n")
                self.asked += 1
                if self.reply is None:
                    await reader.read()
                else:
                    for piece in self.reply if isinstance(self.reply, tuple) else (self.reply,):
                        writer.write(piece)
                        await writer.drain()
                        await asyncio.sleep(0.05)  # the next piece comes by itself
            finally:
                writer.close()

        self._server = await asyncio.start_server(answer, "127.0.0.1", 0)
        self.base_url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"
        return self

    async def __aexit__(self, *_):
        self._server.close()
        await self._server.wait_closed()


@asynccontextmanager
async def pool(*urls, clock=None, retry=RETRY):
    async with AsyncExitStack() as stack:
        backends = []
        for url in urls:
            model = OpenAIModel(url, timeouts=FAST)
            stack.push_async_callback(model.aclose)
            backends.append((Origin.parse(url).place, model))
        yield Backends(backends, retry=retry, monotonic=clock or Clock())


def request(text="[[tokens=2]]"):
    return ModelRequest("scripted", [ChatMessage("user", text)])


async def text_of(model, asked=None):
    batches = [batch async for batch in model.stream(asked or request())]
    return "".join(event.text for batch in batches for event in batch if isinstance(event, TextDelta))


def nowhere():
    return f"http://127.0.0.1:{free_ports(1)[0]}/v1"


async def states(model):
    return {name: await check() for name, check in model.checks()}


async def test_failures_before_the_first_token_are_tried_again():
    async with ModelServer() as server, pool(server.base_url) as model:
        assert await text_of(model, request("[[status=503 times=2 tokens=1]]")) == "t0 "
        assert server.state.stats.requests == 3


async def test_a_refused_key_is_not_tried_again_at_the_same_backend():
    async with ModelServer(api_key="other") as server, pool(server.base_url) as model:
        with pytest.raises(ModelAuthError):
            await text_of(model)
        assert server.state.stats.requests == 1


async def test_a_stream_that_broke_after_text_is_not_sent_again():
    async with ModelServer() as server, pool(server.base_url) as model:
        got = []

        async def read():
            async for batch in model.stream(request("[[half tokens=4]]")):
                got.extend(batch)

        with pytest.raises(ModelTruncatedError):
            await read()
        assert "".join(event.text for event in got) == "t0 t1 "
        assert server.state.stats.requests == 1


@pytest.mark.parametrize("reply", [None, b"", BUSY, BROKEN, b"SMTP ready\r\n", SSE + b"data: {nonsense\n\n"])
async def test_another_backend_serves_what_one_cannot_begin(reply):
    async with Canned(reply) as first, ModelServer() as second:
        async with pool(first.base_url, second.base_url) as model:
            assert await text_of(model) == "t0 t1 "
            assert first.asked == 1
            # The one that failed is asked last from now on.
            assert await text_of(model) == "t0 t1 "
            assert first.asked == 1
            assert second.state.stats.requests == 2


async def test_another_backend_serves_where_one_is_gone_or_refuses_the_key():
    async with ModelServer(api_key="other") as refuses, ModelServer() as serves:
        async with pool(nowhere(), refuses.base_url, serves.base_url) as model:
            assert await text_of(model) == "t0 t1 "


async def test_a_request_that_is_at_fault_goes_nowhere_else():
    async with ModelServer() as first, ModelServer() as second:
        async with pool(first.base_url, second.base_url) as model:
            with pytest.raises(ModelRejectedError):
                await text_of(model, request("[[status=400]]"))
            assert (first.state.stats.requests, second.state.stats.requests) == (1, 0)
            assert set((await states(model)).values()) == {None}


async def test_without_any_backend_the_error_is_one_that_passes():
    async with ModelServer(api_key="other") as refuses:
        async with pool(nowhere(), refuses.base_url) as model:
            with pytest.raises(ModelUnavailableError) as caught:
                await text_of(model)
            assert caught.value.retryable
            assert (await states(model))["model"] == "no model backend works"
    async with Canned(BUSY) as busy, ModelServer(api_key="other") as refuses:
        async with pool(busy.base_url, refuses.base_url) as model:
            with pytest.raises(ModelRateLimitedError) as limited:
                await text_of(model)
            assert limited.value.retry_after == 20


async def test_a_hang_costs_the_first_byte_timeout_once():
    async with Canned(None) as hangs, pool(hangs.base_url) as model:
        with pytest.raises(ModelTimeoutError):
            await text_of(model)
        assert hangs.asked == 1


async def test_garbage_in_mid_stream_passes_only_where_another_backend_is_well():
    async with Canned((SSE + TOKEN, b"data: {nonsense\n\n")) as broken, ModelServer() as well:
        async with pool(broken.base_url, well.base_url) as model:
            with pytest.raises(ModelProtocolError) as caught:
                await text_of(model)
            assert caught.value.retryable
            # The next request of the run, a reset or a prefill, is the other one's.
            assert await text_of(model) == "t0 t1 "
        async with pool(broken.base_url) as alone:
            with pytest.raises(ModelProtocolError) as caught:
                await text_of(alone)
            assert not caught.value.retryable


async def test_a_backend_that_failed_is_named_until_it_answers():
    clock = Clock()
    port = free_ports(1)[0]
    first = f"http://127.0.0.1:{port}/v1"
    async with ModelServer() as second, pool(first, second.base_url, clock=clock) as model:
        assert await text_of(model) == "t0 t1 "
        found = await states(model)
        assert found.pop(f"model/127.0.0.1:{port}") == "the model backend fails: MODEL_UNAVAILABLE"
        assert set(found.values()) == {None}
        # Asked again once it has cooled down, and still gone.
        clock.now += COOL_FIRST
        assert (await states(model))[f"model/127.0.0.1:{port}"] is not None
        async with ModelServer(port=port) as back:
            # It cools down longer after the second failure, and is then found to be back.
            assert (await states(model))[f"model/127.0.0.1:{port}"] is not None
            clock.now += COOL_FIRST * 2
            assert set((await states(model)).values()) == {None}
            assert await text_of(model) == "t0 t1 "
            assert back.state.stats.requests == 2


async def test_a_backend_that_nobody_uses_is_looked_at_now_and_then():
    clock = Clock()
    port = free_ports(1)[0]
    async with pool(f"http://127.0.0.1:{port}/v1", clock=clock) as model:
        async with ModelServer(port=port) as server:
            assert await text_of(model) == "t0 t1 "
            assert await states(model) == {"model": None}
            assert server.state.stats.requests == 1
        assert await states(model) == {"model": None}
        clock.now += SILENT_SECONDS + 1
        assert await states(model) == {"model": "the model backend fails: MODEL_UNAVAILABLE"}
        async with ModelServer(port=port):
            clock.now += COOL_FIRST
            assert await states(model) == {"model": None}


def test_backends_are_told_apart_by_host_port_and_path():
    assert Origin.parse("http://127.0.0.1:8000/v1").place == "127.0.0.1:8000"
    assert Origin.parse("https://secret@models.example/gpu2/v1").place == "models.example:443/gpu2"
