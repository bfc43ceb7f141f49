"""One timer for all streams: who is silent gets a heartbeat, who is blocked is dropped, in order."""

from __future__ import annotations

import asyncio

import uvloop

from gateway.pulse import Pulse


class Stream:
    def __init__(self) -> None:
        self.beats = 0
        self.dropped = False
        self.changed = asyncio.Event()

    def beat(self) -> None:
        self.beats += 1
        self.changed.set()

    def drop(self) -> None:
        self.dropped = True
        self.changed.set()

    async def next(self) -> None:
        async with asyncio.timeout(5):
            await self.changed.wait()
        self.changed.clear()


async def test_silence_is_filled_again_and_again() -> None:
    pulse, stream = Pulse(0.01, 10.0), Stream()
    pulse.written(stream)
    for beats in range(1, 4):
        await stream.next()
        assert stream.beats == beats
    pulse.remove(stream)
    assert pulse._due() is None


async def test_more_streams_than_one_go_takes_all_get_theirs() -> None:
    pulse = Pulse(0.01, 10.0)
    streams = [Stream() for _ in range(1200)]
    for stream in streams:
        pulse.written(stream)
    for stream in streams:
        await stream.next()
        pulse.remove(stream)


async def test_a_blocked_stream_is_dropped_once_and_gets_no_heartbeat() -> None:
    pulse, stream = Pulse(0.005, 0.03), Stream()
    pulse.written(stream)
    pulse.blocked(stream)
    await stream.next()
    assert stream.dropped
    assert stream.beats == 0
    assert pulse._due() is None


async def test_a_stream_that_takes_again_is_not_dropped() -> None:
    pulse, stream = Pulse(0.02, 0.04), Stream()
    pulse.blocked(stream)
    pulse.written(stream)
    for _ in range(3):
        await stream.next()
    assert not stream.dropped
    assert stream.beats == 3
    pulse.remove(stream)


def test_the_loop_that_serves_keeps_the_time_too() -> None:
    """Timers that are due already differ between loops."""

    async def late() -> None:
        pulse = Pulse(0.01, 10.0)
        streams = [Stream() for _ in range(1200)]
        for stream in streams:
            pulse.written(stream)
        for _ in range(3):
            for stream in streams:
                await stream.next()

    uvloop.run(late())
