import asyncio

import grpc.aio
import pytest

from services.session.storm import GRACE_MS, STORM_GRACE_MS, MeshLink, StormGuard


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("broken", "still_open", "grace"),
    [
        (1, 0, GRACE_MS),
        (1, 1, GRACE_MS),
        (2, 3, GRACE_MS),
        (2, 0, STORM_GRACE_MS),  # all of several at once: nobody would be left to take over
        (3, 3, STORM_GRACE_MS),
        (3, 100, GRACE_MS),  # three of a hundred agents may well die together
        (20, 80, GRACE_MS),  # exactly a fifth
        (21, 79, STORM_GRACE_MS),
    ],
)
def test_grace_depends_on_the_share_of_streams_that_broke(broken: int, still_open: int, grace: int) -> None:
    guard = StormGuard(Clock())
    for _ in range(broken):
        guard.broke()
    assert guard.grace_ms(still_open) == grace


def test_breaks_older_than_a_second_do_not_count() -> None:
    clock = Clock()
    guard = StormGuard(clock)
    for _ in range(5):
        guard.broke()
    assert guard.grace_ms(3) == STORM_GRACE_MS
    clock.now += 1.1
    guard.broke()
    assert guard.grace_ms(7) == GRACE_MS


def test_breaks_spread_over_seconds_are_single_deaths() -> None:
    clock = Clock()
    guard = StormGuard(clock)
    for _ in range(10):
        guard.broke()
        assert guard.grace_ms(9) == GRACE_MS
        clock.now += 0.6


async def test_the_link_follows_the_peer() -> None:
    async def until(link: MeshLink, up: bool) -> None:
        async with asyncio.timeout(10):
            while link.up is not up:  # noqa: ASYNC110 -- gRPC tells by a plain state
                await asyncio.sleep(0.01)

    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    options = [("grpc.max_reconnect_backoff_ms", 100), ("grpc.initial_reconnect_backoff_ms", 50)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        link = MeshLink(channel, check_seconds=0.05)
        assert not link.up
        async with asyncio.TaskGroup() as group:
            keeping = group.create_task(link.keep())
            await until(link, True)
            await server.stop(0)
            await until(link, False)
            server = grpc.aio.server()
            server.add_insecure_port(f"127.0.0.1:{port}")
            await server.start()
            await until(link, True)
            keeping.cancel()
    await server.stop(0)
