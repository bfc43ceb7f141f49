"""The dispatcher: runs that wait for an agent are pushed to one, through Envoy.

The Execute stream is kept open for as long as the agent works, because streams in flight are the load that
Envoy's least-request counts. Losing one changes nothing: the agent's own task owns the run.
"""

import asyncio
import random
from collections import deque
from typing import Any, Protocol
from uuid import UUID

import grpc
import structlog

from hermesh.agent.v1 import agent_service_pb2 as agent_pb
from meshkit import failpoints
from meshkit.channel import stream_call
from meshkit.context import run_id_var
from meshkit.errors import HermeshError, from_rpc_error
from meshkit.tasks import Backoff, TaskOwner
from services.session import metrics

_log = structlog.get_logger("session.sweeper")

_BATCH = 64
# From one part of what is due to the next.
_NEXT_S = 0.02
# How long nothing is dispatched after an agent said that it is full, unless a place is seen to get free.
_FULL_S = 0.25
# What no agent could be reached for is asked about again by this replica alone; then any may take it.
_UNREACHED_S = 2.0
# Agents that cannot be reached at all are asked about so few runs: that costs nearly nothing, and those that
# are back have all of them within a second.
_FEW = 4
# A stream that outlives this is let go; the run goes on without it.
_HOLD_SECONDS = 6 * 3600.0
# After a notice the sweep waits this long for more of them: many commits, one sweep.
_GATHER_S = 0.002

_dispatching = failpoints.point("session.dispatch")
_LATER = frozenset(
    {
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    }
)


class DueRuns(Protocol):
    """The part of the store that the sweeper needs; see `store.port.Runs`."""

    async def due(self, limit: int, *, again: bool = False) -> list[UUID]:
        """Takes runs to dispatch, with `again` also those that were taken a moment ago."""
        ...

    async def end_orphans(self, limit: int) -> int:
        """Ends runs that nobody holds and that need no agent any more."""
        ...


