"""The bodies of the native API, and their translation from and to the protos.

Names are the protos'. Times are Unix milliseconds.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, Field, model_validator

from gateway.body import StrictModel, check_input
from hermesh.agent.v1 import agent_service_pb2 as agent_pb
from hermesh.common.v1.event_pb2 import InputMessage
from hermesh.session.v1 import resources_pb2 as resources
from hermesh.session.v1 import session_service_pb2 as session_pb
from meshkit import verbatim

MAX_MESSAGES = 256

Label = Annotated[str, Field(max_length=512)]
LabelName = Annotated[str, Field(min_length=1, max_length=64)]
Metadata = Annotated[dict[LabelName, Label], Field(max_length=32)]


class CreateSession(StrictModel):
    """What a new session starts with; all of it optional."""

    title: str = Field("", max_length=200, description="Shown in lists; empty: from the first message.")
    metadata: Metadata = Field(default_factory=dict, description="The caller's own labels.")
    agent: str = Field("", max_length=100, description="The agent; empty means the default one.")
    user: str = Field(
        "", max_length=200, description="Whose memories apply; empty keeps memory inside this session."
    )


class UpdateSession(StrictModel):
    """What changes."""

    title: str | None = Field(None, max_length=200, description="The new title.")
    metadata: Metadata = Field(
        default_factory=dict, description="Labels to set; an empty value removes the label."
    )


class Session(BaseModel):
    """A conversation of one user with an agent."""

    session_id: str = Field(description="A UUIDv7.")
    title: str = Field(description="Shown in lists.")
    metadata: dict[str, str] = Field(description="The caller's own labels.")
    agent: str = Field(description="The agent; empty means the default one.")
    user: str = Field(description="Whose memories apply.")
    create_time_ms: int = Field(description="Created, Unix milliseconds.")
    update_time_ms: int = Field(description="Last changed, Unix milliseconds.")
    active_run_id: str | None = Field(description="The run that holds the session now.")
    message_count: int = Field(description="How many messages it has.")


class SessionPage(BaseModel):
    """One page of sessions, last changed first."""

    sessions: list[Session]
    next_page_token: str = Field(description="Empty on the last page.")


class ToolCallOfMessage(BaseModel):
    """A call that an assistant's message made."""

    call_id: str
    name: str
    arguments: dict[str, Any] = Field(description="As the model wrote them: numbers may be of any length.")


class Message(BaseModel):
    """One message of a conversation."""

    message_id: str = Field(description="A UUIDv7.")
    session_id: str
    run_id: str = Field(description="The run that wrote it.")
    ordinal: int = Field(description="Position in the session, from 1.")
    role: Literal["system", "user", "assistant", "tool"]
    content: str
    tool_calls: list[ToolCallOfMessage] = Field(description="Calls that an assistant's message made.")
    tool_call_id: str | None = Field(description="Of a tool's message: the call it answers.")
    create_time_ms: int = Field(description="Created, Unix milliseconds.")


class MessagePage(BaseModel):
    """One page of messages, oldest first."""

    messages: list[Message]
    next_page_token: str = Field(description="Empty on the last page.")


class NewMessage(StrictModel):
    """A message that the caller adds."""

    role: Literal["user", "system", "assistant"] = Field(description="Who says it.")
    content: str = Field(description="The text.")


class Options(StrictModel):
    """What is set for one run; what is left out has its default."""

    model: str = Field("", max_length=200, description="A model of GET /v1/models.")
    instructions: str = Field("", description="Replaces the agent's system prompt.")
    temperature: float | None = Field(None, ge=0, le=2, description="Sampling temperature.")
    top_p: float | None = Field(None, gt=0, le=1, description="Nucleus sampling.")
    max_output_tokens: int | None = Field(None, ge=1, le=2**31 - 1, description="The reply's most tokens.")
    tools: list[str] = Field(default_factory=list, max_length=128, description="Tools the run may call.")
    tool_choice: str = Field("", max_length=200, description="auto, none, required, or a tool's name.")
    max_turns: int | None = Field(None, ge=1, le=1000, description="The most model turns.")
    timeout_ms: int | None = Field(
        None,
        ge=1,
        le=24 * 3600 * 1000,
        description="The run's time limit, from its first claim on; waiting for a person does not count.",
    )
    turn_timeout_ms: int | None = Field(
        None, ge=1, le=24 * 3600 * 1000, description="The time limit of one model turn."
    )
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1, description="Sampling seed.")
    stop: list[str] = Field(default_factory=list, max_length=16, description="Strings that end the reply.")
    memory: bool | None = Field(None, description="Whether long-term memory is read and written.")

    def to_proto(self) -> resources.RunOptions:
        """Returns the same for a run."""
        return resources.RunOptions(**{k: v for k, v in self.model_dump().items() if v is not None})


