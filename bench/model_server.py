"""A zero-delay, OpenAI-compatible model server, for tests and benches only.

    python -m bench.model_server --port 0 --ready-file model.json

It is a double: `bench.model_script` says what it answers. It exists to cost next to nothing (httptools
on a bare asyncio protocol, one pre-rendered frame a token), so that what a bench measures is the mesh,
and to misbehave on command. It serves POST /v1/chat/completions (streamed or not), GET /v1/models,
GET /health, GET /stats (counters that tests read: open streams, aborted streams, requests), and GET /starts
(when streams with an `id` began, so that a bench knows the schedule of each token).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, cast

import httptools
import orjson
import uvloop

from bench.model_script import DEFAULT_MODEL, BadRequest, Reply, reply_to, script_text

MAX_BODY = 128 * 1024 * 1024
_REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 413: "Content Too Large"}
_HIGH_RATE_BURST = 4096
_MOST_STARTS = 100_000


@dataclass(slots=True)
class Stats:
    """Counters of one server; `GET /stats` sends them."""

    requests: int = 0
    open: int = 0
    finished: int = 0
    aborted: int = 0
    tokens: int = 0
    connections: int = 0
    accepted: int = 0

    def as_dict(self) -> dict[str, int]:
        """Return the counters by name."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(slots=True)
class State:
    """What the connections of one server share.

    Attributes:
        api_key: when set, a request without it gets 401.
        stats: counters.
        requests: the last decoded request bodies, for tests that look at what was asked.
        seen: how often each script text was asked, for `times=N`.
        starts: when the first stream of each `id` began, in seconds of the monotonic clock.
        changed: set and renewed whenever a counter changes; tests wait on it.
    """

    api_key: str = ""
    stats: Stats = field(default_factory=Stats)
    requests: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=256))
    seen: Counter[str] = field(default_factory=Counter)
    starts: dict[str, float] = field(default_factory=dict)
    connections: set[Connection] = field(default_factory=set)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def notify(self) -> None:
        """Wake whoever waits for a counter."""
        self.changed.set()
        self.changed = asyncio.Event()


