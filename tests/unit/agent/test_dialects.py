"""The adapter against each dialect: a FAKE server for each provider refuses what the real one refuses."""

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from services.agent.domain.loop import LoopState, calls_reported, turn_done
from services.agent.domain.restore import StoredMessage, stored_tool_calls, to_chat
from services.agent.domain.turn import TurnBuilder
from services.agent.model.errors import (
    ModelRateLimitedError,
    ModelRejectedError,
    ModelTruncatedError,
    ModelUnavailableError,
)
from services.agent.model.openai import OpenAIModel
from services.agent.model.port import ChatMessage, ModelRequest, RefusalDelta, ToolOffer, ToolUse, Usage
from services.agent.model.profiles import TOLERANT, Profiles, built_in
from tests.fakes.backends import PAGE, SHOWN, page, shows
from tests.fakes.dialects import DIALECTS, DialectServer, Reply

NAMES = list(DIALECTS)
# What tells a server by its host cannot be told of one on this machine.
BY_HOST = ("openai", "azure", "groq", "openrouter")
ADD = ToolOffer("add", "Adds.", {"type": "object"})
MUL = ToolOffer("mul", "Multiplies.", {"type": "object"})
HI = ChatMessage("user", "hi")
TEXT = "Thé answer is 42. 😀"
CALLS = (("add", '{"a":1,"b":"x"}'), ("add", '{"a":2}'), ("mul", "{}"))


@asynccontextmanager
async def backend(name, *script, learned=True):
    """A fake server of this dialect and a model of it that knows what it is."""
    async with DialectServer(DIALECTS[name](), list(script)) as server:
        profile = built_in()[name] if name in BY_HOST else None
        model = OpenAIModel(server.base_url, api_key="secret", profile=profile)
        try:
            if learned:
                await model.list_models()
            yield server, model
        finally:
            await model.aclose()


def request(*messages, **options):
    return ModelRequest("fake", messages or (HI,), **options)


async def turn(model, asked, step=1):
    """One model turn as a run makes it: the turn, and the reasoning that readers see."""
    builder = TurnBuilder(
        "run", step, asked.messages[-1].content if asked.messages[-1].role == "assistant" else ""
    )
    thoughts = []
    async for batch in model.stream(asked):
        thoughts.append(builder.add(batch)[1])
    return builder.build(), "".join(thoughts)


async def failure(model, asked):
    """How a request fails, and the text that came before."""
    builder = TurnBuilder("run", 1)
    text = []
    try:
        async for batch in model.stream(asked):
            text.append(builder.add(batch)[0])
    except Exception as error:
        return error, "".join(text)
    raise AssertionError("it did not fail")


@shows(
    "azure.first-chunk",
    "azure.key",
    "kimi.usage",
    "groq.usage",
    "mistral.stream-options",
    "openrouter.comments",
)
@pytest.mark.parametrize("name", NAMES)
async def test_a_reply_in_each_dialect(name):
    async with backend(name, Reply(TEXT)) as (server, model):
        done, _ = await turn(model, request())
        assert (done.text, done.calls, done.finish_reason, done.usage) == (TEXT, (), "stop", Usage(7, 5))
        assert len(server.refused) == (1 if name == "unknown" else 0)  # stream_options, once


@shows("mistral.thinking")
@pytest.mark.parametrize("name", NAMES)
async def test_reasoning_is_kept_apart_in_each_dialect(name):
    async with backend(name, Reply(TEXT, reasoning="Let me see.")) as (_, model):
        done, thoughts = await turn(model, request())
        assert (done.text, thoughts) == (TEXT, "Let me see.")


@shows(
    *(
        "mistral.ids",
        "mistral.fields",
        "deepseek.reasoning",
        "kimi.reasoning",
        "kimi.ids",
        "gemini.signature",
    ),
    *("gemini.index", "groq.fields", "openai.fields", "vllm.ids", "sglang.index", "ollama.index"),
    "openrouter.reasoning",
)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("taken_over", [False, True])
async def test_parallel_calls_and_their_results_go_back_in_each_dialect(name, taken_over):
    async with backend(name, Reply("", "I need sums.", CALLS), Reply("done"), Reply("again")) as (
        server,
        model,
    ):
        tools = (ADD, MUL)
        first, _ = await turn(model, request(tools=tools))
        assert [(call.name, call.arguments) for call in first.calls] == list(CALLS)
        assert first.finish_reason == "tool_calls" or name == "gemini"
        state = turn_done(LoopState((HI,)), first)
        results = tuple(replace(call, content=f"result {call.call_id}") for call in first.calls)
        state = calls_reported(replace(state, calls=results))
        messages = state.messages
        if taken_over:  # by a replica that has only what is stored
            stored = stored_tool_calls(first.calls, first.provider)
            messages = (HI, to_chat(StoredMessage("run", "assistant", "", stored)), *messages[2:])
        second, _ = await turn(model, request(*messages, tools=tools), 2)
        assert second.text == "done"
        sent = server.taken[1]["messages"]
        assistant = next(one for one in sent if one["role"] == "assistant")
        ids = [call["id"] for call in assistant["tool_calls"]]
        assert ids == [one["tool_call_id"] for one in sent if one["role"] == "tool"]
        if name != "unknown":  # it gives none
            assert set(ids) == server.dialect.given_ids
        assert assistant["content"] is None
        # A turn later the same conversation is taken as well.
        later = (*messages, ChatMessage("assistant", "done"), ChatMessage("user", "and now?"))
        assert (await turn(model, request(*later, tools=tools), 3))[0].text == "again"


