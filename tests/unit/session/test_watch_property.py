"""Whatever the live tail loses, repeats or reorders, a watcher sends the stored log: no gap, no duplicate."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshkit.errors import OutOfRangeError
from meshkit.ids import uuid7
from services.session import tail as tail_module
from services.session.domain import Event, RunStatus, Submission
from services.session.tail import Tail
from services.session.watch import Moved, Watcher, following, frames
from tests.unit.session.fake_store import FakeStore

ids = st.integers(1, 40)


class World:
    """A run that is written while watchers come and go."""

    def __init__(self, seed: int, length: int) -> None:
        self.random = random.Random(seed)
        self.length = length
        self.store = FakeStore()
        self.tail = Tail(
            self.store, readers=None, holds=lambda _: False, poll_seconds=1.0, degraded_seconds=1.0
        )
        self.tenant_id = uuid7()
        self.late: list[list[Event]] = []
        self.run_id: UUID

    async def begin(self) -> None:
        session = await self.store.create_session(
            self.tenant_id, title="", metadata={}, agent="", user="", request_id="", fingerprint=b""
        )
        submitted = await self.store.submit(
            self.tenant_id, Submission(session.session_id, [("user", "x")], b"", "", "", b"", 0)
        )
        self.run_id = submitted.run.run_id

    def step(self) -> None:
        """Commits some events, or delivers, repeats, reorders or loses some of those committed before."""
        log = self.store.events[self.run_id]
        choice = self.random.random()
        if choice < 0.5 and len(log) < self.length:
            batch = []
            for _ in range(self.random.randint(1, 4)):
                if len(log) < self.length:
                    kind = "run.completed" if len(log) + 1 == self.length else "text.delta"
                    batch.append(self.store.log(self.run_id, kind))
            if log[-1].terminal:
                run = self.store.runs[self.run_id]
                self.store.runs[self.run_id] = type(run)(
                    **{f: getattr(run, f) for f in run.__slots__} | {"status": RunStatus.COMPLETED}
                )
            fate = self.random.random()
            if fate < 0.5:
                self.tail.deliver_events(self.run_id, batch)
            elif fate < 0.65:
                # Some of them were too large for Redis.
                self.tail.deliver_events(
                    self.run_id,
                    [replace(one, data="") if self.random.random() < 0.5 else one for one in batch],
                )
            elif fate < 0.8:
                self.late.append(batch)
        elif choice < 0.7 and self.late:
            batch = self.late.pop(self.random.randrange(len(self.late)))
            self.tail.deliver_events(self.run_id, batch)
        elif choice < 0.85 and log:
            start = self.random.randrange(len(log))
            some = log[start : start + 5]
            if self.random.random() < 0.3:
                self.random.shuffle(some)
            self.tail.deliver_events(self.run_id, some)

    async def write(self) -> None:
        while len(self.store.events[self.run_id]) < self.length:
            self.step()
            for _ in range(self.random.randint(0, 3)):
                await asyncio.sleep(0)
            if self.random.random() < 0.1:
                await self.tail.look()

    async def watch(self, seed: int) -> list[Event]:
        """Watches to the end, over as many connections as the seed wants."""
        rng = random.Random(seed)
        seen: list[Event] = []
        watcher = Watcher(self.store, self.tail, self.tenant_id)
        while not seen or not seen[-1].terminal:
            cut = rng.choice([1, 2, 5, 1000])
            batches = watcher.run(self.run_id, seen[-1].seq if seen else 0)
            async for batch in batches:
                assert not isinstance(batch, Moved)
                # The client may take only part of what was on its way.
                taken = batch[: rng.randint(1, len(batch))] if rng.random() < 0.2 else batch
                seen.extend(taken)
                cut -= len(taken)
                for _ in range(rng.choice([0, 0, 1, 5, 20])):
                    await asyncio.sleep(0)
                if cut <= 0 or len(taken) < len(batch):
                    break
            await batches.aclose()
        return seen


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), length=st.integers(2, 60), bound=st.sampled_from([2, 8, 1024]))
def test_watchers_see_the_log_whatever_the_live_tail_does(seed: int, length: int, bound: int) -> None:
    async def play() -> None:
        world = World(seed, length)
        await world.begin()
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            watches = [group.create_task(world.watch(seed + n)) for n in range(3)]
            await group.create_task(world.write())
            while not all(watch.done() for watch in watches):
                await world.tail.look()
                await asyncio.sleep(0)
        for watch in watches:
            assert watch.result() == world.store.events[world.run_id]
        assert not world.tail._feeds

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tail_module, "_MAX_QUEUED_EVENTS", bound)
        asyncio.run(play())


@given(start=st.integers(0, 20), seqs=st.lists(ids, max_size=30))
def test_following_is_a_run_of_consecutive_seqs(start: int, seqs: list[int]) -> None:
    run_id = uuid7()
    found, gap = following([Event(run_id, seq, "text.delta", 1, "{}") for seq in seqs], start)
    assert [event.seq for event in found] == list(range(start + 1, start + 1 + len(found)))
    end = start + len(found)
    assert gap or all(seq <= end for seq in seqs)


@given(sizes=st.lists(st.integers(0, 300_000), max_size=30))
def test_frames_keep_order_and_are_bounded(sizes: list[int]) -> None:
    run_id = uuid7()
    events = [Event(run_id, seq, "text.delta", 1, "x" * size) for seq, size in enumerate(sizes)]
    split = frames(events)
    assert [event for frame in split for event in frame] == events
    for frame in split:
        assert frame
        assert len(frame) == 1 or sum(len(event.data) for event in frame) <= 512 * 1024


async def test_a_watch_of_a_finished_run_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(1, 12)
    await world.begin()
    await world.write()
    watcher = Watcher(world.store, world.tail, world.tenant_id)

    async def seqs(after: int) -> list[int]:
        return [event.seq async for batch in watcher.run(world.run_id, after) for event in batch]

    assert await seqs(0) == list(range(1, 13))
    assert await seqs(5) == list(range(6, 13))
    assert await seqs(12) == []
    with pytest.raises(OutOfRangeError) as raised:
        await seqs(13)
    assert raised.value.reason == "CURSOR_PAST_END"
    assert raised.value.metadata == {"last_seq": "12"}
