"""FAKE model servers: each speaks a provider's dialect of Chat Completions, and refuses what that one refuses.

None of these is a model, and none is the provider's own server: what they send and refuse is what public reports
say of the real ones (the sources are in services/agent/model/profiles.toml). They are real HTTP servers. What
they reply is set by the test: `server.script` is a list of `Reply`, one for each request that is not refused.
"""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import orjson

Refusal = tuple[int, object]
FAKE = {"Server": "hermesh-fake-model-server"}
KNOWN_MESSAGE_FIELDS = {"role", "content", "tool_calls", "tool_call_id", "name"}


@dataclass(frozen=True, slots=True)
class Reply:
    """What a server is to reply: `error` = fail in the stream after the text; `cut` = close before the end."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[tuple[str, str], ...] = ()
    error: bool = False
    cut: bool = False
    filtered: bool = False
    refusal: str = ""


def sse(data: object, event: str = "") -> bytes:
    """Frame one event."""
    head = f"event: {event}\n".encode() if event else b""
    return head + b"data: " + (data if isinstance(data, bytes) else orjson.dumps(data)) + b"\n\n"


def pieces(text: str, size: int = 3) -> list[str]:
    """Cut a text as tokens do."""
    return [text[at : at + size] for at in range(0, len(text), size)]


class Dialect:
    """OpenAI's own form; the others override what they do differently.

    `refuse` looks at a request and may answer with a status and a body; the rest makes a reply's bytes.
    """

    name = "openai"
    owned_by = "system"
    headers: Mapping[str, str] = {}
    thought = "reasoning_content"
    usage = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
    error: object = {
        "error": {"message": "Slow down", "type": "requests", "param": None, "code": "rate_limit_exceeded"}
    }

    def __init__(self) -> None:
        self._ids = itertools.count()
        self.given_ids: set[str] = set()
        self.given: list[Any] = []

    # requests

    def refuse(self, body: dict[str, Any], headers: Mapping[str, str], path: str) -> Refusal | None:
        """Refuse a request, as this provider does; None = it is taken."""
        if "max_tokens" in body:
            said = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
            return self._refused(said, param="max_tokens", code="unsupported_parameter")
        if body.get("temperature", 1) != 1:
            said = "Unsupported value: 'temperature' does not support 0.5 with this model. Only the default (1) value is supported."
            return self._refused(said, param="temperature", code="unsupported_value")
        return self.unknown_fields(body) or self.long_ids(body)

    def unknown_fields(self, body: dict[str, Any]) -> Refusal | None:
        for place, message in enumerate(body["messages"]):
            for name in sorted(set(message) - KNOWN_MESSAGE_FIELDS):
                return self._refused(
                    f"Unknown parameter: 'messages[{place}].{name}'.", param=f"messages[{place}].{name}"
                )
        return None

    def long_ids(self, body: dict[str, Any]) -> Refusal | None:
        for _, call in called(body):
            if len(call["id"]) > 40:
                return self._refused(
                    f"Invalid 'id': string too long. Expected at most 40, got {len(call['id'])}."
                )
        return None

    def _refused(self, message: str, status: int = 400, **more: Any) -> Refusal:
        return status, {
            "error": {
                "message": message,
                "type": "invalid_request_error",
                "param": None,
                "code": None,
                **more,
            }
        }

    # replies

    def call_id(self, name: str) -> str:
        return f"call_{next(self._ids):024d}"

    def chunk(self, delta: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return sse({"id": "x", "object": "chat.completion.chunk", "choices": [choice], **more})

    def frames(self, reply: Reply) -> Iterator[bytes]:
        """Yield a reply's bytes."""
        yield from self.opening()
        for piece in pieces(reply.reasoning):
            yield self.thinks(piece)
        for piece in pieces(reply.text):
            yield self.says(piece)
        for piece in pieces(reply.refusal):
            yield self.chunk({"refusal": piece})
        if reply.error:
            yield from self.fails()
            return
        if reply.cut:
            return
        made = [(self.call_id(name), name, arguments) for name, arguments in reply.calls]
        self.given_ids |= {identity for identity, _, _ in made}
        yield from self.calls(made)
        finish = "content_filter" if reply.filtered else self.calls_finish if reply.calls else "stop"
        yield from self.ending(finish)
        yield b"data: [DONE]\n\n"

    calls_finish = "tool_calls"

    def opening(self) -> Iterable[bytes]:
        yield self.chunk({"role": "assistant", "content": ""})

    def thinks(self, piece: str) -> bytes:
        return self.chunk({self.thought: piece})

    def says(self, piece: str) -> bytes:
        return self.chunk({"content": piece})

    def calls(self, made: list[tuple[str, str, str]]) -> Iterable[bytes]:
        for index, (identity, name, arguments) in enumerate(made):
            function = {"name": name, "arguments": ""}
            yield self.chunk(
                {"tool_calls": [{"index": index, "id": identity, "type": "function", "function": function}]}
            )
            for piece in pieces(arguments):
                yield self.chunk({"tool_calls": [{"index": index, "function": {"arguments": piece}}]})

    def fails(self) -> Iterable[bytes]:
        yield sse(self.error)

    def ending(self, finish: str) -> Iterable[bytes]:
        yield self.chunk({}, finish)
        yield sse({"id": "x", "object": "chat.completion.chunk", "choices": [], "usage": self.usage})


