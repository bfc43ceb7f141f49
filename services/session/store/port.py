"""The store's port: what the session service asks of PostgreSQL, and every adapter has to answer.

Every method that a caller's key can reach takes the tenant and sees nothing of another's. Methods
raise `meshkit.errors` (NotFoundError, AbortedError, UnavailableError, ...), never a driver's error.
"""

from collections.abc import Sequence
from typing import Protocol
from uuid import UUID

from services.session.domain import (
    AppendResult,
    BeginOutcome,
    Claim,
    ContextPosition,
    Cut,
    Decision,
    Event,
    GoneSession,
    Grant,
    LeaseRef,
    Message,
    Page,
    PendingAction,
    Renewal,
    Run,
    RunAppend,
    RunContext,
    Session,
    Submission,
    Submitted,
    Tenant,
    TenantChange,
    ToolCall,
    ToolCallState,
)

# What a claim returns of the conversation's history: the newest messages before the run within both limits.
MAX_CONTEXT_MESSAGES = 200
MAX_CONTEXT_BYTES = 512 * 1024
# What one answer holds of what a run itself has stored, beside its last item.
CONTEXT_PAGE_BYTES = 512 * 1024
# The same for a page of any list.
PAGE_BYTES = 1024 * 1024
# Of a session: a page of the largest stays well below what a call's answer may be.
MAX_LABELS = 64


class Tenants(Protocol):
    """Tenants and their API keys; a key is stored as the SHA-256 of its text, in hex."""

    async def tenant_of_key(self, key_hash: str) -> UUID | None:
        """Returns the tenant of a key that is not revoked, else None.

        Raises:
            UnavailableError: TENANT_MOVED: another cell has it.
        """
        ...

    async def moved_tenants(self) -> frozenset[UUID]:
        """Returns the tenants that were moved to another cell and are served here no more."""
        ...

    async def ensure_key(self, tenant_name: str, key_hash: str, key_name: str) -> UUID:
        """Makes the tenant and the key if they are not there; returns the tenant."""
        ...

    async def get_tenant(self, name: str) -> Tenant | None:
        """Returns a tenant with its settings; None if no tenant has this name."""
        ...

    async def set_tenant(self, name: str, change: TenantChange) -> Tenant | None:
        """Changes a tenant's settings, for runs accepted or claimed from now on; returns it as it is then, or
        None if no tenant has this name.
        """
        ...


class Conversations(Protocol):
    """Sessions and their messages."""

    async def create_session(
        self,
        tenant_id: UUID,
        *,
        title: str,
        metadata: dict[str, str],
        agent: str,
        user: str,
        request_id: str,
        fingerprint: bytes,
    ) -> Session:
        """Creates a session, or returns what `request_id` made (REQUEST_ID_REUSED on another body)."""
        ...

    async def get_session(self, tenant_id: UUID, session_id: UUID) -> Session:
        """Returns a session. Raises NotFoundError(SESSION_NOT_FOUND)."""
        ...

    async def list_sessions(
        self, tenant_id: UUID, *, page_size: int, page_token: str, user: str = ""
    ) -> Page[Session]:
        """Lists sessions, last changed first. Raises InvalidArgumentError(PAGE_TOKEN_INVALID)."""
        ...

    async def update_session(
        self, tenant_id: UUID, session_id: UUID, *, title: str | None, metadata: dict[str, str]
    ) -> Session:
        """Sets the title if given, and labels; an empty value removes the label.

        Raises:
            ResourceExhaustedError: There would be more than MAX_LABELS (QUOTA_EXCEEDED).
        """
        ...

    async def delete_session(self, tenant_id: UUID, session_id: UUID) -> list[ToolCall]:
        """Deletes a session with all that hangs on it; its lease too, so that a writer is fenced.

        Returns the calls that may act at this moment: while there are any, nothing is deleted.
        """
        ...

    async def list_messages(
        self, tenant_id: UUID, session_id: UUID, *, page_size: int, page_token: str
    ) -> Page[Message]:
        """Lists messages, oldest first; a page ends early where it would be larger than `PAGE_BYTES`."""
        ...

    async def history(self, tenant_id: UUID, session_id: UUID, last: int) -> list[Message]:
        """Returns the newest messages up to the ordinal `last`, within a context's limits, oldest first."""
        ...


