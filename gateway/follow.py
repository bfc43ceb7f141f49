"""Following an event log over whichever replicas serve it: the HTTP client does not notice a change."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Protocol

import grpc
import grpc.aio
import structlog

from gateway.clients import MeshClients, call
from gateway.cursor import GapError, RunCursor
from gateway.door import Door, Waiting
from hermesh.agent.v1.agent_service_pb2 import RunRequest
from hermesh.common.v1.event_pb2 import Event
from hermesh.session.v1 import session_service_pb2 as session_pb
from meshkit import failpoints
from meshkit.channel import stream_call
from meshkit.errors import HermeshError, from_rpc_error
from meshkit.tasks import Backoff

_log = structlog.get_logger("gateway.follow")

# Silence after which a stream is taken for dead and opened again elsewhere. A stopped process keeps its
# connections: nothing else would tell.
RUN_IDLE = 30.0
WATCH_IDLE = 60.0
# A stream that lasted this long was healthy, whatever ended it.
_HEALTHY = 5.0
# Tries of Run before its input goes through the session service instead.
_RUN_TRIES = 3
# How long a stream may take to end by itself after the terminal event.
_TAIL = 2.0

passed_on = failpoints.point("gateway.events")

# One for all: seeding one a stream would cost more than all else here.
_jitter = random.Random()  # noqa: S311 -- spreads load, keeps no secret

# Codes after which another replica, or the same one later, can go on.
PASSING = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
)


class FeedLost(Exception):
    """No replica went on with the log for too long; the client may come back with its cursor."""

    def __init__(self, reason: str, after_ms: int) -> None:
        """Says why, and when to come back."""
        super().__init__(reason)
        self.reason = reason
        self.after_ms = after_ms


class Feed(Protocol):
    """A source of new events in order, in batches of at least one."""

    @property
    def finished(self) -> bool:
        """Whether the log's last event was in the last batch."""
        ...

    def batches(self) -> AsyncGenerator[list[Event], None]:
        """Yields batches until the log's end.

        Raises:
            HermeshError: The log cannot be read, and trying again does not help.
            FeedLost: No replica could be reached for too long.
        """
        ...


