"""When a tail looks into PostgreSQL often: Redis is known not to bring what others commit, or found out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from uuid import UUID

import pytest

from meshkit.ids import uuid7
from services.session import tail as tail_module
from services.session.domain import Event, NewEvent
from services.session.shards import Shards
from services.session.tail import Position, Tail


class FakeReader:
    """A fake of a shard of Redis, from which nothing comes."""

    def __init__(self) -> None:
        self.healthy = True

    async def read(self, positions: Mapping[UUID, Position]) -> Mapping[UUID, Sequence[Event]]:
        raise NotImplementedError

    async def wake(self) -> None:
        raise NotImplementedError


class FakeHeads:
    """A fake of the log: how far each run is."""

    def __init__(self) -> None:
        self.seqs: dict[UUID, int] = {}

    async def heads(self, run_ids: Sequence[UUID]) -> dict[UUID, int]:
        return {run_id: self.seqs[run_id] for run_id in run_ids}

    async def last_ordinals(self, session_ids: Sequence[UUID]) -> dict[UUID, int]:
        return {}


class World:
    def __init__(self, shards: int = 1) -> None:
        self.heads = FakeHeads()
        self.readers = [FakeReader() for _ in range(shards)]
        self.here: set[UUID] = set()
        self.tail = Tail(
            self.heads,
            readers=self.readers,
            holds=lambda run_id: run_id in self.here,
            poll_seconds=1.0,
            degraded_seconds=0.15,
        )
        self.session, self.run = uuid7(), uuid7()
        self.heads.seqs[self.run] = 5

    def commit(self, run: UUID, *, comes: bool) -> None:
        self.heads.seqs[run] += 1
        if comes:
            self.tail.deliver(run, self.heads.seqs[run], [NewEvent("text.delta", 1, "{}")])


@pytest.fixture
def world() -> World:
    return World()


async def test_what_never_comes_is_looked_up_often_and_for_a_while(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with world.tail.subscribe(world.session, world.run, 5, head=5):
        await world.tail.look()
        world.commit(world.run, comes=False)
        await world.tail.look()
        # It may be on its way.
        assert not world.tail.degraded
        await world.tail.look()
        assert world.tail.degraded
        monkeypatch.setattr(tail_module, "_DEAF_S", 0.0)
        world.commit(world.run, comes=False)
        await world.tail.look()
        await world.tail.look()
        # It is over by itself, and a loss counts once.
        assert not world.tail.degraded
        await world.tail.look()
        assert not world.tail.degraded


async def test_a_loss_among_what_comes_is_no_reason(world: World) -> None:
    other = uuid7()
    world.heads.seqs[other] = 1
    with (
        world.tail.subscribe(world.session, world.run, 5, head=5),
        world.tail.subscribe(world.session, other, 1, head=1),
    ):
        world.commit(world.run, comes=False)
        for _ in range(4):
            world.commit(other, comes=True)
            await world.tail.look()
            assert not world.tail.degraded


async def test_what_is_written_here_or_only_told_by_postgresql_is_no_reason(world: World) -> None:
    world.here.add(world.run)
    with world.tail.subscribe(world.session, world.run, 5, head=5):
        for _ in range(4):
            world.commit(world.run, comes=False)
            await world.tail.look()
        world.here.clear()
        await world.tail.look()
    assert not world.tail.degraded
    with world.tail.subscribe(world.session, world.run, 9, head=9):
        await world.tail.look()
        world.commit(world.run, comes=False)
        world.tail.nudge(world.run)
        for _ in range(4):
            await world.tail.look()
            assert not world.tail.degraded


async def test_one_shard_in_trouble_degrades_its_own_runs() -> None:
    world = World(shards=4)
    readers = Shards(world.readers)
    readers.of(world.session).healthy = False
    assert world.tail.degraded
    assert [lane.degraded for lane in world.tail.lanes].count(True) == 1
    assert world.tail.lanes.of(world.session).degraded
    with world.tail.subscribe(world.session, world.run, 5, head=5) as subscription:
        # Something came live, and yet what is missing is missed at the first look.
        world.commit(world.run, comes=True)
        world.commit(world.run, comes=False)
        await world.tail.look()
        assert subscription.lost