class Runs(Protocol):
    """Runs: accepting, claiming, finding what to dispatch."""

    async def submit(self, tenant_id: UUID, submission: Submission, *, history: bool = True) -> Submitted:
        """Accepts input in one transaction: idempotency key, messages, run, first event and, if asked and
        free, the lease. Raises NotFoundError, AlreadyExistsError(REQUEST_ID_REUSED),
        FailedPreconditionError(SESSION_BUSY).
        """
        ...

    async def claim(self, run_id: UUID, owner: str, *, history: bool = True) -> Claim:
        """Takes the lease of a run if the session is free and the run is its next. A run whose cancel was
        asked for, whose time is up, or that was claimed five times without progress, is finished here. Of
        what the run itself stored the context has the first page.
        """
        ...

    async def read_context(self, run_id: UUID, fence: int, position: ContextPosition) -> RunContext:
        """Returns the next page of a claimed run's context, for whoever holds its lease by any fence of this
        claim. Raises AbortedError(FENCE_STALE).
        """
        ...

    async def get_run(self, tenant_id: UUID, run_id: UUID) -> Run:
        """Returns a run. Raises NotFoundError(RUN_NOT_FOUND)."""
        ...

    async def accepted(self, tenant_id: UUID, request_id: str) -> bool:
        """Returns whether input with this idempotency key was accepted."""
        ...

    async def list_runs(
        self, tenant_id: UUID, session_id: UUID, *, page_size: int, page_token: str
    ) -> Page[Run]:
        """Lists runs, newest first."""
        ...

    async def runs_from(self, tenant_id: UUID, session_id: UUID, ordinal: int, limit: int) -> list[Run]:
        """Returns runs whose ordinal is at least `ordinal`, in order."""
        ...

    async def cancel(self, tenant_id: UUID, run_id: UUID, reason: str) -> tuple[Run, Event | None]:
        """Asks for a cancel, durably. A run that no agent holds is cancelled here, and its terminal event
        returned; else the holder is told by notification.
        """
        ...

    async def fail_held(self, ref: LeaseRef, message: str) -> Run | None:
        """Ends a run whose holder cannot write its end: as failed with `message`, or as cancelled if that was
        asked for. Any fence of the current claim will do. Returns None when the claim is over.
        """
        ...

    async def due(self, limit: int, *, again: bool = False) -> list[UUID]:
        """Takes up to `limit` runs to dispatch (queued and next in their session, or orphaned) and sets
        their `dispatch_after` 2 s ahead; SKIP LOCKED, so replicas never take the same ones. Tenants take
        turns. With `again` those that were taken within the last 2 s, too.
        """
        ...

    async def queued(self) -> dict[UUID, int]:
        """Returns how many runs of each tenant wait, for an agent or for another run of their session."""
        ...

    async def end_orphans(self, limit: int) -> int:
        """Ends up to `limit` runs that nobody holds and that are to be cancelled or past their time limit, so
        that this needs no agent; returns how many. Watchers are told by notification.
        """
        ...


class Log(Protocol):
    """The event log and the leases that guard it."""

    async def append(self, appends: Sequence[RunAppend]) -> list[AppendResult]:
        """Writes plain appends (no commit) of distinct sessions in one autocommit statement; each is won
        or refused by itself. Raises UnavailableError when the outcome of all is unknown.
        """
        ...

    async def append_step(self, append: RunAppend) -> AppendResult:
        """Writes one append with its StepCommit in one transaction; a terminal status releases the lease
        and makes the session's next queued run due at once. A repeat of a committed one is a GAP.
        """
        ...

    async def reattach(self, ref: LeaseRef, owner: str) -> Grant | None:
        """Renews a lease under a new fence (`fence + 1`, `attach + 1`); None when it is lost. The owner may
        name an earlier fence than the current one: an answer that got lost is asked for again.
        """
        ...

    async def renew(self, refs: Sequence[LeaseRef], owner: str = "") -> Renewal:
        """Extends leases in one statement that locks in session order; `owner` as in `reattach`."""
        ...

    async def release(self, ref: LeaseRef, owner: str = "") -> bool:
        """Gives a lease up before its run is done; the run is due at once. `owner` as in `reattach`."""
        ...

    async def shorten(self, refs: Sequence[LeaseRef], grace_ms: int) -> set[UUID]:
        """Cuts leases to `grace_ms` from now where fence and attach still match; returns their runs. Those
        that somebody has locked are not among them.
        """
        ...

    async def shorten_claims(self, owner: str, grace_ms: int, age_ms: int = 0) -> Cut:
        """Cuts the leases that `owner` took, at least `age_ms` ago, and wrote nothing under."""
        ...

    async def end_former(self, owner: str) -> Cut:
        """Ends the leases of processes that had the name of `owner` before it."""
        ...

    async def leases_of(self, owner: str) -> list[LeaseRef]:
        """Returns the leases that `owner` has."""
        ...

    async def lost_leases(self, refs: Sequence[LeaseRef], owner: str = "") -> set[UUID]:
        """Returns the runs of those grants that are good no more, whatever became of the lease; `owner` as in
        `reattach`, if all are one's.
        """
        ...

    async def fences(self, session_ids: Sequence[UUID]) -> dict[UUID, int]:
        """Returns the current fences."""
        ...

    async def events_after(self, tenant_id: UUID, run_id: UUID, seq: int, limit: int) -> list[Event]:
        """Returns events with a larger seq, in order: `limit` of them, or as many as make `PAGE_BYTES` full.
        Raises OutOfRangeError(CURSOR_EXPIRED) when they are older than the retention window.
        """
        ...

    async def heads(self, run_ids: Sequence[UUID]) -> dict[UUID, int]:
        """Returns the last seq of each run's log, in one query; a run that is gone is absent. For watchers
        that were admitted with their tenant before.
        """
        ...

    async def last_ordinals(self, session_ids: Sequence[UUID]) -> dict[UUID, int]:
        """Returns the ordinal of each session's newest run (0 without one), in one query; a session that
        is gone is absent. For watchers that were admitted with their tenant before.
        """
        ...


