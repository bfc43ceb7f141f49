"""The streams of `Run` that this gateway has open, as one bundle.

An agent sends what it has for all of them over one of them, and each task that reads here passes on what is
for others. Streams overtake each other: what comes too early waits until what belongs before it is there, or
until it must be taken for lost; then its reader asks the log. So a reader here sees what it would see on a
stream of its own, and need not be as fast as the others.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, NamedTuple
from uuid import uuid4

import grpc.aio
import structlog

from hermesh.agent.v1.agent_service_pb2 import RunRequest, RunResponse
from hermesh.common.v1.event_pb2 import Frame, Reconnect
from meshkit.channel import SESSION_KEY
from meshkit.tasks import TaskOwner

_log = structlog.get_logger("gateway.bundle")

# What overtook something waits so long for it, seconds.
PATIENCE = 1.0
# What one reader may leave unread before it has to read the log, bytes.
MAX_UNREAD = 256 * 1024
# Frames of runs that are not known yet, or not any more.
_MAX_STRAYS = 1000
# An agent says something each 10 s. A stopped process keeps its connections: nothing else would tell.
_SILENCE = 30.0


class Passed(NamedTuple):
    """What a stream of its own would have brought as a response, and its size in bytes."""

    frame: Frame
    size: int


class RunCall:
    """One run's stream: reads like a call of grpc.aio.

    Attributes:
        run_id: Its run; empty before the first event.
    """

    def __init__(self, bundle: RunCalls, call: Any) -> None:
        """Made by `RunCalls.run`."""
        self._bundle = bundle
        self._call = call
        self._queue: deque[Passed] = deque()
        self._unread = 0
        self._waiter: asyncio.Future[None] | None = None
        self.run_id = ""
        self._next_seq = 1
        self._early: dict[int, Frame] = {}
        self._reconnect: Frame | None = None
        self._last_seq = 0
        self._timer: asyncio.TimerHandle | None = None
        # Why nothing more comes: the end, an error, or that it was cancelled.
        self._over: object = None
        self._carries = False
        self._read_all = False
        self._left = False

    @property
    def over(self) -> bool:
        """Whether whoever reads it gets nothing more, beside what waits."""
        return self._over is not None

    async def read(self) -> Any:
        """Returns the next response, or EOF.

        Raises:
            AioRpcError: The stream failed.
            CancelledError: It was cancelled.
        """
        while not self._queue:
            if isinstance(self._over, BaseException):
                raise self._over
            if self._over is not None:
                return self._over
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        passed = self._queue.popleft()
        self._unread -= passed.size
        return passed

    def cancel(self) -> bool:
        """Leaves the stream. One that carries others' events goes on without its reader until it ends.

        So does one that has said its last: cancelled, it would count as a client that went away.
        """
        if self._left:
            return False
        self._left = True
        if not (self._carries or self._last_seq):
            self._call.cancel()
        self._end(asyncio.CancelledError())
        return True

    async def serve(self) -> None:
        """Reads the stream to its end."""
        try:
            while True:
                async with asyncio.timeout(_SILENCE):
                    response = await self._call.read()
                if response is grpc.aio.EOF:
                    break
                self._take(response)
        except grpc.aio.AioRpcError as error:
            self._end(error)
        except TimeoutError:
            _log.warning("a stream was silent for too long", run_id=self.run_id, seconds=_SILENCE)
        except asyncio.CancelledError as error:
            # grpc.aio raises it for a call that the other side cancelled, too.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                self._end(error)
                raise
        finally:
            self._call.cancel()
            self._read_all = True
            if self._next_seq > self._last_seq and self._reconnect is None:
                self._end(grpc.aio.EOF)
            elif self._over is None:
                self._expect()
            else:
                self._bundle.ended(self)

    def _take(self, response: RunResponse) -> None:
        frame = response.frame
        self._last_seq = max(self._last_seq, response.last_seq)
        if frame.events:
            strays: list[Frame] = []
            if not self.run_id:
                self.run_id = frame.events[0].run_id
                strays = self._bundle.begun(self)
            self.deliver(frame)
            for stray in strays:
                self.deliver(stray)
        elif frame.HasField("reconnect"):
            self._reconnect = frame
            self._settle()
        elif not response.others and not response.last_seq:
            self._put(frame)
        if response.others:
            self._carries = True
            for other in response.others:
                self._bundle.deliver(other)

    def deliver(self, frame: Frame) -> None:
        """Takes events of its run, whichever stream brought them."""
        if self._over is not None:
            return
        if frame.events[0].seq > self._next_seq:
            self._early[frame.events[0].seq] = frame
            self._expect()
            return
        self._pass(frame)
        while self._early and (first := min(self._early)) <= self._next_seq:
            self._pass(self._early.pop(first))
        self._settle()

    def _pass(self, frame: Frame) -> None:
        self._next_seq = max(self._next_seq, frame.events[-1].seq + 1)
        self._put(frame)

    def _put(self, frame: Frame) -> None:
        if self._over is not None:
            return
        size = frame.ByteSize()
        if self._unread and self._unread + size > MAX_UNREAD:
            self._queue.append(Passed(Frame(reconnect=Reconnect(reason="slow_reader")), 0))
            self._end(grpc.aio.EOF)
            return
        self._queue.append(Passed(frame, size))
        self._unread += size
        self._wake()

    def _settle(self) -> None:
        """Ends the reading once all is there that was sent before the end."""
        if self._next_seq <= self._last_seq:
            self._expect()
            return
        if not self._early and self._timer is not None:
            self._timer.cancel()
            self._timer = None
        reconnect, self._reconnect = self._reconnect, None
        if reconnect is not None:
            self._put(reconnect)
            self._end(grpc.aio.EOF)
        elif self._last_seq:
            self._end(grpc.aio.EOF)

    def _expect(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(PATIENCE, self._give_up)

    def _give_up(self) -> None:
        """What is missing does not come: the reader finds out where, and asks the log."""
        self._timer = None
        _log.info("events of a bundle did not come", run_id=self.run_id, after_seq=self._next_seq - 1)
        self._end(grpc.aio.EOF)

    def _end(self, why: object) -> None:
        if self._over is None:
            self._over = why
            self._early.clear()
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            self._wake()
        if self._read_all:
            self._bundle.ended(self)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class RunCalls:
    """Begins runs, and owns the reading of their streams."""

    def __init__(self, agents: Any) -> None:
        """Has no streams.

        Args:
            agents: Stub of the agent service.
        """
        self._agents = agents
        self._name = uuid4().hex
        self._owner = TaskOwner("runs")
        self._calls: dict[str, RunCall] = {}
        # Frames that came before their run was known: of a moment ago, and since.
        self._strays: list[dict[str, list[Frame]]] = [{}, {}]
        self._stray = 0
        self._timer: asyncio.TimerHandle | None = None

    async def close(self) -> None:
        """Ends all streams; none begins any more."""
        if self._timer is not None:
            self._timer.cancel()
        await self._owner.close()

    def run(self, request: RunRequest) -> RunCall:
        """Begins a run; whoever reads the call cancels it."""
        request.bundle = self._name
        # Only a proxy that keeps a session with an agent reads it.
        metadata = ((SESSION_KEY, request.session_id),)
        call = RunCall(self, self._agents.Run(request, metadata=metadata))
        self._owner.start(call.serve(), name="run")
        return call

    def begun(self, call: RunCall) -> list[Frame]:
        """A call's run is known; returns what came for it before.

        Where two calls are about the same run, because the second one repeats the first one's key, what other
        streams carry goes to the first while somebody reads it: the second is told to read the log.
        """
        known = self._calls.get(call.run_id)
        if known is not None and not known.over:
            return []
        self._calls[call.run_id] = call
        return [frame for strays in self._strays for frame in strays.pop(call.run_id, ())]

    def ended(self, call: RunCall) -> None:
        """Nothing more comes for this call."""
        if self._calls.get(call.run_id) is call:
            del self._calls[call.run_id]

    def deliver(self, frame: Frame) -> None:
        """Takes events that came over another run's stream."""
        run_id = frame.events[0].run_id
        call = self._calls.get(run_id)
        if call is not None:
            call.deliver(frame)
        elif self._stray < _MAX_STRAYS:
            self._stray += 1
            self._strays[1].setdefault(run_id, []).append(frame)
            if self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(PATIENCE, self._forget)

    def _forget(self) -> None:
        self._strays = [self._strays[1], {}]
        self._stray = sum(len(frames) for frames in self._strays[0].values())
        self._timer = None
        if self._stray:
            self._timer = asyncio.get_running_loop().call_later(PATIENCE, self._forget)
