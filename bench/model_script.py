"""What the scripted model says: a pure function from a chat-completions request to a reply.

This is a test and bench double, not a language model. Its text is a fixed sequence of tokens, so that
two replicas (or the two halves of a reply that was broken off and continued) can be compared byte for
byte. A request steers it by directives, written in the model's name or in the last user message:

    [[tokens=50 rate=50]]            50 tokens, 50 a second (no rate: as fast as the socket takes them)
    [[delay=0.2]]                    seconds before the first byte of the reply
    [[id=17]]                        a name by which GET /starts tells when the reply began
    [[reason=20]]                    20 reasoning tokens before the text
    [[tool=calculator {"expression":"2+2"}]]   call a tool (may be repeated: the calls go side by side)
    [[tool=bulk {} calls=60 turns=3]]          60 of these calls in each of 3 turns, then the text; where any
                                     of their results is missing, it says that instead
    [[status=429 retry_after=1 times=2]]       answer with an HTTP error (the first 2 times only)
    [[garbage]] [[half]] [[silent]] [[empty]]  nonsense, a broken stream, no answer, an empty reply
    [[echo]]                         repeat the last user message
    [[json={"a":1}]]                 exactly this text
    [[counted=99999999999]]          say so much, whatever it is, as the counts of tokens

`times=N` limits any of the faults to the first N requests with the same text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

DEFAULT_MODEL = "scripted"
DEFAULT_TOKENS = 200
MAX_TOKENS = 1_000_000

_WORD = re.compile(r"\s*\S+|\s+$")
_DECODER = json.JSONDecoder()
_FAULTS = ("garbage", "half", "silent", "empty")


class BadRequest(Exception):
    """The request is not a chat-completions request; answered with 400."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call that the reply makes.

    Attributes:
        id: what the result will be matched by; made from the call's place, never random.
        name: the tool's name.
        arguments: its arguments as JSON text.
    """

    id: str
    name: str
    arguments: str


@dataclass(slots=True)
class Directives:
    """The parsed `[[...]]` directives of one request."""

    values: dict[str, str] = field(default_factory=dict)
    tools: list[tuple[str, str]] = field(default_factory=list)
    text: str | None = None

    def number(self, key: str, default: float) -> float:
        """Return a numeric directive or its default; nonsense counts as absent."""
        try:
            return float(self.values[key])
        except (KeyError, ValueError):
            return default


@dataclass(frozen=True, slots=True)
class Reply:
    """What to answer, and how.

    Attributes:
        status: HTTP status; anything but 200 sends an error object.
        retry_after: seconds for the Retry-After header of an error, or None.
        fault: "", "garbage", "half" or "silent".
        reasoning: reasoning tokens, sent before the text.
        tokens: text tokens, each its own chunk.
        tool_calls: calls made in place of (or after) the text.
        rate: tokens a second; 0 = as fast as the socket takes them.
        delay: seconds before the first byte.
        prompt_tokens: rough size of the request in tokens.
        finish: the finish reason.
        ident: the name under which the server notes when the reply began; "" for none.
        counted: JSON to send as the counts of tokens; "" for the right ones.
    """

    status: int = 200
    retry_after: float | None = None
    fault: str = ""
    reasoning: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    rate: float = 0.0
    delay: float = 0.0
    prompt_tokens: int = 0
    finish: str = "stop"
    ident: str = ""
    counted: str = ""


_SEQUENCE: list[str] = []


def sequence(count: int) -> tuple[str, ...]:
    """Return the first `count` tokens of the fixed sequence ("t0 ", "t1 ", ...)."""
    while len(_SEQUENCE) < count:
        _SEQUENCE.append(f"t{len(_SEQUENCE)} ")
    return tuple(_SEQUENCE[:count])


def words(text: str) -> tuple[str, ...]:
    """Split text into tokens that concatenate to it again."""
    return tuple(_WORD.findall(text))


def parse_directives(text: str) -> Directives:
    """Read every directive in `text`; unknown words are kept as flags with the value "1"."""
    found = Directives()
    position = text.find("[[")
    while position >= 0:
        position += 2
        if text.startswith("tool=", position):
            name_end = _end_of_word(text, position + 5)
            arguments, after = _json_at(text, name_end)
            found.tools.append((text[position + 5 : name_end], arguments or "{}"))
        elif text.startswith("json=", position):
            found.text, after = _json_at(text, position + 5)
        else:
            after = position
        close = text.find("]]", after)
        if close < 0:
            break
        for word in text[after:close].split():
            key, _, value = word.partition("=")
            found.values[key] = value or "1"
        position = text.find("[[", close)
    return found


def _end_of_word(text: str, start: int) -> int:
    end = start
    while end < len(text) and not text[end].isspace() and not text.startswith("]]", end):
        end += 1
    return end


def _json_at(text: str, start: int) -> tuple[str | None, int]:
    while start < len(text) and text[start].isspace():
        start += 1
    try:
        _, end = _DECODER.raw_decode(text, start)
    except json.JSONDecodeError:
        return None, start
    return text[start:end], end


def content_text(message: Mapping[str, Any]) -> str:
    """Return a message's text, whether its content is a string, parts or absent."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return ""