class Journal(Protocol):
    """The tool journal."""

    async def begin(
        self, call_id: str, session_id: UUID, fence: int, act_ms: int = 0
    ) -> tuple[BeginOutcome, ToolCall]:
        """Marks a call as running if the fence is current and the call may run (again).

        `act_ms` is for how long from now this try may act at most.
        """
        ...

    async def complete(
        self,
        call_id: str,
        fence: int,
        state: ToolCallState,
        content: str,
        content_ref: str,
        tries: int = 0,
        acts: bool = False,
    ) -> ToolCall:
        """Stores what a begun call did; the first outcome stays.

        `tries` says which try did it, `acts` that it did not stop when it was told to.
        """
        ...

    async def reconcile(
        self, call_id: str, state: ToolCallState, content: str, content_ref: str, tries: int = 0
    ) -> ToolCall:
        """Stores what became of an unknown call, as of its `tries`; other states are left as they are.

        INTENT (it was not done and may run) is taken only once no try can act any more.
        """
        ...

    async def look(self, call_id: str, session_id: UUID) -> ToolCall:
        """Returns a call of a session. Raises NotFoundError(TOOL_CALL_NOT_FOUND)."""
        ...

    async def call_of_run(self, tenant_id: UUID, run_id: UUID, call_id: str) -> ToolCall:
        """Returns a call of a run. Raises NotFoundError(TOOL_CALL_NOT_FOUND)."""
        ...

    async def waiting_calls(self, tenant_id: UUID, run_id: UUID) -> list[ToolCall]:
        """Returns a run's calls that wait for a person, in order."""
        ...

    async def resolve(
        self, tenant_id: UUID, run_id: UUID, call_id: str, decision: Decision
    ) -> tuple[Run, ToolCall]:
        """Settles a call that waits for a person, appends action.resolved and, once none of its calls waits,
        makes the run due again; on ABANDON ends it. Raises AlreadyExistsError(REQUEST_ID_REUSED),
        FailedPreconditionError(ACTION_NOT_REQUIRED).
        """
        ...

    async def pending_actions(
        self, tenant_id: UUID, *, page_size: int, page_token: str
    ) -> Page[PendingAction]:
        """Lists the calls that the tenant's runs wait for, the oldest run first; a page ends early where it
        would be larger than `PAGE_BYTES`.
        """
        ...


class Durable(Protocol):
    """What a store with a standby promises."""

    async def synchronous(self) -> bool:
        """Returns whether commits wait for a standby; looked up, and kept for `confirm`."""
        ...

    async def confirm(self) -> None:
        """Returns once all that could be read until now survives the loss of the server; at once where
        nothing waits for a standby. Raises UnavailableError when no standby says so in time.
        """
        ...

    async def archive_fails(self) -> bool:
        """Returns whether the store archives its log and could not when it last tried; it goes on trying."""
        ...


class Gone(Protocol):
    """Deleted sessions whose large results are still in the object store."""

    async def take_gone(self, limit: int, *, grace_seconds: float, retry_seconds: float) -> list[GoneSession]:
        """Takes some that were deleted so long ago; nobody else is given them before `retry_seconds`."""
        ...

    async def forget_gone(self, session_id: UUID) -> None:
        """Forgets one that has left nothing any more."""
        ...

    async def count_gone(self) -> int:
        """Returns how many there are, counted up to 10,000."""
        ...


class Store(Tenants, Conversations, Runs, Log, Journal, Durable, Gone, Protocol):
    """All of it."""

    @property
    def refused(self) -> str | None:
        """What PostgreSQL lacked when it refused a statement a moment ago; None for nothing."""
        ...

    async def maintain(self) -> object:
        """Does one round of upkeep; safe on several replicas at once. Raises UnavailableError."""
        ...