def called(body: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield a request's assistant messages with each of their calls."""
    for message in body["messages"]:
        for call in message.get("tool_calls") or ():
            yield message, call


def strict_roles(body: dict[str, Any]) -> str:
    """What a strict template (Mistral's, Gemma's) says of a conversation, "" for nothing."""
    roles = [one["role"] for one in body["messages"]]
    if "system" in roles[1:]:
        return "System message must be at the beginning."
    spoken = [role for role in roles if role in ("user", "assistant")]
    turns = [
        role
        for role, message in zip(roles, body["messages"], strict=True)
        if role == "user" or (role == "assistant" and not message.get("tool_calls"))
    ]
    if spoken[:1] != ["user"] or any(a == b for a, b in itertools.pairwise(turns)):
        return "After the optional system message, conversation roles must alternate user/assistant/user/assistant/..."
    return ""


def empty_assistant(body: dict[str, Any]) -> int | None:
    """The place of an assistant's message without content and calls, None if there is none."""
    for place, message in enumerate(body["messages"]):
        if (
            message["role"] == "assistant"
            and not message.get("tool_calls")
            and not (message["content"] or "").strip()
        ):
            return place
    return None


class OpenAI(Dialect):
    """As the base."""


class Azure(Dialect):
    name = "azure"
    error = {"error": {"code": "content_filter", "message": "The response was filtered", "status": 400}}

    def refuse(self, body, headers, path):
        if headers.get("api-key") != "secret" or "authorization" in headers:
            return 401, {"statusCode": 401, "message": "Unauthorized. Access token is missing."}
        if "api-version=" not in path:
            return 404, {"error": {"code": "404", "message": "Resource not found"}}
        return super().refuse(body, headers, path)

    def opening(self):
        yield sse({"id": "", "object": "", "choices": [], "prompt_filter_results": [{"prompt_index": 0}]})
        yield from super().opening()


class Mistral(Dialect):
    name = "mistral"
    owned_by = "mistralai"
    error = {
        "object": "error",
        "message": "Requests rate limit exceeded",
        "type": "rate_limited",
        "code": "1300",
        "status": 429,
    }

    def refuse(self, body, headers, path):
        extra = set(body) - {
            "model",
            "messages",
            "stream",
            "tools",
            "tool_choice",
            "max_tokens",
            "temperature",
            "top_p",
            "random_seed",
            "stop",
            "response_format",
        }
        places = [["body", name] for name in sorted(extra)]
        places += [
            ["body", "messages", place, message["role"], name]
            for place, message in enumerate(body["messages"])
            for name in sorted(set(message) - KNOWN_MESSAGE_FIELDS - {"prefix"})
        ]
        if places:
            detail = [
                {"type": "extra_forbidden", "loc": loc, "msg": "Extra inputs are not permitted", "input": 1}
                for loc in places
            ]
            return 422, {
                "object": "error",
                "message": {"detail": detail},
                "type": "invalid_request_error",
                "param": None,
                "code": None,
            }
        for _, call in called(body):
            if not re.fullmatch("[a-zA-Z0-9]{9}", call["id"]):
                return self.said(
                    f"Tool call id was {call['id']} but must be a-z, A-Z, 0-9, with a length of 9.",
                    "invalid_function_call",
                    "3280",
                )
        messages = body["messages"]
        if empty_assistant(body) is not None:
            return self.said("Assistant message must have either content or tool_calls, but not none.")
        for before, after in itertools.pairwise(messages):
            if (before["role"], after["role"]) == ("tool", "user"):
                return self.said(
                    "Unexpected role 'user' after role 'tool'", "invalid_request_message_order", "3230"
                )
        if messages[-1]["role"] == "assistant" and not messages[-1].get("prefix"):
            return self.said(
                "Expected last role User or Tool (or Assistant with prefix True) for serving but got assistant"
            )
        if said := strict_roles(body):
            return self.said(said)
        return None

    def said(self, message, kind="invalid_request_error", code=None):
        return 400, {"object": "error", "message": message, "type": kind, "param": None, "code": code}

    def call_id(self, name):
        return f"Ab{next(self._ids):07d}"

    def thinks(self, piece):
        return self.chunk({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": piece}]}]})

    def says(self, piece):
        return self.chunk({"content": [{"type": "text", "text": piece}]})

    def calls(self, made):
        calls = [
            {"id": identity, "index": index, "function": {"name": name, "arguments": arguments}}
            for index, (identity, name, arguments) in enumerate(made)
        ]
        if calls:
            yield self.chunk({"tool_calls": calls})

    def ending(self, finish):
        yield self.chunk({"content": ""}, finish, usage=self.usage)


class DeepSeek(Dialect):
    name = "deepseek"
    owned_by = "deepseek"
    error = {"error": {"message": "Server overloaded", "type": "service_unavailable_error", "code": "503"}}

    def refuse(self, body, headers, path):
        for message, _ in called(body):
            if "reasoning_content" not in message:
                return self._refused(
                    "The reasoning_content in the thinking mode must be passed back to the API.",
                    code="invalid_request_error",
                )
        last = body["messages"][-1]
        if last["role"] == "assistant" and not last.get("prefix"):
            return self._refused(
                "The last message of deepseek-chat must be a user message, or an assistant message with prefix mode on"
            )
        return None

    def opening(self):
        yield b": keep-alive\n\n" * 2
        yield from super().opening()


class Kimi(Dialect):
    name = "kimi"
    owned_by = "moonshot"
    error = {"error": {"message": "The engine is currently overloaded", "type": "engine_overloaded_error"}}

    def refuse(self, body, headers, path):
        for place, message in enumerate(body["messages"]):
            if message.get("tool_calls") and not message.get("reasoning_content"):
                return self._refused(
                    f"thinking is enabled but reasoning_content is missing in assistant tool call message at index {place}"
                )
        for _, call in called(body):
            if not re.fullmatch(r"functions\.\w+:\d+", call["id"]):
                return self._refused(f"tool_call_id {call['id']} is not of this model")
        if (place := empty_assistant(body)) is not None:
            return self._refused(
                f"Invalid request: the message at position {place} with role 'assistant' must not be empty"
            )
        if body.get("temperature", 1) != 1:
            return self._refused("invalid temperature: only 1 is allowed for this model")
        if body["messages"][-1]["role"] == "assistant" and not body["messages"][-1].get("partial"):
            return self._refused("the last message must not be of the assistant unless partial is true")
        return None

    def call_id(self, name):
        return f"functions.{name}:{next(self._ids)}"

    def ending(self, finish):
        choice = {"index": 0, "delta": {}, "finish_reason": finish, "usage": self.usage}
        yield sse({"id": "x", "object": "chat.completion.chunk", "choices": [choice]})


class Gemini(Dialect):
    name = "gemini"
    owned_by = "google"
    calls_finish = "stop"
    error = [
        {"error": {"code": 429, "message": "Resource has been exhausted", "status": "RESOURCE_EXHAUSTED"}}
    ]

    def refuse(self, body, headers, path):
        for message in body["messages"]:
            calls = message.get("tool_calls")
            if calls and "thought_signature" not in calls[0].get("extra_content", {}).get("google", {}):
                said = f"Function call is missing a thought_signature in functionCall parts. Additional data, function call `default_api:{calls[0]['function']['name']}` , position 2."
                return 400, [{"error": {"code": 400, "message": said, "status": "INVALID_ARGUMENT"}}]
        return None

    def calls(self, made):
        for place, (identity, name, arguments) in enumerate(made):
            call = {
                "index": 0,
                "id": identity,
                "type": "function",
                "function": {"name": name, "arguments": arguments},
            }
            if not place:
                call["extra_content"] = {"google": {"thought_signature": "c2lnbmVk"}}
            yield self.chunk({"role": "assistant", "tool_calls": [call]})


class Groq(Dialect):
    name = "groq"
    thought = "reasoning"
    error = {
        "error": {
            "message": "Failed to call a function.",
            "type": "invalid_request_error",
            "code": "tool_use_failed",
            "failed_generation": "<f>",
        }
    }

    def refuse(self, body, headers, path):
        for place, message in enumerate(body["messages"]):
            for name in ("reasoning_content", "reasoning", "reasoning_details"):
                if name in message:
                    return self._refused(
                        f"'messages.{place}' : for 'role:assistant' the following must be satisfied[('messages.{place}' : property '{name}' is unsupported)]"
                    )
        return None

    def fails(self):
        yield sse(self.error, "error")

    def ending(self, finish):
        yield self.chunk({}, finish, x_groq={"id": "req", "usage": self.usage})


class Vllm(Dialect):
    name = "vllm"
    owned_by = "vllm"
    error = {
        "object": "error",
        "message": "This model's maximum context length is 4096 tokens.",
        "type": "BadRequestError",
        "param": None,
        "code": 400,
    }

    def refuse(self, body, headers, path):
        said = strict_roles(body)
        for _, call in called(body):
            if self.given_ids and call["id"] not in self.given_ids:
                said = f"{call['id']} is no id of this model"
        if body["messages"][-1]["role"] == "assistant" and (
            body.get("continue_final_message"),
            body.get("add_generation_prompt"),
        ) != (True, False):
            said = "the last message would be closed"
        return (
            (400, {"error": {"message": said, "type": "BadRequestError", "param": None, "code": 400}})
            if said
            else None
        )

    def call_id(self, name):
        return f"functions.{name}:{next(self._ids)}"


class Sglang(Vllm):
    name = "sglang"
    owned_by = "sglang"
    error = {
        "error": {
            "object": "error",
            "message": "The input is longer than the model's context length",
            "type": "BadRequestError",
            "param": None,
            "code": 400,
        }
    }

    def call_id(self, name):
        return f"call_{next(self._ids):024x}"

    def calls(self, made):
        for identity, name, arguments in made:
            yield self.chunk(
                {
                    "tool_calls": [
                        {"id": identity, "type": "function", "function": {"name": name, "arguments": ""}}
                    ]
                }
            )
            for piece in pieces(arguments):
                yield self.chunk(
                    {"tool_calls": [{"id": None, "function": {"name": None, "arguments": piece}}]}
                )


class LlamaCpp(Dialect):
    name = "llama.cpp"
    owned_by = "llamacpp"
    headers = {"Server": "llama.cpp"}

    def refuse(self, body, headers, path):
        said = strict_roles(body)
        return (500, {"error": {"code": 500, "message": said, "type": "server_error"}}) if said else None

    def call_id(self, name):
        return f"{next(self._ids):032d}"

    def fails(self):
        yield b'error: {"code":400,"message":"the request exceeds the available context size","type":"exceed_context_size_error"}\n\n'


class Ollama(Dialect):
    name = "ollama"
    owned_by = "library"
    thought = "reasoning"

    def refuse(self, body, headers, path):
        said = strict_roles(body)
        return (
            (400, {"error": {"message": said, "type": "invalid_request_error", "param": None, "code": None}})
            if said
            else None
        )

    def call_id(self, name):
        return f"call_{next(self._ids):08d}"

    def calls(self, made):
        for identity, name, arguments in made:
            function = {"name": name, "arguments": arguments}
            yield self.chunk(
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"id": identity, "index": 0, "type": "function", "function": function}],
                }
            )

    def fails(self):
        yield b'{"error":"an error was encountered while running the model"}\n'


