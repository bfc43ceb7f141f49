"""The migrations of the session store build exactly the schema that is checked in."""

from __future__ import annotations

import asyncio
import difflib
import os
import re
import subprocess
from pathlib import Path

from launcher.embedded.postgres import BIN
from meshkit.migrate import migrate, pending
from tests.conftest import MIGRATIONS, ROOT

SCHEMA = ROOT / "services/session/store/schema.sql"
HEADER = """\
-- The schema that migrations/ build, as pg_dump shows it; for reading and for a test, never applied.
-- After a new migration: HERMESH_WRITE_SCHEMA=1 make test ARGS=tests/migration
"""


def dump(url: str) -> str:
    """The schema without what differs from day to day: comments, settings and daily partitions."""
    text = subprocess.run(
        [
            BIN / "pg_dump",
            "--schema-only",
            "--schema=session",
            "--no-owner",
            "--no-privileges",
            "--exclude-table=session.event_p[0-9]*",
            url,
        ],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout
    kept = [
        line.rstrip()
        for line in text.splitlines()
        if not re.match(r"(--|SET |SELECT pg_catalog\.set_config|\\(un)?restrict )", line)
    ]
    return HEADER + "\n" + re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip() + "\n"


async def test_migrations_from_empty_build_the_checked_in_schema(empty_database: str) -> None:
    applied = await migrate(empty_database, MIGRATIONS["session"], schema="session")
    assert applied == sorted(path.name for path in MIGRATIONS["session"].glob("*.sql"))
    built = dump(empty_database)
    if os.environ.get("HERMESH_WRITE_SCHEMA"):
        SCHEMA.write_text(built, encoding="utf-8")
    stored = SCHEMA.read_text(encoding="utf-8").splitlines()
    difference = list(difflib.unified_diff(stored, built.splitlines(), "checked in", "built", lineterm=""))
    assert not difference, "\n".join(difference)


async def test_migrating_again_and_at_the_same_time_changes_nothing(empty_database: str) -> None:
    directory = MIGRATIONS["session"]
    applied = await asyncio.gather(*(migrate(empty_database, directory, schema="session") for _ in range(3)))
    assert sorted(name for names in applied for name in names) == sorted(
        path.name for path in directory.glob("*.sql")
    )
    before = dump(empty_database)
    assert await migrate(empty_database, directory, schema="session") == []
    assert await pending(empty_database, directory, schema="session") == []
    assert dump(empty_database) == before


def test_every_table_of_a_tenants_data_carries_its_tenant() -> None:
    text = SCHEMA.read_text(encoding="utf-8")
    tables = dict(re.findall(r"CREATE TABLE session\.(\w+) \((.*?)\n\)", text, re.S))
    assert set(tables) > {"session", "run", "message", "event", "lease", "tool_call", "idempotency"}
    for name, columns in tables.items():
        if name != "hermesh_migration":
            assert re.search(r"\btenant_id uuid\b.* NOT NULL\b", columns), name


def test_migrations_name_their_schema_and_hold_no_secret() -> None:
    for path in Path(MIGRATIONS["session"]).glob("*.sql"):
        text = path.read_text(encoding="utf-8")
        for target in re.findall(r"\bCREATE (?:TABLE|VIEW|FUNCTION) (?!IF NOT)(\S+?)[ (]", text):
            assert target.startswith("session."), f"{path.name}: {target}"
        assert "password" not in text.lower()
