"""Owns the runs of this replica: takes them, gives each a task and a writer, and lets them go."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar
from uuid import UUID

import structlog

from meshkit.context import use_run
from meshkit.errors import HermeshError, InternalError
from meshkit.identity import Identity, use_identity
from meshkit.tasks import TaskOwner
from services.agent import metrics
from services.agent.clients.session import Claim, NotClaimed
from services.agent.runs.admission import Admission, full
from services.agent.runs.link import AppendLink
from services.agent.runs.ports import World
from services.agent.runs.runner import REFUSED, UNWRITTEN, Runner
from services.agent.runs.start import start_of
from services.agent.runs.subscription import Subscription
from services.agent.runs.writer import RunWriter, WriterStopped
from services.agent.settings import AgentSettings

_log = structlog.get_logger("agent.supervisor")

T = TypeVar("T")

REMEMBER_SECONDS = 3.0
# What is left of the grace when runs that did not reach a step boundary are given up where they stand.
RELEASE_MARGIN = 2.0


class SessionPort(Protocol):
    """The part of `SessionClient` that is used here."""

    async def claim(self, run_id: str) -> Claim | NotClaimed:
        """Take a run's lease."""
        ...

    async def release(self, session_id: str, run_id: str, fence: int) -> bool:
        """Give a lease up."""
        ...

    async def fail(self, session_id: str, run_id: str, fence: int, *, refused: bool) -> bool:
        """Have the store end a run that cannot write its end; False when it is not ours any more."""
        ...


@dataclass(slots=True)
class ActiveRun:
    """A run that this replica works on.

    Attributes:
        done: set once it ended here.
        outcome: as `Runner.run` says, once `done`.
    """

    runner: Runner
    writer: RunWriter
    done: asyncio.Event
    outcome: str = ""


