"""Moving a tenant between two real databases and object stores, with the session service's store on both."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import obstore
import pytest

from launcher.cells import move
from launcher.cells.copying import SQL, opened
from launcher.cells.table import Cell, Cells
from launcher.errors import LaunchError
from meshkit.errors import HermeshError, UnavailableError
from meshkit.ids import uuid7
from meshkit.objects import open_store
from meshkit.postgres import open_pool
from services.session.domain import AppendOutcome, BeginOutcome, EffectClass, ToolCallState
from services.session.store.postgres import POOL_SETTINGS, PostgresStore
from services.tool.results import object_path
from tests.conftest import create_database
from tests.integration.session.store.kit import Kit, event, intent

ACT_MS = 30_000


@dataclass
class World:
    """Two cells, the tenant `acme` in the first one, and another tenant that stays there."""

    cells: Cells
    a: Kit
    b: Kit
    other: Kit
    key: str

    async def move(self, to: str = "b") -> move.Moved:
        return await move.move(self.cells, "acme", to, silently)

    async def content(self, kit: Kit) -> dict[str, Any]:
        """All that is kept of the tenant, as text; a move allows calls some more time to act."""
        found = {}
        for table, order in (
            ("session.tenant", "1"),
            ("session.api_key", "1"),
            ("session.session", "1"),
            ("session.lease", "1"),
            ("session.run", "1"),
            ("session.message", "1, 2"),
            ("session.event", "1, 2"),
            ("session.tool_call", "1"),
            ("session.idempotency", "1, 2, 3"),
            ("memory.item", "1"),
            ("memory.preference", "1, 2"),
        ):
            rows = await kit.pool.fetch(
                f"SELECT (to_jsonb(t) - 'quiet_at')::text AS text FROM"
                f" (SELECT * FROM {table} WHERE tenant_id = $1 ORDER BY {order}) t",
                kit.tenant,
            )
            found[table] = [row["text"] for row in rows]
        return found


@pytest.fixture
async def world(
    postgres_url: str, migrated_template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[World]:
    urls = {name: await asyncio.to_thread(create_database, postgres_url, migrated_template) for name in "ab"}
    async with AsyncExitStack() as stack:
        kits = {}
        for name, url in urls.items():
            objects = tmp_path / f"objects-{name}"
            objects.mkdir()
            monkeypatch.setenv(f"HERMESH_CELL_{name.upper()}_DATABASE_URL", url)
            monkeypatch.setenv(f"HERMESH_CELL_{name.upper()}_OBJECT_STORE_URL", objects.as_uri())
            pool = await open_pool(
                url, min_size=1, max_size=10, name="test-move", server_settings=POOL_SETTINGS
            )
            stack.push_async_callback(pool.close)
            kits[name] = pool
        key = uuid7().hex * 2
        store = PostgresStore(kits["a"])
        tenant = await store.ensure_key("acme", key, "test")
        other = await store.ensure_key("other", uuid7().hex * 2, "test")
        cells = Cells(
            tmp_path / "cells.toml",
            "a",
            {name: Cell(name, ("127.0.0.1:1",), ("127.0.0.1:2",)) for name in "ab"},
            folders=(tmp_path / "edge",),
        )
        yield World(
            cells,
            Kit(store, tenant, kits["a"]),
            Kit(PostgresStore(kits["b"]), tenant, kits["b"]),
            Kit(store, other, kits["a"]),
            key,
        )


async def fill(kit: Kit) -> UUID:
    """A finished run with a large result, a memory, a preference; returns its session."""
    grant = await kit.started("agent", "hello")
    call = intent(grant.run_id, 0, EffectClass.PURE)
    await kit.step(grant, 2, event("tool.call", "{}"), intents=(call,))
    await kit.store.begin(call.call_id, grant.session_id, grant.fence, ACT_MS)
    data = b"large" * 1000
    ref = await put_result(kit, grant.session_id, data)
    await kit.pool.execute(
        "UPDATE session.tool_call SET state = 3, content_ref = $2 WHERE call_id = $1", call.call_id, ref
    )
    await kit.finish(grant, 3, "done é")
    await kit.pool.execute(
        "INSERT INTO memory.item"
        " (memory_id, tenant_id, scope_kind, scope_owner, text, importance, model, embedding)"
        " VALUES ($1, $2, 1, 'ada', 'likes tea', 0.3, 'm', array_fill(0.1::real, ARRAY[256])::vector)",
        uuid7(),
        kit.tenant,
    )
    await kit.pool.execute(
        'INSERT INTO memory.preference (tenant_id, user_name, preferences) VALUES ($1, $2, \'{"a": "b"}\')',
        kit.tenant,
        f"ada-{uuid7()}",
    )
    return grant.session_id


def objects_of(name: str) -> Any:
    return open_store(os.environ[f"HERMESH_CELL_{name}_OBJECT_STORE_URL"])


async def put_result(kit: Kit, session_id: UUID, data: bytes) -> str:
    ref = f"sha256:{hashlib.sha256(data).hexdigest()}"
    await obstore.put_async(objects_of("A"), object_path(kit.tenant, session_id, ref), data)
    return ref


def silently(_: str) -> None:
    pass


async def moving(call: Any, reason: str = "TENANT_MOVING") -> None:
    with pytest.raises(UnavailableError) as raised:
        await call
    assert (raised.value.reason, raised.value.retry_after_ms) == (reason, 1000)
    assert "nothing was changed" in raised.value.message


async def test_all_that_is_kept_is_in_the_new_cell_and_only_there(world: World) -> None:
    session = await fill(world.a)
    await fill(world.a)
    await fill(world.other)
    kept = await world.a.submit(session, "again", request_id="key-1", fingerprint=b"f")
    before = await world.content(world.a)
    others = await world.content(world.other)
    done = await world.move()
    assert (await world.content(world.b)) == before
    assert sum(map(len, before.values())) > 20
    assert done.results == 2
    assert world.cells.table() == {"acme": "b"}
    # The old cell tells its stragglers, changes nothing, and serves its other tenants.
    await moving(world.a.store.tenant_of_key(world.key), "TENANT_MOVED")
    await moving(world.a.session(), "TENANT_MOVED")
    await moving(world.a.submit(session, "late"), "TENANT_MOVED")
    assert await world.content(world.other) == others
    assert await world.other.due() == set()
    await world.other.session()
    # The new one knows the key and the idempotency keys, and goes on with what waited.
    assert await world.b.store.tenant_of_key(world.key) == world.b.tenant
    again = await world.b.submit(session, "again", request_id="key-1", fingerprint=b"f")
    assert again.duplicate
    assert again.run.run_id == kept.run.run_id
    assert await world.b.due() == {kept.run.run_id}
    claim = await world.b.claimed(kept.run.run_id)
    assert claim.grant is not None
    assert (await world.b.append(claim.grant, claim.grant.next_seq)).outcome is AppendOutcome.COMMITTED
    # Later calls come after those that came along.
    number = await world.b.pool.fetchval("SELECT nextval('session.tool_call_position_seq')")
    assert number > await world.b.pool.fetchval("SELECT max(position) FROM session.tool_call")
    assert await move.forget(world.cells, "acme", "b", silently) == 2
    assert not any((await world.content(world.a)).values())
    assert (await world.content(world.other))["session.event"] == others["session.event"]
    # Their results are left to the tool service, as those of any deleted session.
    assert await world.a.pool.fetchval("SELECT count(*) FROM session.gone_session") == 2
    # And it can come back.
    await world.move("a")
    assert world.cells.table() == {"acme": "a"}
    assert await world.a.store.tenant_of_key(world.key) == world.a.tenant


async def test_a_run_under_way_is_taken_over_and_its_call_stays_unknown(world: World) -> None:
    grant = await world.a.started("agent", "hello")
    acts, waits = intent(grant.run_id, 0), intent(grant.run_id, 1)
    await world.a.step(grant, 2, event("tool.call", "{}"), intents=(acts, waits))
    begun, _ = await world.a.store.begin(acts.call_id, grant.session_id, grant.fence, ACT_MS)
    assert begun is BeginOutcome.GO
    done = await world.move()
    assert done.runs == 1
    # Its agent finds out as after any takeover, and can do nothing more.
    assert (await world.a.append(grant, 3)).outcome is AppendOutcome.FENCED
    outcome, _ = await world.a.store.begin(waits.call_id, grant.session_id, grant.fence, ACT_MS)
    assert outcome is BeginOutcome.FENCED
    await moving(
        world.a.store.complete(acts.call_id, grant.fence, ToolCallState.COMPLETED, "done", ""), "TENANT_MOVED"
    )
    assert await world.b.due() == {grant.run_id}
    claim = await world.b.claimed(grant.run_id, "agent-of-b")
    assert claim.grant is not None
    assert claim.grant.fence > grant.fence
    assert [call.state for call in await world.b.calls(grant.run_id)] == [
        ToolCallState.UNKNOWN,
        ToolCallState.INTENT,
    ]
    again, _ = await world.b.store.begin(acts.call_id, grant.session_id, claim.grant.fence, ACT_MS)
    assert again is BeginOutcome.UNKNOWN
    assert await world.b.types(grant.run_id) == ["run.created", "tool.call"]


async def test_a_frozen_tenant_changes_nothing_and_others_go_on(world: World) -> None:
    session = await fill(world.a)
    queued = await world.a.submit(session, "later")
    grant = await world.a.started("agent", "hello")
    busy = await world.other.started("agent", "hello")
    async with opened(world.cells.cells["a"]) as source:
        assert await move.freeze(source, world.a.tenant, "b") == 1
    before = await world.content(world.a)
    store = world.a.store
    await moving(world.a.session())
    await moving(world.a.session(request_id="r", fingerprint=b"f"))
    await moving(world.a.submit(session, "x", request_id="s", fingerprint=b"f"))
    await moving(store.claim(queued.run.run_id, "agent"))
    await moving(store.cancel(world.a.tenant, queued.run.run_id, "no"))
    await moving(store.update_session(world.a.tenant, session, title="t", metadata={}))
    for statement in (
        "DELETE FROM memory.preference WHERE tenant_id = $1",
        "UPDATE memory.item SET importance = 1 WHERE tenant_id = $1",
        "DELETE FROM session.session WHERE tenant_id = $1",
    ):
        with pytest.raises(asyncpg.PostgresError, match="TENANT_MOVING"):
            await world.a.pool.execute(statement, world.a.tenant)
    assert (await world.a.append(grant, 2)).outcome is AppendOutcome.FENCED
    assert await store.due(100) == []
    assert await store.end_orphans(100) == 0
    await store.maintain()
    assert await world.content(world.a) == before
    assert (await world.other.append(busy, 2)).outcome is AppendOutcome.COMMITTED
    # Reads go on.
    assert (await store.get_run(world.a.tenant, queued.run.run_id)).run_id == queued.run.run_id


async def test_freezing_waits_for_who_is_about_to_commit(world: World) -> None:
    session = await fill(world.a)
    late = asyncio.Event()

    async def commit_late() -> None:
        async with world.a.pool.acquire() as connection, connection.transaction():
            await connection.execute(
                "UPDATE session.session SET title = 'late' WHERE session_id = $1", session
            )
            late.set()
            await asyncio.sleep(0.3)

    async with asyncio.TaskGroup() as group:
        group.create_task(commit_late())
        await late.wait()
        await world.move()
    assert (await world.b.store.get_session(world.b.tenant, session)).title == "late"


class Breaking:
    """Breaks a move off before its n-th statement that changes something, of the mover's own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, statements: int) -> None:
        self._left = statements
        for name in ("execute", "fetchval"):
            monkeypatch.setattr(asyncpg.Connection, name, self._guard(getattr(asyncpg.Connection, name)))

    def _guard(self, real: Any) -> Any:
        async def call(connection: Any, *args: Any, **named: Any) -> Any:
            if args and args[0] in SQL.values():
                self._left -= 1
                if self._left < 0:
                    raise LaunchError("broken off by the test")
            return await real(connection, *args, **named)

        return call