class LiteLlm(Dialect):
    name = "litellm"
    owned_by = "openai"
    headers = {"x-litellm-version": "1.84.0"}
    error = {
        "error": {
            "message": "litellm.RateLimitError: VertexAI. Received Model Group=x\nAvailable Model Group Fallbacks=None",
            "type": "None",
            "param": "None",
            "code": "429",
        }
    }

    def refuse(self, body, headers, path):
        for _, call in called(body):
            if call["id"] not in self.given_ids and not re.fullmatch("[a-zA-Z0-9]{9}", call["id"]):
                return 400, {
                    "error": {
                        "message": "litellm.BadRequestError: MistralException",
                        "type": "None",
                        "param": "None",
                        "code": "400",
                    }
                }
        said = strict_roles(body)
        return (
            (400, {"error": {"message": said, "type": "None", "param": "None", "code": "400"}})
            if said
            else None
        )


class OpenRouter(Dialect):
    name = "openrouter"
    owned_by = ""

    def refuse(self, body, headers, path):
        for message, _ in called(body):
            if self.given and message.get("reasoning_details") != self.given:
                return 400, {
                    "error": {
                        "message": "Provider returned error",
                        "code": 400,
                        "metadata": {
                            "raw": "Gemini models require OpenRouter reasoning details to be preserved"
                        },
                    }
                }
        roles = [one["role"] for one in body["messages"]]
        said = strict_roles(body) or (
            "Unexpected role 'user' after role 'tool'"
            if ("tool", "user") in itertools.pairwise(roles)
            else ""
        )
        return (400, {"error": {"message": said, "code": 400}}) if said else None

    def opening(self):
        yield b": OPENROUTER PROCESSING\n\n"
        yield from super().opening()

    def thinks(self, piece):
        detail = {"type": "reasoning.text", "text": piece, "index": 0, "format": "unknown"}
        if self.given:
            self.given[0]["text"] += piece
        else:
            self.given.append(dict(detail))
        return self.chunk({"content": "", "reasoning": piece, "reasoning_details": [detail]})

    def calls(self, made):
        if made:
            detail = {"type": "reasoning.encrypted", "data": "c2VjcmV0", "id": made[0][0], "index": 1}
            self.given.append(detail)
            yield self.chunk({"content": "", "reasoning_details": [detail]})
        yield from super().calls(made)

    def fails(self):
        error = {"code": 502, "message": "Provider disconnected"}
        yield self.chunk({"content": ""}, "error", error=error, provider="x")


