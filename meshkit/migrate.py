"""Numbered plain SQL migrations, applied in order, each once.

Files are `NNNN_pre_name.sql` (safe while the old version still runs) or `NNNN_post_name.sql` (only once it
is gone). Each runs in one transaction together with its row in `hermesh_migration`, so it is there fully or
not at all. Two migrators at once are safe: each transaction first locks that table and looks again.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import structlog

from meshkit.errors import StartupError
from meshkit.postgres import CONNECT_TIMEOUT, connect_failure

_log = structlog.get_logger("meshkit.migrate")

_FILE = re.compile(r"(?P<version>\d{4})_(?P<phase>pre|post)_(?P<name>[a-z0-9_]+)\.sql")
_SCHEMA = re.compile(r"[a-z_][a-z0-9_]{0,62}")
# Another migrator holds the lock for as long as its current migration takes.
_LOCK_TIMEOUT_MS = 60_000
_MIGRATION_TIMEOUT_S = 600.0
_CREATE_TRIES = 5

_CREATE = """
CREATE TABLE IF NOT EXISTS hermesh_migration (
    version integer PRIMARY KEY,
    name text NOT NULL,
    checksum text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT clock_timestamp()
)
"""
_LOCK = "LOCK TABLE hermesh_migration IN SHARE ROW EXCLUSIVE MODE"
_LIST = "SELECT version, name, checksum FROM hermesh_migration ORDER BY version"
_FIND = "SELECT checksum FROM hermesh_migration WHERE version = $1"
_INSERT = "INSERT INTO hermesh_migration (version, name, checksum) VALUES ($1, $2, $3)"


@dataclass(frozen=True, slots=True)
class Migration:
    """One migration file.

    Attributes:
        version: Its number.
        phase: `pre` or `post`.
        name: The file's name.
        sql: Its text.
        checksum: SHA-256 of the text, as hex.
    """

    version: int
    phase: str
    name: str
    sql: str
    checksum: str


def read_migrations(directory: Path) -> list[Migration]:
    """Reads a folder of migrations, in order.

    Raises:
        StartupError: The folder is missing, a name has another form, or the numbers are not 1, 2, 3 ...
    """
    if not directory.is_dir():
        raise StartupError(f"there is no folder of migrations at {directory}")
    migrations = []
    for path in sorted(directory.glob("*.sql")):
        match = _FILE.fullmatch(path.name)
        if match is None:
            raise StartupError(f"migration {path.name} is not named NNNN_pre_name.sql or NNNN_post_name.sql")
        sql = path.read_text(encoding="utf-8")
        checksum = hashlib.sha256(sql.encode()).hexdigest()
        migrations.append(Migration(int(match["version"]), match["phase"], path.name, sql, checksum))
    for expected, migration in enumerate(migrations, start=1):
        if migration.version != expected:
            raise StartupError(f"migration {migration.name} should have the number {expected:04d}")
    return migrations


async def migrate(url: str, directory: Path | str, *, schema: str = "") -> list[str]:
    """Applies what is missing.

    Args:
        url: The database.
        directory: The folder of migrations.
        schema: The schema of a service that shares its database with others: made if it is not there, holds
            this folder's `hermesh_migration`, and is where unqualified names go. Empty: the role's own.

    Returns:
        The names of the files applied now, in order.

    Raises:
        StartupError: One line that says what is wrong: no database, a changed or unknown migration, or a
            migration that failed (those before it stay applied).
    """
    migrations = read_migrations(Path(directory))
    search_path = _search_path(schema)
    try:
        connection = await asyncpg.connect(
            url,
            timeout=CONNECT_TIMEOUT,
            command_timeout=_MIGRATION_TIMEOUT_S,
            server_settings={
                "application_name": "hermesh-migrate",
                "lock_timeout": str(_LOCK_TIMEOUT_MS),
                "client_min_messages": "warning",
                **search_path,
            },
        )
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError, ValueError) as error:
        raise StartupError(connect_failure(url, error)) from error
    try:
        try:
            await _create_table(connection, schema)
            _check_known(migrations, await connection.fetch(_LIST))
        except asyncpg.InsufficientPrivilegeError as error:
            raise StartupError(
                f"the database's user may not make tables: {_one_line(error)}; grant it CREATE on the "
                "database and its schema public, or make it the database's owner"
            ) from error
        applied = []
        for migration in migrations:
            if await _apply(connection, migration):
                _log.info("migration applied", migration=migration.name)
                applied.append(migration.name)
        return applied
    finally:
        await connection.close(timeout=CONNECT_TIMEOUT)


async def pending(url: str, directory: Path | str, *, schema: str = "") -> list[str]:
    """Returns the names of the migrations that `migrate` would apply, and changes nothing.

    Raises:
        StartupError: As `migrate`.
    """
    migrations = read_migrations(Path(directory))
    search_path = _search_path(schema)
    try:
        connection = await asyncpg.connect(
            url,
            timeout=CONNECT_TIMEOUT,
            command_timeout=CONNECT_TIMEOUT,
            server_settings=search_path,
        )
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError, ValueError) as error:
        raise StartupError(connect_failure(url, error)) from error
    try:
        if await connection.fetchval("SELECT to_regclass($1) IS NULL", _table(schema)):
            return [migration.name for migration in migrations]
        rows = await connection.fetch(_LIST)
        _check_known(migrations, rows)
        done = {row["version"] for row in rows}
        return [migration.name for migration in migrations if migration.version not in done]
    finally:
        await connection.close(timeout=CONNECT_TIMEOUT)


def _search_path(schema: str) -> dict[str, str]:
    if not schema:
        return {}
    if not _SCHEMA.fullmatch(schema):
        raise ValueError(f"{schema!r} is not a schema's name")
    return {"search_path": f"{schema}, public"}


def _table(schema: str) -> str:
    # Qualified: without its own schema's table another service's must not be taken for it.
    return f"{schema}.hermesh_migration" if schema else "hermesh_migration"


async def _create_table(connection: asyncpg.Connection[asyncpg.Record], schema: str) -> None:
    for attempt in range(1, _CREATE_TRIES + 1):
        try:
            if schema:
                await connection.execute(f"CREATE SCHEMA IF NOT EXISTS {schema}")
            # Into the first schema of the search path that is there, which is `schema` by now.
            await connection.execute(_CREATE.replace("hermesh_migration", _table(schema), 1))
            return
        except (asyncpg.UniqueViolationError, asyncpg.DuplicateTableError, asyncpg.DuplicateObjectError):
            # IF NOT EXISTS is no guard against another session that creates it at the same moment.
            if attempt == _CREATE_TRIES:
                raise
            await asyncio.sleep(0.05 * attempt)


def _check_known(migrations: list[Migration], rows: list[asyncpg.Record]) -> None:
    known = {migration.version: migration for migration in migrations}
    for row in rows:
        migration = known.get(row["version"])
        if migration is None:
            raise StartupError(
                f"the database has migration {row['name']}, which this version does not know: run a newer "
                "version, or another database"
            )
        _check_same(migration, row["checksum"])


def _check_same(migration: Migration, checksum: str) -> None:
    if checksum != migration.checksum:
        raise StartupError(
            f"migration {migration.name} was changed after it was applied: restore its text and put the "
            "change in a new migration"
        )


async def _apply(connection: asyncpg.Connection[asyncpg.Record], migration: Migration) -> bool:
    try:
        async with connection.transaction():
            await connection.execute(_LOCK)
            checksum = await connection.fetchval(_FIND, migration.version)
            if checksum is not None:
                _check_same(migration, checksum)
                return False
            await connection.execute(migration.sql)
            await connection.execute(_INSERT, migration.version, migration.name, migration.checksum)
            return True
    except asyncpg.LockNotAvailableError as error:
        raise StartupError("another migration is running and did not finish; try again later") from error
    except asyncpg.PostgresError as error:
        raise StartupError(f"migration {migration.name} failed and was undone: {_one_line(error)}") from error
    except (asyncpg.InterfaceError, OSError, TimeoutError) as error:
        raise StartupError(f"migration {migration.name} lost its connection to PostgreSQL") from error


def _one_line(error: asyncpg.PostgresError) -> str:
    return " ".join(str(error).split())
