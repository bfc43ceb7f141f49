import asyncio
import ssl
from contextlib import aclosing
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from bench.model_server import ModelServer
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
from services.agent.model.port import (
    ChatMessage,
    Finished,
    ModelRequest,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    ToolOffer,
    Usage,
)

FAST = Timeouts(connect=1, first_byte=0.2, idle=0.2)


@pytest.fixture
async def server():
    async with ModelServer() as running:
        yield running


@pytest.fixture
async def model(server):
    client = OpenAIModel(server.base_url, timeouts=FAST)
    yield client
    await client.aclose()


def request(text, *more, **options):
    return ModelRequest("scripted", [ChatMessage("user", text), *more], **options)


async def collect(model, asked):
    return [event async for batch in model.stream(asked) for event in batch]


def text_of(events):
    return "".join(event.text for event in events if isinstance(event, TextDelta))


async def test_a_reply_comes_in_batches_that_end_with_finished(model):
    events = await collect(model, request("[[tokens=100]]"))
    assert text_of(events) == "".join(f"t{i} " for i in range(100))
    assert isinstance(events[-1], Finished)
    assert events[-1].reason == "stop"
    assert next(e for e in events if isinstance(e, Usage)).output_tokens == 100


async def test_what_is_in_the_socket_comes_as_one_event(model):
    events = await collect(model, request("[[tokens=2000]]"))
    assert len([e for e in events if isinstance(e, TextDelta)]) < 2000


async def test_reasoning_is_kept_apart(model):
    events = await collect(model, request("[[reason=2 tokens=2]]"))
    thoughts = "".join(e.text for e in events if isinstance(e, ReasoningDelta))
    assert (thoughts, text_of(events)) == ("t0 t1 ", "t0 t1 ")


async def test_tool_calls_arrive_in_pieces(model):
    tools = [ToolOffer("calculator", "", {"type": "object"})]
    events = await collect(model, request('[[tool=calculator {"expression":"2+2"}]]', tools=tools))
    calls = [e for e in events if isinstance(e, ToolCallDelta)]
    assert calls[0].name == "calculator"
    assert "".join(c.arguments for c in calls) == '{"expression":"2+2"}'
    assert events[-1].reason == "tool_calls"


async def test_a_last_assistant_message_is_continued(model):
    events = await collect(model, request("[[tokens=3]]", ChatMessage("assistant", "t0 t")))
    assert text_of(events) == "1 t2 "


async def test_connections_are_used_again(server, model):
    for _ in range(5):
        await collect(model, request("[[tokens=3]]"))
    assert server.state.stats.requests == 5
    assert server.state.stats.connections == 1


async def test_a_stale_connection_is_replaced(server, model):
    await collect(model, request("[[tokens=3]]"))
    for connection in list(server.state.connections):
        connection.close()
    assert text_of(await collect(model, request("[[tokens=1]]"))) == "t0 "


async def test_closing_the_stream_closes_the_backends_connection(server, model):
    async with aclosing(model.stream(request("[[tokens=1000 rate=20]]"))) as batches:
        await anext(batches)
        assert server.state.stats.open == 1
    await server.wait_for("aborted", 1)


async def test_cancelling_the_reader_closes_the_backends_connection(server, model):
    task = asyncio.ensure_future(collect(model, request("[[tokens=1000 rate=20]]")))
    await server.wait_for("open", 1)
    task.cancel()
    await asyncio.wait([task])
    await server.wait_for("aborted", 1)


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("status=401", ModelAuthError),
        ("status=403", ModelAuthError),
        ("status=400", ModelRejectedError),
        ("status=429 retry_after=60", ModelRateLimitedError),
        ("status=500", ModelUnavailableError),
        ("garbage", ModelProtocolError),
        ("half", ModelTruncatedError),
        ("silent", ModelTimeoutError),
    ],
)
async def test_each_failure_has_its_error(model, script, error):
    with pytest.raises(error):
        await collect(model, request(f"[[{script}]]"))


async def test_a_rate_limit_says_when_to_come_back(model):
    with pytest.raises(ModelRateLimitedError) as caught:
        await collect(model, request("[[status=429 retry_after=60]]"))
    assert caught.value.retry_after == 60


async def test_a_stream_that_stalls_times_out(model):
    with pytest.raises(ModelTimeoutError):
        await collect(model, request("[[tokens=5 rate=1]]"))


async def test_no_server_is_unavailable():
    model = OpenAIModel("http://127.0.0.1:9/v1", timeouts=FAST)
    with pytest.raises(ModelUnavailableError):
        await collect(model, request("hi"))


