"""From a claim, as the session service words it, to what the loop starts with."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import orjson

from hermesh.session.v1.resources_pb2 import (
    TOOL_CALL_STATE_COMPLETED,
    TOOL_CALL_STATE_FAILED,
    TOOL_CALL_STATE_INTENT,
    TOOL_CALL_STATE_RUNNING,
    TOOL_CALL_STATE_UNKNOWN,
    ContextPosition,
    RunContext,
    ToolCall,
)
from services.agent.clients.session import Claim
from services.agent.domain.loop import Call, CallState, LoopState
from services.agent.domain.prompt import RunSpec
from services.agent.domain.restore import LoggedEvent, StoredMessage, restore
from services.agent.settings import AgentSettings

_STATES = {
    TOOL_CALL_STATE_INTENT: CallState.INTENT,
    TOOL_CALL_STATE_RUNNING: CallState.RUNNING,
    TOOL_CALL_STATE_COMPLETED: CallState.COMPLETED,
    TOOL_CALL_STATE_FAILED: CallState.FAILED,
    TOOL_CALL_STATE_UNKNOWN: CallState.UNKNOWN,
}
NO_LIMIT_SECONDS = 7 * 86_400.0


@dataclass(frozen=True, slots=True)
class Start:
    """A claimed run.

    Attributes:
        spec: what was asked for, defaults filled in.
        messages: the conversation, this run's additions too.
        events: the run's own events that a takeover needs.
        journal: the run's tool calls.
        omitted: how many older messages the store left out.
        approval: tools whose calls the tenant wants approved, beside those that ask for it themselves.
        more: where the rest of messages, events and journal is to be read; None when this is all.
        written: how many bytes the run's log has.
    """

    spec: RunSpec
    messages: tuple[StoredMessage, ...]
    events: tuple[LoggedEvent, ...]
    journal: tuple[Call, ...]
    omitted: int
    approval: frozenset[str] = frozenset()
    more: ContextPosition | None = None
    written: int = 0

    @property
    def said(self) -> str:
        """What this run's input says."""
        own = [one.content for one in self.messages if one.run_id == self.spec.run_id and one.role == "user"]
        return "\n".join(own)

    @property
    def journalled(self) -> bool:
        """Whether the run has tool calls from an attempt before that no message answers."""
        return bool(self.journal)

    @property
    def traceparent(self) -> str:
        """Of the attempt that began the last step; empty for the first one, and where none was recorded."""
        steps = [event.data for event in self.events if event.type == "step.started"]
        return str(steps[-1].get("traceparent", "")) if steps else ""

    def whole(self, pages: Sequence[RunContext]) -> Start:
        """Return the same with the rest of its context.

        Raises:
            ValueError: a stored event is not a JSON object.
        """
        return replace(
            self,
            messages=(*self.messages, *(one for page in pages for one in _messages(page))),
            events=(*self.events, *(one for page in pages for one in _events(page))),
            journal=(*self.journal, *(_call(one) for page in pages for one in page.tool_calls)),
            more=None,
        )

    def restore(self, hookless: Collection[str]) -> LoopState:
        """Rebuild the state that the attempts before left; see `domain.restore`."""
        return restore(
            self.spec.run_id, self.messages, self.events, self.journal, hookless, self.spec.attempt
        )


def start_of(claim: Claim, settings: AgentSettings) -> Start:
    """Read a claim.

    Raises:
        ValueError: a stored event is not a JSON object.
    """
    run, context, options = claim.run, claim.context, claim.options
    spec = RunSpec(
        run_id=run.run_id,
        session_id=run.session_id,
        tenant_id=claim.tenant_id,
        model=options.model or run.model,
        instructions=options.instructions or settings.instructions,
        temperature=options.temperature if options.HasField("temperature") else None,
        top_p=options.top_p if options.HasField("top_p") else None,
        seed=options.seed if options.HasField("seed") else None,
        stop=tuple(options.stop),
        max_output_tokens=options.max_output_tokens or settings.max_output_tokens,
        max_turns=options.max_turns or settings.max_turns,
        timeout=claim.grant.time_left_ms / 1000 or NO_LIMIT_SECONDS,
        turn_timeout=min(options.turn_timeout_ms / 1000, NO_LIMIT_SECONDS) or settings.llm_turn_timeout,
        tools=tuple(options.tools),
        tool_choice=options.tool_choice or "auto",
        memory=options.memory if options.HasField("memory") else True,
        user=context.user,
        ordinal=run.ordinal,
        attempt=run.attempt,
        traceparent=options.traceparent,
    )
    return Start(
        spec,
        tuple(_messages(context)),
        tuple(_events(context)),
        tuple(_call(one) for one in context.tool_calls),
        context.omitted_messages,
        frozenset(context.approval_tools),
        context.next if context.HasField("next") else None,
        context.written_bytes,
    )


def _messages(context: RunContext) -> Iterator[StoredMessage]:
    for one in context.messages:
        yield StoredMessage(one.run_id, one.role, one.content, one.tool_calls, one.tool_call_id)


def _events(context: RunContext) -> Iterator[LoggedEvent]:
    for one in context.events:
        yield LoggedEvent(one.seq, one.type, _data(one.data))


def _data(text: str) -> dict[str, object]:
    data = orjson.loads(text or "{}")
    if not isinstance(data, dict):
        raise ValueError("an event's data is not a JSON object")
    return data


def _call(entry: ToolCall) -> Call:
    state = _STATES.get(entry.state, CallState.UNKNOWN)
    arguments = entry.arguments or "{}"
    return Call(
        entry.call_id,
        entry.name,
        arguments,
        state,
        entry.content,
        entry.needs_approval,
        content_ref=entry.content_ref,
    )
