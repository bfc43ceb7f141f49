"""Requests as bytes, as the server of a profile takes them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import orjson

from services.agent.model.faults import message_of
from services.agent.model.port import ChatMessage, ModelRequest, ToolOffer, ToolUse
from services.agent.model.profiles import CALL_FIELDS, MESSAGE_FIELDS, TOLERANT, Profile

# OpenAI's bound on a call's id.
MAX_ID = 40
# What opens a conversation that begins with the assistant, where roles must alternate.
OPENING = "(The conversation begins.)"
# What the assistant says there between a tool's result and the user, when a run ended without a reply.
NO_REPLY = "..."
# A field that a server wants and whose content is not known: any text will do.
_SOMETHING = " "
# Google's own word for a call that no Gemini made.
_NO_SIGNATURE = {"google": {"thought_signature": "skip_thought_signature_validator"}}
_NINE = re.compile(r"[a-zA-Z0-9]{9}")
_KIMI = re.compile(r"functions\.[^\s:]{1,100}:\d{1,6}")
_PRINTABLE = re.compile(r"[\x21-\x7e]+")

# What a server may refuse and a reply can do without. What would change what the reply is (tools, the choice
# among them, a schema, stop texts) is not among it.
_SPARED = (
    *("max_tokens", "max_completion_tokens", "stream_options", "temperature", "top_p", "seed", "random_seed"),
    *("continue_final_message", "add_generation_prompt", *MESSAGE_FIELDS, *CALL_FIELDS),
)
# By what a server calls it that misses something: the field that is then sent.
_WANTED = {"reasoning_content": "reasoning_content", "thought_signature": "extra_content"}
_MISSING = re.compile(r"missing|must be passed back|must include|is required", re.I)
# What is said of one value of a parameter, and what of the parameter itself, which goes before it.
_OUT_OF_BOUNDS = re.compile(
    r"(?:less|greater|more|higher|lower|larger|smaller) than|too (?:large|small|high|low|big|many|long)"
    r"|at (?:most|least)|maximum|minimum|exceed|out of range|between|<=|>=|\u2264|\u2265",
    re.I,
)
_NOT_TAKEN = re.compile(
    r"unsupported|not support|unknown|unrecogni[sz]ed|unexpected|not permitted|deprecated", re.I
)
# More values of one model are not remembered: what is forgotten costs another second try.
_MAX_VALUES = 100


@dataclass(frozen=True, slots=True)
class Learned:
    """What a server's refusals have taught about one of its models.

    Attributes:
        refused: parameters that it does not take.
        wanted: fields that its messages with tool calls must have.
        values: parameters that it takes, but not with these values, as JSON. What is learned holds for every
            tenant, and one's impossible value says nothing of another's.
    """

    refused: frozenset[str] = frozenset()
    wanted: frozenset[str] = frozenset()
    values: frozenset[tuple[str, bytes]] = frozenset()


NOTHING = Learned()


def encode_request(request: ModelRequest, profile: Profile = TOLERANT, learned: Learned = NOTHING) -> bytes:
    """Render the body of POST /chat/completions; only what is set is sent."""
    last = request.messages[-1] if request.messages else None
    prefilled = last is not None and last.role == "assistant" and not last.tool_calls
    body: dict[str, Any] = {
        "model": request.model,
        "messages": _Messages(profile, learned).render(request.messages, prefilled),
        "stream": True,
    }
    if profile.stream_options:
        body["stream_options"] = {"include_usage": True}
    if request.tools and request.tool_choice != "none":
        body["tools"] = [_tool(tool) for tool in request.tools]
        if request.tool_choice not in ("", "auto"):
            body["tool_choice"] = (
                "required"
                if request.tool_choice == "required"
                else {"type": "function", "function": {"name": request.tool_choice}}
            )
    if request.max_tokens:
        body[_limit(profile, learned)] = request.max_tokens
    for name, value in (
        ("temperature", request.temperature),
        ("top_p", request.top_p),
        (profile.seed, request.seed),
    ):
        if value is not None:
            body[name] = value
    if request.stop:
        body["stop"] = list(request.stop)
    if request.response_schema is not None:
        body["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "reply", "strict": True, "schema": request.response_schema},
        }
    if prefilled and profile.prefill == "flags":
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    for name in learned.refused:
        body.pop(name, None)
    for name, refused in learned.values:
        if name in body and orjson.dumps(body[name]) == refused:
            del body[name]
    return orjson.dumps(body)


def _limit(profile: Profile, learned: Learned) -> str:
    other = "max_tokens" if profile.limit == "max_completion_tokens" else "max_completion_tokens"
    return other if profile.limit in learned.refused else profile.limit


def _tool(tool: ToolOffer) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.schema}
    return {"type": "function", "function": function}


class _Messages:
    """Renders a conversation."""

    def __init__(self, profile: Profile, learned: Learned) -> None:
        self._profile = profile
        self._fields = [name for name in profile.message_fields if name not in learned.refused]
        self._always = (set(profile.always) | learned.wanted) - learned.refused
        self._call_fields = [name for name in profile.call_fields if name not in learned.refused]
        self._sent: dict[str, str] = {}
        self._used: set[str] = set()
        self._made = 0

    def render(self, messages: Sequence[ChatMessage], prefilled: bool) -> list[dict[str, Any]]:
        *others, last = messages if prefilled else (*messages, None)
        kept = [one for one in others if one is not None and not _empty(one)]
        if self._profile.alternate:
            kept = alternating(kept)
        out = [self._message(one) for one in kept]
        if last is not None:
            entry = self._message(last)
            if self._profile.prefill in ("prefix", "partial"):
                entry[self._profile.prefill] = True
            out.append(entry)
        return out

    def _message(self, message: ChatMessage) -> dict[str, Any]:
        entry: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.tool_calls:
            entry["content"] = message.content or None
            stored = _object(message.provider)
            for name in self._fields:
                if stored.get(name):
                    entry[name] = stored[name]
            for name in sorted(self._always.intersection(MESSAGE_FIELDS)):
                entry.setdefault(name, _SOMETHING)
            calls = [self._call(call) for call in message.tool_calls]
            if "extra_content" in self._always and not any("extra_content" in call for call in calls):
                calls[0]["extra_content"] = _NO_SIGNATURE
            entry["tool_calls"] = calls
        if message.tool_call_id:
            entry["tool_call_id"] = self._sent.get(message.tool_call_id) or self._id(message.tool_call_id)
        return entry

    def _call(self, call: ToolUse) -> dict[str, Any]:
        stored = _object(call.provider)
        entry: dict[str, Any] = {
            "id": self._id(call.call_id, stored.get("id"), call.name),
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        fields = stored.get("fields")
        if isinstance(fields, Mapping):
            entry |= {name: fields[name] for name in self._call_fields if name in fields}
        return entry

    def _id(self, call_id: str, own: object = None, name: str = "") -> str:
        """Return a call's id as it is sent: the model's own where that will do, else one made by order."""
        if call_id in self._sent:
            return self._sent[call_id]
        sent = own if isinstance(own, str) and self._fits(own) and own not in self._used else ""
        while not sent or sent in self._used:
            kimi = self._profile.call_ids == "kimi" and name
            sent = f"functions.{name}:{self._made}" if kimi else f"call{self._made:05d}"
            self._made += 1
        self._used.add(sent)
        self._sent[call_id] = sent
        return sent

    def _fits(self, own: str) -> bool:
        if self._profile.call_ids == "nine":
            return _NINE.fullmatch(own) is not None
        if self._profile.call_ids == "kimi":
            return _KIMI.fullmatch(own) is not None
        return len(own) <= MAX_ID and _PRINTABLE.fullmatch(own) is not None


def _object(text: str) -> Mapping[str, Any]:
    """Read a stored JSON object; what is none counts as empty."""
    if not text:
        return {}
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


def _empty(message: ChatMessage) -> bool:
    """Whether a message is one that many servers refuse: the assistant said and did nothing."""
    return message.role == "assistant" and not message.tool_calls and not message.content.strip()


def alternating(messages: Iterable[ChatMessage]) -> list[ChatMessage]:
    """Return a conversation that strict templates take.

    System messages are one and first, the user begins, two messages of one role in a row are one, and the
    assistant speaks between a tool's result and the user.
    """
    system: list[str] = []
    out: list[ChatMessage] = []
    for message in messages:
        last = out[-1] if out else None
        if message.role == "system":
            system.append(message.content)
        elif (
            last is not None
            and message.role == last.role
            and (message.role == "user" or (message.role == "assistant" and not last.tool_calls))
        ):
            joined = "\n\n".join(filter(None, (last.content, message.content)))
            out[-1] = replace(message, content=joined)
        else:
            if last is not None and (last.role, message.role) == ("tool", "user"):
                out.append(ChatMessage("assistant", NO_REPLY))
            out.append(message)
    if out and out[0].role == "assistant":
        out.insert(0, ChatMessage("user", OPENING))
    if system:
        out.insert(0, ChatMessage("system", "\n\n".join(filter(None, system))))
    return out


def learn(learned: Learned, status: int, answer: bytes, sent: bytes) -> Learned | None:
    """Return what a refusal teaches, None when nothing: then the same request would be refused again.

    Args:
        learned: what is known.
        status: the answer's.
        answer: its body.
        sent: the body of the request.
    """
    if status not in (400, 422):
        return None
    try:
        names, said = _named(orjson.loads(answer))
    except orjson.JSONDecodeError:
        return None
    # What counts is what this request had, not what is known: another one may have taught it meanwhile.
    body = orjson.loads(sent)
    in_request = _names_of(body)
    if _MISSING.search(said):
        for name, field in _WANTED.items():
            if name in said:
                given = field in learned.wanted and field in in_request
                if given:
                    return None
                return replace(learned, refused=learned.refused - {field}, wanted=learned.wanted | {field})
    for name in names:
        if name in in_request:
            if name in body and _OUT_OF_BOUNDS.search(said) and not _NOT_TAKEN.search(said):
                kept = learned.values if len(learned.values) < _MAX_VALUES else frozenset()
                return replace(learned, values=kept | {(name, orjson.dumps(body[name]))})
            return replace(learned, refused=learned.refused | {name}, wanted=learned.wanted - {name})
    return None


def _names_of(body: Mapping[str, Any]) -> set[str]:
    """Return the names of what a request's body, its messages and their calls have."""
    names = set(body)
    for message in body["messages"]:
        names.update(message)
        for call in message.get("tool_calls") or ():
            names.update(call)
    return names