class Frames:
    """Renders the SSE frames of one reply, with everything constant rendered once."""

    def __init__(self, number: int, model: str) -> None:
        self._head = (
            f'{{"id":"chatcmpl-{number}","object":"chat.completion.chunk","created":0,'
            f'"model":{json.dumps(model)},'
        ).encode()
        self._text = b"data: " + self._head + b'"choices":[{"index":0,"delta":{"content":'
        self._reason = b"data: " + self._head + b'"choices":[{"index":0,"delta":{"reasoning_content":'

    def text(self, token: str) -> bytes:
        """Frame one text token."""
        return _chunk(self._text + orjson.dumps(token) + b'},"finish_reason":null}]}\n\n')

    def reasoning(self, token: str) -> bytes:
        """Frame one reasoning token."""
        return _chunk(self._reason + orjson.dumps(token) + b'},"finish_reason":null}]}\n\n')

    def delta(self, delta: dict[str, Any], finish: str | None = None) -> bytes:
        """Frame any other delta."""
        choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
        return self._object(b'"choices":' + orjson.dumps(choices))

    def usage(self, usage: dict[str, Any]) -> bytes:
        """Frame the usage chunk, which has no choices."""
        return self._object(b'"choices":[],"usage":' + orjson.dumps(usage))

    def _object(self, fields: bytes) -> bytes:
        return _chunk(b"data: " + self._head + fields + b"}\n\n")


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Connection(asyncio.Protocol):
    """One client connection: HTTP/1.1 with keep-alive, one request at a time."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._url = b""
        self._authorization = b""
        self._body: list[bytes] = []
        self._size = 0
        self._frames: deque[bytes] = deque()
        self._streaming = False
        self._paused = False
        self._timer: asyncio.Handle | None = None
        self._rate = 0.0
        self._next_at = 0.0
        self._cut = False
        self._close_after = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember the transport."""
        self._transport = cast(asyncio.Transport, transport)
        self._state.connections.add(self)
        self._state.stats.connections += 1
        self._state.stats.accepted += 1
        self._state.notify()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the reply that was under way; the client's leaving is counted."""
        if self._timer is not None:
            self._timer.cancel()
        if self._streaming:
            self._streaming = False
            self._state.stats.open -= 1
            self._state.stats.aborted += 1
        self._state.connections.discard(self)
        self._state.stats.connections -= 1
        self._transport = None
        self._state.notify()

    def data_received(self, data: bytes) -> None:
        """Feed the parser; a request that is not HTTP closes the connection."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.close()

    def pause_writing(self) -> None:
        """The client reads slower than we write."""
        self._paused = True

    def resume_writing(self) -> None:
        """The client caught up."""
        self._paused = False
        if self._streaming and self._timer is None:
            self._pump()

    # httptools' callbacks

    def on_message_begin(self) -> None:
        """Forget the previous request."""
        self._url, self._authorization, self._body, self._size = b"", b"", [], 0

    def on_url(self, url: bytes) -> None:
        """Collect the path."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep the one header that matters."""
        if name.lower() == b"authorization":
            self._authorization = value

    def on_body(self, body: bytes) -> None:
        """Collect the body, within a bound."""
        self._size += len(body)
        if self._size <= MAX_BODY:
            self._body.append(body)

    def on_message_complete(self) -> None:
        """Answer."""
        if self._streaming:  # pipelining is not supported: HTTP clients do not use it
            self.close()
            return
        self._close_after = not self._parser.should_keep_alive()
        self._state.stats.requests += 1
        method = self._parser.get_method()
        path = self._url.split(b"?", 1)[0]
        if self._size > MAX_BODY:
            self._error(413, "the request is too large")
        elif path == b"/health":
            self._json(200, {"status": "ok"})
        elif path == b"/stats":
            self._json(200, self._state.stats.as_dict())
        elif path == b"/starts":
            self._json(200, self._state.starts)
        elif self._state.api_key and self._authorization != b"Bearer " + self._state.api_key.encode():
            self._error(401, "wrong or missing API key")
        elif path == b"/v1/models" and method == b"GET":
            model = {"id": DEFAULT_MODEL, "object": "model", "created": 0, "owned_by": "hermesh-bench"}
            self._json(200, {"object": "list", "data": [model]})
        elif path == b"/v1/chat/completions" and method == b"POST":
            self._chat(b"".join(self._body))
        else:
            self._error(404, "no such page")
        self._state.notify()

    # replies

    def _chat(self, body: bytes) -> None:
        try:
            request = orjson.loads(body)
            if not isinstance(request, dict):
                raise BadRequest("the body must be a JSON object")
            script = script_text(request)
            reply = reply_to(request, self._state.seen[script])
        except (orjson.JSONDecodeError, BadRequest) as error:
            self._error(400, str(error))
            return
        self._state.seen[script] += 1
        if len(self._state.seen) > 10_000:  # only tests use times=N; a bench must not grow
            self._state.seen.clear()
        self._state.requests.append(request)
        if reply.delay:
            self._begin()
            self._timer = self._loop.call_later(reply.delay, self._answer, request, reply)
        else:
            self._begin()
            self._answer(request, reply)

    def _begin(self) -> None:
        self._streaming = True
        self._state.stats.open += 1

    def _end(self) -> None:
        self._streaming = False
        self._state.stats.open -= 1
        self._state.stats.finished += 1
        self._state.notify()

    def _answer(self, request: dict[str, Any], reply: Reply) -> None:
        self._timer = None
        if reply.fault == "silent":
            return
        if reply.status != 200:
            self._end()
            self._error(reply.status, f"scripted status {reply.status}", reply.retry_after)
        elif request.get("stream"):
            self._stream(request, reply)
        elif reply.fault == "garbage":
            self._end()
            self._write(_head(200, b"application/json", b"Content-Length: 9\r\n") + b"{not JSON")
        elif reply.fault == "half":
            self._end()
            self._write(_head(200, b"application/json", b"Content-Length: 900\r\n") + b'{"id":"chat')
            self.close()
        else:
            self._end()
            self._state.stats.tokens += len(reply.tokens)
            self._json(200, _completion(request, reply, self._state.stats.requests))

    def _stream(self, request: dict[str, Any], reply: Reply) -> None:
        self._write(_head(200, b"text/event-stream", b"Transfer-Encoding: chunked\r\n"))
        model = str(request.get("model", DEFAULT_MODEL))
        self._frames = deque(_render(Frames(self._state.stats.requests, model), request, reply))
        self._cut = reply.fault in ("half", "garbage")
        self._rate = reply.rate
        self._next_at = self._loop.time()
        if reply.ident:
            if len(self._state.starts) >= _MOST_STARTS:
                self._state.starts.clear()
            self._state.starts.setdefault(reply.ident, self._next_at)
        self._state.stats.tokens += len(reply.tokens)
        self._pump()

    def _pump(self) -> None:
        """Write the next frame (at its time, when paced) and come back for the one after it."""
        self._timer = None
        if self._transport is None or self._paused:
            return
        frames = self._frames
        if not self._rate:
            if frames:
                self._transport.write(frames.popleft())
        else:
            now = self._loop.time()
            for _ in range(min(len(frames), _HIGH_RATE_BURST)):
                if self._next_at > now:
                    break
                self._transport.write(frames.popleft())
                self._next_at += 1.0 / self._rate
        if not frames:
            self._end()
            if self._cut:
                self._transport.close()  # not abort(): what was said arrives, only the end is missing
            else:
                self._transport.write(b"0\r\n\r\n")
                if self._close_after:
                    self.close()
        elif self._rate:
            # uvloop rounds to milliseconds: called half of one early it would spin until the frame is due.
            self._timer = self._loop.call_at(self._next_at + 0.0005, self._pump)
        else:
            self._timer = self._loop.call_soon(self._pump)

    def _json(self, status: int, body: object, extra: bytes = b"") -> None:
        data = orjson.dumps(body)
        length = b"Content-Length: %d\r\n" % len(data)
        self._write(_head(status, b"application/json", length + extra) + data)
        if self._close_after:
            self.close()

    def _error(self, status: int, message: str, retry_after: float | None = None) -> None:
        extra = b"" if retry_after is None else f"Retry-After: {retry_after:g}\r\n".encode()
        self._json(status, {"error": {"message": message, "type": "scripted", "code": status}}, extra)

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def close(self) -> None:
        """Close the connection once what was written is out."""
        if self._transport is not None:
            self._transport.close()


