"""The session service: submit, claim, append, renew, release."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import grpc.aio

from hermesh.agent.v1.agent_service_pb2 import RunRequest
from hermesh.common.v1.event_pb2 import Event
from hermesh.session.v1.resources_pb2 import ContextPosition, Grant, Run, RunContext, RunOptions
from hermesh.session.v1.session_internal_service_pb2 import (
    CLAIM_OUTCOME_ALREADY_CLAIMED,
    CLAIM_OUTCOME_CLAIMED,
    FAIL_CAUSE_INTERNAL,
    FAIL_CAUSE_REFUSED,
    ClaimRunRequest,
    FailRunRequest,
    LeaseRef,
    ListLeasesRequest,
    ReadContextRequest,
    ReleaseLeaseRequest,
    RenewLeasesRequest,
)
from hermesh.session.v1.session_internal_service_pb2_grpc import SessionInternalServiceStub
from hermesh.session.v1.session_service_pb2 import GetRunRequest, SubmitRunRequest
from hermesh.session.v1.session_service_pb2_grpc import SessionServiceStub
from meshkit import failpoints
from meshkit.channel import mesh_metadata, stream_call
from meshkit.errors import DeadlineError, HermeshError, UnavailableError, from_rpc_error
from meshkit.ids import uuid7
from meshkit.settings import MeshSettings
from meshkit.tasks import Backoff
from services.agent.runs.leases import Renewal
from services.agent.runs.link import AppendCall

T = TypeVar("T")

SUBMIT_TRIES = 4
# Some seconds: session replicas that died together are back by then, and no lease is waited out.
CLAIM_TRIES = 10
OUTCOME_UNKNOWN = "OUTCOME_UNKNOWN"
REASON_TIMEOUT = 0.5
LOOK_TIMEOUT = 2.0
MAX_RENEWALS = 5_000
# The longest time between two pages of a context, and how many are read at once: after another replica's
# death many runs come with theirs.
PAGE_SECONDS = 10.0
MAX_CONTEXTS = 4


@dataclass(frozen=True, slots=True)
class Claim:
    """A run that is ours to work on.

    Attributes:
        context: its first page; the rest is read while the run is worked on.
        lease_until: monotonic time until which the lease surely lasts.
    """

    run: Run
    grant: Grant
    context: RunContext
    options: RunOptions
    tenant_id: str
    lease_until: float


@dataclass(frozen=True, slots=True)
class Submitted:
    """An accepted input.

    Attributes:
        claim: None when another replica will work on it.
        unsure: whether the lease may be ours all the same: an earlier try of this call may have taken it.
    """

    run: Run
    created: Event
    duplicate: bool
    claim: Claim | None
    unsure: bool = False


@dataclass(frozen=True, slots=True)
class NotClaimed:
    """A run that is not ours: `elsewhere` when another replica has it, else it needs no work."""

    elsewhere: bool


async def _tried(
    call: Callable[[], Awaitable[T]],
    tries: int,
    passing: tuple[type[HermeshError], ...],
    missed: Callable[[], None] = lambda: None,
) -> tuple[T, float, bool]:
    """Make a call that may be repeated, again while it fails with what passes.

    `missed` is told of each try that failed so.

    Returns:
        Its answer, the monotonic time at which that was asked for, and whether it was asked for again.

    Raises:
        HermeshError: another failure, or the last of so many.
    """
    backoff = Backoff(0.05, 0.5)
    unknown: HermeshError | None = None
    while True:
        asked_at = asyncio.get_running_loop().time()
        try:
            return await call(), asked_at, backoff.attempts > 0
        except grpc.aio.AioRpcError as rpc_error:
            error = from_rpc_error(rpc_error)
            if not isinstance(error, passing):
                raise error from rpc_error
            missed()
            if unknown is None and (isinstance(error, DeadlineError) or error.reason == OUTCOME_UNKNOWN):
                unknown = error
            if backoff.attempts + 1 >= tries:
                # What a later try did not do, an earlier one may have done.
                raise unknown or error from rpc_error
        await backoff.sleep()


def owner_of(replica: str) -> str:
    """Return a name by which a process of this replica holds leases; no other process has the same."""
    return f"{replica[:191]}~{secrets.token_hex(4)}"


class SessionClient:
    """Calls to the session service.

    Args:
        channel: to the mesh.
        settings: for the mesh's credential.
        owner: this process's name as a holder of leases, see `owner_of`.
        append_channel: to the mesh too, for append streams alone; `channel` if None.

    Attributes:
        on_missed: told when a try to be granted a lease got no answer.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        settings: MeshSettings,
        owner: str,
        append_channel: grpc.aio.Channel | None = None,
    ) -> None:
        self.on_missed: Callable[[], None] = lambda: None
        self._owner = owner
        self._sessions = SessionServiceStub(channel)
        self._internal = SessionInternalServiceStub(channel)
        self._appends = SessionInternalServiceStub(append_channel if append_channel is not None else channel)
        self._settings = settings
        self._mesh = mesh_metadata(settings)
        self._contexts = asyncio.Semaphore(MAX_CONTEXTS)

    @failpoints.around("agent.submit")
    async def submit(self, request: RunRequest, tenant_id: str, *, claim: bool) -> Submitted:
        """Accept input, and take the session's lease in the same transaction when `claim`.

        A session replica that cannot be reached is tried again: the idempotency key makes that safe.

        Raises:
            HermeshError: nothing was accepted, as far as is known.
        """
        submit = SubmitRunRequest(
            session_id=request.session_id,
            input=request.input,
            options=request.options if request.HasField("options") else None,
            request_id=request.request_id or str(uuid7()),
            concurrency=request.concurrency,
            claim_owner=self._owner if claim else "",
        )
        metadata = mesh_metadata(self._settings, tenant_id)
        response, asked_at, again = await _tried(
            lambda: self._sessions.SubmitRun(submit, metadata=metadata),
            SUBMIT_TRIES,
            (UnavailableError,),
            self._missed if claim else lambda: None,
        )
        taken = None
        if response.HasField("grant"):
            taken = Claim(
                response.run,
                response.grant,
                response.context,
                response.options,
                tenant_id,
                asked_at + response.grant.ttl_ms / 1000,
            )
        unsure = claim and taken is None and response.duplicate and again
        return Submitted(response.run, response.created, response.duplicate, taken, unsure)

    @failpoints.around("agent.claim")
    async def claim(self, run_id: str) -> Claim | NotClaimed:
        """Take the lease of a queued or orphaned run, or again one that an earlier try of this call took.

        A session replica that does not answer is tried again: whoever has a lease may claim it again.

        Raises:
            HermeshError: the session service could not say.
        """
        request = ClaimRunRequest(run_id=run_id, owner=self._owner)
        response, asked_at, _ = await _tried(
            lambda: self._internal.ClaimRun(request, metadata=self._mesh),
            CLAIM_TRIES,
            (UnavailableError, DeadlineError),
            self._missed,
        )
        if response.outcome != CLAIM_OUTCOME_CLAIMED:
            return NotClaimed(elsewhere=response.outcome == CLAIM_OUTCOME_ALREADY_CLAIMED)
        return Claim(
            response.run,
            response.grant,
            response.context,
            response.options,
            response.tenant_id,
            asked_at + response.grant.ttl_ms / 1000,
        )

    @failpoints.around("agent.context")
    async def rest(
        self, run_id: str, fence: Callable[[], int], position: ContextPosition
    ) -> Sequence[RunContext]:
        """Return the pages of a claimed run's context that follow a position.

        Where a session replica stops answering the next one goes on.

        Args:
            run_id: the run.
            fence: returns the fence of this moment.
            position: where to begin.

        Raises:
            HermeshError: the lease is lost (FENCE_STALE), or the session service could not say.
        """
        pages: list[RunContext] = []
        async with self._contexts:
            backoff = Backoff(0.05, 0.5)
            while True:
                began = len(pages)
                try:
                    await self._read(run_id, fence(), position, pages)
                    return pages
                except (UnavailableError, DeadlineError):
                    if len(pages) > began:
                        position = pages[-1].next
                        backoff.reset()
                    if backoff.attempts + 1 >= CLAIM_TRIES:
                        raise
                await backoff.sleep()

    async def _read(
        self, run_id: str, fence: int, position: ContextPosition, pages: list[RunContext]
    ) -> None:
        """Add the pages from a position on, to the last one."""
        request = ReadContextRequest(run_id=run_id, fence=fence, position=position)
        clock = asyncio.get_running_loop().time
        try:
            async with (
                asyncio.timeout(PAGE_SECONDS) as silence,
                stream_call(self._internal.ReadContext(request, metadata=self._mesh)) as responses,
            ):
                async for response in responses:
                    pages.append(response.context)
                    if not response.context.HasField("next"):
                        return
                    silence.reschedule(clock() + PAGE_SECONDS)
        except TimeoutError:
            raise DeadlineError("DEADLINE_EXCEEDED", "no page of the run's context came") from None
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        raise UnavailableError("SERVICE_UNAVAILABLE", "the run's context ended before its last page")

    async def cancel_reason(self, run_id: str, tenant_id: str) -> str:
        """Return why somebody asked to cancel a run, "" when that cannot be said in a moment."""
        try:
            response = await self._sessions.GetRun(
                GetRunRequest(run_id=run_id),
                metadata=mesh_metadata(self._settings, tenant_id),
                timeout=REASON_TIMEOUT,
            )
        except grpc.aio.AioRpcError:
            return ""
        return response.run.cancel_reason

    def _missed(self) -> None:
        self.on_missed()

    def open_append(self) -> AppendCall:
        """Start an append stream."""
        call: AppendCall = self._appends.Append(metadata=self._mesh)
        return call

    async def renew(self, leases: Sequence[tuple[str, str, int]], timeout: float) -> Renewal:
        """See `LeasePort.renew`.

        Raises:
            HermeshError: nothing is known about the leases.
        """
        lost: list[str] = []
        cancelled: list[str] = []
        busy: list[str] = []
        ttl = 0.0
        for start in range(0, len(leases), MAX_RENEWALS):
            request = RenewLeasesRequest(
                owner=self._owner,
                leases=[
                    LeaseRef(session_id=session_id, run_id=run_id, fence=fence)
                    for session_id, run_id, fence in leases[start : start + MAX_RENEWALS]
                ],
            )
            try:
                response = await self._internal.RenewLeases(request, metadata=self._mesh, timeout=timeout)
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error) from error
            lost += response.lost_run_ids
            cancelled += response.cancelled_run_ids
            busy += response.busy_run_ids
            ttl = response.ttl_ms / 1000
        return Renewal(lost, cancelled, ttl, busy)

    async def leases(self) -> Sequence[tuple[str, str, int]]:
        """See `LeasesPort.leases`.

        Raises:
            HermeshError: that could not be said.
        """
        try:
            response = await self._internal.ListLeases(
                ListLeasesRequest(owner=self._owner), metadata=self._mesh, timeout=LOOK_TIMEOUT
            )
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        return [(lease.session_id, lease.run_id, lease.fence) for lease in response.leases]

    @failpoints.around("agent.fail")
    async def fail(self, session_id: str, run_id: str, fence: int, *, refused: bool) -> bool:
        """Have the store end a run that cannot write its end; False when it is not ours any more.

        Raises:
            HermeshError: the session service could not say.
        """
        request = FailRunRequest(
            lease=LeaseRef(session_id=session_id, run_id=run_id, fence=fence),
            cause=FAIL_CAUSE_REFUSED if refused else FAIL_CAUSE_INTERNAL,
        )
        response, _, again = await _tried(
            lambda: self._internal.FailRun(request, metadata=self._mesh),
            CLAIM_TRIES,
            (UnavailableError, DeadlineError),
        )
        # An earlier try may have done it, and its answer got lost.
        return response.ended or again

    @failpoints.around("agent.release")
    async def release(
        self, session_id: str, run_id: str, fence: int, timeout: float = 2.0, *, earlier: bool = True
    ) -> bool:
        """Give a lease up; False when that could not be said (it ends by itself then).

        Args:
            session_id: the run's session.
            run_id: the run.
            fence: the lease's.
            timeout: for the call, seconds.
            earlier: whether the lease is given up, too, if it has a newer fence by now that is ours.
        """
        lease = LeaseRef(session_id=session_id, run_id=run_id, fence=fence)
        request = ReleaseLeaseRequest(lease=lease, owner=self._owner if earlier else "")
        try:
            async with asyncio.timeout(timeout):
                response = await self._internal.ReleaseLease(request, metadata=self._mesh)
        except (grpc.aio.AioRpcError, HermeshError, TimeoutError):
            return False
        return response.released