class Sweeper:
    """Finds runs that wait and hands each to an agent."""

    def __init__(
        self, store: DueRuns, agent: Any, *, tasks: TaskOwner, interval: float, max_dispatches: int
    ) -> None:
        """Makes a sweeper that starts with `run`.

        Args:
            store: Where runs wait.
            agent: The stub of AgentService, over the mesh.
            tasks: Owns the dispatches.
            interval: Seconds between two sweeps without a notice.
            max_dispatches: Most Execute streams that this replica holds.
        """
        self._store = store
        self._agent = agent
        self._tasks = tasks
        self._interval = interval
        self._max = max_dispatches
        self._held = 0
        # How many are taken at once: agents that are full are asked about few, and then about more again.
        self._batch = _BATCH
        self._full_until = 0.0
        # Runs that reached no agent, and until when they are this replica's to ask about.
        self._unreached: deque[tuple[UUID, float]] = deque()
        # Whether a look for due runs got no answer: it may have taken some all the same.
        self._unheard = False
        self._wake = asyncio.Event()
        self._stopped = False
        self._random = random.Random()  # noqa: S311 -- spreads load, keeps no secret

    def wake(self) -> None:
        """Sweeps soon: something was queued."""
        self._wake.set()

    def stop(self) -> None:
        """Dispatches no more; what is under way goes on."""
        self._stopped = True

    async def run(self) -> None:
        """Sweeps until cancelled."""
        backoff = Backoff(first=0.1, limit=0.5)
        clock = asyncio.get_running_loop().time
        look_at = 0.0
        while True:
            try:
                async with asyncio.timeout(self._interval * self._random.uniform(0.7, 1.3)):
                    await self._wake.wait()
                await asyncio.sleep(_GATHER_S)
            except TimeoutError:
                pass
            self._wake.clear()
            try:
                await self.sweep()
                # What was just queued is neither cancelled nor late: a wake-up is no reason to look.
                if clock() >= look_at:
                    look_at = clock() + self._interval
                    await self.end_orphans()
            except HermeshError as error:
                _log.warning("runs to dispatch could not be looked up", error=str(error))
                await backoff.sleep()
                self._wake.set()
            else:
                backoff.reset()

    async def end_orphans(self) -> int:
        """Ends runs that nobody holds and that are cancelled or late, agent or no agent; returns how many."""
        ended = await self._store.end_orphans(_BATCH)
        metrics.ended_orphans.inc(ended)
        return ended

    async def sweep(self) -> int:
        """Dispatches a part of what is due, as far as there is room; returns how many runs.

        What agents say to one part comes before the next: when they are full, the others are not asked about.
        """
        limit = min(self._batch, self._max - self._held)
        if self._stopped or self._full or limit <= 0:
            return 0
        runs = self._take_unreached(limit)
        if len(runs) < limit:
            until = asyncio.get_running_loop().time() + _UNREACHED_S
            runs += [(run_id, until) for run_id in await self._due(limit - len(runs))]
        for run_id, until in runs:
            self._held += 1
            self._tasks.start(self._dispatch(run_id, until), name=f"dispatch-{run_id}")
        if len(runs) == limit or self._batch < _BATCH:
            wait = _NEXT_S if self._batch == _BATCH else _FULL_S
            asyncio.get_running_loop().call_later(wait, self._grow)
        metrics.dispatched_runs.set(self._held)
        return len(runs)

    async def _due(self, limit: int) -> list[UUID]:
        again, self._unheard = self._unheard, True
        run_ids = await self._store.due(limit, again=again)
        self._unheard = False
        return run_ids

    def _take_unreached(self, limit: int) -> list[tuple[UUID, float]]:
        now = asyncio.get_running_loop().time()
        runs: list[tuple[UUID, float]] = []
        while self._unreached and len(runs) < limit:
            run_id, until = self._unreached.popleft()
            if now < until:
                runs.append((run_id, until))
        return runs

    @property
    def _full(self) -> bool:
        return asyncio.get_running_loop().time() < self._full_until

    def _refused(self, retry_after_ms: int | None, least: int = 1) -> None:
        """Asks about fewer runs, and later: to be refused costs the agents what they need for their runs."""
        if self._full:
            return
        loop = asyncio.get_running_loop()
        wait = min(retry_after_ms / 1000, 1.0) if retry_after_ms else _FULL_S
        self._full_until = loop.time() + wait
        self._batch = max(least, self._batch // 4)
        loop.call_later(wait, self.wake)

    def _grow(self) -> None:
        """Asks about more runs if nobody refused the last ones."""
        if not self._full:
            self._batch = min(_BATCH, self._batch * 2)
            self.wake()

    def _ended(self, result: str) -> None:
        """Takes a dispatch whose stream ended well: where its run was there is a place for the next."""
        if self._batch < _BATCH and result == "ended":
            self._full_until = 0.0
            self._grow()

    async def _dispatch(self, run_id: UUID, until: float) -> None:
        result = "ended"
        run_id_var.set(str(run_id))
        try:
            _dispatching()
            request = agent_pb.ExecuteRequest(run_id=str(run_id))
            async with stream_call(self._agent.Execute(request, timeout=_HOLD_SECONDS)) as call:
                async for response in call:
                    if response.already_claimed:
                        result = "already_claimed"
        except grpc.aio.AioRpcError as error:
            # The run is still due, and the next sweep that finds it so tries again.
            code = error.code()
            result = code.name.lower()
            if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
                self._refused(from_rpc_error(error).retry_after_ms)
            elif from_rpc_error(error).reason in ("TENANT_MOVING", "TENANT_MOVED"):
                # Nobody claims it here, and no agent is short of anything.
                result = "tenant_moving"
            elif code is grpc.StatusCode.UNAVAILABLE:
                # No agent, or one that ended: the run may be due again by now.
                self._unreached.append((run_id, until))
                self._refused(None, _FEW)
            if code not in _LATER:
                _log.error("an agent refused a run", run_id=str(run_id), code=code.name)
        else:
            self._ended(result)
        finally:
            self._held -= 1
            metrics.dispatched_runs.set(self._held)
            metrics.dispatches.labels(result).inc()
