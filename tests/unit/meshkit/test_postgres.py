from __future__ import annotations

from pathlib import Path
from uuid import UUID

import asyncpg
import pytest

from meshkit.errors import (
    HermeshError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    StartupError,
    UnavailableError,
)
from meshkit.postgres import (
    connect_failure,
    fast_uuid,
    is_retryable,
    load_sql,
    map_pg_error,
    open_pool,
    parse_sql,
    refusal,
)

GOOD = """
-- A file of statements.

-- name: find_run
-- Finds a run
-- of a tenant.
SELECT *
-- inner comment
FROM run WHERE run_id = $1;

-- name: count_runs
-- Counts them.
SELECT count(*) FROM run
"""


def test_statements_are_read_by_name() -> None:
    statements = parse_sql(GOOD)
    assert list(statements) == ["find_run", "count_runs"]
    assert statements["find_run"] == "SELECT *\n-- inner comment\nFROM run WHERE run_id = $1"
    assert statements["count_runs"] == "SELECT count(*) FROM run"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("-- name: a\n-- d\nSELECT 1\n-- name: a\n-- d\nSELECT 2", "twice"),
        ("-- name: a\nSELECT 1", "no description"),
        ("-- name: a\n-- d\n", "no statement"),
        ("SELECT 1", "without a"),
    ],
)
def test_a_broken_file_is_refused(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_sql(text)


def test_statements_are_found_in_a_folder_or_a_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "sqlpkg_of_test"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "run.sql").write_text(GOOD)
    monkeypatch.syspath_prepend(str(tmp_path))
    expected = parse_sql(GOOD)
    assert load_sql(package, "run.sql") == expected
    assert load_sql(str(package), "run.sql") == expected
    assert load_sql("sqlpkg_of_test", "run.sql") == expected


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (ConnectionRefusedError(111, "refused"), UnavailableError),
        (TimeoutError(), UnavailableError),
        (asyncpg.InterfaceError("connection is closed"), UnavailableError),
        (asyncpg.ConnectionDoesNotExistError("gone"), UnavailableError),
        (asyncpg.AdminShutdownError("bye"), UnavailableError),
        (asyncpg.CannotConnectNowError("starting up"), UnavailableError),
        (asyncpg.TooManyConnectionsError("full"), UnavailableError),
        (asyncpg.DiskFullError("full"), UnavailableError),
        (asyncpg.ReadOnlySQLTransactionError("standby"), UnavailableError),
        (asyncpg.CrashShutdownError("crash of another server process"), UnavailableError),
        (asyncpg.PostgresIOError("input/output error"), UnavailableError),
        (asyncpg.InternalClientError("cannot switch to state 12"), UnavailableError),
        (asyncpg.QueryCanceledError("timeout"), UnavailableError),
        (asyncpg.LockNotAvailableError("lock"), UnavailableError),
        (asyncpg.DeadlockDetectedError("deadlock"), UnavailableError),
        (asyncpg.CharacterNotInRepertoireError("0x00"), InvalidArgumentError),
        (asyncpg.UniqueViolationError("key"), InternalError),
        (asyncpg.UndefinedTableError("table"), InternalError),
        (asyncpg.DataError("bad"), InternalError),
        (KeyError("x"), InternalError),
    ],
)
def test_driver_errors_become_ours_without_their_text(raised: Exception, kind: type[HermeshError]) -> None:
    error = map_pg_error(raised)
    assert type(error) is kind
    if kind is UnavailableError:
        assert error.reason == "DATABASE_UNAVAILABLE"
        assert error.retry_after_ms
    assert is_retryable(raised) == (kind is UnavailableError)


def test_what_a_database_lacks_is_named() -> None:
    assert refusal(asyncpg.DiskFullError("could not extend file: /secret")) == "its disk is full"
    assert "its disk is full" in map_pg_error(asyncpg.DiskFullError("x")).message
    assert refusal(asyncpg.ReadOnlySQLTransactionError("x")) == "it is read-only"
    assert refusal(asyncpg.CannotConnectNowError("starting up")) is None
    assert refusal(ConnectionRefusedError()) is None


def test_our_own_errors_pass() -> None:
    error = NotFoundError("RUN_NOT_FOUND", "no such run")
    assert map_pg_error(error) is error


async def test_no_database_is_one_line_without_the_password() -> None:
    with pytest.raises(StartupError) as error:
        await open_pool("postgresql://user:hunter2@127.0.0.1:1/mesh", name="t")
    text = str(error.value)
    assert "127.0.0.1:1/mesh" in text
    assert "HERMESH_DATABASE_URL" in text
    assert "hunter2" not in text
    assert "\n" not in text


@pytest.mark.parametrize("url", ["", "mysql://x", "postgresql://h:port/d", "not a url"])
async def test_a_url_that_is_none_is_one_line(url: str) -> None:
    with pytest.raises(StartupError, match="HERMESH_DATABASE_URL"):
        await open_pool(url)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (TimeoutError(), "no answer"),
        (asyncpg.InvalidPasswordError("x"), "refused"),
        (asyncpg.InvalidCatalogNameError("x"), "does not exist"),
        (asyncpg.CannotConnectNowError("the database system is starting up"), "starting up"),
        (ValueError("x"), "not valid"),
    ],
)
def test_a_failed_connection_says_why(error: Exception, words: str) -> None:
    assert words in connect_failure("postgresql:///d?host=/tmp", error)


def test_the_drivers_ids_are_ids_like_others() -> None:
    text = "0198f3a2-0000-7000-8000-0123456789ab"
    fast, plain = fast_uuid(text), UUID(text)
    assert isinstance(fast, UUID)
    assert (fast, hash(fast), str(fast)) == (plain, hash(plain), text)
    for wrong in ("", "0198f3a2", text + "0", text[:-1] + "g", "\0" * 36, "é" * 18):
        with pytest.raises(ValueError, match="invalid UUID"):
            fast_uuid(wrong)