ERRORS = {
    "openai": (ModelRateLimitedError, "Slow down"),
    "azure": (ModelRejectedError, "The response was filtered"),
    "mistral": (ModelRateLimitedError, "Requests rate limit exceeded"),
    "deepseek": (ModelUnavailableError, "Server overloaded"),
    "kimi": (ModelUnavailableError, "currently overloaded"),
    "gemini": (ModelRateLimitedError, "Resource has been exhausted"),
    "groq": (ModelRejectedError, "Failed to call a function"),
    "vllm": (ModelRejectedError, "maximum context length is 4096"),
    "sglang": (ModelRejectedError, "longer than the model's context length"),
    "llama.cpp": (ModelRejectedError, "exceeds the available context size"),
    "ollama": (ModelUnavailableError, "an error was encountered"),
    "litellm": (ModelRateLimitedError, "litellm.RateLimitError: VertexAI."),
    "openrouter": (ModelUnavailableError, "Provider disconnected"),
    "unknown": (ModelRateLimitedError, "too many requests"),
}


@shows(
    *("vllm.error", "sglang.error", "llama.cpp.error", "ollama.error", "litellm.error", "openrouter.error"),
    *("gemini.error", "groq.tool-use-failed"),
)
@pytest.mark.parametrize("name", NAMES)
async def test_an_error_within_the_stream_has_its_reason_and_its_message_in_each_dialect(name):
    async with backend(name, Reply(TEXT, error=True)) as (_, model):
        error, text = await failure(model, request())
        kind, said = ERRORS[name]
        assert type(error) is kind
        assert said in str(error)
        assert "Received Model Group" not in str(error)
        assert error.retryable is (kind is not ModelRejectedError)
        assert text == TEXT  # what was said before it is not lost


@pytest.mark.parametrize("name", NAMES)
async def test_a_stream_that_is_cut_is_no_reply_in_any_dialect(name):
    async with backend(name, Reply(TEXT, cut=True)) as (_, model):
        error, text = await failure(model, request())
        assert type(error) is ModelTruncatedError
        assert text == TEXT


FOREIGN = ToolUse("run:1:0", "add", '{"a":1}', '{"id":"toolu_01ABCDEFGHIJKLMNOPQRSTUVWXYZ-and-longer"}')
ACCIDENTS = (
    ChatMessage("user", "a run of this failed"),
    ChatMessage("user", "one of this was filtered"),
    ChatMessage("assistant", ""),
    ChatMessage("user", "this one called"),
    ChatMessage("assistant", "", (FOREIGN,)),
    ChatMessage("tool", "1", (), "run:1:0"),
    ChatMessage("system", "A rule from here on."),
    ChatMessage("user", "and failed then"),
    ChatMessage("assistant", "  "),
    ChatMessage("assistant", "a partial reply"),
    ChatMessage("user", "now?"),
)


@shows(
    *("mistral.empty", "mistral.order", "kimi.empty", "gemini.foreign", "vllm.roles", "llama.cpp.roles"),
    *("ollama.roles", "litellm.ids", "openrouter.ids"),
)
@pytest.mark.parametrize("name", NAMES)
async def test_a_session_goes_on_after_runs_that_failed_in_each_dialect(name):
    async with backend(name, Reply("well"), Reply("well")) as (server, model):
        for _ in range(2):
            done, _ = await turn(model, request(ChatMessage("system", "Be kind."), *ACCIDENTS))
            assert done.text == "well"
        # Gemini's stand-in is asked for once; the unknown server refuses stream_options, once.
        assert len(server.refused) == (1 if name in ("gemini", "unknown") else 0)
        said = "".join(one["content"] or "" for one in server.taken[-1]["messages"])
        for message in ACCIDENTS:
            assert message.content.strip() in said


OPTIONS = {"max_tokens": 100, "temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": ("END",)}