async def broken_off(world: World, monkeypatch: pytest.MonkeyPatch, statements: int) -> bool:
    """Begins a move to b; returns whether it was broken off, at its n-th statement."""
    with monkeypatch.context() as patch:
        Breaking(patch, statements)
        try:
            await world.move()
        except LaunchError as error:
            if "by the test" in str(error):
                return True
            raise
    return False


async def back_in_a(world: World) -> None:
    await move.forget(world.cells, "acme", "b", silently)
    await world.move("a")
    await move.forget(world.cells, "acme", "a", silently)


async def test_a_move_broken_off_anywhere_goes_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    session = await fill(world.a)
    before = await world.content(world.a)
    place = 0
    while await broken_off(world, monkeypatch, place):
        # After the last step that counts, nothing is left to go on with.
        if world.cells.table().get("acme") != "b" or await held(world.b):
            await world.move()
        assert world.cells.table() == {"acme": "b"}
        assert await world.content(world.b) == before, place
        await moving(world.a.session(), "TENANT_MOVED")
        await back_in_a(world)
        assert await world.content(world.a) == before, place
        place += 1
    assert place > 5
    run = (await world.b.store.runs_from(world.b.tenant, session, 1, 1))[0]
    path = object_path(world.b.tenant, session, (await world.b.calls(run.run_id))[0].content_ref)
    assert (await obstore.head_async(objects_of("B"), path))["size"] == 5000


