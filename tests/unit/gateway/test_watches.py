"""However streams and watches break and clients read: each gets the log once, and watches are shared."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway import watches as watches_module
from gateway.follow import FeedLost
from gateway.watches import START, Watches
from hermesh.common.v1.event_pb2 import Event, Frame, Reconnect
from hermesh.session.v1 import session_internal_service_pb2 as pb
from meshkit.errors import HermeshError, NotFoundError, UnavailableError, to_status
from tests.examples import examples
from tests.unit.gateway.watch_reader import Reader


def rpc_error(code: grpc.StatusCode) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata())


class Call:
    """A stream of `Watch`, as the gateway's side sees it."""

    def __init__(self, replica: Replica, requests: AsyncIterator[pb.WatchRequest]) -> None:
        self.replica = replica
        self.inbox: asyncio.Queue[Any] = asyncio.Queue()
        self.feeds: dict[int, asyncio.Task[None]] = {}
        self.taken: dict[int, int] = {}
        self.reader = asyncio.get_running_loop().create_task(self._take(requests))

    async def read(self) -> Any:
        item = await self.inbox.get()
        if isinstance(item, Exception):
            raise item
        return item

    def cancel(self) -> bool:
        self.replica.calls.discard(self)
        for task in (self.reader, *self.feeds.values()):
            task.cancel()
        return True

    def send(self, watch_id: int, **content: Any) -> None:
        self.inbox.put_nowait(pb.WatchResponse(frames=[pb.WatchFrame(watch_id=watch_id, **content)]))

    async def _take(self, requests: AsyncIterator[pb.WatchRequest]) -> None:
        loop = asyncio.get_running_loop()
        async for request in requests:
            for ack in request.acks:
                self.taken[ack.watch_id] = ack.taken
            for watch_id in request.stops:
                if watch_id in self.feeds:
                    self.feeds[watch_id].cancel()
            for start in request.starts:
                self.replica.starts.append(start)
                self.feeds[start.watch_id] = loop.create_task(self.replica.feed(self, start))
        self.inbox.put_nowait(grpc.aio.EOF)


class Replica:
    """A FAKE of the session service: one session's log of a few runs, and all that may go wrong."""

    def __init__(self, seed: int = 0, trouble: float = 0.0) -> None:
        self.random = random.Random(seed)
        self.trouble = trouble
        self.log: list[Event] = []
        self.calls: set[Call] = set()
        self.starts: list[pb.WatchStart] = []
        self.changed = asyncio.Event()
        self.error: HermeshError | None = None
        self.refusing = False

    def Watch(self, requests: AsyncIterator[pb.WatchRequest]) -> Call:
        call = Call(self, requests)
        if self.refusing:
            call.inbox.put_nowait(rpc_error(grpc.StatusCode.UNAVAILABLE))
        self.calls.add(call)
        return call

    def append(self, run: int, seq: int, kind: str = "text.delta") -> None:
        self.log.append(Event(run_id=f"run-{run}", seq=seq, type=kind, data="{}"))
        self.changed.set()
        self.changed = asyncio.Event()

    def after(self, start: pb.WatchStart) -> int:
        order = start.session
        if not order.after_run_id:
            return 0
        ids = [(event.run_id, event.seq) for event in self.log]
        return ids.index((order.after_run_id, order.after_seq)) + 1

    async def feed(self, call: Call, start: pb.WatchStart) -> None:
        name, rng = start.watch_id, self.random
        if self.error is not None:
            call.send(name, error=to_status(self.error).SerializeToString())
            return
        at = self.after(start)
        call.send(name, opened=pb.WatchOpened())
        while True:
            while at >= len(self.log):
                await self.changed.wait()
            await asyncio.sleep(0)
            first = at
            if rng.random() < self.trouble:
                trouble = rng.choice(("reconnect", "error", "break", "again", "gap"))
                if trouble == "reconnect":
                    call.send(name, frame=Frame(reconnect=Reconnect(reason="drain")))
                    return
                if trouble == "error":
                    call.send(name, error=to_status(UnavailableError()).SerializeToString())
                    return
                if trouble == "break":
                    call.inbox.put_nowait(rpc_error(grpc.StatusCode.UNAVAILABLE))
                    return
                if trouble == "again":
                    first = max(self.start_of_run(at), at - 3)
                elif at + 1 < len(self.log) and self.log[at].run_id == self.log[at + 1].run_id:
                    first = at + 1
            end = at + 1
            while end < len(self.log) and self.log[end].run_id == self.log[at].run_id and rng.random() < 0.7:
                end += 1
            frame = Frame(events=self.log[first : max(end, first + 1)])
            call.send(name, frame=frame, size=frame.ByteSize())
            at = max(end, first + 1)

    def start_of_run(self, at: int) -> int:
        while at and self.log[at - 1].run_id == self.log[at].run_id:
            at -= 1
        return at


