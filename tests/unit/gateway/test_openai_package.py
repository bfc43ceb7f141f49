"""The unmodified `openai` package against the gateway. The mesh behind is the FAKE of tests/fakes/mesh.py."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import httpx
import openai
import pytest

from meshkit.errors import ResourceExhaustedError, UnavailableError
from meshkit.postgres import outcome_unknown
from tests.fakes.mesh import API_KEY, FakeRun

HELLO: Any = [{"role": "user", "content": "one two"}]
COMPLETED = ("run.completed", {"message_id": "", "finish_reason": "stop"})


@pytest.fixture
async def client(served: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{served.url}/v1", api_key=API_KEY, max_retries=0, timeout=10
    ) as made:
        yield made


def script(*entries: tuple[str, dict[str, Any]]) -> Any:
    async def run(_: FakeRun) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        for entry in entries:
            yield entry

    return run


async def test_a_reply_streams(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="scripted", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "one two "
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 5


@pytest.mark.parametrize("stream", [False, True])
async def test_a_refused_call_leaves_no_session(start: Any, stream: bool) -> None:
    served = await start(max_waiting_streams=0)
    full = ResourceExhaustedError("OVERLOADED", "full", retry_after_ms=1000)
    served.mesh.run_cuts = [(-1, full), (-1, full)]
    kept = served.mesh.add_session().session_id
    body = {"model": "scripted", "messages": HELLO, "stream": stream}
    for headers in ({}, {"x-hermesh-session": kept}):
        answer = await served.client.post("/v1/chat/completions", json=body, headers=headers)
        assert answer.status_code == 429
    assert list(served.mesh.sessions) == [kept]


async def test_a_whole_reply(served: Any, client: openai.AsyncOpenAI) -> None:
    reply = await client.chat.completions.create(
        model="scripted",
        messages=[{"role": "system", "content": "Be brief."}, *HELLO],
        temperature=0,
        max_tokens=10,
        user="ada",
    )
    assert reply.choices[0].message.content == "one two "
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == 3
    session = next(iter(served.mesh.sessions.values()))
    assert session.metadata == {"source": "chat_completions"}
    assert session.user == "ada"
    assert session.runs[0].input == [("system", "Be brief."), ("user", "one two")]


async def test_a_session_goes_on(served: Any, client: openai.AsyncOpenAI) -> None:
    session = served.mesh.add_session("mine")
    await client.chat.completions.create(
        model="scripted", messages=HELLO, extra_headers={"X-Hermesh-Session": session.session_id}
    )
    await client.chat.completions.create(
        model="scripted", messages=HELLO, extra_body={"session_id": session.session_id}
    )
    assert len(session.runs) == 2
    assert len(served.mesh.sessions) == 1
    raw = await client.chat.completions.with_raw_response.create(model="scripted", messages=HELLO)
    assert raw.headers["x-hermesh-session"] in served.mesh.sessions


async def test_a_repeated_key_gives_one_session_and_one_reply(
    served: Any, client: openai.AsyncOpenAI
) -> None:
    headers = {"Idempotency-Key": "k"}
    replies = [
        await client.chat.completions.create(model="scripted", messages=HELLO, extra_headers=headers)
        for _ in range(2)
    ]
    assert replies[0] == replies[1]
    assert len(served.mesh.sessions) == 1
    assert len(served.mesh.runs) == 1


async def test_models_are_listed(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["scripted", "other"]
    assert (await client.models.retrieve("other")).id == "other"


@pytest.mark.parametrize("stream", [True, False])
async def test_errors_are_the_packages_own(served: Any, client: openai.AsyncOpenAI, stream: bool) -> None:
    create: Any = client.chat.completions.create
    with pytest.raises(openai.NotFoundError) as missing:
        await create(model="no-such", messages=HELLO, stream=stream)
    assert missing.value.code == "model_not_found"
    assert missing.value.param == "model"
    for wrong in ({"messages": []}, {"n": 2}, {"tools": [{"type": "function"}]}, {"temperature": 9}):
        with pytest.raises(openai.BadRequestError) as bad:
            await create(**{"model": "scripted", "messages": HELLO, "stream": stream, **wrong})
        assert bad.value.param == next(iter(wrong))
    with pytest.raises(openai.AuthenticationError) as refused:
        await client.with_options(api_key="wrong").chat.completions.create(
            model="scripted", messages=HELLO, stream=stream
        )
    assert refused.value.code == "invalid_api_key"
    with pytest.raises(openai.NotFoundError):
        await create(
            model="scripted",
            messages=HELLO,
            stream=stream,
            extra_body={"session_id": "01890000-0000-7000-8000-00000000000a"},
        )
    assert not served.mesh.runs


FAILURES = [
    ("RESOURCE_EXHAUSTED", "MODEL_RATE_LIMITED", openai.RateLimitError, 429),
    ("UNAVAILABLE", "MODEL_UNAVAILABLE", openai.InternalServerError, 503),
    ("UNAUTHENTICATED", "MODEL_UNAUTHENTICATED", openai.InternalServerError, 502),
    ("INTERNAL", "MODEL_BAD_RESPONSE", openai.InternalServerError, 502),
    ("UNAVAILABLE", "MODEL_STREAM_TRUNCATED", openai.InternalServerError, 502),
    ("DEADLINE_EXCEEDED", "MODEL_TIMEOUT", openai.InternalServerError, 504),
    ("INVALID_ARGUMENT", "MODEL_REQUEST_REJECTED", openai.BadRequestError, 400),
    ("NO_SUCH_CODE", "NEW_REASON", openai.InternalServerError, 500),
]


@pytest.mark.parametrize(("code", "reason", "kind", "status"), FAILURES)
@pytest.mark.parametrize("stream", [True, False])
async def test_a_run_that_fails_before_any_text_has_its_status(
    served: Any, client: openai.AsyncOpenAI, code: str, reason: str, kind: Any, status: int, stream: bool
) -> None:
    failed = {"code": code, "reason": reason, "message": "the words for a person", "retryable": False}
    failed["retry_after_ms"] = 20_000
    served.mesh.script = script(("run.started", {"attempt": 1}), ("run.failed", failed))
    with pytest.raises(kind) as raised:
        await client.chat.completions.create(model="scripted", messages=HELLO, stream=stream)
    assert raised.value.status_code == status
    assert "the words for a person" in raised.value.message
    assert raised.value.response.headers["x-should-retry"] == "false"
    assert raised.value.response.headers["retry-after"] == "20"


async def test_a_run_that_fails_in_the_middle_ends_the_stream_with_an_error(
    served: Any, client: openai.AsyncOpenAI
) -> None:
    gone = asyncio.Event()

    async def breaks(_: FakeRun) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        yield "text.delta", {"text": "half"}
        await gone.wait()
        yield "run.failed", {"code": "UNAVAILABLE", "reason": "MODEL_UNAVAILABLE", "message": "gone"}

    served.mesh.script = breaks
    stream = await client.chat.completions.create(model="scripted", messages=HELLO, stream=True)
    got: list[str] = []

    async def read() -> None:
        async for chunk in stream:
            got.append(chunk.choices[0].delta.content or "")
            gone.set()

    with pytest.raises(openai.APIError, match="gone"):
        await read()
    assert "".join(got) == "half"


async def test_a_reset_after_text_is_an_error_and_without_a_stream_a_whole_reply(
    served: Any, client: openai.AsyncOpenAI
) -> None:
    more = asyncio.Event()

    async def resets(_: FakeRun) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        yield "text.delta", {"text": "half"}
        await more.wait()
        yield "attempt.reset", {"from_seq": 2, "reason": "takeover"}
        yield "text.delta", {"text": "whole"}
        yield COMPLETED

    served.mesh.script = resets
    stream = await client.chat.completions.create(model="scripted", messages=HELLO, stream=True)

    async def read() -> None:
        async for _ in stream:
            more.set()

    with pytest.raises(openai.APIError, match="begun anew"):
        await read()
    reply = await client.chat.completions.create(model="scripted", messages=HELLO)
    assert reply.choices[0].message.content == "whole"


async def test_a_tool_call_that_waits_for_a_person_is_told(served: Any, client: openai.AsyncOpenAI) -> None:
    served.mesh.script = script(("action.required", {"call_id": "c", "kind": "unknown", "name": "send_mail"}))
    with pytest.raises(openai.ConflictError, match="send_mail"):
        await client.chat.completions.create(model="scripted", messages=HELLO)


async def test_an_agent_that_dies_is_not_noticed(served: Any, client: openai.AsyncOpenAI) -> None:
    served.mesh.run_cuts = [(3, grpc.StatusCode.UNAVAILABLE), (2, "reconnect")]
    stream = await client.chat.completions.create(model="scripted", messages=HELLO, stream=True)
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == "one two "
    reply = await client.chat.completions.create(model="scripted", messages=HELLO)
    assert reply.choices[0].message.content == "one two "


async def test_the_package_waits_as_long_as_it_is_told_and_tries_again(
    served: Any, client: openai.AsyncOpenAI
) -> None:
    served.mesh.unary_error = UnavailableError("DATABASE_UNAVAILABLE", "later", retry_after_ms=20)
    patient = client.with_options(max_retries=3)
    asked = asyncio.create_task(patient.chat.completions.create(model="scripted", messages=HELLO))
    await served.mesh.until(lambda: served.mesh.calls.count("CreateSession") >= 2)
    served.mesh.unary_error = None
    assert (await asked).choices[0].message.content == "one two "


async def test_a_body_that_is_not_json_has_openais_error_object(served: Any) -> None:
    answer: httpx.Response = await served.client.post("/v1/chat/completions", content=b"{")
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    answer = await served.client.put("/v1/chat/completions", json={})
    assert answer.status_code == 405
    assert "error" in answer.json()


@pytest.mark.parametrize("stream", [True, False])
async def test_what_may_have_been_done_is_not_sent_again_by_the_package(start: Any, stream: bool) -> None:
    served = await start()
    session = served.mesh.add_session().session_id
    served.mesh.run_cuts = [(-1, outcome_unknown())] * 200
    served.mesh.unary_error = outcome_unknown()
    asked = 0

    async def count(_: httpx.Request) -> None:
        nonlocal asked
        asked += 1

    http = httpx.AsyncClient(event_hooks={"request": [count]})
    async with openai.AsyncOpenAI(
        base_url=f"{served.url}/v1", api_key=API_KEY, max_retries=2, timeout=10, http_client=http
    ) as client:
        with pytest.raises(openai.InternalServerError) as raised:
            await client.chat.completions.create(
                model="scripted",
                messages=HELLO,
                stream=stream,
                extra_headers={"X-Hermesh-Session": session},
            )
    assert raised.value.code == "outcome_unknown"
    assert (asked, raised.value.response.headers.get("x-should-retry")) == (1, "false")