async def test_a_move_broken_off_before_the_switch_can_be_taken_back(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill(world.a)
    before = await world.content(world.a)
    taken_back, place = 0, 0
    while await broken_off(world, monkeypatch, place):
        try:
            await move.abort(world.cells, "acme", "b", silently)
            taken_back += 1
        except LaunchError as error:
            if "is b's already" in str(error):
                await world.move()
            if world.cells.table().get("acme") == "b":
                await back_in_a(world)
        assert world.cells.where("acme").name == "a"
        assert await world.content(world.a) == before
        assert not any((await world.content(world.b)).values())
        assert not await held(world.a)
        assert not await held(world.b)
        place += 1
    assert taken_back > 5


async def held(kit: Kit) -> bool:
    found: bool = await kit.pool.fetchval(
        "SELECT EXISTS (SELECT FROM session.tenant_move) OR EXISTS (SELECT FROM memory.tenant_move)"
    )
    return found


async def test_input_with_retries_is_neither_lost_nor_doubled(world: World) -> None:
    session = await fill(world.a)
    accepted: dict[str, UUID] = {}
    refused: list[str] = []
    stop = asyncio.Event()

    async def client(number: int) -> None:
        place, sent = world.a, 0
        while not stop.is_set() or place is world.a:
            key = f"{number}-{sent}"
            while key not in accepted:
                try:
                    got = await place.submit(session, key, request_id=key, fingerprint=b"f")
                    accepted[key] = got.run.run_id
                except HermeshError as error:
                    refused.append(error.reason)
                    place = {"a": world.a, "b": world.b}[world.cells.table().get("acme", "a")]
                    await asyncio.sleep(0.01)
            sent += 1

    async with asyncio.TaskGroup() as group:
        for number in range(4):
            group.create_task(client(number))
        await asyncio.sleep(0.3)
        done = await world.move()
        await asyncio.sleep(0.3)
        stop.set()
    print(json.dumps({"accepted": len(accepted), "refused": len(refused), "pause_s": done.pause_seconds}))
    assert set(refused) <= {"TENANT_MOVING", "TENANT_MOVED"}
    rows = await world.b.pool.fetch(
        "SELECT m.content, count(*) AS n FROM (SELECT i ->> 2 AS content FROM session.run r,"
        " json_array_elements(r.input) i WHERE r.session_id = $1) m GROUP BY 1",
        session,
    )
    found = {row["content"]: row["n"] for row in rows}
    assert found == dict.fromkeys(accepted, 1)


async def test_what_does_not_fit_is_refused_before_anything_changes(world: World) -> None:
    await fill(world.a)
    with pytest.raises(LaunchError, match="has no cell c"):
        await world.move("c")
    with pytest.raises(LaunchError, match="acme is in a already"):
        await world.move("a")
    await world.b.store.ensure_key("acme", uuid7().hex * 2, "test")
    with pytest.raises(LaunchError, match="has a tenant of this name already"):
        await world.move()
    with pytest.raises(LaunchError, match="no move of acme to b is under way"):
        await move.abort(world.cells, "acme", "b", silently)
    with pytest.raises(LaunchError, match="hermesh cells move acme --to b"):
        await move.check_new(world.cells, "acme", "b")
    await move.check_new(world.cells, "new", "b")
    assert await world.a.pool.fetchval("SELECT count(*) FROM session.tenant_move") == 0
    await world.a.session()
