"""Requests: what goes out by profile, and what a refusal teaches."""

import orjson
import pytest

from meshkit.errors import StartupError
from services.agent.app import assemble
from services.agent.model.backends import Retry
from services.agent.model.errors import ModelRateLimitedError
from services.agent.model.faults import error_of_status, status_of_answer
from services.agent.model.http import Origin
from services.agent.model.port import ChatMessage, ModelRequest, ToolOffer, ToolUse
from services.agent.model.profiles import TOLERANT, ProfileError, Profiles, built_in
from services.agent.model.request import NOTHING, OPENING, Learned, alternating, encode_request, learn
from services.agent.settings import AgentSettings

USER = ChatMessage("user", "hi")


def sent(*messages, profile=TOLERANT, learned=NOTHING, **options):
    return orjson.loads(encode_request(ModelRequest("m", messages or (USER,), **options), profile, learned))


def calls_of(body):
    return [call["id"] for message in body["messages"] for call in message.get("tool_calls", ())]


def use(number, own=""):
    provider = orjson.dumps({"id": own}).decode() if own else ""
    return ChatMessage("assistant", "", (ToolUse(f"run:{number}:0", "add", "{}", provider),))


@pytest.mark.parametrize(
    ("profile", "own", "expected"),
    [
        ("unknown", "call_abc", "call_abc"),
        ("unknown", "x" * 41, "call00000"),
        ("unknown", "with blank", "call00000"),
        ("unknown", "", "call00000"),
        ("mistral", "D681PevKs", "D681PevKs"),
        ("mistral", "call_abc", "call00000"),
        ("kimi", "functions.add:7", "functions.add:7"),
        ("kimi", "call_abc", "functions.add:0"),
    ],
)
def test_a_call_has_its_own_id_where_the_server_takes_it(profile, own, expected):
    body = sent(USER, use(1, own), profile={**built_in(), "unknown": TOLERANT}[profile])
    assert calls_of(body) == [expected]


def test_two_calls_never_have_one_id():
    body = sent(USER, use(1, "call00000"), use(2), use(3, "0"), use(4, "0"))
    ids = calls_of(body)
    assert ids[0] == "call00000"
    assert ids[2] == "0"
    assert len(set(ids)) == 4


def test_an_empty_message_of_the_assistant_is_left_out_for_every_server():
    for profile in (TOLERANT, *built_in().values()):
        body = sent(USER, ChatMessage("assistant", " \n"), ChatMessage("user", "again"), profile=profile)
        assert [one["role"] for one in body["messages"]] in (["user"], ["user", "user"])


def test_a_conversation_that_the_assistant_begins_gets_an_opening_where_roles_alternate():
    told = alternating([ChatMessage("assistant", "Welcome!"), USER])
    assert [(one.role, one.content) for one in told] == [
        ("user", OPENING),
        ("assistant", "Welcome!"),
        ("user", "hi"),
    ]


def test_fields_that_another_server_wanted_back_do_not_go_to_one_that_refuses_them():
    message = ChatMessage(
        "assistant",
        "",
        (ToolUse("r:1:0", "add", "{}", '{"id":"x","fields":{"extra_content":{"google":{}}}}'),),
        provider='{"reasoning_content":"hm","reasoning_details":[1]}',
    )
    for name in ("openai", "azure", "mistral", "groq"):
        entry = sent(USER, message, profile=built_in()[name])["messages"][1]
        assert set(entry) == {"role", "content", "tool_calls"}
        assert set(entry["tool_calls"][0]) == {"id", "type", "function"}
    entry = sent(USER, message)["messages"][1]
    assert (entry["reasoning_content"], entry["reasoning_details"]) == ("hm", [1])
    assert entry["tool_calls"][0]["extra_content"] == {"google": {}}


def test_what_is_stored_wrongly_costs_the_field_and_not_the_request():
    message = ChatMessage("assistant", "", (ToolUse("r:1:0", "add", "{}", "{oops"),), provider="[]")
    assert calls_of(sent(USER, message)) == ["call00000"]


def refusal(**error):
    return orjson.dumps({"error": {"message": "no", **error}})


REQUEST = encode_request(
    ModelRequest(
        "m",
        (USER, use(1)),
        [ToolOffer("weather", "", {"type": "object", "properties": {"top_p": {}, "seed": {}}})],
        temperature=0.5,
        top_p=0.5,
        max_tokens=5,
        stop=("x",),
    )
)


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        (refusal(param="temperature"), {"temperature"}),
        (refusal(message="'stream_options' is not supported"), {"stream_options"}),
        (refusal(message="max_tokens is not for me, top_p is fine", param=None), {"max_tokens"}),
        (b'{"detail":[{"loc":["body","stream_options","include_usage"],"msg":"extra"}]}', {"stream_options"}),
        (b'{"message":{"detail":[{"loc":["body","top_p"],"msg":"extra"}]}}', {"top_p"}),
        (b'{"error":"unknown field: temperature"}', {"temperature"}),
        (b'[{"error":{"message":"Invalid value at \'top_p\'"}}]', {"top_p"}),
        (refusal(message="the stop is wrong", param="stop"), None),  # it would be another reply
        (
            refusal(
                message="Invalid schema for function 'weather': 'top_p'", param="tools[0].function.parameters"
            ),
            None,
        ),
        (b'{"detail":[{"loc":["body","tools",0,"seed"],"msg":"bad top_p"}]}', None),
        (refusal(message="the temperatures are high"), None),
        (refusal(param="logit_bias"), None),
        (refusal(param="seed"), None),  # was not sent
        (b"<html>", None),
        (b'"temperature"', None),
    ],
)
def test_a_refusal_teaches_what_it_names(answer, refused):
    learned = learn(NOTHING, 400, answer, REQUEST)
    assert (set(learned.refused) if learned else None) == refused
    assert learn(NOTHING, 500, answer, REQUEST) is None


