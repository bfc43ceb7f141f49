"""Partitions made ahead and dropped, request ids forgotten."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest

from meshkit.errors import OutOfRangeError
from meshkit.ids import uuid7, uuid7_from_ms
from services.session.store.postgres import PARTITIONS_AHEAD_DAYS, PostgresStore
from tests.integration.session.store.kit import Kit, event

_INSERT = """
WITH e AS (INSERT INTO session.event VALUES ($1, $2, 0, $3, $3, 0, 't', '{}') RETURNING tableoid)
SELECT tableoid::regclass::text FROM e
"""


@pytest.fixture
def database(fresh_database: str) -> str:
    """These tests drop partitions: each has a database of its own."""
    return fresh_database


def name_of(day: datetime) -> str:
    return f"event_p{day:%Y%m%d}"


async def partitions(kit: Kit) -> list[str]:
    rows = await kit.pool.fetch(
        "SELECT inhrelid::regclass::text AS name FROM pg_inherits"
        " WHERE inhparent = 'session.event'::regclass ORDER BY 1"
    )
    return [row["name"].removeprefix("session.") for row in rows]


def run_at(time: datetime) -> UUID:
    return uuid7_from_ms(int(time.timestamp() * 1000) + 1)


async def test_migrating_made_partitions_from_yesterday_to_a_week_ahead(kit: Kit) -> None:
    today = datetime.now(UTC)
    expected = [name_of(today + timedelta(days=n)) for n in range(-1, PARTITIONS_AHEAD_DAYS + 1)]
    assert await partitions(kit) == ["event_default", *expected]
    upkeep = await kit.store.maintain()
    assert (upkeep.partitions_made, upkeep.partitions_dropped) == (0, 0)
    assert await kit.pool.fetchval(_INSERT, uuid7(), 1, kit.tenant) == f"session.{name_of(today)}"


async def test_a_missing_partition_is_made_and_takes_its_rows_from_the_default_one(kit: Kit) -> None:
    today = datetime.now(UTC)
    grant = await kit.started()
    await kit.pool.execute("DROP TABLE session." + name_of(today))
    orphaned = await kit.started()
    assert await kit.pool.fetchval("SELECT count(*) FROM session.event_default") == 1
    upkeep = await kit.store.maintain()
    assert upkeep.partitions_made == 1
    assert await kit.pool.fetchval("SELECT count(*) FROM session.event_default") == 0
    assert await kit.types(orphaned.run_id) == ["run.created"]
    await kit.append(grant, 2)


async def test_partitions_past_retention_are_dropped_and_cursors_into_them_expired(kit: Kit) -> None:
    grant = await kit.started()
    await kit.append(grant, 2, event(), event())
    await kit.finish(grant, 4)
    today = datetime.now(UTC)
    # Let the whole log be from 40 days ago: a run keeps its time in its id.
    old = today - timedelta(days=40)
    old_run = run_at(old)
    await kit.pool.execute(_INSERT, run_at(today - timedelta(days=31)), 1, kit.tenant)
    await kit.pool.execute("UPDATE session.event SET run_id = $2 WHERE run_id = $1", grant.run_id, old_run)
    await kit.pool.execute("UPDATE session.run SET run_id = $2 WHERE run_id = $1", grant.run_id, old_run)
    assert len(await kit.log(old_run)) == 4
    upkeep = await kit.store.maintain()
    assert upkeep.partitions_dropped == 0
    with pytest.raises(OutOfRangeError) as caught:
        await kit.log(old_run)
    assert caught.value.reason == "CURSOR_EXPIRED"
    # The conversation stays for the session's life.
    assert len(await kit.messages(grant.session_id)) == 2
    assert await kit.pool.fetchval("SELECT count(*) FROM session.event_default") == 0


async def test_a_days_partition_goes_only_when_all_of_it_is_past_retention(kit: Kit) -> None:
    names = await partitions(kit)
    yesterday = names[1]
    kept = PostgresStore(kit.pool, event_retention=timedelta(hours=25))
    assert (await kept.maintain()).partitions_dropped == 0
    short = PostgresStore(kit.pool, event_retention=timedelta(0))
    assert (await short.maintain()).partitions_dropped == 1
    assert yesterday not in await partitions(kit)


async def test_upkeep_of_many_replicas_at_once_does_it_once(kit: Kit) -> None:
    today = datetime.now(UTC)
    await kit.pool.execute("DROP TABLE session." + name_of(today + timedelta(days=3)))
    await kit.pool.execute("DROP TABLE session." + name_of(today + timedelta(days=4)))
    rounds = await asyncio.gather(*(kit.store.maintain() for _ in range(6)))
    assert sum(upkeep.partitions_made for upkeep in rounds) == 2


async def test_upkeep_beside_appends_loses_none_of_them(kit: Kit) -> None:
    today = datetime.now(UTC)
    grant = await kit.started()
    done = asyncio.Event()
    seq = 2

    async def write() -> None:
        nonlocal seq
        while not done.is_set():
            await kit.append(grant, seq)
            seq += 1

    async def upkeep() -> None:
        for n in range(2, 6):
            await kit.pool.execute("DROP TABLE session." + name_of(today + timedelta(days=n)))
            await kit.store.maintain()
        done.set()

    async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
        tasks.create_task(write())
        tasks.create_task(upkeep())
    assert len(await kit.types(grant.run_id)) == seq - 1


async def test_request_ids_are_forgotten_after_a_week(kit: Kit) -> None:
    session = await kit.session()
    first = await kit.submit(session.session_id, request_id="r", fingerprint=b"1")
    await kit.pool.execute("UPDATE session.idempotency SET created_at = now() - interval '6 days'")
    assert (await kit.store.maintain()).requests_expired == 0
    assert (await kit.submit(session.session_id, request_id="r", fingerprint=b"1")).duplicate
    await kit.pool.execute("UPDATE session.idempotency SET created_at = now() - interval '8 days'")
    assert (await kit.store.maintain()).requests_expired == 1
    again = await kit.submit(session.session_id, request_id="r", fingerprint=b"2")
    assert not again.duplicate
    assert again.run.run_id != first.run.run_id