async def until(check: Callable[[], bool]) -> None:
    """Lets the loop run until something that no event announces is so."""
    async with asyncio.timeout(10):
        while not check():  # noqa: ASYNC110 -- what is waited for is a plain attribute
            await asyncio.sleep(0)


@pytest.fixture
async def replica() -> Replica:
    return Replica()


@pytest.fixture
async def watches(replica: Replica) -> AsyncIterator[Watches]:
    made = Watches(replica, 5.0)
    yield made
    await made.close()
    for call in list(replica.calls):
        call.cancel()


@settings(max_examples=examples(50), deadline=None)
@given(seed=st.integers(0, 2**32), trouble=st.sampled_from([0.0, 0.1, 0.4]), readers=st.integers(1, 6))
def test_readers_get_the_log_once_however_streams_break_and_they_read(
    seed: int, trouble: float, readers: int
) -> None:
    async def play() -> None:
        rng = random.Random(seed)
        replica = Replica(seed, trouble)
        watches = Watches(replica, 60.0)
        members: list[tuple[Reader, int]] = []

        def come() -> None:
            at = rng.randint(0, len(replica.log))
            place = (replica.log[at - 1].run_id, replica.log[at - 1].seq) if at else START
            members.append((Reader(watches, place), at))

        come()
        for run in range(1, 5):
            length = rng.randint(2, 12)
            for seq in range(1, length + 1):
                replica.append(run, seq, "run.completed" if seq == length else "text.delta")
                if len(members) < readers and rng.random() < 0.3:
                    come()
                for member, _ in members:
                    if rng.random() < 0.2:
                        member.takes = False
                    elif not member.takes and rng.random() < 0.5:
                        member.go_on()
                for _ in range(rng.choice((0, 0, 1, 5, 20))):
                    await asyncio.sleep(0)
        replica.trouble = 0.0
        for member, at in members:
            if not member.takes:
                member.go_on()
            expected = replica.log[at:]
            await member.until(lambda member, expected=expected: len(member.seen) >= len(expected))
            assert member.seen == expected
        # All stand at the same place in the end: one watch, however many there were.
        await until(lambda: len({id(member.line) for member, _ in members}) == 1)
        for member, _ in members:
            watches.leave(member)
        assert not watches._lines
        await watches.close()
        for call in list(replica.calls):
            call.cancel()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watches_module, "_FIRST_WAIT", 0.0002)
        patch.setattr(watches_module, "_LONGEST_WAIT", 0.001)
        asyncio.run(play())


async def test_readers_at_one_place_share_a_watch_and_its_bytes(replica: Replica, watches: Watches) -> None:
    readers = [Reader(watches) for _ in range(5)]
    for reader in readers:
        await reader.until(lambda reader: reader.stands)
    replica.append(1, 1)
    for reader in readers:
        await reader.until(lambda reader: reader.seen)
    assert len(replica.starts) == 1
    assert len({id(reader.batches[0]) for reader in readers}) == 1
    assert readers[0].batches[0].sse is readers[1].batches[0].sse
    late = Reader(watches, ("run-1", 1))
    assert late.stands
    assert len(replica.starts) == 1