class Unknown(Dialect):
    """A server that nobody knows, with the oldest habits and no patience."""

    name = "unknown"
    owned_by = "somebody"
    error = {"detail": "Token quota exceeded: too many requests"}
    refuses = ("stream_options", "temperature", "max_tokens")

    def refuse(self, body, headers, path):
        for name in self.refuses:
            if name in body:
                return 422, {
                    "detail": [
                        {
                            "loc": ["body", name],
                            "msg": "extra fields not permitted",
                            "type": "value_error.extra",
                        }
                    ]
                }
        if said := strict_roles(body):
            return 400, {"detail": said}
        return None

    def calls(self, made):
        for _, name, arguments in made:
            yield self.chunk(
                {"tool_calls": [{"function": {"name": name, "arguments": orjson.loads(arguments)}}]}
            )


DIALECTS: dict[str, type[Dialect]] = {
    one.name: one
    for one in (
        OpenAI,
        Azure,
        Mistral,
        DeepSeek,
        Kimi,
        Gemini,
        Groq,
        Vllm,
        Sglang,
        LlamaCpp,
        Ollama,
        LiteLlm,
        OpenRouter,
        Unknown,
    )
}


@dataclass
class DialectServer:
    """One fake server, on a port of its own for the time of the block.

    Attributes:
        script: what is replied, one entry for each request that is taken.
        taken, refused: the bodies of requests, in order.
    """

    dialect: Dialect
    script: list[Reply] = field(default_factory=list)
    taken: list[dict[str, Any]] = field(default_factory=list)
    refused: list[dict[str, Any]] = field(default_factory=list)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    @property
    def base_url(self) -> str:
        """The URL that clients take."""
        port = self._server.sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}/v1" + (
            "?api-version=2024-10-21" if self.dialect.name == "azure" else ""
        )

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            lines = head.split("\r\n")
            headers = {
                name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:] if line)
            }
            _, path, _ = lines[0].split(" ")
            if path.split("?")[0].endswith("/models"):
                entry = {"id": "fake", "object": "model", "owned_by": self.dialect.owned_by}
                self._send(writer, 200, {"object": "list", "data": [entry]})
                return
            body = orjson.loads(await reader.readexactly(int(headers["content-length"])))
            refusal = self.dialect.refuse(body, headers, path)
            if refusal is not None:
                self.refused.append(body)
                self._send(writer, *refusal)
                return
            self.taken.append(body)
            self._stream(writer, self.script.pop(0))
        finally:
            writer.close()

    def _head(self, status: int, kind: str, more: str) -> bytes:
        headers = "".join(f"{name}: {value}\r\n" for name, value in {**FAKE, **self.dialect.headers}.items())
        return f"HTTP/1.1 {status} X\r\n{headers}Content-Type: {kind}\r\n{more}Connection: close\r\n\r\n".encode()

    def _send(self, writer: asyncio.StreamWriter, status: int, body: object) -> None:
        data = orjson.dumps(body)
        writer.write(self._head(status, "application/json", f"Content-Length: {len(data)}\r\n") + data)

    def _stream(self, writer: asyncio.StreamWriter, reply: Reply) -> None:
        writer.write(self._head(200, "text/event-stream", "Transfer-Encoding: chunked\r\n"))
        for frame in self.dialect.frames(reply):
            writer.write(b"%x\r\n%b\r\n" % (len(frame), frame))
        if not reply.cut:
            writer.write(b"0\r\n\r\n")
