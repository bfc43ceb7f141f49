from __future__ import annotations

from pathlib import Path

import pytest

from meshkit.schemas import in_schema

SERVICES = Path(__file__).resolve().parents[3] / "services"


@pytest.mark.parametrize(
    ("sql", "renamed"),
    [
        ("SELECT * FROM session.run r", "SELECT * FROM a_session.run r"),
        ("SELECT 'session.event'::regclass", "SELECT 'a_session.event'::regclass"),
        ("to_regclass('session.' || v_name)", "to_regclass('a_session.' || v_name)"),
        ("format('DROP TABLE session.%I', v)", "format('DROP TABLE a_session.%I', v)"),
        ("FROM session.session", "FROM a_session.session"),
        ("SELECT session_id, b_session.x", "SELECT session_id, b_session.x"),
    ],
)
def test_a_schema_has_another_name(sql: str, renamed: str) -> None:
    assert in_schema(sql, "session", "a_session") == renamed
    assert in_schema(sql, "session", "session") == sql


@pytest.mark.parametrize("schema", ["session", "memory"])
def test_no_statement_names_its_schema_in_another_way(schema: str) -> None:
    """What would stay behind: a quoted name, or one in an argument of its own."""
    for file in (SERVICES / schema / "store").rglob("*.sql"):
        lines = [line.partition("--")[0] for line in file.read_text().splitlines()]
        rest = in_schema("\n".join(lines), schema, "renamed").replace("CREATE SCHEMA IF NOT EXISTS", "")
        assert f"'{schema}'" not in rest.replace(f"$1::uuid, '{schema}'", ""), file
        assert f'"{schema}"' not in rest, file
