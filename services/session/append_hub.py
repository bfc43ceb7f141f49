"""The append streams of a replica: which stream holds which run, and what goes back down each of them."""

import asyncio
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence, Set
from functools import partial
from typing import Protocol
from uuid import UUID

import structlog

from hermesh.session.v1 import session_internal_service_pb2 as internal
from meshkit import failpoints
from meshkit.errors import HermeshError, UnavailableError
from meshkit.postgres import fast_uuid
from meshkit.tasks import Backoff, TaskOwner
from services.session import convert, metrics
from services.session.domain import AppendOutcome, Cut, Grant, LeaseRef, RunAppend, StepCommit
from services.session.flusher import Flusher, Pending
from services.session.storm import STORM_GRACE_MS, StormGuard

_log = structlog.get_logger("session.append")

# A stream whose writes pile up beyond these is not read until some are settled; HTTP/2 then slows the agent.
_MAX_OUTSTANDING = 4096
_MAX_OUTSTANDING_BYTES = 32 * 1024 * 1024
_MAX_EVENTS = 10_000
_MAX_REATTACHING = 32
_REATTACH_TIMEOUT = 8.0
# Breaks within this time are judged together: an Envoy that dies takes its streams down within milliseconds.
_SETTLE_S = 0.06
# A cut is tried for so long: while PostgreSQL is away nobody could take a run over, and when it is back who
# waits for the run should not wait for the lease's own end as well.
_CUT_TRIES_S = 60.0
# Between two looks at whether the runs that writers hold here are theirs still.
_LOOK_S = 10.0
_LOOK_CHUNK = 1000
# The dispatcher looks a moment after leases have ended.
_AFTER_S = 0.005

_before_ack = failpoints.point("session.ack.before")
_after_ack = failpoints.point("session.ack.after")


class Leases(Protocol):
    """The part of the store that the hub needs; see `store.port.Log`."""

    async def reattach(self, ref: LeaseRef, owner: str) -> Grant | None:
        """Renews a lease under a new fence."""
        ...

    async def shorten(self, refs: Sequence[LeaseRef], grace_ms: int) -> set[UUID]:
        """Cuts leases; returns their runs."""
        ...

    async def lost_leases(self, refs: Sequence[LeaseRef]) -> set[UUID]:
        """Returns the runs of those grants that are good no more."""
        ...

    async def shorten_claims(self, owner: str, grace_ms: int, age_ms: int = 0) -> Cut:
        """Cuts the leases that a process took so long ago and wrote nothing under."""
        ...

    async def end_former(self, owner: str) -> Cut:
        """Ends the leases of a process's predecessors."""
        ...