@shows("openai.limit", "openai.temperature", "azure.limit", "mistral.seed", "kimi.temperature")
@pytest.mark.parametrize("name", NAMES)
async def test_options_are_named_as_each_server_wants_them_and_refused_ones_are_sent_once(name):
    async with backend(name, Reply("a"), Reply("b")) as (server, model):
        for text in "ab":
            assert (await turn(model, request(**OPTIONS)))[0].text == text
        refused = {"openai": 1, "azure": 1, "kimi": 1, "unknown": 3}
        assert len(server.refused) == refused.get(name, 0)
        sent = server.taken[-1]
        assert ("temperature" in sent) is (name not in refused)
        assert sent["top_p"] == 0.9
        assert sent["stop"] == ["END"]
        limit = "max_completion_tokens" if name in ("openai", "azure", "unknown") else "max_tokens"
        assert sent[limit] == 100
        assert sent["random_seed" if name == "mistral" else "seed"] == 3


async def test_requests_that_are_refused_at_once_have_their_second_try_each():
    async with backend("openai", *[Reply("a")] * 8) as (_, model):
        done = await asyncio.gather(*(turn(model, request(**OPTIONS)) for _ in range(8)))
        assert [one.text for one, _ in done] == ["a"] * 8


@shows(
    "mistral.prefill",
    "deepseek.prefill",
    "kimi.prefill",
    "vllm.prefill",
    "sglang.prefill",
    "llama.cpp.prefill",
)
@pytest.mark.parametrize("name", NAMES)
async def test_a_reply_is_continued_as_each_server_wants_it(name):
    async with backend(name, Reply("lo")) as (server, model):
        done, _ = await turn(model, request(HI, ChatMessage("assistant", "Hel")))
        assert done.text == "Hello"
        assert server.taken[0]["messages"][-1]["content"] == "Hel"


@shows("openai.refusal")
async def test_a_refusal_is_the_replys_text_and_its_reason():
    async with backend("openai", Reply(refusal="I cannot help with that.")) as (_, model):
        events = [event async for batch in model.stream(request()) for event in batch]
        assert (
            "".join(one.text for one in events if isinstance(one, RefusalDelta)) == "I cannot help with that."
        )
    async with backend("openai", Reply(refusal="I cannot.")) as (_, model):
        done, _ = await turn(model, request())
        assert (done.text, done.finish_reason) == ("I cannot.", "refusal")


@shows("azure.filter")
async def test_a_filtered_reply_is_a_reply_that_was_filtered():
    async with backend("azure", Reply("", filtered=True)) as (_, model):
        done, _ = await turn(model, request())
        assert (done.text, done.finish_reason) == ("", "content_filter")


@shows("deepseek.resource")
async def test_a_reply_that_a_server_gives_up_is_a_failure_that_passes():
    class Short(DIALECTS["deepseek"]):
        def ending(self, finish):
            yield self.chunk({}, "insufficient_system_resource")

    async with DialectServer(Short(), [Reply("half")]) as server:
        model = OpenAIModel(server.base_url, profile=built_in()["deepseek"])
        error, text = await failure(model, request())
        assert (type(error), error.retryable, text) == (ModelUnavailableError, True, "half")
        await model.aclose()


@pytest.mark.parametrize("name", [name for name in NAMES if name not in BY_HOST])
async def test_a_server_is_known_by_its_answers(name):
    async with backend(name) as (_, model):
        assert model.profile is (TOLERANT if name == "unknown" else built_in()[name])


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("api.openai.com", "openai"),
        ("mine.openai.azure.com", "azure"),
        ("mine.services.ai.azure.com", "azure"),
        ("api.mistral.ai", "mistral"),
        ("api.deepseek.com", "deepseek"),
        ("api.moonshot.ai", "kimi"),
        ("generativelanguage.googleapis.com", "gemini"),
        ("api.groq.com", "groq"),
        ("openrouter.ai", "openrouter"),
        ("eu.openrouter.ai", "openrouter"),
        ("notopenrouter.ai", None),
        ("models.example.com", None),
    ],
)
def test_a_server_is_known_by_its_host(host, name):
    found = Profiles().by_host(host)
    assert (found.name if found else None) == name


def test_each_line_of_each_profile_has_a_source_and_a_test():
    for profile in built_in().values():
        assert profile.quirks
        for quirk in profile.quirks:
            assert quirk.source.startswith("https://")
            assert f"{profile.name}.{quirk.id}" in SHOWN
    known = {f"{profile.name}.{quirk.id}" for profile in built_in().values() for quirk in profile.quirks}
    assert set(SHOWN) <= known


def test_the_table_of_backends_is_current():
    assert PAGE.read_text() == page(), "run: python -m tests.fakes.backends --write"
