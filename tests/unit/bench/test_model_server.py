import asyncio
import json
import sys

import httpx
import openai
import pytest

from bench.model_script import reply_to
from bench.model_server import ModelServer


@pytest.fixture
async def server():
    async with ModelServer() as running:
        yield running


def body(text, **more):
    return {"model": "scripted", "messages": [{"role": "user", "content": text}], **more}


async def post(server, request):
    async with httpx.AsyncClient() as client:
        return await client.post(f"{server.base_url}/chat/completions", json=request)


async def chunks(server, request):
    response = await post(server, {**request, "stream": True})
    frames = [frame.removeprefix("data: ") for frame in response.text.split("\n\n") if frame]
    assert frames[-1] == "[DONE]"
    return [json.loads(frame) for frame in frames[:-1]]


def text_of(frames):
    return "".join(choice["delta"].get("content") or "" for frame in frames for choice in frame["choices"])


async def test_every_token_is_its_own_chunk_and_usage_comes_last(server):
    frames = await chunks(server, body("[[tokens=5]]", stream_options={"include_usage": True}))
    assert text_of(frames) == "t0 t1 t2 t3 t4 "
    assert len(frames) == 1 + 5 + 1 + 1
    assert frames[-1]["choices"] == []
    assert frames[-1]["usage"]["completion_tokens"] == 5


async def test_the_openai_package_reads_it_streamed_and_whole(server):
    async with openai.AsyncOpenAI(base_url=server.base_url, api_key="any") as client:
        whole = await client.chat.completions.create(**body("[[tokens=3]]"))
        assert whole.choices[0].message.content == "t0 t1 t2 "
        stream = await client.chat.completions.create(**body("[[tokens=3]]"), stream=True)
        assert "".join([c.choices[0].delta.content or "" async for c in stream]) == "t0 t1 t2 "
        models = await client.models.list()
        assert [model.id for model in models.data] == ["scripted"]


async def test_tool_calls_are_made_when_offered_and_answered_from_their_result(server):
    text = '[[tool=calculator {"expression":"2+2"}]]'
    tools = [{"type": "function", "function": {"name": "calculator", "parameters": {}}}]
    frames = await chunks(server, body(text, tools=tools))
    deltas = [c["delta"]["tool_calls"][0] for f in frames for c in f["choices"] if "tool_calls" in c["delta"]]
    assert deltas[0]["function"]["name"] == "calculator"
    assert "".join(d["function"].get("arguments", "") for d in deltas) == '{"expression":"2+2"}'
    assert frames[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert "tool_calls" not in (await post(server, body(text))).json()["choices"][0]["message"]
    answered = body(text, tools=tools)
    answered["messages"] += [
        {"role": "assistant", "content": "", "tool_calls": []},
        {"role": "tool", "tool_call_id": "call_0", "content": "4"},
    ]
    assert text_of(await chunks(server, answered)) == "The tool said: 4"


@pytest.mark.parametrize("prefix", ["", "t", "t0 ", "t0 t1", "t0 t1 t2 "])
async def test_a_last_assistant_message_is_continued(server, prefix):
    request = body("[[tokens=3]]")
    request["messages"].append({"role": "assistant", "content": prefix})
    assert prefix + text_of(await chunks(server, request)) == "t0 t1 t2 "


@pytest.mark.parametrize(("status", "retry_after"), [(401, None), (429, "1"), (500, None)])
async def test_statuses_are_scripted(server, status, retry_after):
    response = await post(server, body(f"[[status={status}]]"))
    assert response.status_code == status
    assert response.headers.get("retry-after") == retry_after


async def test_a_fault_can_be_limited_to_the_first_requests(server):
    text = "[[status=500 times=2 tokens=1]]"
    assert [(await post(server, body(text))).status_code for _ in range(3)] == [500, 500, 200]


async def test_a_half_stream_ends_without_its_end(server):
    with pytest.raises(httpx.RemoteProtocolError):
        await post(server, body("[[half tokens=4]]", stream=True))


async def test_garbage_is_not_json(server):
    with pytest.raises(httpx.RemoteProtocolError):
        await post(server, body("[[garbage]]", stream=True))
    assert (await post(server, body("[[garbage]]"))).text == "{not JSON"


async def test_a_limit_on_tokens_ends_the_reply_as_too_long(server):
    frames = await chunks(server, body("[[tokens=5]]", max_tokens=2))
    assert text_of(frames) == "t0 t1 "
    assert frames[-1]["choices"][0]["finish_reason"] == "length"


async def test_empty_and_echo(server):
    assert text_of(await chunks(server, body("[[empty]]"))) == ""
    assert text_of(await chunks(server, body("say  this [[echo]]"))) == "say  this [[echo]]"


async def test_a_client_that_leaves_a_paced_reply_is_counted(server):
    request = body("[[tokens=1000 rate=50]]", stream=True)
    async with (
        httpx.AsyncClient() as client,
        client.stream("POST", f"{server.base_url}/chat/completions", json=request) as response,
    ):
        await anext(response.aiter_bytes())
        assert server.state.stats.open == 1
    await server.wait_for("aborted", 1)
    assert server.state.stats.open == 0


async def test_a_silent_reply_never_comes(server):
    with pytest.raises(httpx.ReadTimeout):
        async with httpx.AsyncClient(timeout=httpx.Timeout(5, read=0.05)) as client:
            await client.post(f"{server.base_url}/chat/completions", json=body("[[silent]]"))
    await server.wait_for("aborted", 1)


async def test_a_wrong_key_is_refused():
    async with ModelServer(api_key="right") as server:
        assert (await post(server, body("hi"))).status_code == 401


@pytest.mark.parametrize("request_", [{}, {"messages": []}, {"messages": "x"}, {"messages": [{}]}, []])
async def test_what_is_no_chat_request_is_refused(server, request_):
    assert (await post(server, request_)).status_code == 400


async def test_the_process_says_where_it_listens_and_ends_on_sigterm(tmp_path):
    ready = tmp_path / "ready.json"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.model_server", "--ready-file", ready, stdout=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(20):
            await process.stdout.readline()
            url = json.loads(ready.read_text())["base_url"]
            async with httpx.AsyncClient() as client:
                assert (await client.get(f"{url.removesuffix('/v1')}/health")).json() == {"status": "ok"}
            process.terminate()
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def test_inputs_that_an_agent_joined_are_steered_by_the_last_ones_directives_alone() -> None:
    first, second = "a [[garbage]]", "b [[tokens=3]]"
    request = {"model": "m", "messages": [{"role": "user", "content": f"{first}\n\n{second}"}]}
    reply = reply_to(request)
    assert (len(reply.tokens), reply.fault) == (3, "")
    # One input may have paragraphs of its own.
    request["messages"] = [{"role": "user", "content": f"{second}\n\nand a long text"}]
    assert len(reply_to(request).tokens) == 3


def test_a_result_that_is_missing_is_said_in_place_of_the_text():
    calls = [{"id": f"c{number}", "function": {"name": "bulk", "arguments": "{}"}} for number in range(2)]
    results = [{"role": "tool", "tool_call_id": one["id"], "content": "x"} for one in calls]
    asked = body("[[tool=bulk {} calls=2 turns=1 tokens=2]]")
    turn = [*asked["messages"], {"role": "assistant", "tool_calls": calls}]
    assert reply_to({**asked, "messages": [*turn, *results]}).tokens == ("t0 ", "t1 ")
    assert "".join(reply_to({**asked, "messages": [*turn, results[1]]}).tokens) == "1 results are missing"