def test_a_limit_that_is_refused_is_sent_under_its_other_name_and_then_left_out():
    learned = Learned(frozenset({"max_tokens"}))
    assert sent(max_tokens=5, learned=learned)["max_completion_tokens"] == 5
    both = Learned(frozenset({"max_tokens", "max_completion_tokens"}))
    assert set(sent(max_tokens=5, learned=both)) == {"model", "messages", "stream", "stream_options"}


def test_what_a_server_misses_is_given_and_not_left_out():
    said = refusal(message="The reasoning_content in the thinking mode must be passed back to the API.")
    learned = learn(NOTHING, 400, said, REQUEST)
    assert learned is not None
    assert sent(USER, use(1), learned=learned)["messages"][1]["reasoning_content"] == " "
    again = encode_request(ModelRequest("m", (USER, use(1))), TOLERANT, learned)
    assert learn(learned, 400, said, again) is None  # once is enough


def test_what_another_request_has_taught_meanwhile_is_reason_enough_for_a_second_try():
    said = refusal(message="temperature is not supported", param="temperature")
    learned = learn(NOTHING, 400, said, REQUEST)
    assert learned is not None
    assert learn(learned, 400, said, REQUEST) == learned
    said = refusal(message="The reasoning_content in the thinking mode must be passed back to the API.")
    wanted = learn(NOTHING, 400, said, REQUEST)
    assert wanted is not None
    assert learn(wanted, 400, said, REQUEST) == wanted


def test_a_spent_quota_is_not_waited_for():
    body = refusal(message="You exceeded your quota", type="insufficient_quota")
    error = error_of_status(status_of_answer(429, body), "m", 1.0)
    assert isinstance(error, ModelRateLimitedError)
    assert not error.retryable
    assert Retry().wait(1, error) is None
    assert Retry().wait(1, error_of_status(status_of_answer(429, b"{}"), "m", 1.0)) == 1.0


def test_the_query_of_a_base_url_is_kept():
    origin = Origin.parse("https://x.openai.azure.com/openai/deployments/d?api-version=1")
    assert (origin.path, origin.query) == ("/openai/deployments/d", "api-version=1")


OWN = """
[mine]
title = "Mine"
detect = { hosts = ["models.mine"] }

[[mine.quirks]]
id = "limit"
what = "as it is"
source = "https://mine.example"
set = { limit = "max_completion_tokens", message_fields = [] }
"""


def test_profiles_of_ones_own_are_used_like_the_others(tmp_path):
    file = tmp_path / "own.toml"
    file.write_text(OWN)
    profiles = Profiles(file)
    assert profiles.by_host("models.mine") == profiles.chosen(["mine"], 0)
    assert profiles.by_host("models.mine").limit == "max_completion_tokens"
    assert profiles.chosen(["openai", "mine"], 1).name == "mine"
    assert profiles.chosen(["auto"], 3) is None
    assert profiles.chosen(["unknown"], 0) is TOLERANT


WRONG = ("oops", "mine = 1", OWN.replace("limit =", "limt ="), OWN.replace("what =", "wat ="))


@pytest.mark.parametrize("text", WRONG)
def test_a_file_that_is_none_is_told(tmp_path, text):
    file = tmp_path / "own.toml"
    file.write_text(text)
    with pytest.raises(ProfileError, match=str(file)):
        Profiles(file)


@pytest.mark.parametrize(("names", "place"), [(["mstral"], 0), (["openai", "mistral"], 2)])
def test_a_profile_that_is_not_there_is_told(names, place):
    with pytest.raises(ProfileError):
        Profiles().chosen(names, place)


async def test_an_agent_does_not_start_with_a_profile_that_is_not_there():
    settings = AgentSettings(llm_base_url="http://127.0.0.1:9/v1", llm_profile="mstral", mesh_token="t" * 32)
    with pytest.raises(StartupError, match="mstral"):
        async with assemble(settings, configure_logging=False):
            pass


@pytest.mark.parametrize(
    ("bad", "good", "answer"),
    [
        (
            {"temperature": 1.9},
            {"temperature": 0.2},
            {
                "detail": [
                    {"loc": ["body", "temperature"], "msg": "Input should be less than or equal to 1.5"}
                ]
            },
        ),
        (
            {"max_tokens": 10**6},
            {"max_tokens": 20},
            {
                "error": {
                    "message": "max_tokens is too large: 1000000. This model supports at most 16384",
                    "param": "max_tokens",
                }
            },
        ),
    ],
)
def test_a_value_that_was_refused_takes_no_other_value_from_anybody(bad, good, answer):
    """What is learned is every tenant's: one's impossible value must not cost another's possible one."""
    request = encode_request(ModelRequest("m", (USER,), **bad))
    learned = learn(NOTHING, 422, orjson.dumps(answer), request)
    assert learned is not None
    ((name, value),) = good.items()
    assert sent(learned=learned, **good).get(name) == value
    # The second try of the request itself goes without it.
    assert not bad.keys() & sent(learned=learned, **bad).keys()