async def test_more_requests_than_connections_wait_their_turn(server):
    model = OpenAIModel(server.base_url, connections=2)
    replies = await asyncio.gather(*(collect(model, request("[[tokens=20]]")) for _ in range(8)))
    assert {text_of(reply) for reply in replies} == {"".join(f"t{i} " for i in range(20))}
    await model.aclose()


async def test_models_are_listed(model):
    assert [one.name for one in await model.list_models()] == ["scripted"]


async def test_a_wrong_key_is_an_auth_error():
    async with ModelServer(api_key="right") as server:
        wrong = OpenAIModel(server.base_url, api_key="wrong")
        with pytest.raises(ModelAuthError):
            await collect(wrong, request("hi"))
        right = OpenAIModel(server.base_url, api_key="right")
        assert text_of(await collect(right, request("[[tokens=1]]"))) == "t0 "
        await right.aclose()


async def _raw(reply: bytes):
    """Serve these bytes to any request, then close."""

    async def answer(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(reply)
        await writer.drain()
        writer.close()

    return await asyncio.start_server(answer, "127.0.0.1", 0)


SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (b"SMTP ready\r\n", ModelProtocolError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n<html>hi</html>", ModelProtocolError),
        (SSE + b'data: {"error":{"message":"overloaded","code":503}}\n\n', ModelUnavailableError),
        (SSE + b'error: {"message":"bad grammar","code":400}\n\n', ModelRejectedError),
        (SSE + b"data: []\n\n", ModelProtocolError),
        (SSE + b'data: {"choices":[{"delta":{"content":5}}]}\n\n', ModelProtocolError),
        (SSE + b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n', ModelTruncatedError),
        (SSE + b"data: [DONE]\n\n", ModelUnavailableError),
        (b"", ModelUnavailableError),
    ],
)
async def test_what_is_not_the_protocol_is_told_apart(reply, error):
    server = await _raw(reply)
    async with server:
        port = server.sockets[0].getsockname()[1]
        model = OpenAIModel(f"http://127.0.0.1:{port}/v1")
        with pytest.raises(error):
            await collect(model, request("hi"))


async def test_a_stream_that_ends_by_closing_after_its_finish_is_whole():
    server = await _raw(
        SSE + b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":"length"}]}\r\n\r\n'
    )
    async with server:
        port = server.sockets[0].getsockname()[1]
        model = OpenAIModel(f"http://127.0.0.1:{port}/v1")
        events = await collect(model, request("hi"))
        assert events == [TextDelta("a"), Finished("length")]


async def test_a_connection_that_stays_open_after_the_replys_end_costs_no_finished_reply():
    closed = asyncio.Event()

    async def answer(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(SSE + b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":"stop"}]}\n\n')
        await reader.read()
        writer.close()
        await writer.wait_closed()
        closed.set()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        model = OpenAIModel(f"http://127.0.0.1:{port}/v1", timeouts=FAST)
        assert await collect(model, request("hi")) == [TextDelta("a"), Finished("stop")]
        await model.aclose()
        async with asyncio.timeout(10):
            await closed.wait()


def self_signed(folder):
    """Make a certificate for localhost, and its key, as files."""
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, private.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(private, hashes.SHA256())
    )
    certificate, key = folder / "cert.pem", folder / "key.pem"
    certificate.write_bytes(made.public_bytes(Encoding.PEM))
    key.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return certificate, key


async def test_tls_is_checked_against_the_trusted_certificates(tmp_path, monkeypatch):
    certificate, key = self_signed(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    async def answer(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        writer.write(SSE + b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":"stop"}]}\n\n')
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(answer, "localhost", 0, ssl=context)
    async with server:
        url = f"https://localhost:{server.sockets[0].getsockname()[1]}/v1"
        with pytest.raises(ModelUnavailableError, match="TLS"):
            await collect(OpenAIModel(url), request("hi"))
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert text_of(await collect(OpenAIModel(url), request("hi"))) == "a"


@pytest.mark.parametrize("url", ["ftp://x/v1", "localhost:8000", "http://", ""])
def test_a_base_url_must_be_http_with_a_host(url):
    with pytest.raises(ValueError, match="not an http"):
        Origin.parse(url)


async def test_a_pause_that_is_too_long_is_noticed_also_after_a_longer_wait_and_on_a_used_connection(server):
    # The wait for the first byte may be longer than those after it, and one timer watches over all of them.
    model = OpenAIModel(server.base_url, timeouts=Timeouts(connect=1, first_byte=30, idle=0.2))
    try:
        for _ in range(2):
            await collect(model, request("[[tokens=5]]"))
            async with asyncio.timeout(15):
                with pytest.raises(ModelTimeoutError):
                    await collect(model, request("[[tokens=3 rate=1]]"))
    finally:
        await model.aclose()
