"""Proto to domain and back; the only module of the service that knows both."""

from collections.abc import Iterable, Sequence
from typing import cast
from uuid import UUID

from hermesh.common.v1 import event_pb2
from hermesh.session.v1 import resources_pb2 as resources
from hermesh.session.v1 import session_internal_service_pb2 as internal
from meshkit.errors import FieldViolation, InvalidArgumentError
from services.session.domain import (
    ContextPosition,
    EffectClass,
    Event,
    Grant,
    LeaseRef,
    Message,
    NewEvent,
    NewMessage,
    NewToolCall,
    Run,
    RunContext,
    RunError,
    RunStatus,
    Session,
    StepCommit,
    ToolCall,
    Usage,
)


def uuid_of(text: str, field: str) -> UUID:
    """Returns an id of a request. Raises InvalidArgumentError that names the field."""
    try:
        return UUID(text)
    except ValueError as error:
        raise InvalidArgumentError(
            "INVALID_ARGUMENT",
            f"{field} must be a UUID",
            violations=[FieldViolation(field, "must be a UUID")],
        ) from error


def session_to_proto(session: Session) -> resources.Session:
    """Returns the wire's form of a session."""
    return resources.Session(
        session_id=str(session.session_id),
        title=session.title,
        metadata=dict(session.metadata),
        agent=session.agent,
        user=session.user,
        create_time_ms=session.create_time_ms,
        update_time_ms=session.update_time_ms,
        active_run_id=str(session.active_run_id) if session.active_run_id else "",
        message_count=session.message_count,
    )


def message_to_proto(message: Message, texts: dict[UUID, str] | None = None) -> resources.Message:
    """Returns the wire's form of a message.

    Args:
        message: The message.
        texts: Ids of sessions and runs as text, kept from message to message: writing them anew for each
            would be half of the work.
    """
    known = {} if texts is None else texts
    return resources.Message(
        message_id=str(message.message_id),
        session_id=known.get(message.session_id)
        or known.setdefault(message.session_id, str(message.session_id)),
        run_id=known.get(message.run_id) or known.setdefault(message.run_id, str(message.run_id)),
        ordinal=message.ordinal,
        role=message.role,
        content=message.content,
        tool_calls=message.tool_calls,
        tool_call_id=message.tool_call_id,
        create_time_ms=message.create_time_ms,
    )


def run_to_proto(run: Run) -> resources.Run:
    """Returns the wire's form of a run."""
    return resources.Run(
        run_id=str(run.run_id),
        session_id=str(run.session_id),
        ordinal=run.ordinal,
        status=cast(resources.RunStatus.ValueType, int(run.status)),
        model=run.model,
        attempt=run.attempt,
        last_seq=run.last_seq,
        error=None
        if run.error is None
        else resources.RunError(
            code=run.error.code,
            reason=run.error.reason,
            message=run.error.message,
            retryable=run.error.retryable,
        ),
        usage=None
        if run.usage is None
        else resources.Usage(
            input_tokens=run.usage.input_tokens,
            output_tokens=run.usage.output_tokens,
            cached_tokens=run.usage.cached_tokens,
        ),
        create_time_ms=run.create_time_ms,
        finish_time_ms=run.finish_time_ms,
        cancel_requested=run.cancel_requested,
        cancel_reason=run.cancel_reason,
    )


def event_to_proto(event: Event) -> event_pb2.Event:
    """Returns the wire's form of an event."""
    return event_pb2.Event(
        run_id=str(event.run_id), seq=event.seq, type=event.type, time_ms=event.time_ms, data=event.data
    )


def frame_of(events: Iterable[Event]) -> event_pb2.Frame:
    """Returns a frame of events of one run."""
    frame = event_pb2.Frame()
    run_id = ""
    for event in events:
        run_id = run_id or str(event.run_id)
        frame.events.add(
            run_id=run_id, seq=event.seq, type=event.type, time_ms=event.time_ms, data=event.data
        )
    return frame


