"""A synchronous standby that does not answer: of a memory, too, what is not known is called unknown."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator

import pytest

from meshkit.errors import HermeshError
from meshkit.postgres import open_pool
from services.memory.store import postgres as memory_postgres
from services.memory.store.postgres import PostgresStore
from tests.integration.memory.test_store import ANN, TENANT, new
from tests.integration.session.standby import Replicated, replicated


@pytest.fixture(scope="module")
def pair() -> Iterator[Replicated]:
    with asyncio.Runner() as runner:
        both = replicated()
        yield runner.run(both.__aenter__())
        runner.run(both.__aexit__(None, None, None))


async def told(call: Awaitable[object]) -> str:
    """What a call's error says, "" for none."""
    try:
        await call
    except HermeshError as error:
        return f"{error.reason}: {error.message}"
    return ""


async def test_what_a_memory_write_did_is_unknown_and_said_again_only_with_the_standby(
    pair: Replicated, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_postgres, "_SECONDS", 0.6)
    pool = await open_pool(pair.url, max_size=8, name="test-memory")
    try:
        store = await PostgresStore.over(pool, max_per_scope=100, schema="memory")
        kept = [await store.remember(TENANT, new(f"t{n}")) for n in range(3)]
        again = new("once", request_id="r1")
        pair.freeze()
        found = {
            "remember": await told(store.remember(TENANT, again)),
            "remember again": await told(store.remember(TENANT, again)),
            "preferences": await told(store.set_preferences(TENANT, "ann", {"a": "b"})),
            "forget": await told(store.forget(TENANT, kept[0].memory_id)),
            "forget again": await told(store.forget(TENANT, kept[0].memory_id)),
            "forget scope": await told(store.forget_scope(TENANT, ANN)),
            "forget scope again": await told(store.forget_scope(TENANT, ANN)),
        }
        async with asyncio.TaskGroup() as group:
            waiting = group.create_task(told(store.remember(TENANT, new("cancelled", request_id="r2"))))
            for _ in range(40):
                await pool.fetch(
                    "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
                )
                await asyncio.sleep(0.01)
        found["remember, wait cancelled"] = waiting.result()
        pair.thaw()
        assert {text.partition(":")[0] for text in found.values()} == {"OUTCOME_UNKNOWN"}, found
    finally:
        pair.thaw()
        await pool.close()
