"""Rebuilds a run's state from what is stored: a pure fold, the same on every replica."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from meshkit import verbatim
from services.agent.domain.loop import Call, CallState, LoopState, Partial
from services.agent.model.port import ChatMessage, ToolUse


@dataclass(frozen=True, slots=True)
class StoredMessage:
    """A message as the session service has it; `tool_calls` is a JSON array as text or empty."""

    run_id: str
    role: str
    content: str
    tool_calls: str = ""
    tool_call_id: str = ""


@dataclass(frozen=True, slots=True)
class LoggedEvent:
    """An event of the run's log."""

    seq: int
    type: str
    data: Mapping[str, Any]


@dataclass(slots=True)
class _Fold:
    step: int = 0
    requests: int = 0
    attempt: int = 0
    pieces: list[tuple[int, str]] = field(default_factory=list)
    reported: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)


def restore(
    run_id: str,
    messages: Sequence[StoredMessage],
    events: Sequence[LoggedEvent] = (),
    journal: Sequence[Call] = (),
    hookless: Collection[str] = (),
    attempt: int = 1,
) -> LoopState:
    """Rebuild the state of a run.

    Args:
        run_id: the run.
        messages: the conversation with what this run has added, oldest first.
        events: at least everything of the current model turn and the `step.started` before it.
        journal: the run's tool calls, at least those that no message answers.
        hookless: names of tools that surely cannot look up what became of a call; the others are asked.
        attempt: which one this is, from 1.

    Returns:
        The state to go on with. Where the log has half a turn, `partial` says so.
    """
    fold = _fold(events)
    own = [message for message in _written(run_id, messages) if message.role == "assistant"]
    chat = tuple(to_chat(message) for message in messages)
    state = LoopState(
        messages=chat,
        # Without its step.started (an older log was cut) the number follows from the finished turns.
        step=max(fold.step, len(own)),
        turns=len(own),
        partial=_partial(fold),
        # An attempt that only continued a turn has said so nowhere.
        requests=max(fold.requests, len(own)) + max(0, attempt - 1 - fold.attempt),
    )
    if not own:
        return state
    uses = parse_tool_calls(own[-1].tool_calls)
    if not uses:
        return replace(state, finish_reason="stop")  # the reply is whole, only the run's end is missing
    answered = {message.tool_call_id for message in messages if message.role == "tool"}
    if all(use.call_id in answered for use in uses):
        return state
    by_id = {call.call_id: call for call in journal}
    # Many results become messages in several commits: those that did need nothing more.
    calls = tuple(
        _restore_call(use, by_id.get(use.call_id), fold, hookless)
        for use in uses
        if use.call_id not in answered
    )
    return replace(state, calls=calls)


def _written(run_id: str, messages: Sequence[StoredMessage]) -> list[StoredMessage]:
    """Return what the run itself wrote: its messages after its input.

    A caller may hand in a whole conversation, replies included; the input's last message is never one.
    """
    run = [message for message in messages if message.run_id == run_id]
    last_input = max((i for i, message in enumerate(run) if message.role in ("user", "system")), default=-1)
    return run[last_input + 1 :]


def _fold(events: Sequence[LoggedEvent]) -> _Fold:
    fold = _Fold()
    for event in events:
        data = event.data
        if event.type == "step.started":
            fold.step = int(data["step"])
            # Both are left out where nothing happened twice.
            fold.requests = int(data.get("request", fold.step))
            fold.attempt = int(data.get("attempt", 1))
            fold.pieces = []
        elif event.type == "text.delta":
            fold.pieces.append((event.seq, str(data["text"])))
        elif event.type == "reasoning.delta":
            fold.pieces.append((event.seq, ""))
        elif event.type == "attempt.reset":
            from_seq = int(data["from_seq"])
            fold.requests = int(data.get("request", fold.requests + 1))
            fold.attempt = int(data.get("attempt", fold.attempt))
            fold.pieces = [piece for piece in fold.pieces if piece[0] < from_seq]
        elif event.type == "message.completed":
            fold.pieces = []
        elif event.type == "tool.result":
            fold.reported[str(data["call_id"])] = data
        elif event.type == "action.required":
            fold.asked.add(str(data["call_id"]))
        elif event.type == "action.resolved":
            fold.asked.discard(str(data["call_id"]))
    return fold


def _partial(fold: _Fold) -> Partial | None:
    if not fold.pieces:
        return None
    return Partial("".join(text for _, text in fold.pieces), fold.pieces[0][0])


def _restore_call(use: ToolUse, entry: Call | None, fold: _Fold, hookless: Collection[str]) -> Call:
    reported = fold.reported.get(use.call_id)
    if entry is None:
        # It never got into the journal: it was refused when the model made it, and the log says how.
        content = str(reported.get("content", "")) if reported else "The call was not valid."
        return Call(
            use.call_id, use.name, use.arguments, CallState.FAILED, content, reported=reported is not None
        )
    return replace(
        entry,
        asked=use.call_id in fold.asked,
        # "unknown" was not the last word.
        reported=reported is not None and reported.get("status") != CallState.UNKNOWN.value,
        reconcilable=entry.name not in hookless,
    )


def to_chat(message: StoredMessage) -> ChatMessage:
    """Turn a stored message into what the model is given."""
    calls, provider = _read_calls(message.tool_calls)
    return ChatMessage(message.role, message.content, calls, message.tool_call_id, provider)


def parse_tool_calls(text: str) -> tuple[ToolUse, ...]:
    """Read the JSON array of a message's tool calls; text that is not one counts as none."""
    return _read_calls(text)[0]


def _read_calls(text: str) -> tuple[tuple[ToolUse, ...], str]:
    """Return a message's tool calls, and what its backend may want to have back with the message."""
    if not text:
        return (), ""
    try:
        entries = [verbatim.members(entry) for entry in verbatim.elements(text)]
        calls = tuple(
            ToolUse(
                str(orjson.loads(entry["call_id"])),
                str(orjson.loads(entry["name"])),
                _arguments(entry.get("arguments", "{}")),
                _provider(entry.get("provider", "")),
            )
            for entry in entries
        )
    except (ValueError, KeyError):
        return (), ""
    return calls, _provider(entries[0].get("message_provider", "")) if entries else ""


def _provider(value: str) -> str:
    return value if value.startswith("{") and value != "{}" else ""


def _arguments(value: str) -> str:
    """Return arguments as they were written; some are stored as a text that holds them."""
    return str(orjson.loads(value)) if value.startswith('"') else value


def stored_tool_calls(calls: Sequence[Call], provider: str) -> str:
    """Return a message's `tool_calls` as it is stored: with what the model's backend may want to have back.

    The entries are those of `render_tool_calls`, with `provider`; what goes with the message itself is
    `message_provider` of the first.

    Args:
        calls: the message's calls.
        provider: what goes back with the message, a JSON object's text or "".
    """
    if not calls:
        return ""
    entries = render_tool_calls(calls)
    for entry, call in zip(entries, calls, strict=True):
        if call.provider:
            entry["provider"] = orjson.Fragment(call.provider)
    if provider:
        entries[0]["message_provider"] = orjson.Fragment(provider)
    return orjson.dumps(entries).decode()


def render_tool_calls(calls: Sequence[Call]) -> list[dict[str, Any]]:
    """Return what a message's `tool_calls` holds: [{"call_id", "name", "arguments": {...}}]."""
    return [
        {"call_id": call.call_id, "name": call.name, "arguments": orjson.Fragment(call.arguments)}
        for call in calls
    ]
