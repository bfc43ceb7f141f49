"""The loop: what to do next, given what was done.

`decide` looks at a `LoopState` and answers with one decision; the runner carries it out and feeds the
outcome back through `turn_done`, `turn_broken`, `calls_done`, `calls_asked` or `calls_reported`, each of
which returns the next state.
A step is one model turn with the tool calls it asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Literal

from services.agent.model.port import ChatMessage, ToolUse, Usage

# How often a call whose outcome is unknown is looked up by one replica: one that times out each time, and was
# not done each time, would go on for ever.
MAX_LOOKS = 3


class CallState(Enum):
    """A tool call's place in the journal."""

    INTENT = "intent"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    UNKNOWN = "unknown"

    @property
    def settled(self) -> bool:
        """Whether there is a result to give to the model."""
        return self in (CallState.COMPLETED, CallState.FAILED)


@dataclass(frozen=True, slots=True)
class Call:
    """One tool call of the current step.

    Attributes:
        call_id: `run:step:index`.
        name: the tool.
        arguments: a JSON object as text.
        state: as the journal has it.
        content: the result, or the error's text.
        content_ref: where a large result is as a whole; "" for others.
        needs_approval: a person must agree first.
        asked: whether the log has its `action.required` already, and nobody's word since.
        reported: whether the log has its outcome already.
        reconcilable: whether its tool may be able to look up what became of it.
        looks: how often that was done here.
        provider: what the model's backend may want to have back with the call; see `ToolUse`.
    """

    call_id: str
    name: str
    arguments: str
    state: CallState = CallState.INTENT
    content: str = ""
    needs_approval: bool = False
    asked: bool = False
    reported: bool = False
    reconcilable: bool = False
    looks: int = 0
    content_ref: str = ""
    provider: str = ""

    @property
    def waits(self) -> bool:
        """Whether only a person can settle it."""
        return self.state is CallState.UNKNOWN or (self.needs_approval and self.state is CallState.INTENT)

    @property
    def may_be_found_out(self) -> bool:
        """Whether its tool is to look up what became of it before a person is asked."""
        return self.state is CallState.UNKNOWN and self.reconcilable and self.looks < MAX_LOOKS


@dataclass(frozen=True, slots=True)
class Partial:
    """A model turn that was cut off after it had written something.

    Attributes:
        text: the reply's text in the log.
        first_seq: the seq of the turn's first text or reasoning event.
    """

    text: str
    first_seq: int


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one run.

    Attributes:
        max_turns: model turns.
        max_output_tokens: tokens written in all turns, 0 = no bound of ours.
        max_breaks: how often one model turn may break off and be taken up again.
        spare_requests: model requests beyond one for each turn.
        max_bytes: of events in its log, 0 = no bound.
    """

    max_turns: int = 16
    max_output_tokens: int = 0
    max_breaks: int = 1
    spare_requests: int = 32
    max_bytes: int = 0


@dataclass(frozen=True, slots=True)
class LoopState:
    """Everything that `decide` looks at.

    Attributes:
        messages: the conversation, with what this run has added to it.
        step: the current step, from 1; 0 before the first.
        turns: finished model turns of this run.
        partial: the current turn's text, when it was cut off.
        calls: the current step's calls, until all are settled and became messages.
        usage: tokens of this run's turns as far as this replica knows.
        finish_reason: set once a turn ended without calls.
        breaks: how often the current turn broke off here.
        requests: how many requests the attempts before have made to the model, as far as the log tells.
    """

    messages: tuple[ChatMessage, ...]
    step: int = 0
    turns: int = 0
    partial: Partial | None = None
    calls: tuple[Call, ...] = ()
    usage: Usage = field(default_factory=Usage)
    finish_reason: str = ""
    breaks: int = 0
    requests: int = 0


@dataclass(frozen=True, slots=True)
class Turn:
    """A whole model turn.

    Attributes:
        provider: what the model's backend may want to have back with the turn's message; see `ChatMessage`.
    """

    text: str
    calls: tuple[Call, ...]
    finish_reason: str
    usage: Usage
    provider: str = ""


@dataclass(frozen=True, slots=True)
class CallModel:
    """Ask the model.

    Attributes:
        step: the step that this turn belongs to.
        resume: "fresh" = a new step; "prefill" = go on after `prefix`; "reset" = tell readers to discard
            what came from `from_seq` on and write the turn anew; "again" = the step was begun before and
            has written nothing.
        prefix: text that the log already has of this turn.
        from_seq: with "prefill" and "reset": the seq of the turn's first text.
        max_tokens: the most tokens to write, 0 = no bound of ours.
    """

    step: int
    resume: Literal["fresh", "again", "prefill", "reset"] = "fresh"
    prefix: str = ""
    from_seq: int = 0
    max_tokens: int = 0


@dataclass(frozen=True, slots=True)
class CallTools:
    """Run these calls side by side."""

    step: int
    calls: tuple[Call, ...]


@dataclass(frozen=True, slots=True)
class AskApproval:
    """Ask a person about these calls, and go on with the others meanwhile."""

    calls: tuple[Call, ...]


@dataclass(frozen=True, slots=True)
class FindOut:
    """Have these calls' tools look up what became of them, side by side."""

    calls: tuple[Call, ...]


@dataclass(frozen=True, slots=True)
class ReportCalls:
    """All of the step's calls are settled: make them messages, with results that the log lacks."""

    calls: tuple[Call, ...]


@dataclass(frozen=True, slots=True)
class AwaitAction:
    """Stop until a person has settled these calls."""

    calls: tuple[Call, ...]