def _named(body: object) -> tuple[list[str], str]:
    """Return the parameters that a refusal names, the surest first, and what it says."""
    if isinstance(body, list):
        body = body[0] if body else None
    if not isinstance(body, Mapping):
        return [], ""
    inner = body.get("error")
    error: Mapping[str, Any] = inner if isinstance(inner, Mapping) else body
    said = inner if isinstance(inner, str) else message_of(error)
    param = error.get("param")
    param = param if isinstance(param, str) else ""
    places = [str(place) for place in _places(error)]
    for place in (param, " ".join(places)):
        names = _names_in(place)
        if names:
            return names, said
    # A fault of a tool's schema may name anything.
    about_tools = param.startswith("tools") or "tools" in places
    return ([] if about_tools else _names_in(said)), said


def _names_in(text: str) -> list[str]:
    """Return the parameters that a text names, in its order."""
    found = {name: _at(name, text) for name in _SPARED}
    return sorted((name for name in found if found[name] < len(text)), key=found.__getitem__)


def _at(name: str, text: str) -> int:
    """Return where a text names a parameter, its length if it does not."""
    found = re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text)
    return found.start() if found else len(text)


def _places(value: object, depth: int = 0) -> Iterable[object]:
    """Yield the steps of all `loc` of a validation error, wherever they are."""
    if depth > 5:
        return
    if isinstance(value, Mapping):
        loc = value.get("loc")
        if isinstance(loc, list):
            yield from loc
        for name in ("detail", "message", "errors"):
            yield from _places(value.get(name), depth + 1)
    elif isinstance(value, list):
        for one in value[:50]:
            yield from _places(one, depth + 1)
