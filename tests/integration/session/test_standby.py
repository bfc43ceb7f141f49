"""A synchronous standby that does not answer, and a failover: what was acknowledged is there, and what is not
known is called unknown.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest

from meshkit import postgres as meshkit_postgres
from meshkit.errors import HermeshError, UnavailableError
from meshkit.ids import uuid7
from meshkit.postgres import open_pool
from services.session.domain import AppendOutcome, RunAppend, RunStatus, ToolCallState
from services.session.store import postgres_base
from services.session.store.postgres import PostgresStore
from tests.integration.session.process import SessionProcess, environment
from tests.integration.session.standby import Replicated, replicated
from tests.integration.session.store.kit import Kit, event, intent, ref
from tests.integration.session.store.test_journal import waiting
from tests.integration.session.test_faults import readiness

PATIENCE = 0.6
SECONDS = 30.0


@pytest.fixture(scope="module")
def pair() -> Iterator[Replicated]:
    with asyncio.Runner() as runner:
        both = replicated()
        yield runner.run(both.__aenter__())
        runner.run(both.__aexit__(None, None, None))


@pytest.fixture
async def kit(pair: Replicated, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Kit]:
    """A store on the primary, less patient than ours."""
    monkeypatch.setattr(meshkit_postgres, "_COMMAND_TIMEOUT", PATIENCE)
    monkeypatch.setattr(postgres_base, "CONFIRM_TIMEOUT", PATIENCE)
    pool = await open_pool(pair.url, max_size=8, name="test-store")
    try:
        store = PostgresStore(pool)
        assert await store.synchronous()
        yield Kit(store, await store.ensure_key(f"tenant-{uuid7()}", uuid7().hex * 2, "test"), pool)
    finally:
        pair.thaw()
        await pool.close()


async def unknown(call: Callable[[], Awaitable[Any]]) -> None:
    """Asserts that nobody says whether it was done, and nobody that it was not."""
    with pytest.raises(UnavailableError) as raised:
        await call()
    assert raised.value.reason == "OUTCOME_UNKNOWN"
    assert raised.value.retry_after_ms
    assert "nothing was changed" not in raised.value.message


async def reason_of(call: Callable[[], Awaitable[Any]]) -> str:
    """The reason of a call's error; empty when there is none."""
    try:
        await call()
    except HermeshError as error:
        return error.reason
    return ""


async def test_every_already_done_waits_for_the_standby(pair: Replicated, kit: Kit) -> None:
    session = await kit.session()
    calls_of = await kit.started()
    call, other = intent(calls_of.run_id, 1), intent(calls_of.run_id, 2)
    await kit.step(calls_of, 2, event(), intents=(call, other))
    for one in (call, other):
        await kit.store.begin(one.call_id, calls_of.session_id, calls_of.fence)
    plain, step, held = await kit.started(), await kit.started(), await kit.started()
    gone = await kit.session()
    queued = await kit.submit((await kit.started()).session_id)

    async def submit() -> Any:
        return await kit.submit(session.session_id, request_id="the-input")

    async def create() -> Any:
        return await kit.store.create_session(
            kit.tenant, title="", metadata={}, agent="", user="", request_id="the-session", fingerprint=b"x"
        )

    async def append() -> Any:
        [result] = await kit.store.append(
            [RunAppend(plain.session_id, plain.run_id, plain.fence, 2, [event()])]
        )
        return result

    async def append_step() -> Any:
        return await kit.step(step, 2, event("run.completed", "{}"), status=RunStatus.COMPLETED)

    async def complete() -> Any:
        return await kit.store.complete(call.call_id, calls_of.fence, ToolCallState.COMPLETED, "4", "")

    async def begin() -> Any:
        return await kit.store.begin(call.call_id, calls_of.session_id, calls_of.fence)

    async def cancel() -> Any:
        return await kit.store.cancel(kit.tenant, queued.run.run_id, "enough")

    async def claim() -> Any:
        return await kit.store.claim(held.run_id, "a")

    async def delete() -> Any:
        return await kit.store.delete_session(kit.tenant, gone.session_id)

    asked = {
        "submit": submit,
        "create": create,
        "append": append,
        "append_step": append_step,
        "complete": complete,
        "begin": begin,
        "cancel": cancel,
        "claim": claim,
        "delete": delete,
    }
    told: dict[str, list[str]] = {name: [] for name in asked}
    pair.freeze()
    for name, one in asked.items():
        for _ in ("first", "again"):
            told[name].append(await reason_of(one))
    pair.thaw()
    # A wait for what others did is no outcome of its own.
    others = {"delete": ["OUTCOME_UNKNOWN", "DATABASE_UNAVAILABLE"]}
    assert told == {name: ["OUTCOME_UNKNOWN"] * 2 for name in asked} | others
    assert await reason_of(delete) == "SESSION_NOT_FOUND"
    assert (await submit()).duplicate
    assert (await append()).outcome is AppendOutcome.GAP
    assert (await append_step()).outcome is AppendOutcome.GAP
    assert (await create()).session_id == (await create()).session_id
    assert (await complete()).state is ToolCallState.COMPLETED
    assert (await cancel())[0].status is RunStatus.CANCELLED


