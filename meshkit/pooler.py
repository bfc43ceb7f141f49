"""What stands between a process and PostgreSQL: nothing, or a pooler such as PgBouncer.

A pooler that lends a server's connection for one transaction (PgBouncer's `pool_mode = transaction`) breaks
whatever belongs to a connection: statements that are prepared under a name, settings made at its start,
LISTEN. What it does is found out by trying, since none of them says which it is, in which mode, of which
version.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import asyncpg
import structlog

from meshkit.errors import StartupError
from meshkit.hosts import CONNECT_TIMEOUT, Connection

_log = structlog.get_logger("meshkit.pooler")

Connect = Callable[..., Awaitable[Connection]]

# Without these a process that is gone can hold a row for good. Everything else only costs time.
REQUIRED = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout")
# One name for all: a pooler sets the name on the server's connection again each time it is another one.
_NAME = "hermesh"

_EFFECTIVE = """
SELECT name, setting FROM pg_catalog.pg_settings WHERE name = ANY($1::text[]) AND setting NOT IN ('0', '-1')
"""
_ROLE = "SELECT quote_ident(current_user) AS role, quote_ident(current_database()) AS database"


@dataclass(frozen=True, slots=True)
class Way:
    """How connections are made.

    Attributes:
        pooled: Whether a pooler is between.
        options: For `asyncpg.connect`.
    """

    pooled: bool
    options: Mapping[str, Any] = field(default_factory=dict)


async def is_pooled(connection: Connection) -> bool:
    """Whether a pooler is between: it makes up the number that a connection gets at its start."""
    pid: int = await connection.fetchval("SELECT pg_backend_pid()", timeout=CONNECT_TIMEOUT)
    return bool(pid != connection.get_server_pid())


def refuses_settings(error: BaseException) -> bool:
    """Whether a connection was refused because of settings that it asked for at its start."""
    return isinstance(error, asyncpg.ProtocolViolationError) and "startup parameter" in str(error)


async def find_way(connect: Connect, name: str, settings: Mapping[str, str]) -> Way:
    """Makes one connection, and finds out how all are to be made.

    Args:
        connect: Makes a connection with the options of `asyncpg.connect`.
        name: `application_name`.
        settings: PostgreSQL's settings for each connection.

    Raises:
        StartupError: A pooler is between that keeps the limits of time from PostgreSQL, and it has none of
            its own; or transactions do not work. Beside that, whatever `connect` raises.
    """
    # No statement of this connection has a name: what it asks must not depend on what it finds out.
    plain: dict[str, Any] = {"statement_cache_size": 0, "command_timeout": CONNECT_TIMEOUT}
    try:
        connection = await connect(server_settings={**settings, "application_name": name}, **plain)
    except asyncpg.ProtocolViolationError as error:
        if not refuses_settings(error):
            raise
        connection = await connect(server_settings={"application_name": _NAME}, **plain)
    try:
        if not await is_pooled(connection):
            return Way(False, {"server_settings": {**settings, "application_name": name}})
        await _require_limits(connection, settings)
        cached = await _keeps_statements(connection)
    finally:
        connection.terminate()
    _log.info("a pooler is before PostgreSQL", prepared_statements=cached)
    options: dict[str, Any] = {"server_settings": {"application_name": _NAME}}
    if not cached:
        options["statement_cache_size"] = 0
    return Way(True, options)


async def _keeps_statements(connection: Connection) -> bool:
    """Whether prepared statements follow their client from one server's connection to another.

    A pooler that sees to that (PgBouncer from 1.21 on, with `max_prepared_statements`) gives them names of
    its own. Another one hands the name on, which every process chooses alike: under it somebody else's
    statement may run.
    """
    try:
        async with connection.transaction():
            statement = await connection.prepare("SELECT 1", name="hermesh_probe")
            handed_on: bool = await connection.fetchval(
                "SELECT EXISTS (SELECT FROM pg_catalog.pg_prepared_statements WHERE name = $1)",
                statement.get_name(),
            )
            if handed_on:
                # It would stay behind on a connection that the next client gets.
                await connection.execute("DEALLOCATE hermesh_probe")
    except asyncpg.PostgresError as error:
        raise StartupError(
            f"transactions do not work through the pooler before PostgreSQL ({str(error).splitlines()[0]}); "
            "set its pool_mode to transaction or session"
        ) from error
    return not handed_on


async def _require_limits(connection: Connection, settings: Mapping[str, str]) -> None:
    """Checks that limits of time are in force, whoever set them.

    Raises:
        StartupError: They are not; the line holds the statements that put them there.
    """
    wanted = [name for name in REQUIRED if name in settings]
    rows = await connection.fetch(_EFFECTIVE, wanted)
    missing = [name for name in wanted if name not in {row["name"] for row in rows}]
    if not missing:
        return
    who = await connection.fetchrow(_ROLE)
    assert who is not None
    rule = f"ALTER ROLE {who['role']} IN DATABASE {who['database']} SET"
    # All of them: those that only save time can be had in the same way.
    remedy = " ".join(f"{rule} {name} = '{value}';" for name, value in settings.items())
    raise StartupError(
        f"a pooler such as PgBouncer is before PostgreSQL and keeps {', '.join(missing)} from it; set them "
        f"for the role once, as the role itself, and RECONNECT in the pooler's console: {remedy}"
    )
