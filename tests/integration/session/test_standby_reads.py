"""Old events come from a real standby while it keeps up, and from the primary whenever it does not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from meshkit.ids import uuid7
from meshkit.postgres import open_pool
from services.session.domain import Grant
from services.session.store import standby_reads
from services.session.store.postgres import PostgresStore
from services.session.store.standby_reads import Lag, StandbyReads
from tests.integration.session.standby import Replicated, replicated
from tests.integration.session.store.kit import Kit

SECONDS = 30.0


@pytest.fixture(scope="module")
def pair() -> Iterator[Replicated]:
    with asyncio.Runner() as runner:
        both = replicated(synchronous=False)
        yield runner.run(both.__aenter__())
        runner.run(both.__aexit__(None, None, None))


@pytest.fixture
async def standby(pair: Replicated, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[StandbyReads]:
    # What was written a moment ago counts as old here.
    monkeypatch.setattr(standby_reads, "OLD_SECONDS", -1.0)
    monkeypatch.setattr(standby_reads, "_TIMEOUT", 0.5)
    async with StandbyReads(pair.standby.url, name="test", max_lag=1.0) as reads:
        yield reads
    pair.thaw()


@pytest.fixture
async def kit(pair: Replicated, standby: StandbyReads) -> AsyncIterator[Kit]:
    pool = await open_pool(pair.url, max_size=4, name="test-store")
    try:
        store = PostgresStore(pool, standby=standby)
        yield Kit(store, await store.ensure_key(f"tenant-{uuid7()}", uuid7().hex * 2, "test"), pool)
    finally:
        await pool.close()


async def finished(kit: Kit) -> Grant:
    grant = await kit.started()
    for seq in range(2, 5):
        await kit.append(grant, seq)
    await kit.finish(grant, 5)
    return grant


async def until(standby: StandbyReads, kit: Kit, problem: str | None) -> None:
    """Looks until the standby is as it should be."""
    async with asyncio.timeout(SECONDS):
        while (found := await standby.look(kit.store.position)) != problem:  # noqa: ASYNC110 - as its watch does
            await asyncio.sleep(0.05)
    standby._problem = found


def reads(result: str) -> float:
    value: float = standby_reads.metrics.standby_reads.labels(result)._value.get()
    return value


async def test_an_ended_run_is_read_from_the_standby(
    pair: Replicated, kit: Kit, standby: StandbyReads
) -> None:
    grant = await finished(kit)
    await until(standby, kit, None)
    before = reads("read")
    assert [event.seq for event in await kit.log(grant.run_id)] == [1, 2, 3, 4, 5]
    assert reads("read") == before + 1
    # Another tenant sees nothing there either, and what is not there is the primary's to say.
    assert await standby.events_after(uuid7(), grant.run_id, 0, 10) is None
    assert await kit.store.events_after(kit.tenant, grant.run_id, 5, 10) == []


async def test_a_page_that_ends_with_the_standbys_data_is_not_taken(kit: Kit, standby: StandbyReads) -> None:
    grant = await kit.started()
    await kit.append(grant, 2)
    await until(standby, kit, None)
    # The run goes on, so there may be more than the standby has.
    assert await standby.events_after(kit.tenant, grant.run_id, 0, 10) is None
    assert len(await standby.events_after(kit.tenant, grant.run_id, 0, 2) or []) == 2
    assert [event.seq for event in await kit.log(grant.run_id)] == [1, 2]


async def test_a_standby_that_lags_or_is_frozen_is_left_out_and_comes_back(
    pair: Replicated, kit: Kit, standby: StandbyReads
) -> None:
    await until(standby, kit, None)
    await pair.ask("SELECT pg_wal_replay_pause()", of=pair.standby)
    grant = await finished(kit)
    await until(standby, kit, "the standby for reads is too far behind")
    assert len(await kit.log(grant.run_id)) == 5
    await pair.ask("SELECT pg_wal_replay_resume()", of=pair.standby)
    await until(standby, kit, None)
    pair.freeze()
    failed = reads("failed")
    # Frozen between two looks: the page comes from the primary after a short wait.
    assert len(await kit.log(grant.run_id)) == 5
    assert reads("failed") == failed + 1
    await until(standby, kit, "the standby for reads does not answer")
    pair.thaw()
    await until(standby, kit, None)


async def test_a_server_that_is_no_standby_is_not_read_from(pair: Replicated, kit: Kit) -> None:
    async with StandbyReads(pair.url, name="test", max_lag=1.0) as reads:
        assert await reads.look(kit.store.position) == "the standby for reads is no standby"


async def test_a_standby_that_is_away_at_the_start_keeps_nobody_from_starting(kit: Kit) -> None:
    async with StandbyReads("postgresql://u:p@127.0.0.1:1/d", name="test", max_lag=1.0) as reads:
        assert await reads.look(kit.store.position) == "the standby for reads does not answer"


def test_lag_is_the_age_of_the_newest_place_that_was_passed() -> None:
    lag = Lag()
    assert lag.of(10, now=5.0) == float("inf")
    for at, position in ((1.0, 100), (2.0, 200), (3.0, 200), (4.0, 300)):
        lag.note(at, position)
    assert lag.of(300, now=4.5) == 0.5
    # Nothing was written between 2.0 and 3.0.
    assert lag.of(250, now=4.5) == 1.5
    assert lag.of(99, now=4.5) == float("inf")
    # Another primary, whose log is shorter.
    lag.note(5.0, 250)
    assert lag.of(300, now=5.0) == 0.0
    assert lag.of(249, now=5.0) == float("inf")
