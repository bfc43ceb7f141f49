"""What the publisher does with each of Redis's answers; the streams here are a fake in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from uuid import UUID

import pytest

from meshkit.errors import UnavailableError
from meshkit.ids import uuid7
from services.session.domain import Event, RunAppend
from services.session.publisher import Publication, RedisPublisher, Reply
from tests.unit.session.calls import until
from tests.unit.session.fake_store import FakeStore, text

SESSION, RUN = uuid7(), uuid7()


class FakeStreams:
    """A fake of Redis: keeps the rules of the script that runs there."""

    def __init__(self) -> None:
        self.fences: dict[UUID, int] = {}
        self.streams: dict[UUID, list[int]] = {}
        self.refuses = False
        self.down = False
        self.calls: list[int] = []
        self.changed = asyncio.Event()

    async def publish(self, items: Sequence[Publication], *, reseed: bool = False) -> list[Reply]:
        self.calls.append(len(items))
        self.changed.set()
        if self.down:
            raise UnavailableError("SERVICE_UNAVAILABLE", "down")
        return [self._publish(item, reseed) for item in items]

    def _publish(self, item: Publication, reseed: bool) -> Reply:
        fence = self.fences.get(item.session_id)
        if fence is None:
            return Reply.MISSING
        if item.fence < fence:
            return Reply.STALE
        stream = self.streams.setdefault(item.run_id, [])
        if stream and item.first_seq > stream[-1] + 1:
            if not reseed:
                return Reply.GAP
            stream.clear()
        self.fences[item.session_id] = item.fence
        last = stream[-1] if stream else 0
        stream += [seq for seq in range(item.first_seq, item.first_seq + len(item.events)) if seq > last]
        return Reply.OK

    async def seed(self, fences: Mapping[UUID, int]) -> None:
        for session_id, fence in fences.items():
            self.fences[session_id] = max(fence, self.fences.get(session_id, 0))


def append(first_seq: int, count: int = 1, fence: int = 1) -> RunAppend:
    return RunAppend(SESSION, RUN, fence, first_seq, [text("x")] * count)


@asynccontextmanager
async def running(streams: FakeStreams, store: FakeStore) -> AsyncIterator[RedisPublisher]:
    publisher = RedisPublisher(streams, store)
    task = asyncio.create_task(publisher.run())
    yield publisher
    task.cancel()
    await asyncio.wait([task])


@pytest.fixture
def streams() -> FakeStreams:
    return FakeStreams()


@pytest.fixture
def store() -> FakeStore:
    store = FakeStore()
    store.leases[SESSION].fence = 1
    return store


async def test_an_unknown_fence_comes_from_postgresql(streams: FakeStreams, store: FakeStore) -> None:
    async with running(streams, store) as publisher:
        publisher.offer(append(2, 2))
        publisher.offer(append(4, 2))
        await until(lambda: streams.streams.get(RUN) == [2, 3, 4, 5])
    assert streams.fences == {SESSION: 1}


async def test_an_old_writer_stays_out_after_redis_lost_its_fence(
    streams: FakeStreams, store: FakeStore
) -> None:
    store.leases[SESSION].fence = 3
    async with running(streams, store) as publisher:
        publisher.offer(append(2, fence=2))
        publisher.offer(append(2, 3, fence=3))
        await until(lambda: RUN in streams.streams)
    assert streams.streams[RUN] == [2, 3, 4]
    assert streams.fences == {SESSION: 3}


async def test_a_gap_begins_the_stream_anew(streams: FakeStreams, store: FakeStore) -> None:
    streams.fences[SESSION] = 1
    streams.streams[RUN] = [2, 3]
    async with running(streams, store) as publisher:
        publisher.offer(append(7, 2))
        publisher.offer(append(9, 1))
        await until(lambda: streams.streams[RUN] == [7, 8, 9])


async def test_an_outage_loses_publications_and_nothing_else(streams: FakeStreams, store: FakeStore) -> None:
    streams.fences[SESSION] = 1
    streams.down = True
    async with running(streams, store) as publisher:
        publisher.offer(append(2))
        await until(lambda: streams.calls)
        streams.down = False
        publisher.offer(append(3))
        await until(lambda: streams.streams.get(RUN) == [3])


async def test_the_queue_is_bounded(
    streams: FakeStreams, store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.session.publisher._MAX_QUEUED", 10)
    publisher = RedisPublisher(streams, store)
    for seq in range(2, 100):
        publisher.offer(append(seq))
    assert len(publisher._queue) == 10


async def test_while_redis_is_down_one_publication_waits(streams: FakeStreams, store: FakeStore) -> None:
    streams.refuses = True
    publisher = RedisPublisher(streams, store)
    for seq in range(2, 100):
        publisher.offer(append(seq))
    assert len(publisher._queue) == 1


async def test_an_event_without_a_lease_gets_the_sessions_fence(
    streams: FakeStreams, store: FakeStore
) -> None:
    tenant = store.add_key("k" * 20)
    session = await store.create_session(
        tenant, title="", metadata={}, agent="", user="", request_id="", fingerprint=b""
    )
    store.leases[session.session_id].fence = 4
    run_id = uuid7()
    run = type("R", (), {"session_id": session.session_id, "run_id": run_id})()
    async with running(streams, store) as publisher:
        publisher.offer_event(run, Event(run_id, 2, "run.cancelled", 1, "{}"))
        await until(lambda: streams.streams.get(run_id) == [2])
    assert streams.fences == {session.session_id: 4}


async def test_appends_of_one_run_are_one_publication(streams: FakeStreams, store: FakeStore) -> None:
    streams.fences[SESSION] = 1
    async with running(streams, store) as publisher:
        for seq in range(2, 30):
            publisher.offer(append(seq))
        publisher.offer(append(30, fence=2))
        await until(lambda: streams.streams.get(RUN) == list(range(2, 31)))
    assert streams.calls == [2]


async def test_what_comes_during_a_publication_gathers_and_what_it_left_does_not(
    streams: FakeStreams, store: FakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.session.publisher._APART_S", 1000.0)
    monkeypatch.setattr("services.session.publisher._BATCH", 3)
    streams.fences[SESSION] = 1
    async with running(streams, store) as publisher:
        publish = streams.publish

        async def slow(items: Sequence[Publication], *, reseed: bool = False) -> list[Reply]:
            if len(items) == 2:
                publisher.offer(append(2))
            return await publish(items, reseed=reseed)

        monkeypatch.setattr(streams, "publish", slow)
        for _ in range(5):
            publisher.offer(RunAppend(SESSION, uuid7(), 1, 2, [text("x")]))
        await until(lambda: len(streams.calls) == 2)
        for _ in range(10):
            await asyncio.sleep(0)
        assert streams.calls == [3, 2]
        assert len(publisher._queue) == 1


async def test_large_events_stay_out_of_redis_and_out_of_the_queue(
    streams: FakeStreams, store: FakeStore
) -> None:
    published: list[Publication] = []
    publish = streams.publish

    async def noted(items: Sequence[Publication], *, reseed: bool = False) -> list[Reply]:
        published.extend(items)
        return await publish(items, reseed=reseed)

    streams.publish = noted  # type: ignore[method-assign]
    streams.fences[SESSION] = 1
    large = text("x" * 60_000)
    async with running(streams, store) as publisher:
        for place in range(64):
            events = [text("a"), large, text("b")]
            publisher.offer(RunAppend(SESSION, RUN, 1, 2 + 3 * place, events, size=61_000))
        assert publisher._size < 64 * 200
        await until(lambda: streams.streams.get(RUN, [0])[-1] == 193)
    events = [event for item in published for event in item.events]
    assert [event.data for event in events[:3]] == [text("a").data, "", text("b").data]
    assert sum(len(event.data) for event in events) < 64 * 200
    assert [event.type for event in events] == ["text.delta"] * 192


async def test_a_batch_is_bounded_by_its_bytes(streams: FakeStreams, store: FakeStore) -> None:
    streams.fences[SESSION] = 1
    sessions = [uuid7() for _ in range(40)]
    streams.fences |= dict.fromkeys(sessions, 1)
    async with running(streams, store) as publisher:
        for session_id in sessions:
            append = RunAppend(session_id, uuid7(), 1, 2, [text("x" * 4000)] * 25, size=101_000)
            publisher.offer(append)
        await until(lambda: sum(streams.calls) == 40)
    assert max(streams.calls) <= 11
