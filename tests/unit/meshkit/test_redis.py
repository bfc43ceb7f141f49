from __future__ import annotations

import asyncio
import time

import pytest
import redis.asyncio
import redis.exceptions

from meshkit.redis import Breaker, BreakerOpenError
from meshkit.redis_servers import REDIS_ERRORS
from meshkit.redis_trouble import Trouble
from tests.valkeys import client_of


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


async def bad() -> None:
    raise redis.exceptions.ConnectionError("gone")


async def good() -> int:
    return 7


async def open_breaker(breaker: Breaker) -> None:
    for _ in range(3):
        with pytest.raises(REDIS_ERRORS):
            await breaker.run(bad)


async def test_a_dead_redis_fails_at_once_and_is_not_tried_again() -> None:
    client = client_of("redis://127.0.0.1:1")
    began = time.monotonic()
    with pytest.raises(REDIS_ERRORS):
        await client.get("k")
    assert time.monotonic() - began < 2
    await client.aclose()


async def test_a_silent_redis_costs_a_quarter_of_a_second() -> None:
    connections = 0
    held: list[asyncio.StreamWriter] = []

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        held.append(writer)

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    client = client_of(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    began = time.monotonic()
    with pytest.raises(REDIS_ERRORS):
        await client.get("k")
    assert 0.2 < time.monotonic() - began < 2
    assert connections == 1
    await client.aclose()
    for writer in held:
        writer.close()
    server.close()


async def test_failures_open_the_breaker_and_a_success_closes_it() -> None:
    clock = Clock()
    breaker = Breaker(clock=clock)
    await open_breaker(breaker)
    assert breaker.is_open
    with pytest.raises(BreakerOpenError):
        await breaker.run(good)
    clock.now += 1.3
    assert not breaker.is_open
    assert await breaker.run(good) == 7
    assert not breaker.is_open
    assert await breaker.run(good) == 7


async def test_a_failed_trial_opens_it_again() -> None:
    clock = Clock()
    breaker = Breaker(clock=clock)
    await open_breaker(breaker)
    clock.now += 1.3
    with pytest.raises(redis.exceptions.ConnectionError):
        await breaker.run(bad)
    with pytest.raises(BreakerOpenError):
        await breaker.run(good)


async def test_only_one_call_tries_at_a_time() -> None:
    clock = Clock()
    breaker = Breaker(clock=clock)
    await open_breaker(breaker)
    clock.now += 1.3
    assert breaker.allow()
    assert not breaker.allow()
    assert breaker.is_open
    breaker.cancelled()
    assert breaker.allow()
    breaker.success()
    assert breaker.allow()


async def test_a_cancelled_trial_leaves_its_place_to_the_next() -> None:
    clock = Clock()
    breaker = Breaker(clock=clock)
    await open_breaker(breaker)
    clock.now += 1.3
    task = asyncio.ensure_future(breaker.run(asyncio.Event().wait))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert await breaker.run(good) == 7


async def test_an_error_reply_shows_that_redis_lives() -> None:
    breaker = Breaker(failures=1)

    async def wrong_type() -> None:
        raise redis.exceptions.ResponseError("WRONGTYPE")

    for _ in range(3):
        with pytest.raises(redis.exceptions.ResponseError):
            await breaker.run(wrong_type)
    assert not breaker.is_open


async def test_a_server_that_cannot_be_used_opens_it_at_once_and_says_why() -> None:
    clock = Clock()
    breaker = Breaker(clock=clock)

    async def read_only() -> None:
        raise redis.exceptions.ReadOnlyError("You can't write against a read only replica.")

    with pytest.raises(redis.exceptions.ReadOnlyError):
        await breaker.run(read_only)
    assert breaker.is_open
    assert breaker.trouble is not None
    assert breaker.trouble.cause == "read_only"
    clock.now += 1.3
    # It may be tried again, and is still in trouble until that works.
    assert not breaker.is_open
    assert breaker.trouble is not None
    assert await breaker.run(good) == 7
    assert breaker.trouble is None


def test_a_probe_that_fails_opens_it_at_once() -> None:
    breaker = Breaker()
    why = Trouble("timeout", "slow")
    breaker.trip(why)
    assert breaker.is_open
    assert breaker.trouble is why


async def test_a_bug_of_ours_does_not_open_it() -> None:
    breaker = Breaker(failures=1)

    async def bug() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        await breaker.run(bug)
    assert not breaker.is_open


def test_a_success_forgets_earlier_failures() -> None:
    breaker = Breaker(failures=2)
    for _ in range(5):
        breaker.failure(Trouble("timeout", "slow"))
        breaker.success()
    assert not breaker.is_open


@pytest.mark.parametrize("url", ["redis://h", "rediss://h", "unix:///s"])
def test_commands_are_packed_as_redis_py_packs_them(url: str) -> None:
    client = client_of(url)
    connection = client.connection_pool.make_connection()
    for command in (
        ("GET", b"k\x00"),
        ("SCRIPT LOAD", "return 'ü'"),
        ("EVALSHA", "a", 1, "k", 2.5, "x" * 9000),
    ):
        packed = b"".join(connection.pack_command(*command))
        assert packed == b"".join(redis.asyncio.connection.Connection().pack_command(*command))
    with pytest.raises(redis.exceptions.DataError):
        connection.pack_command("GET", object())
