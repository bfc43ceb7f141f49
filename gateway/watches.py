"""All watches of this gateway: clients at the same place of the same log share one, over few streams.

A line is one watch of a run or a session, from a place on. Clients who stand at that place are its members,
and each batch of events is checked and rendered once for all of them. Lines of one log that come to the same
place become one: a client that comes back reads what it missed by a line of its own and ends in the common
one.

Nobody queues events here. A member that cannot take a batch leaves its line and keeps its place; when it can
again, it joins a line from there, which PostgreSQL fills. A line whose members all cannot take holds what
comes, which the window of `Watch` bounds, and acknowledges nothing. A line whose stream is lost begins again
at its place on another one. So what a member gets is a gap-free, duplicate-free prefix of the log, whatever
breaks.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
from collections import deque
from functools import cached_property
from typing import Any, Protocol

import structlog
from google.rpc.status_pb2 import Status

from gateway import frames
from gateway.cursor import GapError, RunCursor, SessionCursor
from gateway.follow import PASSING, FeedLost, passed_on
from gateway.watch_link import Link
from hermesh.common.v1.event_pb2 import Event
from hermesh.session.v1 import session_internal_service_pb2 as pb
from hermesh.session.v1 import session_service_pb2 as session_pb
from meshkit.errors import HermeshError, InternalError, from_status
from meshkit.tasks import TaskOwner

_log = structlog.get_logger("gateway.watches")

# Where a reader stands: after this event. Without a run: at a session's start, or wherever that is when the
# next event comes.
Place = tuple[str, int]
START: Place = ("", 0)
# (tenant, "run" or "session", its id)
Log = tuple[str, str, str]

# Two: half of the watches do not notice that a session replica died.
_LINKS = 2
# What a line takes before it says so; a small part of the window of `Watch`.
_ACK_BYTES = 16_384
_FIRST_WAIT = 0.02
_LONGEST_WAIT = 1.0
_jitter = random.Random()  # noqa: S311 -- spreads load, keeps no secret


class Batch:
    """New events, the same for all who stand at one place."""

    def __init__(self, events: list[Event]) -> None:
        """Takes at least one event."""
        self.events = events

    @cached_property
    def sse(self) -> bytes:
        """The events as SSE, rendered once."""
        return frames.sse(self.events)


class Member(Protocol):
    """A reader. `Watches` calls it, never waits for it, and keeps its `line` and `place`.

    Attributes:
        line: The line that it is on.
        place: Where it joined or, without a line, stands.
    """

    line: Line | None
    place: Place

    @property
    def writable(self) -> bool:
        """Whether a batch can be taken now; if not, it calls `Watches.resume` once it can."""
        ...

    def opened(self) -> None:
        """The watch stands; may be called again."""
        ...

    def deliver(self, batch: Batch) -> None:
        """Takes a batch; only called while `writable`."""
        ...

    def ended(self) -> None:
        """The log has ended."""
        ...

    def failed(self, error: HermeshError | FeedLost) -> None:
        """The log cannot be read, or nobody was found for too long who can."""
        ...


class Line:
    """One watch and those who share it."""

    __slots__ = (
        "acked",
        "attempts",
        "cursor",
        "held",
        "link",
        "log",
        "lost_since",
        "members",
        "opened",
        "taken",
        "timer",
        "watch_id",
    )

    def __init__(self, log: Log, place: Place) -> None:
        self.log = log
        self.cursor: RunCursor | SessionCursor = (
            RunCursor(log[2], place[1]) if log[1] == "run" else SessionCursor(*place)
        )
        self.members: set[Member] = set()
        self.held: deque[pb.WatchFrame] | None = None
        self.link: Link | None = None
        self.watch_id = 0
        self.taken = self.acked = 0
        self.opened = False
        self.attempts = 0
        self.lost_since = 0.0
        self.timer: asyncio.TimerHandle | None = None

    @property
    def place(self) -> Place:
        """The last event that the members have."""
        return self.cursor.run_id, self.cursor.last_seq

    def start(self) -> pb.WatchStart:
        """Returns the message that begins the watch, or begins it again."""
        tenant_id, kind, name = self.log
        run_id, seq = self.place
        if kind == "run":
            run = session_pb.WatchRunRequest(run_id=name, after_seq=seq)
            return pb.WatchStart(watch_id=self.watch_id, tenant_id=tenant_id, run=run)
        session = session_pb.WatchSessionRequest(session_id=name, after_run_id=run_id, after_seq=seq)
        return pb.WatchStart(watch_id=self.watch_id, tenant_id=tenant_id, session=session)


class Watches:
    """All lines of this gateway."""

    def __init__(self, stub: Any, patience: float) -> None:
        """Watches nothing.

        Args:
            stub: SessionInternalService's, on the channel to the mesh.
            patience: Seconds without any replica before members are told so.
        """
        self._stub = stub
        self._patience = patience
        self._links: list[Link] = []
        self._lines: dict[tuple[Log, Place], Line] = {}
        self._owner = TaskOwner("watches")
        self._closed = False

    async def close(self) -> None:
        """Ends the streams to the session service; nothing begins any more."""
        self._closed = True
        await self._owner.close()

    def join(self, member: Member, log: Log, place: Place) -> None:
        """Puts a member on a line; what follows `place` comes to it from now on."""
        member.place = place
        line = self._lines.get((log, place))
        if line is not None and line.held is None:
            line.members.add(member)
            member.line = line
            if line.opened:
                member.opened()
            return
        new = Line(log, place)
        new.members.add(member)
        member.line = new
        # One that holds keeps its entry, and this one has none until it moves.
        self._lines.setdefault((log, place), new)
        self._begin(new)

    def leave(self, member: Member) -> None:
        """Takes a member off; nothing more comes to it."""
        line, member.line = member.line, None
        if line is None:
            return
        line.members.discard(member)
        if not line.members:
            self._drop(line)
        elif line.held is not None:
            self._advance(line)

    def resume(self, member: Member, log: Log) -> None:
        """A member can take again."""
        if member.line is None:
            self.join(member, log, member.place)
        elif member.line.held is not None:
            self._advance(member.line)

    def take(self, link: Link, frame: pb.WatchFrame) -> None:
        """Takes what came over a link."""
        line = link.lines.get(frame.watch_id)
        if line is None:
            return
        if line.held is not None:
            line.held.append(frame)
        elif any(member.writable for member in line.members):
            self._take(line, frame)
        else:
            line.held = deque((frame,))

    def lost(self, link: Link, why: str) -> None:
        """A link is no more: its lines go on over another."""
        self.retire(link)
        lines, link.lines = link.lines, {}
        if lines:
            _log.info("watching elsewhere", watches=len(lines), why=why)
        for line in lines.values():
            line.link = None
            self._again(line, None)

    def retire(self, link: Link) -> None:
        """Begins no more on a link."""
        if link in self._links:
            self._links.remove(link)
        if not link.lines:
            link.finish()

    def _begin(self, line: Line) -> None:
        line.timer = None
        if self._closed:
            return
        if len(self._links) < _LINKS:
            link = Link(self._stub, self)
            self._links.append(link)
            # It is nobody's: neither the tenant nor the trace of the request that happens to need it.
            contextvars.Context().run(self._owner.start, link.run(), name="link")
        else:
            link = min(self._links, key=lambda each: len(each.lines))
        line.link, line.taken, line.acked, line.held = link, 0, 0, None
        link.start(line)

    def _again(self, line: Line, pause: float | None) -> None:
        """Begins a line again from its place after a pause in seconds; None means a moment that grows."""
        self._stop(line)
        loop = asyncio.get_running_loop()
        now = loop.time()
        if not line.lost_since:
            line.lost_since = now
        elif now - line.lost_since > self._patience:
            self._end(line, FeedLost("unreachable", 1000))
            return
        if pause is None:
            pause = min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** min(line.attempts, 10))
            line.attempts += 1
        # All lines of a lost stream begin again; not all in one moment.
        line.timer = loop.call_later(pause * _jitter.uniform(0.5, 1.0), self._begin, line)

    def _stop(self, line: Line) -> None:
        line.held = None
        line.opened = False
        if line.timer is not None:
            line.timer.cancel()
            line.timer = None
        link, line.link = line.link, None
        if link is not None:
            link.stop(line)
            if link not in self._links and not link.lines:
                link.finish()

    def _drop(self, line: Line) -> None:
        self._stop(line)
        place = (line.log, line.place)
        if self._lines.get(place) is line:
            del self._lines[place]

    def _end(self, line: Line, error: HermeshError | FeedLost | None) -> None:
        """Ends a line for all its members."""
        self._drop(line)
        members, line.members = line.members, set()
        for member in members:
            member.line, member.place = None, line.place
            if error is None:
                member.ended()
            else:
                member.failed(error)

    def _advance(self, line: Line) -> None:
        """Hands on what is held, as far as somebody takes it."""
        while line.held is not None:
            if not line.held:
                line.held = None
                self._settle(line)
                return
            if not any(member.writable for member in line.members):
                return
            self._take(line, line.held.popleft())

    def _take(self, line: Line, frame: pb.WatchFrame) -> None:
        try:
            self._dispatch(line, frame)
        except Exception as error:
            # A bug of one line must not end the stream that others are on.
            _log.error("a watch failed unexpectedly", log=line.log, exc_info=error)
            self._end(line, InternalError())

    def _dispatch(self, line: Line, frame: pb.WatchFrame) -> None:
        content = frame.WhichOneof("content")
        if content == "frame":
            self._events(line, frame)
        elif content == "opened":
            line.opened = True
            line.lost_since = 0.0
            for member in list(line.members):
                member.opened()
        elif content == "ended":
            self._end(line, None)
        elif content == "error":
            error = from_status(Status.FromString(frame.error))
            if error.reason == "TENANT_MOVED":
                # No replica of this mesh has it any more.
                self._end(line, error)
            elif error.code in PASSING:
                wait = error.retry_after_ms
                self._again(line, None if wait is None else wait / 1000)
            else:
                self._end(line, error)

    def _events(self, line: Line, frame: pb.WatchFrame) -> None:
        before = line.place
        try:
            fresh = line.cursor.admit(frame.frame.events)
        except GapError as error:
            _log.error("a watch had a gap", error=str(error), log=line.log, after=before)
            self._again(line, None)
            return
        line.taken += frame.size
        if fresh:
            line.attempts = 0
            line.lost_since = 0.0
            batch = Batch(fresh)
            for member in list(line.members):
                if member.line is not line:
                    continue
                if member.writable:
                    member.deliver(batch)
                else:
                    line.members.discard(member)
                    member.line, member.place = None, before
            passed_on()
            self._move(line, before)
        if not line.members:
            self._drop(line)
        elif line.cursor.finished:
            self._end(line, None)
        elif frame.frame.HasField("reconnect"):
            if line.link is not None:
                self.retire(line.link)
            wait = frame.frame.reconnect.after_ms / 1000
            self._again(line, wait or None)
        elif line.link is not None:
            if line.taken - line.acked >= _ACK_BYTES:
                line.acked = line.taken
                line.link.ack(line)
            self._settle(line)

    def _move(self, line: Line, before: Place) -> None:
        """Notes a line's new place."""
        if self._lines.get((line.log, before)) is line:
            del self._lines[line.log, before]
        self._lines.setdefault((line.log, line.place), line)

    def _settle(self, line: Line) -> None:
        """Lets a line end in another one of its log that has come to the same place."""
        other = self._lines.setdefault((line.log, line.place), line)
        if other is line or other.held is not None or line.held is not None:
            return
        members, line.members = line.members, set()
        self._drop(line)
        for member in members:
            member.line = other
            other.members.add(member)
            if other.opened:
                member.opened()