async def test_a_word_about_a_call_and_an_end_that_was_asked_for_wait_for_the_standby_again(
    pair: Replicated, kit: Kit
) -> None:
    (by_id, [named]), (by_word, [said]) = await waiting(kit), await waiting(kit)
    settled, [call_id] = await waiting(kit)
    held = await kit.started()

    async def resolve() -> Any:
        return (await kit.resolve(by_id.run_id, named, request_id=f"word-{named}"))[1].state

    async def resolve_without_id() -> Any:
        return (await kit.resolve(by_word.run_id, said, content="42"))[1].state

    async def reconcile() -> Any:
        return (await kit.store.reconcile(call_id, ToolCallState.COMPLETED, "4", "")).state

    async def fail_held() -> Any:
        return await kit.store.fail_held(ref(held), "it could not")

    asked = {
        "resolve": (by_id.run_id, resolve, ToolCallState.COMPLETED),
        "resolve, without an id": (by_word.run_id, resolve_without_id, ToolCallState.COMPLETED),
        "reconcile": (settled.run_id, reconcile, ToolCallState.COMPLETED),
        "fail_held": (held.run_id, fail_held, None),
    }
    told: dict[str, list[str]] = {}
    pair.freeze()
    for name, (run_id, one, _) in asked.items():
        told[name] = [await reason_of(one)]
        # It is done here, where alone it can be seen: what comes next finds nothing left to do.
        run = await kit.store.get_run(kit.tenant, run_id)
        assert run.status is (RunStatus.FAILED if name == "fail_held" else RunStatus.QUEUED), name
        told[name].append(await reason_of(one))
    pair.thaw()
    assert told == {name: ["OUTCOME_UNKNOWN"] * 2 for name in asked}
    for name, (_, one, answer) in asked.items():
        assert await one() is answer, name


async def test_a_replica_says_that_no_standby_answers_for_as_long_as_none_does(pair: Replicated) -> None:
    replica = SessionProcess("session-1", environment(pair.url))

    async def until(says: str) -> None:
        async with asyncio.timeout(SECONDS):
            while True:
                status, checks = await asyncio.to_thread(readiness, replica)
                # Reads go on, and another replica would do no better.
                assert (status, checks["postgresql"]["reason"]) == (200, None)
                reason = checks["standby"]["reason"] or ""
                if says in reason and bool(says) == bool(reason):
                    return
                await asyncio.sleep(0.05)

    try:
        await asyncio.to_thread(replica.wait_ready)
        await until("")
        pair.freeze()
        await until("no synchronous standby of PostgreSQL answers")
        pair.thaw()
        await until("")
    finally:
        pair.thaw()
        replica.kill()
        shutil.rmtree(replica.folder, ignore_errors=True)


async def test_readers_are_shown_nothing_that_a_failover_could_take_back(pair: Replicated, kit: Kit) -> None:
    grant = await kit.started()
    pair.freeze()
    await unknown(lambda: kit.append(grant, 2))
    # It is committed here, where alone it can be seen.
    assert await kit.pool.fetchval("SELECT max(seq) FROM session.event WHERE run_id = $1", grant.run_id) == 2
    with pytest.raises(UnavailableError):
        await kit.store.events_after(kit.tenant, grant.run_id, 1, 10)
    pair.thaw()
    assert [one.seq for one in await kit.store.events_after(kit.tenant, grant.run_id, 1, 10)] == [2]


async def test_readers_share_the_commits_that_they_wait_for(kit: Kit) -> None:
    before = await kit.pool.fetchval("SELECT pg_current_wal_insert_lsn()")
    await asyncio.gather(*(kit.store.confirm() for _ in range(50)))
    written = await kit.pool.fetchval("SELECT pg_current_wal_insert_lsn() - $1::pg_lsn", before)
    assert 0 < written < 1_500


async def test_a_wait_that_somebody_cancelled_is_no_success(pair: Replicated, kit: Kit) -> None:
    session = await kit.session()
    pair.freeze()
    async with asyncio.TaskGroup() as group:
        waiting = group.create_task(unknown(lambda: kit.submit(session.session_id)))
        async with asyncio.timeout(PATIENCE / 2):
            # PostgreSQL tells nobody that a backend has begun to wait.
            while not waiting.done() and not await kit.pool.fetchval(  # noqa: ASYNC110
                "SELECT count(pg_cancel_backend(pid)) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
                " AND query LIKE '%submit_run%'"
            ):
                await asyncio.sleep(0.01)


async def test_after_a_failover_what_was_acknowledged_is_there_and_the_rest_is_made_once(
    pair: Replicated, kit: Kit
) -> None:
    """It ends the pair, so it is the last of its module."""
    session = await kit.session()
    acknowledged = await kit.submit(session.session_id, request_id="first")
    pair.freeze()
    for _ in range(3):
        await unknown(lambda: kit.submit(session.session_id, request_id="second"))
    url = await pair.fail_over()
    pool = await open_pool(url, max_size=4, name="test-store")
    try:
        left = Kit(PostgresStore(pool), kit.tenant, pool)
        again = await left.submit(session.session_id, request_id="first")
        assert (again.duplicate, again.run.run_id) == (True, acknowledged.run.run_id)
        assert not (await left.submit(session.session_id, request_id="second")).duplicate
        assert (await left.submit(session.session_id, request_id="second")).duplicate
    finally:
        await pool.close()
