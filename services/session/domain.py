"""What the session service speaks about, free of gRPC, SQL and Redis."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Generic, TypeVar
from uuid import UUID

T = TypeVar("T")


class RunStatus(IntEnum):
    """The state of a run; the numbers are the wire's (`session.v1.RunStatus`) and the table's."""

    QUEUED = 1
    RUNNING = 2
    REQUIRES_ACTION = 3
    COMPLETED = 4
    FAILED = 5
    CANCELLED = 6

    @property
    def terminal(self) -> bool:
        """Whether a run in this state never changes again."""
        return self >= RunStatus.COMPLETED


class ToolCallState(IntEnum):
    """A tool call's place in the journal (`session.v1.ToolCallState`)."""

    INTENT = 1
    RUNNING = 2
    COMPLETED = 3
    FAILED = 4
    UNKNOWN = 5


class EffectClass(IntEnum):
    """What may be done again after a crash (`session.v1.EffectClass`)."""

    PURE = 1
    IDEMPOTENT = 2
    NON_IDEMPOTENT = 3


class ConcurrencyPolicy(IntEnum):
    """What happens to input while a run is unfinished (`session.v1.ConcurrencyPolicy`)."""

    DEFAULT = 0
    ENQUEUE = 1
    REJECT = 2
    INTERRUPT = 3
    ROLLBACK = 4


class ClaimOutcome(IntEnum):
    """How a claim ended (`session.v1.ClaimOutcome`)."""

    CLAIMED = 1
    ALREADY_CLAIMED = 2
    FINISHED = 3
    REQUIRES_ACTION = 4


class AppendOutcome(IntEnum):
    """What became of a write (`session.v1.AppendOutcome`)."""

    COMMITTED = 1
    FENCED = 2
    GAP = 3
    RETRY = 4
    INVALID = 5


class BeginOutcome(IntEnum):
    """Whether a tool may act (`session.v1.BeginOutcome`)."""

    GO = 1
    DONE = 2
    UNKNOWN = 3
    FENCED = 4
    NOT_APPROVED = 5


class ActionDecision(IntEnum):
    """A person's word about a tool call (`session.v1.ActionDecision`)."""

    COMPLETED = 1
    FAILED = 2
    RETRY = 3
    ABANDON = 4
    APPROVE = 5
    DENY = 6


@dataclass(frozen=True, slots=True)
class Tenant:
    """A tenant and what holds for its runs unless a run says otherwise.

    Attributes:
        concurrency: What happens to input for a busy session; never DEFAULT.
        approval_tools: Tools whose every call a person must approve; `*` means all.
        run_timeout_ms: The time limit of its runs; None for the service's own.
    """

    tenant_id: UUID
    name: str
    concurrency: ConcurrencyPolicy
    approval_tools: Sequence[str]
    run_timeout_ms: int | None


@dataclass(frozen=True, slots=True)
class TenantChange:
    """What to change of a tenant's settings; None leaves a setting as it is.

    Attributes:
        run_timeout_ms: 0 takes the tenant's own limit away.
    """

    concurrency: ConcurrencyPolicy | None = None
    approval_tools: Sequence[str] | None = None
    run_timeout_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Session:
    """A conversation; times are Unix milliseconds."""

    session_id: UUID
    tenant_id: UUID
    title: str
    metadata: Mapping[str, str]
    agent: str
    user: str
    create_time_ms: int
    update_time_ms: int
    active_run_id: UUID | None
    message_count: int


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation; `ordinal` counts from 1 without a gap in a session."""

    message_id: UUID
    session_id: UUID
    run_id: UUID
    ordinal: int
    role: str
    content: str
    tool_calls: str
    tool_call_id: str
    create_time_ms: int


@dataclass(frozen=True, slots=True)
class RunError:
    """Why a run failed; `reason` is an ErrorReason without prefix."""

    code: str
    reason: str
    message: str
    retryable: bool


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a run as the model reported them."""

    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Run:
    """One input to a session and all that was done to answer it.

    `options` is the serialized `session.v1.RunOptions`, opaque to the store.
    """

    run_id: UUID
    session_id: UUID
    tenant_id: UUID
    ordinal: int
    status: RunStatus
    model: str
    attempt: int
    last_seq: int
    error: RunError | None
    usage: Usage | None
    create_time_ms: int
    finish_time_ms: int
    cancel_requested: bool
    cancel_reason: str
    options: bytes


@dataclass(frozen=True, slots=True)
class Event:
    """One entry of a run's log; `data` is a JSON object as text, the same bytes for every reader."""

    run_id: UUID
    seq: int
    type: str
    time_ms: int
    data: str

    @property
    def terminal(self) -> bool:
        """Whether nothing follows it in its run."""
        return self.type in TERMINAL_EVENTS


TERMINAL_EVENTS = frozenset({"run.completed", "run.failed", "run.cancelled"})


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One entry of the tool journal.

    Attributes:
        needs_approval: a person has to agree before it may begin; false once one has.
        tries: how often it was begun.
        quiet_in_ms: how much longer a try that was begun may still act, as of the reading.
    """

    call_id: str
    run_id: UUID
    session_id: UUID
    name: str
    arguments: str
    effect: EffectClass
    state: ToolCallState
    content: str
    content_ref: str
    idempotency_key: str
    fence: int
    needs_approval: bool = False
    tries: int = 0
    quiet_in_ms: int = 0

    @property
    def waits(self) -> bool:
        """Whether only a person's word lets it go on."""
        return self.state is ToolCallState.UNKNOWN or (
            self.state is ToolCallState.INTENT and self.needs_approval
        )


