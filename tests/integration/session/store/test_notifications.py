"""Notices of commits: sent only where somebody has to act, and listened to across breaks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from services.session.domain import ActionDecision, ConcurrencyPolicy, RunStatus
from services.session.store.notifications import CANCEL, DUE, LOG, Notifications
from tests.integration.session.store.kit import Kit, event, intent, ref

DEADLINE = 20.0


@asynccontextmanager
async def listening(url: str) -> AsyncIterator[Notifications]:
    """A listener whose notice of having connected is read."""
    async with Notifications(url, name="test-listen") as notifications, asyncio.timeout(DEADLINE):
        assert await anext(notifications) == (DUE, "")
        yield notifications


async def heard(kit: Kit, notifications: Notifications) -> list[tuple[str, str]]:
    """What came until now: up to a notice that is sent last."""
    await kit.pool.execute("SELECT pg_notify('hermesh_due', 'last')")
    notices = []
    while (notice := await anext(notifications)) != (DUE, "last"):
        notices.append(notice)
    return notices


async def test_queueing_a_run_that_is_next_is_told(kit: Kit, database: str) -> None:
    async with listening(database) as notifications:
        session = await kit.session()
        await kit.submit(session.session_id)
        await kit.submit(session.session_id)
        assert await heard(kit, notifications) == [(DUE, str(session.session_id))]


async def test_the_hot_path_tells_nothing(kit: Kit, database: str) -> None:
    async with listening(database) as notifications:
        grant = await kit.started()
        await kit.append(grant, 2)
        await kit.step(grant, 3, event())
        await kit.store.renew([ref(grant)])
        await kit.store.reattach(ref(grant), "a")
        newer = await kit.store.reattach(ref(grant), "a")
        assert newer is not None
        await kit.finish(newer, 4)
        assert await heard(kit, notifications) == []


async def test_the_end_of_a_run_is_told_if_another_waits(kit: Kit, database: str) -> None:
    async with listening(database) as notifications:
        grant = await kit.started()
        await kit.submit(grant.session_id)
        assert await heard(kit, notifications) == []
        await kit.finish(grant, 2)
        assert await heard(kit, notifications) == [(DUE, str(grant.session_id))]


async def test_a_release_is_told(kit: Kit, database: str) -> None:
    async with listening(database) as notifications:
        grant = await kit.started()
        await kit.store.release(ref(grant))
        await kit.store.release(ref(grant))
        assert await heard(kit, notifications) == [(DUE, str(grant.session_id))]


async def test_a_cancel_that_the_holder_has_to_carry_out_is_told(kit: Kit, database: str) -> None:
    async with listening(database) as notifications:
        grant = await kit.started()
        queued = await kit.submit(grant.session_id)
        await kit.store.cancel(kit.tenant, queued.run.run_id, "")
        assert await heard(kit, notifications) == [(LOG, str(queued.run.run_id))]
        await kit.store.cancel(kit.tenant, grant.run_id, "")
        assert await heard(kit, notifications) == [(CANCEL, str(grant.run_id))]
        await kit.submit(grant.session_id, policy=ConcurrencyPolicy.INTERRUPT)
        assert await heard(kit, notifications) == [(CANCEL, str(grant.run_id))]


async def test_a_persons_word_is_told(kit: Kit, database: str) -> None:
    async with listening(database) as notifications:
        grant = await kit.started()
        call = intent(grant.run_id, needs_approval=True)
        await kit.step(grant, 2, event(), intents=(call,), status=RunStatus.REQUIRES_ACTION)
        await kit.resolve(grant.run_id, call.call_id, ActionDecision.RETRY)
        assert await heard(kit, notifications) == [
            (LOG, str(grant.run_id)),
            (DUE, str(grant.session_id)),
        ]


async def test_a_broken_connection_is_made_anew_and_says_so(kit: Kit, database: str) -> None:
    async with listening(database) as notifications:
        ended = await kit.pool.fetchval(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
            " WHERE application_name = 'test-listen' AND datname = current_database()"
        )
        assert ended == 1
        assert await anext(notifications) == (DUE, "")
        await notifications.wait_listening()
        await kit.pool.execute("SELECT pg_notify('hermesh_cancel', 'x')")
        assert await anext(notifications) == (CANCEL, "x")


async def test_too_many_notices_become_one_that_says_so(
    kit: Kit, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.session.store.notifications._MAX_QUEUED", 10)
    async with listening(database) as notifications:
        await kit.pool.execute("SELECT pg_notify('hermesh_cancel', n::text) FROM generate_series(1, 50) n")
        async with asyncio.timeout(DEADLINE):
            while not notifications.overflowed:
                await kit.pool.fetchval("SELECT 1")
        assert await anext(notifications) == (DUE, "")
        assert await heard(kit, notifications) == []


async def test_an_unreachable_database_is_tried_again_and_closing_ends_it() -> None:
    async with asyncio.timeout(DEADLINE):
        async with Notifications("postgresql://u@127.0.0.1:1/x") as notifications:
            assert not notifications.listening
        assert not [task for task in asyncio.all_tasks() if task.get_name() == "notifications"]
