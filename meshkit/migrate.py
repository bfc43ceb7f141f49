"""Numbered plain SQL migrations, applied in order, each once.

Files are `NNNN_pre_name.sql` (safe while the old version still runs) or `NNNN_post_name.sql` (only once it
is gone). Each runs in one transaction together with its row in `hermesh_migration`, so it is there fully or
not at all. Two migrators at once are safe: each transaction first locks that table and looks again. What a
migration needs of its connection it sets for its transaction, so that it may come through a pooler.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import structlog

from meshkit.errors import StartupError
from meshkit.hosts import CONNECT_TIMEOUT, Connection, Hosts
from meshkit.postgres import FAILURES, Pool, cannot_connect, open_pool
from meshkit.schemas import in_schema

_log = structlog.get_logger("meshkit.migrate")

_FILE = re.compile(r"(?P<version>\d{4})_(?P<phase>pre|post)_(?P<name>[a-z0-9_]+)\.sql")
_SCHEMA = re.compile(r"[a-z_][a-z0-9_]{0,62}")
# Another migrator holds the lock for as long as its current migration takes.
_LOCK_TIMEOUT_MS = 60_000
_MIGRATION_TIMEOUT_S = 600.0
_CREATE_TRIES = 5
_EXTENSION_REMEDY = (
    "; have the extension's package installed on PostgreSQL's server (pgvector: postgresql-NN-pgvector), and "
    "let a superuser make it once in this database: CREATE EXTENSION vector"
)

_CREATE = """
CREATE TABLE IF NOT EXISTS hermesh_migration (
    version integer PRIMARY KEY,
    name text NOT NULL,
    checksum text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT clock_timestamp()
)
"""
# A role's own limit of time is for the services' statements.
_SET_UP = """
SELECT set_config('lock_timeout', $1, true), set_config('statement_timeout', '0', true),
       set_config('idle_in_transaction_session_timeout', '0', true),
       set_config('client_min_messages', 'warning', true),
       CASE WHEN $2 <> '' THEN set_config('search_path', $2, true) END
"""
_EXTENSIONS = """
SELECT DISTINCT quote_ident(n.nspname) AS schema FROM pg_catalog.pg_extension e
JOIN pg_catalog.pg_namespace n ON n.oid = e.extnamespace WHERE n.nspname NOT IN ('pg_catalog', 'public')
"""
# Somebody else's tables; a service's own have its list of migrations beside them. Not by to_regclass, which
# raises where the schema may not be looked into.
_STRANGERS = """
SELECT count(*) > 0 AND NOT coalesce(bool_or(c.relname = 'hermesh_migration'), false)
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = $1 AND c.relkind IN ('r', 'p', 'v')
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


async def migrate(
    url: str, directory: Path | str, *, schema: str = "", name: str = "", before_rollout: bool = False
) -> list[str]:
    """Applies what is missing.

    Args:
        url: The database.
        directory: The folder of migrations.
        schema: The schema of a service that shares its database with others: made if it is not there, holds
            this folder's `hermesh_migration`, and is where unqualified names go. Empty: the role's own.
        name: What the schema is called in this database, if not as in the migrations.
        before_rollout: The version before still runs: what is `post` has to wait until it is gone.

    Returns:
        The names of the files applied now, in order.

    Raises:
        StartupError: One line that says what is wrong: no database, a changed or unknown migration, or a
            migration that failed (those before it stay applied).
    """
    migrations = read_migrations(Path(directory))
    name = name or schema
    connection = await _connect(url, _MIGRATION_TIMEOUT_S)
    try:
        try:
            await _create_table(connection, name)
            rows = await connection.fetch(_list(name))
            _check_known(migrations, rows)
            search_path = await _search_path(connection, name)
        except asyncpg.InsufficientPrivilegeError as error:
            raise StartupError(
                f"the database's user may not make tables: {_one_line(error)}; grant it CREATE on the "
                f"database, or make its schema: CREATE SCHEMA {name or 'hermesh'} AUTHORIZATION its_name"
            ) from error
        due = _due(migrations, {row["version"] for row in rows}) if before_rollout else migrations
        applied = []
        for migration in due:
            if await _apply(connection, migration, _text(migration, schema, name), search_path):
                _log.info("migration applied", migration=migration.name)
                applied.append(migration.name)
        return applied
    finally:
        await connection.close(timeout=CONNECT_TIMEOUT)


def _due(migrations: list[Migration], done: set[int]) -> list[Migration]:
    """What the version before survives of what is missing.

    Raises:
        StartupError: Something that it survives builds on something that it does not: a release was left out.
    """
    missing = [migration for migration in migrations if migration.version not in done]
    waiting = [migration for migration in missing if migration.phase == "post"]
    due = [migration for migration in missing if migration.phase == "pre"]
    if waiting and due and due[-1].version > waiting[0].version:
        raise StartupError(
            f"{waiting[0].name} of a release in between has to be applied before {due[-1].name}: upgrade to "
            "one release after the other, or end the mesh first"
        )
    return due


def _text(migration: Migration, schema: str, name: str) -> str:
    # The schema is there by now, and who may not make one is refused even where it need not be made.
    sql = re.sub(r"CREATE SCHEMA IF NOT EXISTS \w+;", "", migration.sql)
    return in_schema(sql, schema, name) if schema else sql


