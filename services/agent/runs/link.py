"""The one append stream of an agent process: many runs' writes out, their results in.

The text of more than a few runs is paced: it goes out on beats that all share, the slower the more runs there
are, so that the cost of a replica, and of the session service's, follows its messages a second and not its
tokens. Text that comes faster than anyone reads gathers at any time. A turn's first text and everything that
is not text is never held back.

When the stream breaks, every run that wrote on it is attached to the next stream under a new fence before
it writes again; the stream itself is opened anew after 0, 50, 100, 200 ms with jitter.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from functools import partial
from typing import Protocol

import grpc.aio
import structlog

from hermesh.session.v1.session_internal_service_pb2 import (
    AppendRequest,
    AppendResponse,
    Reattach,
    ReattachResult,
)
from meshkit import failpoints
from services.agent.runs.writer import Attachment, RunWriter, WriterStopped

_log = structlog.get_logger("agent.link")

BACKOFF = (0.0, 0.05, 0.1, 0.2)
# A write without an answer for this long means a dead peer: the store's own statement timeout is 5 s.
ANSWER_TIMEOUT = 8.0
RETRY_DELAY = 0.1
WATCH_SECONDS = 1.0
# The longest that text gathers, seconds: a reader still sees it flow.
MAX_PACE = 0.05
# From so many runs on text gathers, and for so long at least: what it saves is messages, and nobody sees it.
FEW_RUNS = 4
MIN_PACE = 0.008
# From this size on, in bytes, the rest goes into the next message. One write has at most so many: together
# less than gRPC takes.
MAX_MESSAGE = 1024 * 1024
MAX_WRITE = 14 * 1024 * 1024
# So long after a stream broke leases may still be cut for it, seconds.
CUT_SECONDS = 0.5
# So long a process says that it is new: what its predecessor held has ended by itself then.
NEW_SECONDS = 15.0

_sent = failpoints.point("agent.append.sent")


class AppendCall(Protocol):
    """A bidirectional call, as grpc.aio has it."""

    async def write(self, request: AppendRequest) -> None:
        """Send a message."""

    def __aiter__(self) -> AsyncIterator[AppendResponse]:
        """Read messages."""

    def cancel(self) -> bool:
        """End the call."""


class StreamEnded(Exception):
    """The append stream is over and another one is needed."""


class _Beat:
    """Writers whose text gathers until the next beat, which all of them share.

    Args:
        monotonic: the clock of `at`.
        over: gets those that waited.

    Attributes:
        waiting: writers by run.
        at: when the last beat was.
    """

    def __init__(self, monotonic: Callable[[], float], over: Callable[[dict[str, RunWriter]], None]) -> None:
        self.waiting: dict[str, RunWriter] = {}
        self.at = float("-inf")
        self._monotonic = monotonic
        self._over = over
        self._timer: asyncio.TimerHandle | None = None

    def hold(self, writer: RunWriter, seconds: float) -> None:
        """Let a writer wait for the next beat, which comes within so many seconds."""
        self.waiting[writer.run_id] = writer
        loop = asyncio.get_running_loop()
        if self._timer is not None:
            if self._timer.when() <= loop.time() + seconds:
                return
            self._timer.cancel()
        # The loop's timers know milliseconds: less than one would be none.
        self._timer = loop.call_later(max(seconds, 0.001), self._fire)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _fire(self) -> None:
        self._timer = None
        self.at = self._monotonic()
        waiting, self.waiting = self.waiting, {}
        self._over(waiting)


class AppendLink:
    """Owns the append stream; `run` is its one task.

    Args:
        open_stream: starts a call.
        owner: this process's name as a holder of leases.
        on_cancel: told about runs that somebody asked to cancel.
        monotonic: the clock of leases.
        rate: how many writes a second are aimed at; 0 = text is never held back.
    """

    def __init__(
        self,
        open_stream: Callable[[], AppendCall],
        owner: str,
        on_cancel: Callable[[str], None],
        monotonic: Callable[[], float],
        rate: float = 0.0,
    ) -> None:
        self._open_stream = open_stream
        self._owner = owner
        self._on_cancel = on_cancel
        self._monotonic = monotonic
        self._rate = rate
        # Runs that write faster than anyone reads have a slower beat of their own.
        self._beats = {fast: _Beat(monotonic, self._beat_over) for fast in (False, True)}
        self._writers: dict[str, RunWriter] = {}
        self._ready: dict[str, RunWriter] = {}
        self._reattach: dict[str, RunWriter] = {}
        self._wake = asyncio.Event()
        self._timers: set[asyncio.TimerHandle] = set()
        self._asked_at: dict[str, float] = {}
        self._broke_at = float("-inf")
        self._began = monotonic()

    def add(self, writer: RunWriter) -> None:
        """Serve a run's writer."""
        former = self._writers.get(writer.run_id)
        if former is not None:  # of a claim before: what it left here would stand in this one's way
            self.remove(former)
        self._writers[writer.run_id] = writer
        if writer.asked_at <= self._broke_at + CUT_SECONDS:
            # A stream broke since its lease was asked for, or just before: it may have been cut with it.
            writer.detach()
            self._reattach[writer.run_id] = writer
            self._wake.set()
        elif writer.ready:
            self.schedule(writer)

    def remove(self, writer: RunWriter) -> None:
        """Serve it no more."""
        if self._writers.get(writer.run_id) is not writer:
            return
        del self._writers[writer.run_id]
        self._ready.pop(writer.run_id, None)
        for beat in self._beats.values():
            beat.waiting.pop(writer.run_id, None)
        self._reattach.pop(writer.run_id, None)
        self._asked_at.pop(writer.run_id, None)

    def schedule(self, writer: RunWriter) -> None:
        """Send what a writer has ready, together with whatever else is: now, or on a beat if it can wait."""
        if self._writers.get(writer.run_id) is writer and (writer.urgent or not self._gathers(writer)):
            self._ready[writer.run_id] = writer
            self._wake.set()

    async def run(self) -> None:
        """Keep a stream open until cancelled."""
        failures = 0
        try:
            while True:
                started = self._monotonic()
                try:
                    await self._serve()
                except Exception as error:  # whatever it was: the runs need a stream
                    cause = _describe(error)
                    say = _log.debug if failures else _log.warning
                    say("append stream broke", runs=len(self._writers), cause=cause)
                self._broke_at = self._monotonic()
                for writer in self._writers.values():
                    writer.detach()
                failures = 0 if self._monotonic() - started > 1.0 else failures + 1
                wait = BACKOFF[min(failures, len(BACKOFF) - 1)]
                await asyncio.sleep(random.uniform(wait / 2, wait))  # noqa: S311 - jitter
        finally:
            for timer in self._timers:
                timer.cancel()
            self._timers.clear()
            for beat in self._beats.values():
                beat.close()

    async def _serve(self) -> None:
        """Use one stream until it ends; it always ends by an exception."""
        call = self._open_stream()
        # No task group: one that is cancelled while it fails tells of the failure only, and this would go on.
        parts = [
            asyncio.create_task(_ended_by_us(self._read(call)), name="append-read"),
            asyncio.create_task(self._watch(), name="append-watch"),
            asyncio.create_task(_ended_by_us(self._write(call)), name="append-write"),
        ]
        try:
            done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            for part in done:
                part.result()
        finally:
            call.cancel()
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)

    # sending

    async def _write(self, call: AppendCall) -> None:
        self._asked_at.clear()
        for writer in self._writers.values():
            if writer.attachment is Attachment.DETACHED:
                self._reattach[writer.run_id] = writer
        first = True
        while True:
            self._wake.clear()
            message = self._message()
            if first or message.appends or message.reattach:
                if first:
                    message.owner = self._owner
                    message.new_process = self._monotonic() < self._began + NEW_SECONDS
                    first = False
                await call.write(message)
                _sent()
                continue
            await self._wake.wait()

    def _message(self) -> AppendRequest:
        message = AppendRequest()
        for writer in self._reattach.values():
            message.reattach.append(
                Reattach(session_id=writer.session_id, run_id=writer.run_id, fence=writer.fence)
            )
            self._asked_at[writer.run_id] = self._monotonic()
        self._reattach.clear()
        size = 0
        while self._ready and size < MAX_MESSAGE:
            _, writer = self._ready.popitem()
            if not writer.ready:
                continue
            if writer.attachment is Attachment.ATTACHED and not writer.lease_held:
                # Not renewed in time: it may be another's. A new fence says whether it is still ours.
                writer.detach()
                self._reattach[writer.run_id] = writer
                self._wake.set()
                continue
            size += self._take(writer, message)
        return message

    def _take(self, writer: RunWriter, message: AppendRequest) -> int:
        """Put a writer's next write into a message; returns its size, 0 if it cannot be sent at all.

        One write must not break the stream that all runs share, and break it again when it is sent again.
        """
        try:
            size = writer.take(message.appends.add())
        except Exception as error:
            _log.error("a write cannot be made", run_id=writer.run_id, exc_info=error)
            reason = "it cannot be encoded"
        else:
            if size <= MAX_WRITE:
                return size
            _log.error("a write is too large", run_id=writer.run_id, size=size)
            reason = f"it is larger than {MAX_WRITE} bytes"
        del message.appends[-1]
        writer.stop(WriterStopped("rejected", reason))
        return 0

    # gathering

    def _gathers(self, writer: RunWriter) -> bool:
        """Let a writer's text wait for a beat if it is to; returns whether it does."""
        fast = writer.fast and self._rate > 0
        beat = self._beats[fast]
        if writer.run_id in beat.waiting:
            return True
        now = self._monotonic()
        if fast:
            # From now on: a beat that all of them share follows none's last write.
            wait = MAX_PACE if writer.sent_at + MAX_PACE > now else 0.0
        else:
            wait = max(beat.at, writer.sent_at) + self._pace() - now
        wait = max(wait, writer.hold_until - now)
        if wait > 0:
            beat.hold(writer, wait)
            return True
        if not fast:
            # Text that found no beat to wait for is one: what comes right after it gathers.
            beat.at = now
        return False

    def _pace(self) -> float:
        """The seconds between two beats; 0 = text goes out when it comes."""
        runs = len(self._writers)
        if not self._rate or runs < FEW_RUNS:
            return 0.0
        return min(MAX_PACE, max(MIN_PACE, runs / self._rate))

    def _beat_over(self, writers: dict[str, RunWriter]) -> None:
        now = self._monotonic()
        for run_id, writer in writers.items():
            if writer.hold_until > now and not writer.urgent:
                # It waits for its turn's first text.
                self._beats[False].hold(writer, writer.hold_until - now)
            else:
                self._ready[run_id] = writer
        self._wake.set()

    # receiving

    async def _read(self, call: AppendCall) -> None:
        async for response in call:
            for result in response.results:
                writer = self._writers.get(result.run_id)
                if writer is None:
                    continue
                if writer.answered(result):
                    self._later(partial(writer.send_again, result.first_seq))
                elif writer.attachment is Attachment.DETACHED:
                    # Fenced, maybe by ourselves: a re-attach or a claim whose answer we never heard.
                    self._reattach[result.run_id] = writer
                    self._wake.set()
            if response.reattached:
                self._reattached(response.reattached)
            for run_id in response.cancelled_run_ids:
                self._on_cancel(run_id)
            if response.draining:
                # What is in flight there is settled by the new fence: it is in the log by then, or refused.
                raise StreamEnded("the session replica is draining")
        raise StreamEnded("closed by the session replica")

    def _reattached(self, results: Sequence[ReattachResult]) -> None:
        for result in results:
            writer = self._writers.get(result.run_id)
            asked_at = self._asked_at.pop(result.run_id, None)
            if writer is None or asked_at is None:
                continue
            if result.HasField("grant"):
                writer.reattached(result.grant, asked_at + result.grant.ttl_ms / 1000)
            elif result.lost:
                writer.stop(WriterStopped("lost"))
            else:
                self._later(partial(self._ask_again, writer))

    def _ask_again(self, writer: RunWriter) -> None:
        if self._writers.get(writer.run_id) is writer and writer.attachment is Attachment.DETACHED:
            self._reattach[writer.run_id] = writer
            self._wake.set()

    def _later(self, action: Callable[[], None]) -> None:
        def fire() -> None:
            self._timers.discard(timer)
            action()

        delay = random.uniform(RETRY_DELAY / 2, RETRY_DELAY * 2)  # noqa: S311 - jitter
        timer = asyncio.get_running_loop().call_later(delay, fire)
        self._timers.add(timer)

    async def _watch(self) -> None:
        """End the stream when a write or a re-attach on it stays without an answer."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            limit = self._monotonic() - ANSWER_TIMEOUT
            late = any(
                writer.in_flight and writer.sent_at < limit and writer.attachment is Attachment.ATTACHED
                for writer in self._writers.values()
            )
            if late or any(at < limit for at in self._asked_at.values()):
                raise StreamEnded("the session replica does not answer")


async def _ended_by_us(part: Coroutine[None, None, None]) -> None:
    """Tell a call that its peer cancelled (grpc.aio raises CancelledError for that too) from our own end."""
    try:
        await part
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise StreamEnded("cancelled by the session replica") from None


def _describe(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return error.code().name
    return str(error) if isinstance(error, StreamEnded) else repr(error)
