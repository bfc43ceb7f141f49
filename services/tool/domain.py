"""What the tool service speaks about, free of gRPC."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from uuid import UUID


class CallState(IntEnum):
    """How a call ended; the numbers are the wire's (`session.v1.ToolCallState`)."""

    COMPLETED = 3
    FAILED = 4
    UNKNOWN = 5


class BeginOutcome(IntEnum):
    """Whether a tool may act (`session.v1.BeginOutcome`)."""

    GO = 1
    DONE = 2
    UNKNOWN = 3
    FENCED = 4
    NOT_APPROVED = 5


@dataclass(frozen=True, slots=True)
class CallRequest:
    """One journalled call as the agent asks for it.

    Attributes:
        arguments: A JSON object as text.
        ends_at: When the run's time is up, by this process's monotonic clock.
    """

    call_id: str
    tenant_id: UUID
    session_id: UUID
    run_id: UUID
    fence: int
    name: str
    arguments: str
    user: str = ""
    ends_at: float = math.inf


@dataclass(frozen=True, slots=True)
class Entry:
    """What the journal has about a call.

    Attributes:
        state: None while the call has not ended.
        content, content_ref: As in `Outcome`.
        idempotency_key: The same for every try.
        effect: The wire's number, 0 if unset.
        tries: How often it was begun.
        quiet_in: For how many more seconds a try that was begun may still act.
        may_begin: Whether no try is under way and one may be.
    """

    state: CallState | None
    content: str = ""
    content_ref: str = ""
    idempotency_key: str = ""
    effect: int = 0
    tries: int = 0
    quiet_in: float = 0.0
    may_begin: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call ended.

    Attributes:
        state: As the journal has it.
        content: The result for the model, or the error's text.
        content_ref: `sha256:<hex>` of a large result in the object store; `content` then has its beginning.
        reason: With FAILED or UNKNOWN, an `ErrorReason` without its prefix.
        reused: Whether an earlier try's result was used.
    """

    state: CallState
    content: str
    content_ref: str = ""
    reason: str = ""
    reused: bool = False