class Supervisor:
    """See the module.

    Args:
        settings: limits and texts.
        session: for claims and releases.
        world: what runners use.
        tasks: owns the runs' tasks, and those that are about to begin one.
    """

    def __init__(self, settings: AgentSettings, session: SessionPort, world: World, tasks: TaskOwner) -> None:
        self._settings = settings
        self._session = session
        self._world = world
        self._tasks = tasks
        self._link: AppendLink | None = None
        self._active: dict[str, ActiveRun] = {}
        self._claiming: set[str] = set()
        self._admission = Admission(settings.max_active_runs, settings.accept_target_seconds, world.monotonic)
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False

    def serve_with(self, link: AppendLink) -> None:
        """Use this append stream; before the first run."""
        self._link = link

    def writers(self) -> Iterable[RunWriter]:
        """Return the writers of the active runs."""
        return [active.writer for active in self._active.values()]

    @property
    def active(self) -> int:
        """How many runs are worked on."""
        return len(self._active)

    def get(self, run_id: str) -> ActiveRun | None:
        """Return an active run."""
        return self._active.get(run_id)

    def cancel(self, run_id: str) -> None:
        """Cancel a run, if it is here."""
        active = self._active.get(run_id)
        if active is not None:
            active.runner.cancel()

    def place(self, tenant_id: str | None = None) -> AbstractContextManager[None]:
        """Keep a place for one more run while it is being claimed: a tenant's new one, or one that waited.

        Raises:
            ResourceExhaustedError: the replica is full, or drains.
        """
        if self.draining:
            raise full("this replica drains")
        return self._admission.place(tenant_id)

    def accepted(self, seconds: float) -> None:
        """Take how long a new run took to be accepted."""
        self._admission.limit.accepted(seconds, self._admission.used)

    async def execute(self, run_id: str) -> ActiveRun | NotClaimed:
        """Claim a run and work on it.

        Raises:
            ResourceExhaustedError: no place.
            HermeshError: the session service could not say.
        """
        with self.place():
            claim = await self.claim(run_id)
            if isinstance(claim, NotClaimed):
                return claim
            return self.begin(claim)

    async def claim(self, run_id: str) -> Claim | NotClaimed:
        """Take a run's lease, unless this replica works on it already or is about to.

        The store gives a lease again to who has it: two claims here at once would end each other.

        Raises:
            HermeshError: the session service could not say.
        """
        if self.holds(run_id):
            return NotClaimed(elsewhere=True)
        self._claiming.add(run_id)
        try:
            return await self._session.claim(run_id)
        finally:
            self._claiming.discard(run_id)

    def holds(self, run_id: str) -> bool:
        """Whether a run is worked on here, or is about to be."""
        return run_id in self._active or run_id in self._claiming

    async def kept(self, work: Coroutine[Any, Any, T]) -> T:
        """Do work to its end although its caller may leave: a lease that was taken is one that is worked on.

        Raises:
            HermeshError: as the work does.
        """

        async def done() -> T | HermeshError:
            try:
                return await work
            except HermeshError as error:
                return error

        result = await asyncio.shield(self._tasks.start(done(), name="claim"))
        if isinstance(result, HermeshError):
            raise result
        return result

    def begin(self, claim: Claim, subscription: Subscription | None = None) -> ActiveRun:
        """Work on a claimed run; what it stores goes to `subscription` too."""
        assert self._link is not None
        link = self._link
        former = self._active.get(claim.run.run_id)
        if former is not None:  # our own lease ran out and was claimed anew: the old fence writes nothing
            former.writer.stop(WriterStopped("lost"))
        writer = RunWriter(
            claim.grant,
            lease_until=claim.lease_until,
            now_ms=self._world.now_ms,
            schedule=link.schedule,
            monotonic=self._world.monotonic,
        )
        if subscription is not None:
            writer.subscribe(subscription)
        try:
            start = start_of(claim, self._settings)
        except Exception:
            # Nobody could work on it, and each who tried would hold its session for a while.
            _log.exception("a claimed run cannot be read", run_id=claim.run.run_id)
            writer.close_subscriptions("moved")
            self._tasks.start(self._end(writer, UNWRITTEN), name=f"end-{claim.run.run_id}")
            raise InternalError() from None
        runner = Runner(start, writer, self._world)
        active = ActiveRun(runner, writer, asyncio.Event())
        self._active[claim.run.run_id] = active
        self._admission.take(claim.tenant_id)
        self._idle.clear()
        metrics.active_runs.set(len(self._active))
        link.add(writer)
        with use_identity(Identity(UUID(claim.tenant_id), mesh=True)), use_run(claim.run.run_id):
            self._tasks.start(self._work(active, link), name=f"run-{claim.run.run_id}")
        if claim.run.cancel_requested:
            runner.cancel()
        return active

    async def _work(self, active: ActiveRun, link: AppendLink) -> None:
        runner, writer = active.runner, active.writer
        run_id = runner.spec.run_id
        try:
            active.outcome = await runner.run()
            if active.outcome in (UNWRITTEN, REFUSED):
                # Its end is no write of ours: callers find it where they go on.
                writer.close_subscriptions("moved")
                active.outcome = await self._end(writer, active.outcome)
        finally:
            self._admission.give(runner.spec.tenant_id)
            link.remove(writer)
            if self._active.get(run_id) is active:
                del self._active[run_id]
            if not self._active:
                self._idle.set()
            metrics.active_runs.set(len(self._active))
            over = active.outcome in ("completed", "failed", "cancelled")
            writer.close_subscriptions("" if over else "drain" if self.draining else "moved")
            active.done.set()
        if active.outcome == "released":
            released = await self._session.release(writer.session_id, run_id, writer.fence)
            _log.info("run released", run_id=run_id, released=released)
        elif active.outcome == "completed" and runner.spec.memory:
            await self._remember(runner)

    async def _end(self, writer: RunWriter, why: str) -> str:
        """Have the store end a run that could not write its end; returns how it ended here.

        When the store does not answer, the lease ends by itself and the run is taken over.
        """
        writer.stop(WriterStopped("lost"))
        ended = False
        try:
            ended = await self._session.fail(
                writer.session_id, writer.run_id, writer.fence, refused=why == REFUSED
            )
        except HermeshError as error:
            _log.warning("the store did not end a run", run_id=writer.run_id, reason=error.reason)
        metrics.unwritten_ends.labels(str(ended).lower()).inc()
        return "failed" if ended else "lost"

    async def _remember(self, runner: Runner) -> None:
        """Keep the exchange; the run is over for its readers, and a failure here is only logged."""
        text = runner.exchange()
        if not text:
            return
        try:
            await self._world.memory.remember(runner.spec, text, REMEMBER_SECONDS)
        except HermeshError as error:
            metrics.unkept_exchanges.inc()
            _log.warning("an exchange was not remembered", run_id=runner.spec.run_id, reason=error.reason)

    async def drain(self) -> None:
        """Take no more runs; let those that are here finish, or give them up at a step boundary.

        Runs that reach neither before the grace ends are given up where they stand.
        """
        self.draining = True
        settings = self._settings
        patience = max(0.0, settings.drain_delay_seconds + settings.drain_seconds - RELEASE_MARGIN)
        try:
            async with asyncio.timeout(patience):
                await self._idle.wait()
        except TimeoutError:
            for active in list(self._active.values()):
                active.runner.release()
        if not await self._tasks.wait_idle(RELEASE_MARGIN):  # the last writes, releases and memories
            _log.warning("runs were still busy when the replica had to stop", runs=len(self._tasks))
