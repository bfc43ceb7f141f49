"""Rules on the SQL files that need no database."""

from __future__ import annotations

import re

import pytest

from meshkit.postgres import load_sql

FILES = ("tenants", "sessions", "runs", "log", "journal", "upkeep")
# Reached by an operator's command, with the mesh's own credential, or by watchers that were admitted with
# their tenant before.
NOT_BY_TENANT = {
    "tenants": {"tenant_of_key", "ensure_tenant", "ensure_key", "get_tenant", "set_tenant"},
    "runs": {"claim", "read_context", "due", "fail_held", "queued", "end_orphans", "last_ordinals"},
    "log": {
        "append",
        "refusals",
        "append_step",
        "reattach",
        "renew",
        "release",
        "shorten",
        "shorten_claims",
        "end_former",
        "leases_of",
        "lost_leases",
        "fences",
        "heads",
    },
    "journal": {"begin", "complete", "reconcile", "look"},
    "upkeep": {
        "maintain_partitions",
        "set_lock_timeout",
        "set_long_statement",
        "expire_requests",
        "synchronous",
        "confirm",
        "position",
        "replayed",
        "take_gone",
        "forget_gone",
        "count_gone",
        "moved_tenants",
        "archive_fails",
    },
}
BLOCKS = [
    (file, name, text)
    for file in FILES
    for name, text in load_sql("services.session.store.sql", f"{file}.sql").items()
]


@pytest.mark.parametrize(("file", "name", "text"), BLOCKS, ids=[f"{f}.{n}" for f, n, _ in BLOCKS])
def test_a_statement_that_a_caller_can_reach_takes_the_tenant_first(file: str, name: str, text: str) -> None:
    if name in NOT_BY_TENANT.get(file, set()):
        return
    by_column = re.search(r"tenant_id\s*=\s*\$1\b", text)
    by_function = re.search(r"session\.(submit_run|cancel_run|resolve_action)\(\$1,", text)
    by_insert = name == "create_session" and "$1::uuid" in text
    assert by_column or by_function or by_insert


@pytest.mark.parametrize(("file", "name", "text"), BLOCKS, ids=[f"{f}.{n}" for f, n, _ in BLOCKS])
def test_tables_are_named_with_their_schema(file: str, name: str, text: str) -> None:
    tables = "tenant|api_key|session|lease|run|message|event|tool_call|idempotency|run_view|session_view"
    bare = re.findall(rf"\b(?:FROM|JOIN|INTO|UPDATE)\s+(?:{tables})\b(?!\.)(?!\s*\()", text)
    assert not [hit for hit in bare if not hit.endswith("OF r")], bare


def test_a_statement_over_several_leases_locks_them_in_order() -> None:
    for name, text in load_sql("services.session.store.sql", "log.sql").items():
        if "UPDATE session.lease" in text and "unnest" in text:
            assert re.search(r"ORDER BY session_id FOR NO KEY UPDATE", text), name