class CreateRun(StrictModel):
    """New input to a session."""

    input: str | Annotated[list[NewMessage], Field(min_length=1, max_length=MAX_MESSAGES)] = Field(
        description="A text by the user, or messages."
    )
    stream: bool = Field(False, description="Answer with the run's events (SSE) instead of 202.")
    model: str = Field("", max_length=200, description="The same as `options.model`.")
    concurrency: Literal["enqueue", "reject", "interrupt", "rollback"] | None = Field(
        None, description="What happens when the session is busy; the tenant's default if left out."
    )
    options: Options = Field(
        default_factory=lambda: Options.model_validate({}), description="What is set for this run."
    )

    @model_validator(mode="after")
    def _not_empty(self) -> CreateRun:
        if not self.input or (isinstance(self.input, str) and not self.input.strip()):
            raise ValueError("the input is empty")
        if self.model and self.options.model and self.model != self.options.model:
            raise ValueError("model and options.model differ")
        return self

    @property
    def chosen_model(self) -> str:
        """The model asked for; empty for the default."""
        return self.model or self.options.model

    def messages(self) -> list[InputMessage]:
        """Returns the input for a run.

        Raises:
            InvalidArgumentError: INPUT_TOO_LARGE.
        """
        if isinstance(self.input, str):
            messages = [InputMessage(role="user", content=self.input)]
        else:
            messages = [InputMessage(role=item.role, content=item.content) for item in self.input]
        check_input(messages)
        return messages

    def policy(self) -> resources.ConcurrencyPolicy.ValueType:
        """Returns the concurrency policy."""
        if self.concurrency is None:
            return resources.CONCURRENCY_POLICY_UNSPECIFIED
        return resources.ConcurrencyPolicy.Value(f"CONCURRENCY_POLICY_{self.concurrency.upper()}")

    def run_request(self, session_id: str, request_id: str) -> agent_pb.RunRequest:
        """Returns the request for the agent."""
        return agent_pb.RunRequest(
            session_id=session_id,
            input=self.messages(),
            options=self.options.to_proto(),
            request_id=request_id,
            concurrency=self.policy(),
        )

    def submit_request(self, session_id: str, request_id: str) -> session_pb.SubmitRunRequest:
        """Returns the request for the session service."""
        return session_pb.SubmitRunRequest(
            session_id=session_id,
            input=self.messages(),
            options=self.options.to_proto(),
            request_id=request_id,
            concurrency=self.policy(),
        )


class RunError(BaseModel):
    """Why a run failed."""

    code: str = Field(description="Canonical code.")
    reason: str
    message: str
    retryable: bool = Field(description="Whether the same input may succeed when sent again.")


class Usage(BaseModel):
    """The tokens of a run."""

    input_tokens: int
    output_tokens: int
    cached_tokens: int


class PendingAction(BaseModel):
    """A tool call that waits for a person."""

    call_id: str
    kind: Literal["unknown", "approval"] = Field(
        description="It is not known whether it took effect, or it needs approval."
    )
    name: str
    arguments: Any = Field(description="As the model wrote them: numbers may be of any length.")
    arguments_text: str = Field(description="The same as text, for parsers that round numbers.")
    effect: str
    state: str
    may_act_ms: int = Field(description="For how many more milliseconds an earlier try may still act.")


class WaitingAction(PendingAction):
    """A tool call that waits for a person, whichever run and session it is of."""

    run_id: str
    session_id: str
    waiting_since_ms: int = Field(description="Unix milliseconds.")


class ActionPage(BaseModel):
    """One page of tool calls that wait for a person, the oldest run first."""

    actions: list[WaitingAction]
    next_page_token: str = Field(description="Empty on the last page.")


RunStatus = Literal["queued", "running", "requires_action", "completed", "failed", "cancelled"]


class Run(BaseModel):
    """One input to a session and everything done to answer it."""

    run_id: str = Field(description="A UUIDv7.")
    session_id: str
    ordinal: int = Field(description="Position among the session's runs, from 1.")
    status: RunStatus
    model: str = Field(description="The model asked for; empty means the default.")
    attempt: int = Field(description="How often an agent claimed it.")
    last_seq: int = Field(description="The highest seq in its log.")
    error: RunError | None
    usage: Usage | None
    create_time_ms: int = Field(description="Created, Unix milliseconds.")
    finish_time_ms: int | None = Field(description="Finished, Unix milliseconds.")
    cancel_requested: bool
    pending_actions: list[PendingAction] = Field(description="Tool calls that wait for a person.")


class RunPage(BaseModel):
    """One page of runs, newest first."""

    runs: list[Run]
    next_page_token: str = Field(description="Empty on the last page.")


