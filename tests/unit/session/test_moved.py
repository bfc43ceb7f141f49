"""Watches of a tenant that was moved to another cell."""

from __future__ import annotations

import asyncio
from uuid import UUID

import pytest

from meshkit.errors import UnavailableError
from meshkit.ids import uuid7
from services.session.moved import MovedTenants
from services.session.watch import Watcher
from tests.unit.session.test_watch_property import World


class Moves:
    """A fake of the table of moves."""

    def __init__(self) -> None:
        self.moved: frozenset[UUID] = frozenset()

    async def moved_tenants(self) -> frozenset[UUID]:
        return self.moved


async def test_its_watches_end_with_the_word_for_it_and_others_go_on() -> None:
    world, moves = World(1, 12), Moves()
    await world.begin()
    moved = MovedTenants(moves, world.tail)
    await moved.look()
    watcher = Watcher(world.store, world.tail, world.tenant_id, moved.check)
    seen: list[int] = []

    async def watch() -> None:
        async for batch in watcher.run(world.run_id, 0):
            seen.extend(event.seq for event in batch)

    task = asyncio.create_task(watch())
    async with asyncio.timeout(10):
        while not world.tail._feeds:  # noqa: ASYNC110 -- no event announces it
            await asyncio.sleep(0)
        for _ in range(50):
            await asyncio.sleep(0)
        # Another tenant's move is none of its business.
        moves.moved = frozenset({uuid7()})
        await moved.look()
        for _ in range(50):
            await asyncio.sleep(0)
        assert not task.done()
        moves.moved |= {world.tenant_id}
        await moved.look()
        with pytest.raises(UnavailableError) as raised:
            await task
    assert (raised.value.reason, raised.value.retry_after_ms) == ("TENANT_MOVED", 1000)
    assert not world.tail._feeds
    with pytest.raises(UnavailableError):
        await watch()
    moves.moved = frozenset()
    await moved.look()
    moved.check(world.tenant_id)