class AppendHub:
    """Owns the append streams of this replica."""

    def __init__(
        self,
        leases: Leases,
        flusher: Flusher,
        *,
        tasks: TaskOwner,
        guard: StormGuard,
        reachable: Callable[[], bool],
        dispatch: Callable[[], None],
    ) -> None:
        """Makes a hub without streams.

        Args:
            leases: The store.
            flusher: Takes the writes.
            tasks: Owns the hub's background work.
            guard: Counts streams that break.
            reachable: Whether agents can be reached at all; while they cannot, nobody could take a run over.
            dispatch: Wakes the dispatcher: leases that were cut have ended.
        """
        self.flusher = flusher
        self.tasks = tasks
        self._leases = leases
        self._guard = guard
        self._reachable = reachable
        self._dispatch = dispatch
        self._streams: set[AppendStream] = set()
        self._holders: dict[str, AppendStream] = {}
        self._broken: list[LeaseRef] = []
        self._broken_owners: set[str] = set()
        self._reattaching = asyncio.Semaphore(_MAX_REATTACHING)
        self._draining = False

    def open(self) -> "AppendStream":
        """Opens a stream; the caller closes it."""
        stream = AppendStream(self)
        self._streams.add(stream)
        metrics.append_streams.set(len(self._streams))
        if self._draining:
            stream.say_draining()
        return stream

    def close(self, stream: "AppendStream") -> None:
        """Forgets a stream. Runs that it still held lose most of their lease, unless this replica drains.

        So do those that its writer was given and had not begun to write: no stream holds them.
        """
        if stream not in self._streams:
            return
        self._streams.discard(stream)
        held = list(stream.held.items())
        stream.held.clear()
        stream.closed = True
        for run_text, _ in held:
            if self._holders.get(run_text) is stream:
                del self._holders[run_text]
        metrics.append_streams.set(len(self._streams))
        metrics.attached_runs.set(len(self._holders))
        if not stream.owner or self._draining:
            return
        if held:
            _log.info("an append stream ended while it held runs", owner=stream.owner, runs=len(held))
            self._guard.broke()
        first = not self._broken_owners
        self._broken.extend(lease for _, lease in held)
        self._broken_owners.add(stream.owner)
        if first:
            self.tasks.start(self._shorten(), name="shorten")

    async def _shorten(self) -> None:
        await asyncio.sleep(_SETTLE_S)
        refs, self._broken = self._broken, []
        owners, self._broken_owners = self._broken_owners, set()
        still_open = sum(1 for stream in self._streams if stream.held)
        grace_ms = self._guard.grace_ms(still_open) if self._reachable() else STORM_GRACE_MS
        # A writer that came back on another stream of this replica has a newer fence and keeps its lease.
        grace_ms = max(1, grace_ms - int(_SETTLE_S * 1000))
        count = await self._insist(
            "a stream broke", partial(self._cut, refs, owners, grace_ms, time.monotonic())
        )
        if refs or count:
            _log.info("leases cut after a stream broke", runs=len(refs), cut=count, grace_ms=grace_ms)
        if count:
            asyncio.get_running_loop().call_later(grace_ms / 1000 + _AFTER_S, self._dispatch)

    async def _cut(self, refs: list[LeaseRef], owners: Set[str], grace_ms: int, since: float) -> Cut:
        """Cuts what broken streams held, less what an earlier try did; `refs` keeps what is locked."""
        age_ms = int((time.monotonic() - since) * 1000)
        cut = await self._leases.shorten(refs, grace_ms)
        others = [ref for ref in refs if ref.run_id not in cut]
        # Neither cut nor lost: somebody has it locked, or its writer is attached to another replica by now.
        lost = await self._leases.lost_leases(others) if others else set()
        refs[:] = [ref for ref in others if ref.run_id not in lost]
        count, locked = len(cut), len(refs)
        for owner in owners:
            claims = await self._leases.shorten_claims(owner, grace_ms, age_ms)
            count, locked = count + claims.cut, locked + claims.locked
        return Cut(count, locked)

    async def _insist(self, why: str, cut: Callable[[], Awaitable[Cut]]) -> int:
        """Cuts leases, again while PostgreSQL is away or somebody has them locked; returns how many."""
        backoff = Backoff(first=0.05, limit=0.5)
        count = 0
        try:
            async with asyncio.timeout(_CUT_TRIES_S):
                while True:
                    try:
                        done = await cut()
                    except UnavailableError:
                        pass
                    else:
                        count += done.cut
                        if not done.locked:
                            break
                    await backoff.sleep()
        except (TimeoutError, HermeshError) as error:
            _log.warning("leases could not be cut; they end by themselves", cause=why, error=str(error))
        metrics.leases_shortened.inc(count)
        return count

    def attach(self, stream: "AppendStream", run_text: str, lease: LeaseRef) -> None:
        """Notes that a run's writer is on this stream, unless a newer writer is on another."""
        former = self._holders.get(run_text)
        if former is not None and former is not stream:
            other = former.held.get(run_text)
            if other is not None and other.fence > lease.fence:
                return
            former.held.pop(run_text, None)
        if stream.closed:
            if former is not None:
                # Its fence is old by now: nobody writes here any more.
                self.detach(run_text)
            return
        self._holders[run_text] = stream
        stream.held[run_text] = lease
        metrics.attached_runs.set(len(self._holders))

    def detach(self, run_text: str, fence: int | None = None) -> None:
        """Notes that a run has no writer here any more: it ended, was released, or its fence is old."""
        stream = self._holders.get(run_text)
        if stream is None:
            return
        lease = stream.held.get(run_text)
        if fence is not None and lease is not None and lease.fence != fence:
            return
        stream.held.pop(run_text, None)
        del self._holders[run_text]
        metrics.attached_runs.set(len(self._holders))

    async def end_former(self, stream: "AppendStream", owner: str) -> None:
        """Ends what a process's predecessors held: it has just begun, so they have ended.

        One that ended together with the session replica that had its stream left nobody to tell of it.
        Tried while the process has this stream: when it may have ended itself, another of its name may work
        by now, whose leases nothing tells from a predecessor's. That one ends them all.
        """

        async def end() -> Cut:
            return Cut() if stream.closed else await self._leases.end_former(owner)

        count = await self._insist("a process began", end)
        if count:
            _log.info("a former process's leases ended", owner=owner, runs=count)
            self._dispatch()

    async def watch_leases(self) -> None:
        """Forgets writers that lost their run without a word on their stream, until cancelled.

        An agent renews and releases at whichever replica Envoy picks, and once it knows that a run is not its
        own any more it writes nothing more: only PostgreSQL can tell this replica.
        """
        spread = random.Random()  # noqa: S311 -- spreads load, keeps no secret
        while True:
            await asyncio.sleep(_LOOK_S * spread.uniform(0.8, 1.2))
            try:
                await self._look()
            except HermeshError as error:
                _log.warning("leases could not be looked up", error=str(error))

    async def _look(self) -> None:
        held = [lease for stream in self._streams for lease in stream.held.values()]
        for start in range(0, len(held), _LOOK_CHUNK):
            chunk = held[start : start + _LOOK_CHUNK]
            lost = await self._leases.lost_leases(chunk)
            for lease in chunk:
                if lease.run_id in lost:
                    self.detach(str(lease.run_id), lease.fence)

    def holds(self, run_id: UUID) -> bool:
        """Returns True if the run's writer appends on this replica."""
        return str(run_id) in self._holders

    def cancel(self, run_id: UUID) -> bool:
        """Tells the run's writer that somebody asked to cancel; returns False if it is not here."""
        text = str(run_id)
        stream = self._holders.get(text)
        if stream is None:
            return False
        stream.say_cancelled(text)
        return True

    def drain(self) -> None:
        """Asks all writers to move to other replicas."""
        self._draining = True
        for stream in self._streams:
            stream.say_draining()

    async def reattach(self, stream: "AppendStream", request: internal.Reattach) -> None:
        """Moves a run onto a stream under a new fence and answers there."""
        answer = internal.ReattachResult(run_id=request.run_id)
        try:
            ref = LeaseRef(UUID(request.session_id), UUID(request.run_id), request.fence)
            async with self._reattaching, asyncio.timeout(_REATTACH_TIMEOUT):
                grant = await self._leases.reattach(ref, stream.owner)
        except ValueError:
            answer.lost = True
        except (HermeshError, TimeoutError) as error:
            _log.warning("a re-attach got no answer", run_id=request.run_id, error=str(error))
        else:
            if grant is None:
                answer.lost = True
            else:
                answer.grant.CopyFrom(convert.grant_to_proto(grant))
                lease = LeaseRef(grant.session_id, grant.run_id, grant.fence, grant.attach)
                self.attach(stream, request.run_id, lease)
        stream.say_reattached(answer)


