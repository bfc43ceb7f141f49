"""A synchronous standby that does not answer, and a failover: of a memory, too, what was acknowledged is
there, and what is not known is called unknown.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import asyncpg
import pytest

from meshkit.errors import HermeshError
from meshkit.ids import uuid7
from meshkit.postgres import open_pool
from services.memory.domain import Scope, ScopeKind
from services.memory.store import postgres as memory_postgres
from services.memory.store.postgres import PostgresStore
from tests.integration.memory.test_store import ANN, BOB, TENANT, new
from tests.integration.session.standby import Replicated, replicated

PATIENCE = 0.6
SECONDS = 20.0
NOBODY = Scope(ScopeKind.USER, "nobody")

Write = Callable[[PostgresStore], Awaitable[object]]


@pytest.fixture(scope="module")
def pair() -> Iterator[Replicated]:
    with asyncio.Runner() as runner:
        both = replicated()
        yield runner.run(both.__aenter__())
        runner.run(both.__aexit__(None, None, None))


@pytest.fixture
async def pool(pair: Replicated) -> AsyncIterator[asyncpg.Pool[asyncpg.Record]]:
    pool = await open_pool(pair.url, max_size=8, name="test-memory")
    try:
        await pool.execute("TRUNCATE memory.item, memory.preference")
        yield pool
    finally:
        pair.thaw()
        await pool.close()


@pytest.fixture
async def store(pool: asyncpg.Pool[asyncpg.Record]) -> PostgresStore:
    return await PostgresStore.over(pool, max_per_scope=100, schema="memory")


async def told(call: Awaitable[object]) -> str:
    """The reason of a call's error, "" for none."""
    try:
        await call
    except HermeshError as error:
        return error.reason
    return ""


async def test_what_a_write_did_is_unknown_and_said_again_only_with_the_standby(
    pair: Replicated, store: PostgresStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = [await store.remember(TENANT, new(f"t{n}")) for n in range(3)]
    again = new("once", request_id="r1")
    gone = kept[0].memory_id
    monkeypatch.setattr(memory_postgres, "_SECONDS", PATIENCE)
    asked: dict[str, Callable[[], Awaitable[Any]]] = {
        "remember": lambda: store.remember(TENANT, again),
        "preferences": lambda: store.set_preferences(TENANT, "ann", {"a": "b"}),
        "forget": lambda: store.forget(TENANT, gone),
        "forget scope": lambda: store.forget_scope(TENANT, ANN),
    }
    pair.freeze()
    found = {name: [await told(one()) for _ in ("first", "again")] for name, one in asked.items()}
    # All of it is there, where alone it can be seen: so it was "again", and not the first time once more.
    left = [memory.text for memory in await store.list_memories(TENANT, ANN, None, 10)]
    pair.thaw()
    assert found == {name: ["OUTCOME_UNKNOWN"] * 2 for name in asked}
    assert left == []
    monkeypatch.setattr(memory_postgres, "_SECONDS", SECONDS)
    assert [await asked["forget"](), await asked["forget scope"]()] == [0, 0]
    assert await asked["preferences"]() == {"a": "b"}


async def test_a_memory_that_was_stored_before_is_said_to_be_only_with_the_standby(
    pair: Replicated, store: PostgresStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = new("once", request_id="r1")
    monkeypatch.setattr(memory_postgres, "_SECONDS", PATIENCE)
    pair.freeze()
    assert await told(store.remember(TENANT, again)) == "OUTCOME_UNKNOWN"
    assert [memory.text for memory in await store.list_memories(TENANT, ANN, None, 10)] == ["once"]
    assert await told(store.remember(TENANT, again)) == "OUTCOME_UNKNOWN"
    # Another's use of the request id is an answer from the same row.
    assert await told(store.remember(TENANT, new("other", request_id="r1"))) == "OUTCOME_UNKNOWN"
    pair.thaw()
    monkeypatch.setattr(memory_postgres, "_SECONDS", SECONDS)
    assert (await store.remember(TENANT, again)).memory_id == again.memory_id
    assert await told(store.remember(TENANT, new("other", request_id="r1"))) == "REQUEST_ID_REUSED"


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda store: store.remember(TENANT, new("new")), id="remember"),
        pytest.param(lambda store: store.remember(TENANT, new("kept", request_id="r")), id="remember-again"),
        pytest.param(lambda store: store.set_preferences(TENANT, "ann", {"a": "b"}), id="preferences"),
        pytest.param(lambda store: store.forget_scope(TENANT, ANN), id="forget-scope"),
        pytest.param(lambda store: store.forget(TENANT, uuid7()), id="forget-none"),
        pytest.param(lambda store: store.forget_scope(TENANT, NOBODY), id="forget-scope-none"),
        pytest.param(lambda store: store.sweep(10), id="sweep"),
    ],
)
async def test_a_wait_that_somebody_cancelled_is_no_success(
    pair: Replicated,
    pool: asyncpg.Pool[asyncpg.Record],
    store: PostgresStore,
    monkeypatch: pytest.MonkeyPatch,
    write: Write,
) -> None:
    # Longer than the test waits: an answer that comes is the one to the cancel.
    monkeypatch.setattr(memory_postgres, "_SECONDS", 2 * SECONDS)
    await store.remember(TENANT, new("kept", request_id="r"))
    await store.remember(TENANT, new("short", scope=BOB, ttl_ms=1))
    pair.freeze()
    async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as group:
        waiting = group.create_task(told(write(store)))
        # PostgreSQL tells nobody that a backend has begun to wait.
        while not waiting.done():
            await pool.fetch(
                "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
            )
            await asyncio.sleep(0.01)
    assert waiting.result() == "OUTCOME_UNKNOWN"


async def test_after_a_failover_what_was_acknowledged_is_there_and_the_rest_can_be_done(
    pair: Replicated, store: PostgresStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends the pair, so it is the last of its module."""
    first = await store.remember(TENANT, new("first"))
    second = await store.remember(TENANT, new("second"))
    assert await store.forget(TENANT, first.memory_id) == 1
    third = new("third", request_id="r3")
    monkeypatch.setattr(memory_postgres, "_SECONDS", PATIENCE)
    pair.freeze()
    for _ in range(2):
        assert await told(store.forget(TENANT, second.memory_id)) == "OUTCOME_UNKNOWN"
        assert await told(store.remember(TENANT, third)) == "OUTCOME_UNKNOWN"
    url = await pair.fail_over()
    monkeypatch.setattr(memory_postgres, "_SECONDS", SECONDS)
    pool = await open_pool(url, max_size=2, name="test-memory")
    try:
        left = await PostgresStore.over(pool, max_per_scope=100, schema="memory")
        assert [memory.text for memory in await left.list_memories(TENANT, ANN, None, 10)] == ["second"]
        assert await left.forget(TENANT, second.memory_id) == 1
        assert (await left.remember(TENANT, third)).text == "third"
        assert [memory.text for memory in await left.list_memories(TENANT, ANN, None, 10)] == ["third"]
    finally:
        await pool.close()