class _Idle:
    """Cancels a call that was silent for too long."""

    def __init__(self, stream: Any, seconds: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._stream = stream
        self._seconds = seconds
        self.heard = self._loop.time()
        self.fired = False
        self._timer = self._loop.call_later(seconds, self._check)

    def _check(self) -> None:
        left = self.heard + self._seconds - self._loop.time()
        if left > 0:
            self._timer = self._loop.call_later(left, self._check)
        else:
            self.fired = True
            self._stream.cancel()

    def stop(self) -> None:
        self._timer.cancel()


async def _read_out(stream: Any) -> None:
    """Lets a finished stream end by itself: a cancelled one would count as a client that went away."""
    try:
        async with asyncio.timeout(_TAIL):
            while await stream.read() is not grpc.aio.EOF:
                pass
    except (TimeoutError, grpc.aio.AioRpcError):
        pass


class RunFeed:
    """The events of one run, to its terminal event."""

    def __init__(
        self,
        mesh: MeshClients,
        cursor: RunCursor,
        patience: float,
        submit: RunRequest | None = None,
        door: Door | None = None,
    ) -> None:
        """Follows a run that exists, or with `submit` begins one.

        Args:
            mesh: The services.
            cursor: Where to start; without a run's id if `submit` is given.
            patience: Seconds without any replica before giving up.
            submit: New input. It must have a request id, which makes a second try harmless.
            door: Learns what became of it, and says whether it may be queued.
        """
        self.cursor = cursor
        self._patience = patience
        self._backoff = Backoff(0.02, 1.0, rng=_jitter)
        self._pause: float | None = None
        self._heard_at = 0.0
        self._mesh = mesh
        self._submit = submit
        self._door = door
        self._waiting: Waiting | None = None
        self._tries = 0

    @property
    def finished(self) -> bool:
        """Whether the log's last event was in the last batch."""
        return self.cursor.finished

    async def batches(self) -> AsyncGenerator[list[Event], None]:
        """See `Feed`."""
        door = self._door if self._submit is not None else None
        turn = await door.enter() if door is not None else None
        try:
            async with aclosing(self._follow()) as batches:
                async for batch in batches:
                    if door is not None and turn is not None:
                        turn.end()
                        door.accepted()
                        door = None
                    if self._waiting is not None and batch[-1].seq > 1:
                        self._waiting.begun()
                        self._waiting = None
                    yield batch
        except HermeshError as error:
            if door is not None and error.reason == "OVERLOADED":
                door.refused()
            raise
        finally:
            if turn is not None:
                turn.end()
            if self._waiting is not None:
                self._waiting.given_up()

    async def _follow(self) -> AsyncGenerator[list[Event], None]:
        """Opens stream after stream from the cursor until the log ends."""
        loop = asyncio.get_running_loop()
        self._heard_at = loop.time()
        while True:
            opened = loop.time()
            self._pause = None
            why = "ended early"
            try:
                async with aclosing(self._stream()) as stream:
                    async for fresh in stream:
                        yield fresh
                if self.cursor.finished:
                    return
            except GapError as error:
                why = "gap"
                _log.error("a stream of events had a gap", error=str(error), run_id=self.cursor.run_id)
            except grpc.aio.AioRpcError as error:
                why = error.code().name
                await self._failed(from_rpc_error(error))
            now = loop.time()
            if now - opened > _HEALTHY:
                self._heard_at = now
            if now - self._heard_at > self._patience:
                raise FeedLost("unreachable", 1000)
            _log.info(
                "following the log elsewhere", run_id=self.cursor.run_id, after=self.cursor.last_seq, why=why
            )
            await asyncio.sleep(min(self._wait(), self._patience))

    def _wait(self) -> float:
        return self._backoff.next() if self._pause is None else self._pause

    async def _stream(self) -> AsyncGenerator[list[Event], None]:
        opened, idle_seconds = self._open()
        cursor = self.cursor
        async with stream_call(opened) as stream:
            idle = _Idle(stream, idle_seconds)
            loop = asyncio.get_running_loop()
            eof = grpc.aio.EOF
            try:
                while True:
                    response = await stream.read()
                    if response is eof:
                        return
                    idle.heard = self._heard_at = loop.time()
                    frame = response.frame
                    if frame.events:
                        fresh = cursor.admit(frame.events)
                        self._backoff.reset()
                        if fresh:
                            yield fresh
                            passed_on()
                        if cursor.finished:
                            await _read_out(stream)
                            return
                    if frame.HasField("reconnect"):
                        # After progress the move is at once; moves without any wait longer and longer.
                        progressed = self._backoff.attempts == 0
                        wait = self._backoff.next()
                        self._pause = frame.reconnect.after_ms / 1000 or (0.0 if progressed else wait)
                        return
            except asyncio.CancelledError:
                if not idle.fired:
                    raise
                _log.warning("a stream was silent for too long", run_id=cursor.run_id, seconds=idle_seconds)
            finally:
                idle.stop()

    def _open(self) -> tuple[Any, float]:
        """Returns a stream that starts after the cursor, and how long it may be silent."""
        cursor = self.cursor
        if not cursor.run_id:
            self._tries += 1
            assert self._submit is not None
            return self._mesh.runs.run(self._submit), RUN_IDLE
        request = session_pb.WatchRunRequest(run_id=cursor.run_id, after_seq=cursor.last_seq)
        return self._mesh.sessions.WatchRun(request), WATCH_IDLE

    async def _failed(self, error: HermeshError) -> None:
        """Decides about an error: returns to try again, raises to give up."""
        if error.code not in PASSING:
            raise error
        if error.reason in ("TENANT_MOVING", "TENANT_MOVED"):
            # Nobody in this mesh goes on with it: its client asks again, and comes to the cell that does.
            if self.cursor.run_id:
                raise FeedLost(error.reason.lower(), error.retry_after_ms or 1000)
            raise error
        if self.cursor.run_id or self._submit is None:
            if error.retry_after_ms is not None:
                self._pause = error.retry_after_ms / 1000
            return
        full = error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        if full and error.reason != "OVERLOADED":
            raise error
        # An earlier try may have been accepted, and its answer lost: only the session service knows.
        if full and self._door is not None and self._tries == 1:
            self._waiting = self._door.wait(error)
        if full or self._tries >= _RUN_TRIES:
            # No agent takes it now. Accepted by the session service it waits for one, and is followed there.
            submit = self._submit
            answer = await call(
                self._mesh.sessions.SubmitRun(
                    session_pb.SubmitRunRequest(
                        session_id=submit.session_id,
                        input=submit.input,
                        options=submit.options if submit.HasField("options") else None,
                        request_id=submit.request_id,
                        concurrency=submit.concurrency,
                    )
                )
            )
            self.cursor = RunCursor(answer.run.run_id)
            self._pause = 0.0
