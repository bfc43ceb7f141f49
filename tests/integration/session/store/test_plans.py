"""Statements stay cheap when the tables are large: what PostgreSQL does for each is asserted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest

from meshkit.ids import uuid7
from meshkit.postgres import load_sql
from services.session.domain import RunStatus
from tests.integration.session.store.kit import Kit, event, intent

SESSIONS = 5_000
FINISHED = 100_000

_FILL = f"""
INSERT INTO session.session (session_id, tenant_id, title, metadata, agent, user_name, created_ms, updated_ms,
                             run_count)
SELECT gen_random_uuid(), $1, 't', '{{}}', '', 'u' || n % 100, n, n, {FINISHED // SESSIONS}
FROM generate_series(1, {SESSIONS}) n;
INSERT INTO session.lease (session_id, tenant_id, fence) SELECT session_id, tenant_id, 1 FROM session.session;
INSERT INTO session.run (run_id, tenant_id, session_id, ordinal, status, model, options, last_seq, created_ms,
                         finished_ms, left_ms, deadline)
SELECT gen_random_uuid(), tenant_id, session_id, o, 4, 'm', '', 2, 1, 2, 600000, now()
FROM session.session, generate_series(1, {FINISHED // SESSIONS}) o;
INSERT INTO session.message (session_id, message_id, tenant_id, run_id, ordinal, role, content, tool_calls,
                             tool_call_id, created_ms)
SELECT session_id, gen_random_uuid(), tenant_id, run_id, ordinal, 'user', 'x', '', '', 1 FROM session.run;
INSERT INTO session.event (run_id, seq, time_ms, tenant_id, session_id, fence, type, data)
SELECT run_id, s, 1, tenant_id, session_id, 1, 't', '{{}}' FROM session.run, generate_series(1, 2) s
WHERE ordinal <= 4;
INSERT INTO session.tool_call (call_id, tenant_id, session_id, run_id, name, arguments, effect, state,
                               idempotency_key, created_ms)
SELECT run_id || ':1:0', tenant_id, session_id, run_id, 't', '{{}}', 3, 5, '', 1 FROM session.run
WHERE ordinal <= 4;
"""


@pytest.fixture
async def full(kit: Kit) -> Kit:
    """A database with 100,000 finished runs, made once for the module."""
    if not await kit.pool.fetchval("SELECT count(*) > 1000 FROM session.run"):
        async with kit.pool.acquire() as connection:
            await connection.execute("SET statement_timeout = '60s'")
            for statement in _FILL.replace("$1", f"'{kit.tenant}'").split(";\n"):
                if statement.strip():
                    await connection.execute(statement, timeout=60)
            await connection.execute("VACUUM ANALYZE", timeout=60)
            await connection.execute("RESET statement_timeout")
    return kit


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", ()):
        yield from nodes(child)


def literal(value: Any) -> str:
    """A value as EXECUTE takes it."""
    if isinstance(value, list):
        items = ",".join(json.dumps(str(item)) for item in value)
        return literal("{" + items + "}")
    if isinstance(value, timedelta):
        return literal(f"{value.total_seconds()} s")
    return "'" + str(value).replace("'", "''") + "'"


async def explain(kit: Kit, statement: str, *args: Any) -> tuple[list[str], int]:
    """What a statement scans as `<node> <index or table>`, and how many pages it touches.

    By EXECUTE, so that the plan is the one that the store's connections keep.
    """
    values = ", ".join(literal(value) for value in args)
    async with kit.pool.acquire() as connection:
        await connection.execute(f"PREPARE explained AS {statement}")
        transaction = connection.transaction()
        await transaction.start()
        try:
            for _ in range(2):
                text = await connection.fetchval(
                    f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE explained({values})"
                )
        finally:
            await transaction.rollback()
            await connection.execute("DEALLOCATE explained")
    plan = json.loads(text)[0]["Plan"]
    scans = [
        f"{node['Node Type']} {node.get('Index Name') or node['Relation Name']}"
        for node in nodes(plan)
        # Tenants on their way elsewhere are few, and nearly always none.
        if "Relation Name" in node and "Scan" in node["Node Type"] and node["Relation Name"] != "tenant_move"
    ]
    return scans, plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]


def sql(file: str, name: str) -> str:
    return load_sql("services.session.store.sql", f"{file}.sql")[name]


async def test_the_sweep_costs_what_is_unfinished_and_not_what_is_stored(full: Kit) -> None:
    statement = sql("runs", "due")
    scans, pages = await explain(full, statement, 64, timedelta(seconds=2), timedelta())
    assert any("run_due" in scan for scan in scans), scans
    assert not any(scan.startswith("Seq Scan") for scan in scans), scans
    assert pages < 20
    held = [await full.started() for _ in range(50)]
    queued = [await full.submit((await full.session()).session_id) for _ in range(20)]
    for submitted in queued:
        for _ in range(5):
            await full.submit(submitted.run.session_id)
    scans, pages = await explain(full, statement, 64, timedelta(seconds=2), timedelta())
    assert any("run_due" in scan for scan in scans), scans
    assert not any(scan.startswith("Seq Scan") for scan in scans), scans
    # A few pages for each held or queued run; those behind them in their sessions cost nothing.
    assert pages < 1_500, pages
    assert await full.due() == {submitted.run.run_id for submitted in queued}
    for grant in held:
        await full.finish(grant, 2)


async def test_the_look_for_orphans_costs_what_there_is_to_end(full: Kit) -> None:
    # The statement inside of session.end_orphans, whose own plan EXPLAIN does not show.
    body = await full.pool.fetchval("SELECT prosrc FROM pg_proc WHERE proname = 'end_orphans'")
    statement = body.partition("FOR v_found IN")[2].partition("LOOP")[0].replace("p_limit", "$1::integer")
    held = [await full.started() for _ in range(50)]
    scans, pages = await explain(full, statement, 64)
    assert {scan.rpartition(" ")[2] for scan in scans} >= {"run_overdue", "run_cancelling"}, scans
    assert not any(scan.startswith("Seq Scan") for scan in scans), scans
    assert pages < 20, pages
    for grant in held:
        await full.run_out(grant.run_id)
        await full.expire(grant.session_id)
    _, pages = await explain(full, statement, 64)
    assert pages < 50 * 12, pages
    assert await full.store.end_orphans(64) == 50


@pytest.mark.parametrize(
    ("file", "name", "rows"),
    [
        ("runs", "get_run", 1),
        ("runs", "list_runs", 20),
        ("runs", "runs_from", 20),
        ("sessions", "get_session", 1),
        ("sessions", "list_sessions", 50),
        ("sessions", "list_sessions_of_user", 50),
        ("sessions", "list_messages", 20),
        ("sessions", "history", 20),
        ("log", "events_after", 2),
        ("log", "heads", 1),
    ],
)
async def test_reads_go_by_an_index(full: Kit, file: str, name: str, rows: int) -> None:
    row = await full.pool.fetchrow(
        "SELECT tenant_id, session_id, run_id FROM session.run WHERE ordinal = 2 AND status = 4 LIMIT 1"
    )
    tenant, session, run = row["tenant_id"], row["session_id"], row["run_id"]
    last = 2**62
    args: dict[str, tuple[Any, ...]] = {
        "get_run": (tenant, run),
        "list_runs": (tenant, session, 2**31 - 1, 20),
        "runs_from": (tenant, session, 1, 20),
        "get_session": (tenant, session),
        "list_sessions": (tenant, last, uuid7(), 50),
        "list_sessions_of_user": (tenant, last, uuid7(), 50, "u7"),
        "list_messages": (tenant, session, 0, 20, 2**20),
        "history": (tenant, session, 20, 20, 2**20),
        "events_after": (tenant, run, 0, 100, 2**20),
        "heads": ([run],),
    }
    statement = sql(file, name)
    assert len(await full.pool.fetch(statement, *args[name])) == rows
    scans, pages = await explain(full, statement, *args[name])
    assert scans
    assert not any(scan.startswith("Seq Scan") for scan in scans), scans
    assert pages <= 20 + 12 * rows, (scans, pages)


async def test_what_waits_for_a_person_is_found_by_the_runs_that_wait(full: Kit) -> None:
    grants = [await full.started() for _ in range(10)]
    for grant in grants:
        call = intent(grant.run_id, needs_approval=True)
        await full.step(grant, 2, event(), intents=(call,), status=RunStatus.REQUIRES_ACTION)
    args = (full.tenant, UUID(int=0), 0, 50, 2**20)
    assert len(await full.pool.fetch(sql("journal", "pending"), *args)) == len(grants)
    scans, pages = await explain(full, sql("journal", "pending"), *args)
    assert any("run_waiting" in scan for scan in scans), scans
    assert any("tool_call_by_run" in scan for scan in scans), scans
    assert pages < 100 * len(grants), (scans, pages)
    for grant in grants:
        await full.store.cancel(full.tenant, grant.run_id, "")


async def test_looks_for_a_processs_leases_cost_what_is_unfinished(full: Kit) -> None:
    grants = [await full.started("agent-1~00000001") for _ in range(50)]
    owner, second = "agent-1~00000001", timedelta(seconds=1)
    args: dict[str, tuple[Any, ...]] = {
        "leases_of": (owner,),
        "shorten_claims": (owner, second, timedelta()),
        "end_former": ("agent-1~00000002",),
    }
    for name, values in args.items():
        scans, pages = await explain(full, sql("log", name), *values)
        assert scans, name
        assert not any(scan.startswith("Seq Scan") for scan in scans), (name, scans)
        assert pages < 40 * len(grants), (name, scans, pages)
    for grant in grants:
        await full.finish(grant, 2)


async def test_what_is_done_to_leases_goes_by_their_key(full: Kit) -> None:
    grants = [await full.started() for _ in range(150)]
    sessions, runs, fences = (
        [grant.session_id for grant in grants],
        [grant.run_id for grant in grants],
        [grant.fence for grant in grants],
    )
    ttl = timedelta(seconds=10)
    args: dict[str, tuple[Any, ...]] = {
        "renew": (sessions, runs, fences, ttl, "a"),
        "shorten": (sessions, runs, fences, [0] * len(grants), ttl),
        "lost_leases": (sessions, runs, fences, "a"),
        "refusals": (sessions, runs, fences, [2] * len(grants), [1] * len(grants)),
        "release": (sessions[0], runs[0], fences[0], "a"),
        "reattach": (sessions[0], runs[0], fences[0], "a", ttl),
    }
    for name, values in args.items():
        scans, pages = await explain(full, sql("log", name), *values)
        # A function shows none; the pages that it touches count.
        assert scans or name == "refusals", name
        assert not any(scan.startswith("Seq Scan") for scan in scans), (name, scans)
        assert pages < 30 * len(grants), (name, scans, pages)
    for grant in grants:
        await full.finish(grant, 2)


async def test_what_a_run_or_a_session_has_to_wait_for_is_found_by_its_key(full: Kit) -> None:
    row = await full.pool.fetchrow(
        "SELECT tenant_id, session_id, run_id FROM session.run WHERE ordinal = 2 LIMIT 1"
    )
    for file, name, values in (
        ("sessions", "calls_under_way", (row["tenant_id"], row["session_id"])),
        ("journal", "waiting_calls", (row["tenant_id"], row["run_id"])),
    ):
        scans, pages = await explain(full, sql(file, name), *values)
        assert scans, name
        assert not any(scan.startswith("Seq Scan") for scan in scans), (name, scans)
        assert pages < 40, (name, scans, pages)


async def test_an_append_goes_by_an_index_and_stays_on_its_page(full: Kit) -> None:
    # More than the planner guesses: a plan for just these many would read the whole table of leases.
    grants = [await full.started() for _ in range(150)]
    n = len(grants)
    scans, pages = await explain(
        full,
        sql("log", "append"),
        [grant.session_id for grant in grants],
        [grant.run_id for grant in grants],
        [grant.fence for grant in grants],
        [2] * n,
        [1] * n,
        list(range(1, n + 1)),
        [2] * n,
        ["t"] * n,
        [1] * n,
        ["{}"] * n,
    )
    assert not any(scan.startswith("Seq Scan") for scan in scans), scans
    assert pages < 30 * n
    for seq in range(2, 42):
        for grant in grants[:8]:
            await full.append(grant, seq)
    async with full.pool.acquire() as connection:
        await connection.fetchval("SELECT pg_stat_force_next_flush()")
        await connection.fetchval("SELECT 1")
        updates = await connection.fetchrow(
            "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables"
            " WHERE schemaname = 'session' AND relname = 'lease'"
        )
    # HOT: the row's indexes are not touched.
    assert updates["n_tup_hot_upd"] >= 0.9 * updates["n_tup_upd"] > 0