def _head(status: int, content_type: bytes, extra: bytes) -> bytes:
    reason = _REASONS.get(status, "Error").encode()
    return b"HTTP/1.1 %d %b\r\nContent-Type: %b\r\n%b\r\n" % (status, reason, content_type, extra)


def _render(frames: Frames, request: dict[str, Any], reply: Reply) -> list[bytes]:
    """Return every frame of a streamed reply, in order."""
    out = [frames.delta({"role": "assistant", "content": ""})]
    out += [frames.reasoning(token) for token in reply.reasoning]
    text = [frames.text(token) for token in reply.tokens]
    if reply.fault in ("half", "garbage"):
        out += text[: max(1, len(text) // 2)] if reply.fault == "half" else text[:1]
        if reply.fault == "garbage":
            out.append(_chunk(b"data: {this is not JSON\n\n"))
        return out
    out += text
    for index, call in enumerate(reply.tool_calls):
        function = {"name": call.name, "arguments": ""}
        opening = {"index": index, "id": call.id, "type": "function", "function": function}
        out.append(frames.delta({"tool_calls": [opening]}))
        for start in range(0, len(call.arguments), 8):
            piece = {"index": index, "function": {"arguments": call.arguments[start : start + 8]}}
            out.append(frames.delta({"tool_calls": [piece]}))
    out.append(frames.delta({}, reply.finish))
    options = request.get("stream_options")
    if isinstance(options, dict) and options.get("include_usage"):
        out.append(frames.usage(_usage(reply)))
    out.append(_chunk(b"data: [DONE]\n\n"))
    return out


def _usage(reply: Reply) -> dict[str, Any]:
    said = len(reply.tokens) + len(reply.reasoning)
    if reply.counted:
        claimed = orjson.Fragment(reply.counted)
        return {"prompt_tokens": claimed, "completion_tokens": claimed, "total_tokens": claimed}
    return {
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": said,
        "total_tokens": reply.prompt_tokens + said,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def _completion(request: dict[str, Any], reply: Reply, number: int) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": "".join(reply.tokens)}
    if reply.tool_calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in reply.tool_calls
        ]
    return {
        "id": f"chatcmpl-{number}",
        "object": "chat.completion",
        "created": 0,
        "model": request.get("model", DEFAULT_MODEL),
        "choices": [{"index": 0, "message": message, "finish_reason": reply.finish}],
        "usage": _usage(reply),
    }


class ModelServer:
    """The server as an async context manager, so that tests can run it in their own loop.

    Args:
        host: address to listen on.
        port: port, 0 = any free one.
        api_key: when set, requests must carry it.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0, api_key: str = "") -> None:
        self._host, self._port = host, port
        self._server: asyncio.Server | None = None
        self.state = State(api_key=api_key)

    @property
    def base_url(self) -> str:
        """The URL that clients take, with its /v1."""
        return f"http://{self._host}:{self.port}/v1"

    @property
    def port(self) -> int:
        """The port it listens on."""
        if self._server is None:
            return self._port
        return int(self._server.sockets[0].getsockname()[1])

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: Connection(self.state), self._host, self._port, backlog=1024
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._server is not None
        self._server.close()
        for connection in list(self.state.connections):
            connection.close()
        await self._server.wait_closed()

    async def wait_for(self, counter: str, value: int, timeout: float = 5.0) -> None:
        """Wait until a counter of `/stats` has exactly this value.

        Raises:
            TimeoutError: it did not within `timeout` seconds.
        """
        async with asyncio.timeout(timeout):
            while getattr(self.state.stats, counter) != value:
                await self.state.changed.wait()


async def _main(arguments: argparse.Namespace) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with ModelServer(arguments.host, arguments.port, arguments.api_key) as server:
        address = f"{arguments.host}:{server.port}"
        if arguments.ready_file is not None:
            ready = {
                "service": "model",
                "replica": "model-scripted",
                "pid": os.getpid(),
                "address": address,
                "base_url": server.base_url,
            }
            partial = arguments.ready_file.with_suffix(".tmp")
            partial.write_bytes(orjson.dumps(ready))
            partial.rename(arguments.ready_file)
        print(f"scripted model (a test double) on {server.base_url}", flush=True)
        await stop.wait()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(description="OpenAI-compatible scripted model, for tests and benches")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 = any free port")
    parser.add_argument("--ready-file", type=Path, default=None, help="JSON written once it listens")
    parser.add_argument("--api-key", default="", help="when given, requests must carry it")
    arguments = parser.parse_args(argv)
    with contextlib.suppress(KeyboardInterrupt):
        try:
            uvloop.run(_main(arguments))
        except OSError as error:
            print(f"cannot listen on {arguments.host}:{arguments.port}: {error.strerror}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
