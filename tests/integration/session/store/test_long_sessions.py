"""A turn of a session with thousands of messages and runs reads no more rows than one of a short session."""

from __future__ import annotations

from uuid import UUID

import pytest

from services.session.store.port import MAX_CONTEXT_MESSAGES
from tests.integration.session.store.kit import Kit

LONG = 10_000
_MESSAGES = """
INSERT INTO session.message (session_id, message_id, tenant_id, run_id, ordinal, role, content, tool_calls,
                             tool_call_id, created_ms)
SELECT $1, gen_random_uuid(), $2, r.run_id, o, CASE WHEN o % 2 = 1 THEN 'user' ELSE 'assistant' END,
       'said ' || o, '', '', 1
FROM generate_series(1, $3::integer) o
JOIN session.run r ON r.session_id = $1 AND r.ordinal = (o + 1) / 2
"""
_RUNS = """
INSERT INTO session.run (run_id, tenant_id, session_id, ordinal, status, model, options, last_seq, created_ms,
                         finished_ms, left_ms)
SELECT gen_random_uuid(), $2, $1, o, 4, 'm', '', 2, 1, 2, 600000 FROM generate_series(1, $3::integer / 2) o
"""
# Of this connection alone, whatever others do.
_READ = """
SELECT relname, seq_tup_read + coalesce(idx_tup_fetch, 0) AS rows
FROM pg_stat_xact_user_tables WHERE schemaname = 'session'
"""


async def filled(kit: Kit, messages: int) -> UUID:
    """A session with so many messages, two of each of its runs."""
    session = await kit.session()
    async with kit.pool.acquire() as connection:
        await connection.execute("SET statement_timeout = '60s'")
        for statement in (_RUNS, _MESSAGES):
            await connection.execute(statement, session.session_id, kit.tenant, messages, timeout=60)
        await connection.execute(
            "UPDATE session.session SET message_count = $2, run_count = $2 / 2 WHERE session_id = $1",
            session.session_id,
            messages,
        )
        await connection.execute("RESET statement_timeout")
    return session.session_id


async def rows_read(kit: Kit, session_id: UUID, *, history: bool) -> dict[str, int]:
    """What accepting and claiming a turn, and then ending it, reads of each table; nothing is kept of it."""
    async with kit.pool.acquire() as connection:
        transaction = connection.transaction()
        await transaction.start()
        try:
            before = {row["relname"]: row["rows"] for row in await connection.fetch(_READ)}
            run_id = await connection.fetchval(
                "SELECT (s.run).run_id FROM session.submit_run($1, $2, gen_random_uuid(), '', '', 1, 0,"
                " 600000, $3::json, '', 'm', 't', '{', ',', '}', 1, 'agent', interval '10 s', 5, $4,"
                " 524288) s",
                kit.tenant,
                session_id,
                '[["01890000-0000-7000-8000-000000000001","user","next"]]',
                MAX_CONTEXT_MESSAGES if history else 0,
            )
            await connection.fetchrow(
                "SELECT * FROM session.append_step($1, $2,"
                " (SELECT fence FROM session.lease WHERE session_id = $1),"
                " 2, '{run.completed}', '{1}', '{\"{}\"}', $3::json, NULL, 4::smallint, NULL, 1, 1, 0)",
                session_id,
                run_id,
                '[["01890000-0000-7000-8000-000000000002","assistant","reply","",""]]',
            )
            after = {row["relname"]: row["rows"] for row in await connection.fetch(_READ)}
            return {name: rows - before.get(name, 0) for name, rows in after.items()}
        finally:
            await transaction.rollback()


@pytest.mark.parametrize("analyzed", [False, True])
@pytest.mark.parametrize("history", [False, True])
async def test_a_turn_reads_what_its_window_holds_and_not_what_its_session_holds(
    kit: Kit, *, history: bool, analyzed: bool
) -> None:
    short, middle, long = [await filled(kit, count) for count in (10, MAX_CONTEXT_MESSAGES * 2, LONG)]
    if analyzed:
        await kit.pool.execute("ANALYZE session.message, session.run")
    small, full, large = [await rows_read(kit, one, history=history) for one in (short, middle, long)]
    assert large == full
    assert large["run"] == small["run"]
    if not history:  # What is not in the cache of conversations is the same for all.
        assert large == small
    assert large["message"] <= (MAX_CONTEXT_MESSAGES if history else 0) + 10, large


async def test_a_run_with_more_messages_than_the_window_gets_all_of_its_own_and_the_window(kit: Kit) -> None:
    session_id = await filled(kit, 1000)
    texts = [f"own {number}" for number in range(MAX_CONTEXT_MESSAGES + 50)]
    submitted = await kit.submit(session_id, *texts, owner="a")
    assert submitted.claim is not None
    assert submitted.claim.context is not None
    found = [message.content for message in submitted.claim.context.messages]
    assert found[MAX_CONTEXT_MESSAGES:] == texts
    assert found[:MAX_CONTEXT_MESSAGES] == [f"said {number}" for number in range(801, 1001)]
    assert submitted.claim.context.omitted_messages == 800