class AppendStream:
    """One Append call: what came up it and is not settled, and what waits to go down."""

    def __init__(self, hub: AppendHub) -> None:
        """Makes an open stream; use `AppendHub.open`."""
        self.owner = ""
        self.held: dict[str, LeaseRef] = {}
        self.closed = False
        self._hub = hub
        self._response = internal.AppendResponse()
        self._full = False
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._outstanding = 0
        self._outstanding_bytes = 0
        self._read_all = False

    async def read(self, requests: AsyncIterator[internal.AppendRequest]) -> None:
        """Takes requests until the writer closes its side; pauses while too much is under way."""
        try:
            async for request in requests:
                if request.owner:
                    self.owner = request.owner
                if request.new_process and request.owner[-9:-8] == "~":
                    self._hub.tasks.start(self._hub.end_former(self, request.owner), name="end-former")
                for append in request.appends:
                    self._accept(append)
                for item in request.reattach:
                    self._outstanding += 1
                    self._hub.tasks.start(self._hub.reattach(self, item), name="reattach")
                while (
                    self._outstanding >= _MAX_OUTSTANDING or self._outstanding_bytes >= _MAX_OUTSTANDING_BYTES
                ):
                    self._room.clear()
                    await self._room.wait()
        except Exception as error:
            # Whatever ended the stream, its runs are taken care of when it closes.
            _log.info("an append stream broke", owner=self.owner, error=type(error).__name__)
        finally:
            self._read_all = True
            self._wake.set()

    def _accept(self, append: internal.RunAppend) -> None:
        run_text = append.run_id
        lease = self.held.get(run_text)
        if lease is None or lease.fence != append.fence:
            try:
                lease = LeaseRef(fast_uuid(append.session_id), fast_uuid(run_text), append.fence)
            except ValueError:
                self._invalid(append, "session_id and run_id must be UUIDs")
                return
            self._hub.attach(self, run_text, lease)
        count = len(append.events)
        commit: StepCommit | None = None
        if append.HasField("commit"):
            try:
                commit = convert.commit_of(append.commit)
            except ValueError as error:
                self._invalid(append, str(error))
                return
        elif not count:
            self._invalid(append, "an append needs events or a commit")
            return
        if append.first_seq < 1 or count > _MAX_EVENTS:
            self._invalid(append, f"first_seq starts at 1, and an append holds at most {_MAX_EVENTS} events")
            return
        size = append.ByteSize()
        self._outstanding += 1
        self._outstanding_bytes += size
        write = RunAppend(
            lease.session_id,
            lease.run_id,
            append.fence,
            append.first_seq,
            convert.events_of(append),
            commit,
            size,
        )
        self._hub.flusher.submit(Pending(write, run_text, self))

    def _invalid(self, append: internal.RunAppend, detail: str) -> None:
        self._outstanding += 1
        metrics.appends.labels(AppendOutcome.INVALID.name).inc()
        self._response.results.add(
            run_id=append.run_id,
            first_seq=append.first_seq,
            outcome=internal.APPEND_OUTCOME_INVALID,
            detail=detail,
        )
        self._ready()

    def settled(self, pending: Pending, outcome: AppendOutcome, next_seq: int, detail: str) -> None:
        """Takes the outcome of a write and passes it down."""
        append = pending.append
        self._outstanding_bytes -= append.size
        if outcome is AppendOutcome.FENCED or (
            outcome is AppendOutcome.COMMITTED
            and append.commit is not None
            and append.commit.status is not None
        ):
            self._hub.detach(pending.run_text, append.fence)
        if self.closed:
            return
        self._response.results.add(
            run_id=pending.run_text,
            first_seq=append.first_seq,
            outcome=int(outcome),
            next_seq=next_seq,
            detail=detail,
        )
        self._ready()

    def say_reattached(self, answer: internal.ReattachResult) -> None:
        """Passes the answer to a re-attach down."""
        self._response.reattached.append(answer)
        self._ready()

    def say_cancelled(self, run_text: str) -> None:
        """Passes down that somebody asked to cancel a run."""
        if run_text not in self._response.cancelled_run_ids:
            self._response.cancelled_run_ids.append(run_text)
        self._ready()

    def say_draining(self) -> None:
        """Passes down that this replica drains."""
        self._response.draining = True
        self._ready()

    def _ready(self) -> None:
        self._full = True
        self._wake.set()

    async def responses(self) -> AsyncGenerator[internal.AppendResponse]:
        """Yields what there is to say, everything at hand in one message, until all is said."""
        while True:
            if self._full:
                response, self._response = self._response, internal.AppendResponse()
                self._full = False
                _before_ack()
                yield response
                _after_ack()
                # Only what was sent makes room: a writer that does not read its answers is not read either.
                self._outstanding -= len(response.results) + len(response.reattached)
                self._room.set()
            elif self._read_all and not self._outstanding:
                return
            else:
                self._wake.clear()
                await self._wake.wait()