async def test_tenants_share_nothing(replica: Replica, watches: Watches) -> None:
    mine, other = Reader(watches), Reader(watches, log=("other", "session", "s"))
    for reader in (mine, other):
        await reader.until(lambda reader: reader.stands)
    assert [start.tenant_id for start in replica.starts] == ["tenant", "other"]


async def test_a_tenant_that_was_moved_is_not_looked_for_here(replica: Replica, watches: Watches) -> None:
    replica.error = UnavailableError("TENANT_MOVED", "it was moved", retry_after_ms=1000)
    reader = Reader(watches)
    await reader.until(lambda reader: reader.outcome is not None)
    assert isinstance(reader.outcome, UnavailableError)
    assert reader.outcome.reason == "TENANT_MOVED"
    assert len(replica.starts) == 1


async def test_a_reader_that_does_not_take_stalls_nobody_and_catches_up(
    replica: Replica, watches: Watches
) -> None:
    quick, slow = Reader(watches), Reader(watches)
    await slow.until(lambda reader: reader.stands)
    slow.takes = False
    for seq in range(1, 50):
        replica.append(1, seq)
    await quick.until(lambda reader: len(reader.seen) == 49)
    assert slow.line is None
    assert not slow.seen
    slow.go_on()
    await slow.until(lambda reader: len(reader.seen) == 49)
    assert slow.seen == quick.seen


async def test_what_nobody_takes_is_held_and_not_acknowledged(replica: Replica, watches: Watches) -> None:
    reader = Reader(watches)
    await reader.until(lambda reader: reader.stands)
    reader.takes = False
    replica.append(1, 1)
    line = reader.line
    assert line is not None
    await until(lambda: bool(line.held))
    assert line.taken == 0
    reader.go_on()
    assert [event.seq for event in reader.seen] == [1]
    assert len(replica.starts) == 1


async def test_an_error_ends_one_watch_and_not_its_neighbours(replica: Replica, watches: Watches) -> None:
    well = Reader(watches)
    await well.until(lambda reader: reader.stands)
    replica.error = NotFoundError("SESSION_NOT_FOUND", "no such session")
    lost = Reader(watches, log=("tenant", "session", "gone"))
    await lost.until(lambda reader: reader.outcome)
    assert lost.outcome.reason == "SESSION_NOT_FOUND"
    replica.append(1, 1)
    await well.until(lambda reader: reader.seen)


async def test_when_nobody_goes_on_readers_are_told(replica: Replica) -> None:
    replica.refusing = True
    watches = Watches(replica, 0.05)
    reader = Reader(watches)
    await reader.until(lambda reader: reader.outcome)
    assert isinstance(reader.outcome, FeedLost)
    assert reader.outcome.reason == "unreachable"
    await watches.close()


async def test_a_stream_that_nobody_needs_after_a_drain_is_ended(replica: Replica, watches: Watches) -> None:
    reader = Reader(watches)
    await reader.until(lambda reader: reader.stands)
    (call,) = replica.calls
    call.send(1, frame=Frame(reconnect=Reconnect(reason="drain")))
    await until(lambda: call not in replica.calls)
    replica.append(1, 1)
    await reader.until(lambda reader: reader.seen)


async def test_a_bug_in_one_watch_ends_that_watch_alone(
    replica: Replica, watches: Watches, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, other = Reader(watches), Reader(watches, log=("other", "session", "s"))
    for each in (reader, other):
        await each.until(lambda each: each.stands)
    assert reader.line is not None

    def broken(_: Any) -> Any:
        raise ValueError("a bug")

    monkeypatch.setattr(type(reader.line.cursor), "admit", lambda self, events: broken(self))
    replica.append(1, 1)
    await reader.until(lambda reader: reader.outcome)
    assert reader.outcome.reason == "INTERNAL"
