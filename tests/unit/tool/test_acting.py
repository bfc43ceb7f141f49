"""The act's clock: no step begins once its time has passed, whatever the event loop's timers say."""

import asyncio
import time

import pytest

from services.tool.acting import Timed


class Clock:
    """`time.monotonic` as a stopped process sees it: it jumps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead = 0.0
        real = time.monotonic
        monkeypatch.setattr("services.tool.acting.time.monotonic", lambda: real() + self.ahead)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


async def test_an_act_within_its_time_is_left_alone(clock: Clock) -> None:
    async def act() -> str:
        await asyncio.sleep(0)
        with pytest.raises(ValueError, match="inside"):
            raise ValueError("inside")
        return "done"

    assert await Timed(act(), time.monotonic() + 60) == "done"


async def test_what_an_act_raises_comes_out(clock: Clock) -> None:
    async def act() -> str:
        await asyncio.sleep(0)
        raise ValueError("of its own")

    with pytest.raises(ValueError, match="of its own"):
        await Timed(act(), time.monotonic() + 60)


async def test_an_act_that_wakes_after_its_time_takes_no_further_step(clock: Clock) -> None:
    answer = asyncio.Event()
    steps = []

    async def act() -> None:
        steps.append("asked")
        try:
            await answer.wait()
            steps.append("acted")
        finally:
            # Cleaning up is not acting: it may wait.
            await asyncio.sleep(0)
            steps.append("cleaned")

    task = asyncio.create_task(_driven(act(), time.monotonic() + 60))
    await asyncio.sleep(0)
    # The process stops, and goes on when both the answer and the end of its time are there.
    clock.ahead = 120
    answer.set()
    await asyncio.wait({task}, timeout=5)
    assert task.cancelled()
    assert steps == ["asked", "cleaned"]


async def test_an_act_whose_time_has_passed_never_begins(clock: Clock) -> None:
    begun = []

    async def act() -> None:
        begun.append(True)

    task = asyncio.create_task(_driven(act(), time.monotonic() - 1))
    await asyncio.wait({task}, timeout=5)
    assert task.cancelled()
    assert begun == []


async def test_a_cancelled_act_cleans_up_after_its_time_too(clock: Clock) -> None:
    cleaned = []

    async def act() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            clock.ahead = 120
            await asyncio.sleep(0)
            cleaned.append(True)

    task = asyncio.create_task(_driven(act(), time.monotonic() + 60))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task}, timeout=5)
    assert cleaned == [True]


async def _driven(awaitable: object, until: float) -> object:
    return await Timed(awaitable, until)  # type: ignore[arg-type]