@dataclass(frozen=True, slots=True)
class PendingAction:
    """A call that its run waits for, and since when, Unix milliseconds."""

    call: ToolCall
    since_ms: int


@dataclass(frozen=True, slots=True)
class Decision:
    """A person's word about one call.

    Attributes:
        decision: what is to become of it.
        content: the result or the reason.
        request_id: the caller's idempotency key, or empty.
        fingerprint: of the whole request.
        time_ms: when, Unix milliseconds.
        data: the body of the event that says so, JSON as text.
    """

    decision: ActionDecision
    content: str
    request_id: str
    fingerprint: bytes
    time_ms: int
    data: str


@dataclass(frozen=True, slots=True)
class NewMessage:
    """A message before it has its ordinal; the agent chose `message_id`, so that a repeat is the same."""

    message_id: UUID
    role: str
    content: str
    tool_calls: str = ""
    tool_call_id: str = ""


@dataclass(frozen=True, slots=True)
class NewEvent:
    """An event before it has its seq."""

    type: str
    time_ms: int
    data: str


@dataclass(frozen=True, slots=True)
class NewToolCall:
    """The intent of a tool call, to be journalled."""

    call_id: str
    name: str
    arguments: str
    effect: EffectClass
    idempotency_key: str
    needs_approval: bool = False


@dataclass(frozen=True, slots=True)
class StepCommit:
    """What a step changes beside the log, in the same transaction.

    `traceparent` is of what the step was a part of; the store has no use for it.
    """

    messages: Sequence[NewMessage] = ()
    intents: Sequence[NewToolCall] = ()
    status: RunStatus | None = None
    error: RunError | None = None
    usage: Usage | None = None
    traceparent: str = ""


# These two are made for every few tokens. They are not frozen, because that doubles what making one costs.
@dataclass(slots=True)
class RunAppend:
    """One write of one run: events from `first_seq` on, and what commits with them.

    `size` is about how many bytes it holds, where a queue's bound needs it.
    """

    session_id: UUID
    run_id: UUID
    fence: int
    first_seq: int
    events: Sequence[NewEvent]
    commit: StepCommit | None = None
    size: int = 0


@dataclass(slots=True)
class AppendResult:
    """What became of a RunAppend; `next_seq` is PostgreSQL's word where it was asked, else 0."""

    run_id: UUID
    first_seq: int
    outcome: AppendOutcome
    next_seq: int = 0
    detail: str = ""


@dataclass(frozen=True, slots=True)
class LeaseRef:
    """A lease as its holder knows it."""

    session_id: UUID
    run_id: UUID
    fence: int
    attach: int = 0


@dataclass(frozen=True, slots=True)
class Grant:
    """A lease on a session for one run; its times run from the moment of the grant.

    Attributes:
        ttl_ms: How long the lease lasts.
        time_left_ms: How long the run may still take; 0 if that is not told (a re-attach changes nothing).
    """

    session_id: UUID
    run_id: UUID
    fence: int
    attach: int
    next_seq: int
    ttl_ms: int
    time_left_ms: int = 0


@dataclass(frozen=True, slots=True)
class ContextPosition:
    """How far a run's context was read: the ordinal of the last message, the place of the last call in the
    journal, the seq of the last event.
    """

    message: int = 0
    call: int = 0
    event: int = 0


@dataclass(frozen=True, slots=True)
class RunContext:
    """What an agent needs to go on with a run, as of the claim, or one page of it.

    Attributes:
        next: where the rest begins; None when this is all, or the last page.
        written_bytes: with a claim: how many bytes the data of the run's events has.
    """

    messages: Sequence[Message]
    events: Sequence[Event]
    tool_calls: Sequence[ToolCall]
    user: str
    agent: str
    omitted_messages: int = 0
    approval_tools: Sequence[str] = ()
    next: ContextPosition | None = None
    written_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Claim:
    """How a claim ended, with the grant and the context where it was won."""

    outcome: ClaimOutcome
    run: Run
    grant: Grant | None = None
    context: RunContext | None = None


@dataclass(frozen=True, slots=True)
class Submission:
    """A request to run: the input and how to run it; `timeout_ms` is 0 where the request sets no limit."""

    session_id: UUID
    input: Sequence[tuple[str, str]]
    options: bytes
    model: str
    request_id: str
    fingerprint: bytes
    concurrency: ConcurrencyPolicy
    claim_owner: str = ""
    timeout_ms: int = 0


@dataclass(frozen=True, slots=True)
class Submitted:
    """What became of a Submission; `claim` is set when the lease was asked for and taken."""

    run: Run
    created: Event
    duplicate: bool
    claim: Claim | None = None


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """One page of a list and the opaque token of the next; empty on the last."""

    items: Sequence[T]
    next_page_token: str = ""


@dataclass(frozen=True, slots=True)
class Renewal:
    """What a batch of renewals found: leases that are lost, runs that are to be cancelled, and leases that
    are neither lost nor renewed, because somebody has them locked.
    """

    lost: Sequence[UUID] = field(default=())
    cancelled: Sequence[UUID] = field(default=())
    busy: Sequence[UUID] = field(default=())


@dataclass(frozen=True, slots=True)
class Cut:
    """How many leases were cut, and how many could not be because somebody has them locked."""

    cut: int = 0
    locked: int = 0


@dataclass(frozen=True, slots=True)
class GoneSession:
    """A session that was deleted, and may have left results in the object store."""

    tenant_id: UUID
    session_id: UUID
