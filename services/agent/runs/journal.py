"""What a run writes: each method is one batch of events with what commits beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from hermesh.session.v1.resources_pb2 import (
    EFFECT_CLASS_IDEMPOTENT,
    EFFECT_CLASS_PURE,
    RUN_STATUS_CANCELLED,
    RUN_STATUS_COMPLETED,
    RUN_STATUS_FAILED,
    RUN_STATUS_REQUIRES_ACTION,
    TOOL_CALL_STATE_INTENT,
    EffectClass,
    RunError,
    ToolCall,
)
from hermesh.session.v1.resources_pb2 import Usage as UsageProto
from hermesh.session.v1.session_internal_service_pb2 import NewMessage, StepCommit
from meshkit import tracing
from meshkit.ids import uuid7
from services.agent.clients.memory import Recalled
from services.agent.domain.loop import Call, CallState, Fail, Turn
from services.agent.domain.restore import render_tool_calls, stored_tool_calls
from services.agent.model.port import ChatMessage, Usage
from services.agent.runs.writer import RunWriter

# Characters of tool messages in one commit: results of a step may be more than a message between services.
MAX_COMMIT = 512 * 1024

_EFFECTS = {EFFECT_CLASS_PURE: "pure", EFFECT_CLASS_IDEMPOTENT: "idempotent"}


class RunJournal:
    """Renders a run's history into events and commits, and hands them to its writer.

    Args:
        writer: where they go.
    """

    def __init__(self, writer: RunWriter) -> None:
        self._writer = writer
        self._carried: list[NewMessage] = []

    def started(self, attempt: int, replica: str) -> None:
        """This replica begins to work on the run."""
        self._writer.event("run.started", {"attempt": attempt, "replica": replica}, patient=True)

    def step(self, number: int, request: int, attempt: int) -> None:
        """A step begins; results of the step before become messages with it.

        Args:
            number: of the step.
            request: of the run's requests to its model, the one that this step makes.
            attempt: of the run's, this one.
        """
        commit = self._carry(StepCommit()) if self._carried else None
        data: dict[str, int | str] = {"step": number}
        if request != number:
            data["request"] = request
        if attempt > 1:
            data["attempt"] = attempt
        if tracing.recording():
            # Whoever takes the run over finds in it what to link its trace to.
            data["traceparent"] = tracing.current_traceparent()
        self._writer.events([("step.started", data)], commit, patient=True)

    def reset(self, from_seq: int, reason: str, request: int, attempt: int) -> None:
        """Readers discard what came from a seq on; `request` and `attempt` are as in `step`."""
        data = {"from_seq": from_seq, "reason": reason, "request": request, "attempt": attempt}
        self._writer.event("attempt.reset", data, patient=True)

    def degraded(self, part: str, detail: str) -> None:
        """The run goes on without something."""
        self._writer.event("context.degraded", {"part": part, "detail": detail}, patient=True)

    def recalled(self, memories: Sequence[Recalled]) -> None:
        """Memories were found."""
        entries = [
            {"memory_id": memory.memory_id, "text": memory.text, "score": round(memory.score, 4)}
            for memory in memories
        ]
        self._writer.event("memory.recalled", {"memories": entries}, patient=True)

    def called(self, turn: Turn, effects: dict[str, EffectClass.ValueType]) -> None:
        """A model turn ended with tool calls; those that can run get their intent into the journal.

        Args:
            turn: the turn.
            effects: by call id, of the calls that can run.
        """
        message_id = str(uuid7())
        rendered = render_tool_calls(turn.calls)
        stored = stored_tool_calls(turn.calls, turn.provider)
        commit = StepCommit(messages=[_assistant(message_id, turn.text, stored)])
        for call in turn.calls:
            if call.call_id in effects:
                commit.intents.append(
                    ToolCall(
                        call_id=call.call_id,
                        run_id=self._writer.run_id,
                        session_id=self._writer.session_id,
                        name=call.name,
                        arguments=call.arguments,
                        effect=effects[call.call_id],
                        state=TOOL_CALL_STATE_INTENT,
                        idempotency_key=call.call_id,
                        needs_approval=call.needs_approval,
                    )
                )
        events = [_completed(message_id, turn.text, rendered)]
        for call, entry in zip(turn.calls, rendered, strict=True):
            effect = _EFFECTS.get(effects.get(call.call_id, EffectClass.ValueType(0)), "non_idempotent")
            events.append(("tool.call", {**entry, "effect": effect}))
        self._writer.events(events, self._carry(commit))

    def progress(self, call_id: str, text: str) -> None:
        """A tool call gave a sign of life."""
        self._writer.event("tool.progress", {"call_id": call_id, "text": text})

    def result(self, call: Call) -> None:
        """A tool call came to something."""
        data = {"call_id": call.call_id, "status": call.state.value, "content": call.content}
        if call.content_ref:
            data["content_ref"] = call.content_ref
        self._writer.event("tool.result", data)

    def reconciled(self, call: Call) -> None:
        """A call's tool looked up what became of it."""
        finding = "not_done" if call.state is CallState.INTENT else call.state.value
        self._writer.event("tool.reconciled", {"call_id": call.call_id, "finding": finding})

    def asks(self, calls: Sequence[Call]) -> None:
        """A person is asked about calls while the run goes on."""
        self._writer.events([_required(call) for call in calls])

    def carry(self, messages: Sequence[ChatMessage]) -> None:
        """Store tool messages with the next event that commits anything."""
        self._carried += [
            NewMessage(
                message_id=str(uuid7()), role="tool", content=one.content, tool_call_id=one.tool_call_id
            )
            for one in messages
        ]

    def requires_action(self, calls: Sequence[Call]) -> None:
        """The run waits for a person; those calls are asked about that were not yet."""
        events = [_required(call) for call in calls if not call.asked]
        self._writer.events(events, self._carry(StepCommit(status=RUN_STATUS_REQUIRES_ACTION)))

    def completed(self, text: str | None, finish_reason: str, usage: Usage, ttft_ms: int) -> None:
        """The run is done.

        Args:
            text: the reply, None when it is stored already.
            finish_reason: of the last turn.
            usage: tokens of the run.
            ttft_ms: from the claim to the first token, 0 when there was none.
        """
        message_id = str(uuid7())
        commit = self._carry(StepCommit(status=RUN_STATUS_COMPLETED, usage=_usage(usage)))
        events: list[tuple[str, dict[str, Any]]] = []
        if text is not None:
            commit.messages.append(_assistant(message_id, text))
            events.append(_completed(message_id, text, []))
        events.append(_usage_event(usage, ttft_ms))
        events.append(
            (
                "run.completed",
                {"message_id": message_id if text is not None else "", "finish_reason": finish_reason},
            )
        )
        self._writer.events(events, commit)

    def failed(self, failure: Fail, usage: Usage, ttft_ms: int) -> None:
        """The run failed."""
        error = RunError(
            code=failure.code, reason=failure.reason, message=failure.message, retryable=failure.retryable
        )
        commit = self._carry(StepCommit(status=RUN_STATUS_FAILED, error=error, usage=_usage(usage)))
        data = {
            "code": failure.code,
            "reason": failure.reason,
            "message": failure.message,
            "retryable": failure.retryable,
        }
        if failure.retry_after_ms:
            data["retry_after_ms"] = failure.retry_after_ms
        events = [_usage_event(usage, ttft_ms)] if usage != Usage() else []
        self._writer.events([*events, ("run.failed", data)], commit)

    def cancelled(self, text: str, reason: str, usage: Usage, ttft_ms: int) -> None:
        """The run was cancelled.

        Args:
            text: what the turn had written; it is kept as a message.
            reason: why, as whoever asked said.
            usage: tokens of the run.
            ttft_ms: from the claim to the first token, 0 when there was none.
        """
        commit = self._carry(StepCommit(status=RUN_STATUS_CANCELLED, usage=_usage(usage)))
        events: list[tuple[str, dict[str, Any]]] = []
        if text:
            message_id = str(uuid7())
            commit.messages.append(_assistant(message_id, text))
            events.append(_completed(message_id, text, []))
        if usage != Usage():
            events.append(_usage_event(usage, ttft_ms))
        self._writer.events([*events, ("run.cancelled", {"reason": reason})], commit)

    def _carry(self, commit: StepCommit) -> StepCommit:
        """Put carried messages before a commit's own; what would make it too large is stored before it."""
        if not self._carried:
            return commit
        own = list(commit.messages)
        del commit.messages[:]
        carried, self._carried = self._carried, []
        size = 0
        chunk: list[NewMessage] = []
        for message in carried:
            if chunk and size + len(message.content) > MAX_COMMIT:
                self._writer.events([], StepCommit(messages=chunk))
                size, chunk = 0, []
            chunk.append(message)
            size += len(message.content)
        commit.messages.extend([*chunk, *own])
        return commit


def _assistant(message_id: str, text: str, tool_calls: str = "") -> NewMessage:
    return NewMessage(message_id=message_id, role="assistant", content=text, tool_calls=tool_calls)


def _required(call: Call) -> tuple[str, dict[str, Any]]:
    data = {
        "call_id": call.call_id,
        "kind": "unknown" if call.state is CallState.UNKNOWN else "approval",
        "name": call.name,
        "arguments": orjson.Fragment(call.arguments),
        # For readers whose parser rounds numbers: what a person agrees to is what runs.
        "arguments_text": call.arguments,
    }
    return "action.required", data


def _completed(message_id: str, text: str, calls: list[dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    data = {"message_id": message_id, "role": "assistant", "content": text, "tool_calls": calls}
    return "message.completed", data


def _usage(usage: Usage) -> UsageProto:
    return UsageProto(
        input_tokens=usage.input_tokens, output_tokens=usage.output_tokens, cached_tokens=usage.cached_tokens
    )


def _usage_event(usage: Usage, ttft_ms: int) -> tuple[str, dict[str, Any]]:
    data = {
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "cached_tokens": usage.cached_tokens,
        "ttft_ms": ttft_ms,
    }
    return "usage", data