def messages_of(request: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the request's messages.

    Raises:
        BadRequest: they are absent, empty or not objects with a role.
    """
    messages = request.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages must be a list with at least one message")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRequest("each message needs a role")
    return messages


def script_text(request: Mapping[str, Any]) -> str:
    """Return what may hold directives: the model's name, then the last input.

    An agent joins user messages in a row by empty lines: each input is steered by its own directives alone.
    """
    inputs = last_said(messages_of(request)).split("\n\n")
    last = next((one for one in reversed(inputs) if "[[" in one), inputs[-1])
    return f"{request.get('model', '')}\n{last}"


def last_said(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return the text of the last user message, "" when there is none."""
    for message in reversed(messages):
        if message["role"] == "user":
            return content_text(message)
    return ""


def reply_to(request: Mapping[str, Any], seen: int = 0) -> Reply:
    """Decide the reply to one request.

    Args:
        request: the decoded body of POST /v1/chat/completions.
        seen: how many requests with the same script text came before this one.

    Raises:
        BadRequest: the body is not a chat-completions request.
    """
    messages = messages_of(request)
    said = last_said(messages)
    directives = parse_directives(script_text(request))
    values = directives.values
    prompt = sum(len(content_text(m)) for m in messages) // 4 + 1
    faulty = seen < directives.number("times", float("inf"))
    rate = max(0.0, directives.number("rate", 0.0))
    delay = max(0.0, directives.number("delay", 0.0))

    if "status" in values and faulty:
        after = directives.number("retry_after", 1.0) if values["status"] == "429" else None
        if "retry_after" in values:
            after = directives.number("retry_after", 1.0)
        return Reply(status=int(directives.number("status", 500)), retry_after=after, delay=delay)

    fault = next((f for f in _FAULTS if f in values), "") if faulty else ""
    count = min(MAX_TOKENS, max(0, int(directives.number("tokens", DEFAULT_TOKENS))))
    tokens, calls = _content(request, messages, directives, said, count)
    if fault == "empty":
        tokens, calls = (), ()
    last = messages[-1]
    if last["role"] == "assistant" and not last.get("tool_calls"):
        tokens = continue_after(tokens, content_text(last))
    limit = request.get("max_completion_tokens") or request.get("max_tokens")
    finish = "tool_calls" if calls else "stop"
    if isinstance(limit, int) and 0 < limit < len(tokens):
        tokens, calls, finish = tokens[:limit], (), "length"
    return Reply(
        fault="" if fault == "empty" else fault,
        reasoning=sequence(int(directives.number("reason", 0))),
        tokens=tokens,
        tool_calls=calls,
        # Steps on the way to a text are not what its rate is about.
        rate=0.0 if calls and "turns" in values else rate,
        delay=delay,
        prompt_tokens=prompt,
        finish=finish,
        ident=values.get("id", ""),
        counted=values.get("counted", ""),
    )


def _content(
    request: Mapping[str, Any],
    messages: Sequence[Mapping[str, Any]],
    directives: Directives,
    said: str,
    count: int,
) -> tuple[tuple[str, ...], tuple[ToolCall, ...]]:
    results = _results_after_last_user(messages)
    wanted = _constrained_call(request, directives)
    turns = int(directives.number("turns", 0))
    made = directives.tools * max(0, int(directives.number("calls", 1)))
    missing = _turns_after_last_user(messages) * len(made) - len(results)
    if directives.tools and turns and missing > 0:
        return words(f"{missing} results are missing"), ()
    if directives.tools and results and turns and _turns_after_last_user(messages) >= turns:
        return sequence(count), ()
    if directives.tools and results and not turns:
        return words("The tool said: " + "; ".join(results)), ()
    if wanted is not None and not results:
        return words(wanted), ()
    if directives.tools and _offers_tools(request):
        calls = tuple(
            ToolCall(f"call_{index}", name, arguments) for index, (name, arguments) in enumerate(made)
        )
        # With an explicit tokens=N the reply also says something before it calls.
        return (sequence(count) if "tokens" in directives.values and not turns else ()), calls
    if directives.text is not None:
        return words(directives.text), ()
    if "echo" in directives.values:
        return words(said), ()
    return sequence(count), ()


def _results_after_last_user(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    results: list[str] = []
    for message in reversed(messages):
        if message["role"] == "user":
            break
        if message["role"] == "tool":
            results.append(content_text(message))
    return results[::-1]


def _turns_after_last_user(messages: Sequence[Mapping[str, Any]]) -> int:
    last = max((place for place, message in enumerate(messages) if message["role"] == "user"), default=0)
    return sum(bool(message.get("tool_calls")) for message in messages[last:])


def _offers_tools(request: Mapping[str, Any]) -> bool:
    return bool(request.get("tools")) and request.get("tool_choice") != "none"


def _constrained_call(request: Mapping[str, Any], directives: Directives) -> str | None:
    """Return the JSON that a grammar-constrained model would write, when the request asks for one."""
    asked = request.get("response_format")
    if not isinstance(asked, dict) or asked.get("type") != "json_schema" or not directives.tools:
        return None
    name, arguments = directives.tools[0]
    return json.dumps({"name": name, "arguments": json.loads(arguments)})


def continue_after(tokens: Sequence[str], prefix: str) -> tuple[str, ...]:
    """Return what is left of a reply whose first characters were already said.

    A prefix that the reply does not start with is ignored, as a model would go on in its own words.
    """
    if not "".join(tokens).startswith(prefix):
        return tuple(tokens)
    left = len(prefix)
    for index, token in enumerate(tokens):
        if left < len(token):
            return (token[left:], *tokens[index + 1 :])
        left -= len(token)
    return ()