@dataclass(frozen=True, slots=True)
class Finish:
    """The run is done; its reply is the last assistant message."""

    finish_reason: str


@dataclass(frozen=True, slots=True)
class Fail:
    """The run failed. The fields are those of its `run.failed` event.

    `retry_after_ms` is how long the backend asked to wait, 0 where nobody said.
    """

    code: str
    reason: str
    message: str
    retryable: bool = False
    retry_after_ms: int = 0


Decision = CallModel | CallTools | AskApproval | FindOut | ReportCalls | AwaitAction | Finish | Fail


def decide(
    state: LoopState, limits: Limits, *, seconds_left: float, can_prefill: bool, written: int = 0
) -> Decision:
    """Say what to do next.

    Args:
        state: what was done.
        limits: the run's bounds.
        seconds_left: until the run's time limit.
        can_prefill: whether the backend continues a last message of role assistant.
        written: how many bytes of events the run has in its log, or on the way there.
    """
    if state.finish_reason and not state.calls:
        return Finish(state.finish_reason)
    waiting = tuple(call for call in state.calls if call.waits)
    if seconds_left <= 0:
        if any(call.state is CallState.UNKNOWN for call in waiting):
            # A call that may have run is never passed over: a person decides, however late it is.
            return AwaitAction(waiting)
        return Fail("DEADLINE_EXCEEDED", "RUN_TIMEOUT", "the run's time limit was reached", True)
    if state.calls and all(call.state.settled for call in state.calls):
        return ReportCalls(state.calls)
    if limits.max_bytes and written > limits.max_bytes:
        if any(call.state is CallState.UNKNOWN for call in waiting):
            return AwaitAction(waiting)
        return Fail(
            "RESOURCE_EXHAUSTED",
            "RUN_TOO_LARGE",
            f"the run has written {written} bytes and may write {limits.max_bytes}; what it did is stored",
        )
    if state.calls:
        todo = tuple(call for call in state.calls if not call.state.settled and not call.waits)
        unclear = tuple(call for call in waiting if call.may_be_found_out)
        unasked = tuple(call for call in waiting if call.state is CallState.INTENT and not call.asked)
        if unasked and (todo or unclear):
            return AskApproval(unasked)
        if todo:
            return CallTools(state.step, todo)
        return FindOut(unclear) if unclear else AwaitAction(waiting)
    if state.turns >= limits.max_turns:
        return Fail(
            "RESOURCE_EXHAUSTED", "TURN_LIMIT", f"the limit of {limits.max_turns} model turns was reached"
        )
    budget = 0
    if limits.max_output_tokens:
        budget = limits.max_output_tokens - state.usage.output_tokens
        if budget <= 0:
            return Finish("length")
    return _call_model(state, budget, can_prefill)


def _call_model(state: LoopState, budget: int, can_prefill: bool) -> CallModel:
    partial = state.partial
    if partial is None:
        # A step whose turn is not finished was begun by the attempt before: its number stays.
        begun = state.step > state.turns
        return CallModel(
            state.step if begun else state.step + 1, "again" if begun else "fresh", "", 0, budget
        )
    if can_prefill and partial.text:
        return CallModel(
            state.step, "prefill", prefix=partial.text, from_seq=partial.first_seq, max_tokens=budget
        )
    return CallModel(state.step, "reset", from_seq=partial.first_seq, max_tokens=budget)


def turn_begun(state: LoopState, decision: CallModel) -> LoopState:
    """Note that a model turn is under way; what was partial is now either its prefix or discarded."""
    return replace(state, step=decision.step, partial=None)


def turn_done(state: LoopState, turn: Turn) -> LoopState:
    """Add a finished model turn to the conversation."""
    uses = tuple(ToolUse(call.call_id, call.name, call.arguments, call.provider) for call in turn.calls)
    return replace(
        state,
        messages=(*state.messages, ChatMessage("assistant", turn.text, uses, provider=turn.provider)),
        turns=state.turns + 1,
        partial=None,
        calls=turn.calls,
        usage=state.usage + turn.usage,
        finish_reason="" if turn.calls else turn.finish_reason,
        breaks=0,
    )


def turn_broken(state: LoopState, partial: Partial | None, failure: Fail, limits: Limits) -> LoopState | Fail:
    """Note that a model turn broke off.

    Args:
        state: the state in the turn.
        partial: what the log has of it; None when it has nothing.
        failure: how it broke.
        limits: the run's bounds.

    Returns:
        The state to go on with when the turn may be taken up again, else the failure: nothing was written
        (the model's adapter has retried that already), or it broke too often.
    """
    if partial is None or not failure.retryable or state.breaks >= limits.max_breaks:
        return failure
    return replace(state, partial=partial, breaks=state.breaks + 1)


def calls_done(state: LoopState, results: Sequence[Call]) -> LoopState:
    """Note what calls came to."""
    by_id = {call.call_id: call for call in results}
    return replace(state, calls=tuple(by_id.get(call.call_id, call) for call in state.calls))


def calls_asked(state: LoopState, asked: Sequence[Call]) -> LoopState:
    """Note that a person was asked about calls."""
    return calls_done(state, [replace(call, asked=True) for call in asked])


def calls_reported(state: LoopState) -> LoopState:
    """Turn the step's settled calls into messages."""
    return replace(state, messages=(*state.messages, *tool_messages(state.calls)), calls=())


def tool_messages(calls: Sequence[Call]) -> tuple[ChatMessage, ...]:
    """Return the messages that tell the model what its calls came to, in the order it made them."""
    return tuple(ChatMessage("tool", call.content, (), call.call_id) for call in calls)
