"""Makes the model's request out of a run's state: system prompt, history that fits, tools, prefill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import orjson

from services.agent.domain.loop import Turn
from services.agent.model.port import ChatMessage, ModelRequest, ToolOffer, Usage

ToolMode = Literal["native", "json", "none"]

# Tokens are estimated by bytes: short for prose, generous for code, and no tokenizer of a model is ours.
_BYTES_A_TOKEN = 3.5
_OVERHEAD = 8


@dataclass(frozen=True, slots=True)
class RunSpec:
    """What was asked for one run, with defaults filled in.

    Attributes:
        tool_choice: "auto", "none", "required" or a tool's name; it binds the first turn only.
        timeout: how long the run may still take from its claim on, seconds.
        turn_timeout: how long one model turn may take, seconds.
        memory: whether long-term memory is read and written.
        traceparent: of the request that the input came with, where that is recorded.
    """

    run_id: str
    session_id: str
    tenant_id: str
    model: str
    instructions: str = ""
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    max_output_tokens: int = 0
    max_turns: int = 16
    timeout: float = 600.0
    turn_timeout: float = 300.0
    tools: tuple[str, ...] = ()
    tool_choice: str = "auto"
    memory: bool = True
    user: str = ""
    ordinal: int = 0
    attempt: int = 1
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class Background:
    """What is known beside the conversation.

    Attributes:
        preferences: the user's, by name.
        memories: what was recalled, best first.
    """

    preferences: Mapping[str, str] | None = None
    memories: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Prompt:
    """A model request, and whether its reply is a grammar-constrained tool call."""

    request: ModelRequest
    constrained: bool = False


def build_prompt(
    spec: RunSpec,
    messages: Sequence[ChatMessage],
    background: Background,
    tools: Sequence[ToolOffer],
    *,
    mode: ToolMode,
    first_turn: bool,
    prefix: str = "",
    max_tokens: int = 0,
    context_tokens: int = 0,
) -> Prompt:
    """Make the request of one model turn.

    Args:
        spec: what was asked for.
        messages: the conversation with this run's input and additions.
        background: preferences and memories.
        tools: what may be offered, already limited to what the run may call.
        mode: how the backend calls tools.
        first_turn: whether `tool_choice` still binds.
        prefix: text to be continued (prefill), "" for none.
        max_tokens: the most tokens to write.
        context_tokens: the backend's window, 0 = not known; older messages are left out to fit it.
    """
    choice = spec.tool_choice if first_turn or spec.tool_choice == "none" else "auto"
    schema: Mapping[str, Any] | None = None
    offered: Sequence[ToolOffer] = ()
    wanted: Sequence[ToolOffer] = ()
    if mode == "native" and choice != "none":
        offered = tools
    elif mode == "json" and choice not in ("auto", "none"):
        wanted = [tool for tool in tools if choice in ("required", tool.name)]
        if wanted:
            schema = _call_schema(wanted)
    chat = list(messages) if mode == "native" else [plain(message) for message in messages]
    if mode == "native":
        chat = _answered_only(chat)
    system = system_prompt(spec.instructions, background, wanted)
    room = context_tokens - max_tokens - estimate(prefix) if context_tokens else 0
    chat = fit(system, chat, room) if context_tokens else chat
    if system:
        chat.insert(0, ChatMessage("system", system))
    if prefix:
        chat.append(ChatMessage("assistant", prefix))
    request = ModelRequest(
        model=spec.model,
        messages=chat,
        tools=offered,
        tool_choice=choice,
        max_tokens=max_tokens,
        temperature=spec.temperature,
        top_p=spec.top_p,
        seed=spec.seed,
        stop=spec.stop,
        response_schema=schema,
        cache_key=spec.session_id,
    )
    return Prompt(request, schema is not None)


def system_prompt(instructions: str, background: Background, tools: Sequence[ToolOffer] = ()) -> str:
    """Return the system prompt, "" when there is nothing to say."""
    parts = [instructions] if instructions else []
    if background.preferences:
        lines = [f"- {name}: {value}" for name, value in sorted(background.preferences.items())]
        parts.append("The user's preferences:\n" + "\n".join(lines))
    if background.memories:
        lines = [f"- {memory}" for memory in background.memories]
        parts.append("From earlier conversations, if it helps:\n" + "\n".join(lines))
    if tools:
        # A model that needs a grammar to call tools is a small one: a whole schema in its prompt confuses it,
        # and the grammar holds the schema anyway.
        lines = [_signature(tool) for tool in tools]
        parts.append("Answer with one tool call as JSON. The tools:\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _signature(tool: ToolOffer) -> str:
    names = ", ".join(tool.schema.get("properties", {}))
    return f"- {tool.name}({names}): {tool.description.split('. ')[0]}"


def plain(message: ChatMessage) -> ChatMessage:
    """Write tool calls and results as text, for a model whose template has no place for them."""
    if message.role == "tool":
        return ChatMessage("user", f"The tool returned: {message.content}\nUse it to answer my question.")
    if message.tool_calls:
        calls = [
            {"name": use.name, "arguments": orjson.Fragment(use.arguments)} for use in message.tool_calls
        ]
        text = "\n".join(orjson.dumps(call).decode() for call in calls)
        return ChatMessage("assistant", f"{message.content}\n{text}".strip())
    return message


def _call_schema(tools: Sequence[ToolOffer]) -> dict[str, Any]:
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.name}, "arguments": dict(tool.schema)},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def _answered_only(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Drop calls without results and results without calls: an earlier run may have been cut off there."""
    answered = {message.tool_call_id for message in messages if message.role == "tool"}
    called: set[str] = set()
    out: list[ChatMessage] = []
    for message in messages:
        if message.role == "tool" and message.tool_call_id not in called:
            continue
        if message.tool_calls:
            kept = tuple(use for use in message.tool_calls if use.call_id in answered)
            called |= {use.call_id for use in kept}
            if not kept and not message.content:
                continue
            message = replace(message, tool_calls=kept)
        out.append(message)
    return out


def estimate(text: str) -> int:
    """Estimate the tokens of a text, on the large side."""
    return int(len(text.encode()) / _BYTES_A_TOKEN) + 1 if text else 0


def _size(message: ChatMessage) -> int:
    uses = sum(
        estimate(use.name) + estimate(use.arguments) + estimate(use.provider) for use in message.tool_calls
    )
    return estimate(message.content) + estimate(message.provider) + uses + _OVERHEAD


def estimated_usage(request: ModelRequest, turn: Turn) -> Usage:
    """Estimate the tokens of a turn that was cut before its backend said how many they are."""
    written = estimate(turn.text) + sum(estimate(call.name) + estimate(call.arguments) for call in turn.calls)
    return Usage(sum(_size(message) for message in request.messages), written)


def fit(system: str, messages: Sequence[ChatMessage], room: int) -> list[ChatMessage]:
    """Leave out the oldest messages until the rest fits.

    The last user message and what follows it always stay: without them there is nothing to answer.
    """
    last_user = max((i for i, message in enumerate(messages) if message.role == "user"), default=0)
    left = room - estimate(system) - sum(_size(message) for message in messages[last_user:])
    start = last_user
    while start > 0:
        left -= _size(messages[start - 1])
        if left < 0:
            break
        start -= 1
    # A history that opens with a tool's result, or a reply to nothing, confuses every template.
    while start < last_user and messages[start].role not in ("user", "system"):
        start += 1
    return list(messages[start:])
