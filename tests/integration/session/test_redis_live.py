"""The live streams on a real Valkey."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from uuid import UUID

import pytest
import redis.asyncio

from meshkit.errors import UnavailableError
from meshkit.ids import uuid7
from meshkit.redis import Breaker
from meshkit.redis_servers import open_redis
from services.session.domain import NewEvent
from services.session.publisher import Publication, Reply
from services.session.store.redis_calls import Caller
from services.session.store.redis_live import (
    READ_TIMEOUT,
    RedisReader,
    RedisStreams,
    fence_key,
    stream_key,
)
from services.session.tail import Position
from tests.conftest import ValkeyServer

SESSION, RUN = uuid7(), uuid7()


@dataclass
class Live:
    client: redis.asyncio.Redis
    streams: RedisStreams
    reader: RedisReader


@pytest.fixture
async def live(valkey: ValkeyServer) -> AsyncIterator[Live]:
    async with AsyncExitStack() as stack:
        servers = open_redis(valkey.url)
        assert servers is not None
        link, reading = servers.link(), servers.link(timeout=READ_TIMEOUT)
        stack.push_async_callback(link.aclose)
        stack.push_async_callback(reading.aclose)
        caller = Caller(link, Breaker("test"))
        streams = RedisStreams(caller, ttl_seconds=60, max_events=50)
        yield Live(link.redis, streams, RedisReader(reading, caller, "test-1"))


def publication(first_seq: int, count: int = 1, fence: int = 1, run_id: UUID = RUN) -> Publication:
    events = [
        NewEvent("text.delta", 1000 + seq, f'{{"text":"é{seq}"}}')
        for seq in range(first_seq, first_seq + count)
    ]
    return Publication(SESSION, run_id, fence, first_seq, events)


async def seqs(live: Live, run_id: UUID = RUN) -> list[int]:
    return [
        int(entry.partition(b"-")[0]) for entry, _ in await live.client.xrange(stream_key(SESSION, run_id))
    ]


async def test_an_absent_fence_fails_closed(live: Live) -> None:
    assert await live.streams.publish([publication(2)]) == [Reply.MISSING]
    assert await live.client.keys("*") == []


async def test_events_are_written_under_their_seqs(live: Live) -> None:
    await live.streams.seed({SESSION: 1})
    assert await live.streams.publish([publication(2, 2), publication(4, 3)]) == [Reply.OK, Reply.OK]
    assert await seqs(live) == [2, 3, 4, 5, 6]
    assert await live.streams.publish([publication(3, 2), publication(6, 2)]) == [Reply.OK, Reply.OK]
    assert await seqs(live) == [2, 3, 4, 5, 6, 7]
    assert 0 < await live.client.ttl(stream_key(SESSION, RUN)) <= 60
    assert 0 < await live.client.ttl(fence_key(SESSION)) <= 120


async def test_an_old_fence_writes_nothing(live: Live) -> None:
    await live.streams.seed({SESSION: 2})
    assert await live.streams.publish([publication(2, fence=1), publication(2, fence=3)]) == [
        Reply.STALE,
        Reply.OK,
    ]
    assert await live.streams.publish([publication(3, fence=2)]) == [Reply.STALE]
    assert await live.client.get(fence_key(SESSION)) == b"3"
    await live.streams.seed({SESSION: 1})
    assert await live.client.get(fence_key(SESSION)) == b"3"


async def test_a_gap_is_refused_until_reseeded(live: Live) -> None:
    await live.streams.seed({SESSION: 1})
    await live.streams.publish([publication(2, 2)])
    assert await live.streams.publish([publication(6)]) == [Reply.GAP]
    assert await seqs(live) == [2, 3]
    assert await live.streams.publish([publication(6), publication(7)], reseed=True) == [Reply.OK, Reply.OK]
    assert await seqs(live) == [6, 7]


async def test_a_stream_keeps_about_so_many_events(live: Live) -> None:
    await live.streams.seed({SESSION: 1})
    await live.streams.publish([publication(2, 1000)])
    kept = await seqs(live)
    assert kept[-1] == 1001
    assert kept == list(range(kept[0], 1002))
    assert len(kept) < 300


async def test_a_flush_in_between_is_survived(live: Live) -> None:
    await live.streams.seed({SESSION: 1})
    await live.streams.publish([publication(2)])
    await live.client.flushall()
    await live.client.script_flush()
    assert await live.streams.publish([publication(3)]) == [Reply.MISSING]
    await live.streams.seed({SESSION: 1})
    assert await live.streams.publish([publication(3)]) == [Reply.OK]
    assert await seqs(live) == [3]


async def test_something_else_at_the_keys_is_dropped(live: Live) -> None:
    await live.streams.seed({SESSION: 1})
    await live.client.set(stream_key(SESSION, RUN), "nonsense")
    other = uuid7()
    assert await live.streams.publish([publication(2), publication(2, run_id=other)]) == [
        Reply.BROKEN,
        Reply.OK,
    ]
    await live.streams.seed({SESSION: 1})
    assert await live.streams.publish([publication(3)]) == [Reply.OK]
    await live.client.delete(fence_key(SESSION))
    await live.client.rpush(fence_key(SESSION), "nonsense")
    assert await live.streams.publish([publication(4)]) == [Reply.BROKEN]
    assert await live.streams.publish([publication(5)]) == [Reply.MISSING]


async def test_reads_go_on_from_positions(live: Live) -> None:
    other = uuid7()
    await live.streams.seed({SESSION: 1})
    await live.streams.publish([publication(2, 3), publication(2, 2, run_id=other)])
    found = await live.reader.read({RUN: Position(SESSION, 3), other: Position(SESSION, 1)})
    assert [(event.seq, event.type, event.time_ms, event.data) for event in found[RUN]] == [
        (4, "text.delta", 1004, '{"text":"é4"}')
    ]
    assert [event.seq for event in found[other]] == [2, 3]
    assert found[other][0].run_id == other


async def test_a_read_waits_for_what_comes_and_a_wake_ends_it(live: Live) -> None:
    await live.streams.seed({SESSION: 1})
    for _ in range(3):
        async with asyncio.TaskGroup() as group:
            reading = group.create_task(live.reader.read({RUN: Position(SESSION, 0)}))
            await asyncio.sleep(0)
            started = time.monotonic()
            await live.reader.wake()
            assert await reading == {}
        assert time.monotonic() - started < 0.8
    async with asyncio.TaskGroup() as group:
        reading = group.create_task(live.reader.read({RUN: Position(SESSION, 0)}))
        await live.streams.publish([publication(2)])
        found = await reading
    assert [event.seq for event in found[RUN]] == [2]


async def test_a_dead_server_is_an_error_soon_and_recovers(live: Live, valkey: ValkeyServer) -> None:
    await live.streams.seed({SESSION: 1})
    assert live.reader.healthy
    valkey.kill()
    started = time.monotonic()
    with pytest.raises(UnavailableError):
        await live.streams.publish([publication(2)])
    with pytest.raises(UnavailableError):
        await live.reader.read({RUN: Position(SESSION, 0)})
    with pytest.raises(UnavailableError):
        await live.reader.wake()
    assert time.monotonic() - started < 3
    assert not live.reader.healthy
    await asyncio.to_thread(valkey.start)
    assert await live.reader.read({RUN: Position(SESSION, 0)}) == {}
    assert live.reader.healthy


async def test_foreign_data_in_a_stream_is_an_error(live: Live) -> None:
    await live.client.xadd(stream_key(SESSION, RUN), {"x": "y"}, id="2-0")
    with pytest.raises(UnavailableError):
        await live.reader.read({RUN: Position(SESSION, 0)})
    assert not live.reader.healthy


async def test_a_large_event_comes_without_its_data(live: Live) -> None:
    await live.streams.seed({SESSION: 1})
    item = publication(2, 3)
    item.events = [item.events[0], NewEvent("tool.result", 7, ""), item.events[2]]
    assert await live.streams.publish([item]) == [Reply.OK]
    (_, fields) = (await live.client.xrange(stream_key(SESSION, RUN)))[1]
    # So that a reader that knows of no such events takes it for broken and not for empty.
    assert fields == {b"e": b"tool.result 7"}
    found = (await live.reader.read({RUN: Position(SESSION, 1)}))[RUN]
    assert [(event.seq, event.type, event.time_ms, event.data) for event in found] == [
        (2, "text.delta", 1002, '{"text":"é2"}'),
        (3, "tool.result", 7, ""),
        (4, "text.delta", 1004, '{"text":"é4"}'),
    ]
