"""Turns are given in order, in fair shares, and not waited for too long."""

from __future__ import annotations

import asyncio
from uuid import UUID

import pytest

from gateway.line import Line, LineFull

ONE, TWO = UUID(int=1), UUID(int=2)


async def test_so_many_have_their_turn_and_the_next_comes_when_one_ends() -> None:
    line = Line(2, 10, 10)
    first, second = await line.enter(ONE), await line.enter(ONE)
    third = asyncio.ensure_future(line.enter(ONE))
    await asyncio.sleep(0)
    assert not third.done()
    first.end()
    first.end()
    (await third).end()
    second.end()
    await line.enter(ONE)
    assert line.waiting == 0


async def test_tenants_take_turns_however_many_one_has_in_line() -> None:
    line = Line(1, 100, 10)
    held = await line.enter(ONE)
    order: list[str] = []

    async def one(tenant: UUID, name: str) -> None:
        turn = await line.enter(tenant)
        order.append(name)
        turn.end()

    async with asyncio.TaskGroup() as group:
        for number in range(5):
            group.create_task(one(ONE, f"flood {number}"))
        await asyncio.sleep(0)
        group.create_task(one(TWO, "polite"))
        await asyncio.sleep(0)
        held.end()
    assert order == ["flood 0", "polite", "flood 1", "flood 2", "flood 3", "flood 4"]


async def test_a_flood_leaves_room_in_line() -> None:
    line = Line(1, 90, 10)
    await line.enter(ONE)
    waiting = []
    while line.has_room(ONE):
        waiting.append(asyncio.ensure_future(line.enter(ONE)))
        await asyncio.sleep(0)
    assert len(waiting) == 80
    with pytest.raises(LineFull):
        await line.enter(ONE)
    assert line.has_room(TWO)
    for one in waiting:
        one.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert line.waiting == 0


async def test_who_waits_too_long_is_sent_away_and_whoever_leaves_the_line_loses_no_turn() -> None:
    line = Line(1, 10, 0.01)
    await line.enter(ONE)
    with pytest.raises(LineFull):
        await line.enter(TWO)
    assert line.waiting == 0
    patient = Line(1, 10, 10)
    held = await patient.enter(ONE)
    gone = asyncio.ensure_future(patient.enter(ONE))
    after = asyncio.ensure_future(patient.enter(ONE))
    await asyncio.sleep(0)
    held.end()  # The turn is given to one that leaves in the same moment.
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    (await asyncio.wait_for(after, 1)).end()
    await patient.enter(ONE)


async def test_a_turn_that_takes_too_long_is_the_next_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.line.TURN_S", 0.01)
    line = Line(1, 10, 10)
    hanging = await line.enter(ONE)
    await asyncio.wait_for(line.enter(ONE), 5)
    hanging.end()
    assert line.waiting == 0


async def test_nobody_is_let_in_who_would_wait_too_long_as_fast_as_the_line_moves() -> None:
    line = Line(1, 500, 0.5)
    held = await line.enter(ONE)
    waiting = [asyncio.ensure_future(line.enter(ONE)) for _ in range(100)]
    await asyncio.sleep(0)
    assert line.has_room(ONE)
    for one in waiting[:40]:
        await asyncio.sleep(0.01)
        held.end()
        held = await one
    # Sixty wait, ten milliseconds at the least each.
    assert not line.has_room(ONE)
    assert line.has_room(TWO)
    for one in waiting:
        one.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