async def open_migrated(
    url: str, directory: Path | str, *, service: str, schema: str, **options: Any
) -> Pool:
    """Opens a pool on a database whose tables are there as this version needs them; the caller closes it.

    What a newer version added before its replicas start (`pre`) is as good: old and new ones serve side by
    side while an upgrade is under way.

    Args:
        url: The database.
        directory: The folder of migrations.
        service: Whose they are, for the remedy.
        schema: Where they are in this database.
        options: As `open_pool` takes them.

    Raises:
        StoreAwayError: The database cannot be reached, which may pass.
        StartupError: One line that says what is missing or too new, and what to do.
    """
    migrations = read_migrations(Path(directory))
    pool = await open_pool(url, **options)
    try:
        await _require(pool, migrations, service, schema)
    except FAILURES as error:
        await pool.shut()
        raise cannot_connect(url, error) from error
    except BaseException:
        await pool.shut()
        raise
    return pool


async def _require(pool: Pool, migrations: list[Migration], service: str, schema: str) -> None:
    remedy = f"run: python -m services.{service} migrate"
    if await pool.fetchval("SELECT to_regclass($1) IS NULL", _table(schema)):
        raise StartupError(f"the database has no tables of the {service} service; {remedy}")
    rows = await pool.fetch(_list(schema))
    _check_known(migrations, rows)
    done = {row["version"] for row in rows}
    # What is `post` comes when the rollout is over, of which this replica may be a part.
    missing = [one.name for one in migrations if one.version not in done and one.phase == "pre"]
    if missing:
        raise StartupError(
            f"the database's schema is older than this version: {', '.join(missing)} not applied; {remedy}"
        )


async def _connect(url: str, command_timeout: float) -> Connection:
    try:
        # No statement has a name, and no setting is asked for at the start: a pooler may be between.
        return await Hosts(url).connect(
            command_timeout=command_timeout,
            statement_cache_size=0,
            server_settings={"application_name": "hermesh-migrate"},
        )
    except FAILURES as error:
        raise cannot_connect(url, error) from error


async def pending(url: str, directory: Path | str, *, schema: str = "") -> list[str]:
    """Returns the names of the migrations that `migrate` would apply, and changes nothing.

    Raises:
        StartupError: As `migrate`.
    """
    migrations = read_migrations(Path(directory))
    connection = await _connect(url, CONNECT_TIMEOUT)
    try:
        if await connection.fetchval("SELECT to_regclass($1) IS NULL", _table(schema)):
            return [migration.name for migration in migrations]
        rows = await connection.fetch(_list(schema))
        _check_known(migrations, rows)
        done = {row["version"] for row in rows}
        return [migration.name for migration in migrations if migration.version not in done]
    finally:
        await connection.close(timeout=CONNECT_TIMEOUT)


async def _search_path(connection: Connection, schema: str) -> str:
    """Where unqualified names are: in the schema, and where extensions are, which need not be public."""
    if not schema:
        return ""
    others = [row["schema"] for row in await connection.fetch(_EXTENSIONS)]
    return ", ".join([_checked(schema), "public", *others])


def _table(schema: str) -> str:
    # Qualified: without its own schema's table another service's must not be taken for it.
    return f"{_checked(schema)}.hermesh_migration" if schema else "hermesh_migration"


def _checked(schema: str) -> str:
    if not _SCHEMA.fullmatch(schema):
        raise ValueError(f"{schema!r} is not a schema's name")
    return schema


def _list(schema: str) -> str:
    return _LIST.replace("hermesh_migration", _table(schema))


async def _create_table(connection: Connection, schema: str) -> None:
    for attempt in range(1, _CREATE_TRIES + 1):
        try:
            if schema:
                if await connection.fetchval(_STRANGERS, schema):
                    raise StartupError(
                        f"the schema {schema} of this database holds tables that are not Hermesh's; set "
                        "HERMESH_DATABASE_SCHEMA_PREFIX, or name a database of its own"
                    )
                # Who may not make schemas may have been given this one.
                if not await connection.fetchval("SELECT to_regnamespace($1) IS NOT NULL", schema):
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
        if migration is not None:
            _check_same(migration, row["checksum"])
        elif "_post_" in row["name"]:
            raise StartupError(
                f"the database's schema is newer: it has migration {row['name']}, which this version does "
                "not know; run a newer version, or another database"
            )


def _check_same(migration: Migration, checksum: str) -> None:
    if checksum != migration.checksum:
        raise StartupError(
            f"migration {migration.name} was changed after it was applied: restore its text and put the "
            "change in a new migration"
        )


async def _apply(connection: Connection, migration: Migration, sql: str, search_path: str) -> bool:
    try:
        async with connection.transaction():
            await connection.execute(_SET_UP, str(_LOCK_TIMEOUT_MS), search_path)
            await connection.execute(_LOCK)
            checksum = await connection.fetchval(_FIND, migration.version)
            if checksum is not None:
                _check_same(migration, checksum)
                return False
            await connection.execute(sql)
            await connection.execute(_INSERT, migration.version, migration.name, migration.checksum)
            return True
    except asyncpg.LockNotAvailableError as error:
        raise StartupError("another migration is running and did not finish; try again later") from error
    except asyncpg.PostgresError as error:
        remedy = _EXTENSION_REMEDY if "extension" in str(error) else ""
        raise StartupError(
            f"migration {migration.name} failed and was undone: {_one_line(error)}{remedy}"
        ) from error
    except (asyncpg.InterfaceError, OSError, TimeoutError) as error:
        raise StartupError(f"migration {migration.name} lost its connection to PostgreSQL") from error


def _one_line(error: asyncpg.PostgresError) -> str:
    return " ".join(str(error).split())