class CancelRun(StrictModel):
    """Why; the body may be left out."""

    reason: str = Field("", max_length=500, description="Shown in the run's terminal event.")


class ResolveAction(StrictModel):
    """A person's word about a tool call."""

    decision: Literal["completed", "failed", "retry", "abandon", "approve", "deny"] = Field(
        description="It was done, it was not done, run it again, give the run up; or, of a call that needs "
        "approval, let it run or not."
    )
    content: str = Field("", max_length=65536, description="The result or the reason.")


class Model(BaseModel):
    """A model that runs may ask for, in OpenAI's shape."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str


class ModelList(BaseModel):
    """All models; the first one is the default."""

    object: Literal["list"] = "list"
    data: list[Model]


def session_json(session: resources.Session) -> dict[str, Any]:
    """Returns a `Session`."""
    return {
        "session_id": session.session_id,
        "title": session.title,
        "metadata": dict(session.metadata),
        "agent": session.agent,
        "user": session.user,
        "create_time_ms": session.create_time_ms,
        "update_time_ms": session.update_time_ms,
        "active_run_id": session.active_run_id or None,
        "message_count": session.message_count,
    }


def message_json(message: resources.Message) -> dict[str, Any]:
    """Returns a `Message`."""
    return {
        "message_id": message.message_id,
        "session_id": message.session_id,
        "run_id": message.run_id,
        "ordinal": message.ordinal,
        "role": message.role,
        "content": message.content,
        "tool_calls": _tool_calls(message.tool_calls),
        "tool_call_id": message.tool_call_id or None,
        "create_time_ms": message.create_time_ms,
    }


def run_json(run: resources.Run, pending: Any = ()) -> dict[str, Any]:
    """Returns a `Run`, with the tool calls that wait for a person."""
    failed = run.HasField("error")
    used = run.HasField("usage")
    return {
        "run_id": run.run_id,
        "session_id": run.session_id,
        "ordinal": run.ordinal,
        "status": resources.RunStatus.Name(run.status).removeprefix("RUN_STATUS_").lower(),
        "model": run.model,
        "attempt": run.attempt,
        "last_seq": run.last_seq,
        "error": {
            "code": run.error.code,
            "reason": run.error.reason,
            "message": run.error.message,
            "retryable": run.error.retryable,
        }
        if failed
        else None,
        "usage": {
            "input_tokens": run.usage.input_tokens,
            "output_tokens": run.usage.output_tokens,
            "cached_tokens": run.usage.cached_tokens,
        }
        if used
        else None,
        "create_time_ms": run.create_time_ms,
        "finish_time_ms": run.finish_time_ms or None,
        "cancel_requested": run.cancel_requested,
        "pending_actions": [action_json(item) for item in pending],
    }


def action_json(item: resources.ToolCall) -> dict[str, Any]:
    """Returns a `PendingAction`."""
    return {
        "call_id": item.call_id,
        "kind": "approval" if item.state == resources.TOOL_CALL_STATE_INTENT else "unknown",
        "name": item.name,
        "arguments": verbatim.fragment(item.arguments, "{}"),
        "arguments_text": item.arguments,
        "effect": resources.EffectClass.Name(item.effect).removeprefix("EFFECT_CLASS_").lower(),
        "state": resources.ToolCallState.Name(item.state).removeprefix("TOOL_CALL_STATE_").lower(),
        "may_act_ms": item.quiet_in_ms,
    }


def waiting_json(item: session_pb.PendingAction) -> dict[str, Any]:
    """Returns a `WaitingAction`."""
    call = item.tool_call
    return action_json(call) | {
        "run_id": call.run_id,
        "session_id": call.session_id,
        "waiting_since_ms": item.waiting_since_ms,
    }


def decision_proto(decision: str) -> session_pb.ActionDecision.ValueType:
    """Returns a decision by its name."""
    return session_pb.ActionDecision.Value(f"ACTION_DECISION_{decision.upper()}")


def is_finished(run: resources.Run) -> bool:
    """Whether a run reached its terminal state."""
    return run.status in (
        resources.RUN_STATUS_COMPLETED,
        resources.RUN_STATUS_FAILED,
        resources.RUN_STATUS_CANCELLED,
    )


def _tool_calls(text: str) -> list[dict[str, Any]]:
    """Returns the calls of a message, as the model wrote them; none of a text that holds no calls."""
    if not text:
        return []
    try:
        calls = [verbatim.members(call) for call in verbatim.elements(text)]
        # What the model's backend wants back stands beside these, and is nobody else's.
        return [
            {
                "call_id": orjson.Fragment(call["call_id"]),
                "name": orjson.Fragment(call["name"]),
                "arguments": orjson.Fragment(call["arguments"]),
            }
            for call in calls
        ]
    except (ValueError, KeyError):
        return []