def reconnect_frame(reason: str, after_ms: int = 0) -> event_pb2.Frame:
    """Returns the last frame of a stream that ends before its log does."""
    return event_pb2.Frame(reconnect=event_pb2.Reconnect(reason=reason, after_ms=after_ms))


def tool_call_to_proto(call: ToolCall) -> resources.ToolCall:
    """Returns the wire's form of a journal entry."""
    return resources.ToolCall(
        call_id=call.call_id,
        run_id=str(call.run_id),
        session_id=str(call.session_id),
        name=call.name,
        arguments=call.arguments,
        effect=cast(resources.EffectClass.ValueType, int(call.effect)),
        state=cast(resources.ToolCallState.ValueType, int(call.state)),
        content=call.content,
        content_ref=call.content_ref,
        idempotency_key=call.idempotency_key,
        fence=call.fence,
        needs_approval=call.needs_approval,
        tries=call.tries,
        quiet_in_ms=call.quiet_in_ms,
    )


def grant_to_proto(grant: Grant) -> resources.Grant:
    """Returns the wire's form of a grant."""
    return resources.Grant(
        session_id=str(grant.session_id),
        run_id=str(grant.run_id),
        fence=grant.fence,
        attach=grant.attach,
        next_seq=grant.next_seq,
        ttl_ms=grant.ttl_ms,
        time_left_ms=grant.time_left_ms,
    )


def context_to_proto(context: RunContext) -> resources.RunContext:
    """Returns the wire's form of a run's context."""
    texts: dict[UUID, str] = {}
    return resources.RunContext(
        messages=[message_to_proto(message, texts) for message in context.messages],
        events=[event_to_proto(event) for event in context.events],
        tool_calls=[tool_call_to_proto(call) for call in context.tool_calls],
        user=context.user,
        agent=context.agent,
        omitted_messages=context.omitted_messages,
        approval_tools=context.approval_tools,
        next=None
        if context.next is None
        else resources.ContextPosition(
            message=context.next.message, call=context.next.call, event=context.next.event
        ),
        written_bytes=context.written_bytes,
    )


def position_of(position: resources.ContextPosition) -> ContextPosition:
    """Returns the domain's form of a position."""
    return ContextPosition(position.message, position.call, position.event)


def options_of(stored: bytes) -> resources.RunOptions:
    """Returns run options from the bytes the store kept."""
    return resources.RunOptions.FromString(stored)


def lease_of(lease: internal.LeaseRef) -> LeaseRef:
    """Returns the domain's form of a lease that protovalidate has seen."""
    return LeaseRef(UUID(lease.session_id), UUID(lease.run_id), lease.fence)


def events_of(append: internal.RunAppend) -> Sequence[NewEvent]:
    """Returns an append's events without a copy: the message has the attributes of `domain.NewEvent`."""
    return cast(Sequence[NewEvent], append.events)


def commit_of(commit: internal.StepCommit) -> StepCommit:
    """Returns the domain's form of a step commit. Raises ValueError that says what is wrong."""
    status = RunStatus(commit.status) if commit.status else None
    if status in (RunStatus.QUEUED, RunStatus.RUNNING):
        raise ValueError(f"a step cannot set status {status.name}")
    return StepCommit(
        messages=[
            NewMessage(
                message_id=UUID(message.message_id),
                role=message.role,
                content=message.content,
                tool_calls=message.tool_calls,
                tool_call_id=message.tool_call_id,
            )
            for message in commit.messages
        ],
        intents=[
            NewToolCall(
                call_id=call.call_id,
                name=call.name,
                arguments=call.arguments,
                effect=EffectClass(call.effect or EffectClass.NON_IDEMPOTENT),
                idempotency_key=call.idempotency_key,
                needs_approval=call.needs_approval,
            )
            for call in commit.intents
        ],
        status=status,
        error=RunError(commit.error.code, commit.error.reason, commit.error.message, commit.error.retryable)
        if commit.HasField("error")
        else None,
        usage=Usage(commit.usage.input_tokens, commit.usage.output_tokens, commit.usage.cached_tokens)
        if commit.HasField("usage")
        else None,
        traceparent=commit.traceparent,
    )
