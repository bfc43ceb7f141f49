"""PostgreSQL: the pool, SQL files, and driver errors turned into ours."""

from __future__ import annotations

import asyncio
import importlib.resources
import re
import socket
import ssl
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, cast
from urllib.parse import parse_qs, urlsplit
from uuid import UUID

import asyncpg
from asyncpg.pgproto.pgproto import UUID as _FastUUID

from meshkit.errors import (
    HermeshError,
    InternalError,
    InvalidArgumentError,
    StartupError,
    StoreAwayError,
    UnavailableError,
)
from meshkit.hosts import CONNECT_TIMEOUT, Hosts
from meshkit.pooler import find_way
from meshkit.tasks import TaskOwner

# Bounds on the server's side, so that a lost client or a stuck lock cannot hold a row for long.
LIMITS: Mapping[str, str] = {
    "statement_timeout": "5000",
    "lock_timeout": "2000",
    "idle_in_transaction_session_timeout": "5000",
    "jit": "off",
    "timezone": "UTC",
}
# The client gives up a little after the server did, so that the server's clearer error wins.
_COMMAND_TIMEOUT = 7.0

_CLOSE_SECONDS = 3.0

_RETRY_DOWN_MS = 500
_RETRY_BUSY_MS = 100
# A full disk is not mended in a moment, and those who wait for it come back all the same.
_RETRY_REFUSED_MS = 2_000
_RETRY_MOVING_MS = 1_000
# What migrations raise for a tenant that may not be changed here; the message is the reason.
_ELSEWHERE = "HM503"


class Pool(asyncpg.Pool):  # type: ignore[misc]
    """Connections to the primary among a URL's hosts; see `open_pool`.

    Attributes:
        pooled: Whether a pooler such as PgBouncer is between.
    """

    __slots__ = ("_hosts", "_tasks", "pooled")

    def __init__(self, hosts: Hosts, *, pooled: bool, **options: Any) -> None:
        """Makes a closed pool; `options` as `asyncpg.create_pool` takes them."""
        defaults: dict[str, Any] = {
            "max_queries": 50_000,
            "max_inactive_connection_lifetime": 300.0,
            "setup": None,
            "init": None,
            "loop": None,
            "connection_class": asyncpg.Connection,
            "record_class": asyncpg.Record,
        }
        super().__init__(connect=hosts.connect, reset=_reset, **defaults, **options)
        self._hosts = hosts
        self._tasks = TaskOwner("postgres-hosts")
        self.pooled = pooled

    async def open(self, watch: Mapping[str, Any]) -> None:
        """Connects; with several hosts, looks from now on whether another one is the primary."""
        await self
        if self._hosts.several:
            self._tasks.start(self._hosts.watch(**watch), name="hosts")

    async def close(self) -> None:
        """Closes all connections once they are given back."""
        await self._tasks.close()
        await super().close()

    async def shut(self) -> None:
        """Closes it within a bound, whatever the server does."""
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self.close()
        except TimeoutError:
            self.terminate()


async def open_pool(
    url: str,
    *,
    min_size: int = 1,
    max_size: int = 8,
    name: str = "hermesh",
    server_settings: Mapping[str, str] | None = None,
) -> Pool:
    """Opens a pool; the caller closes it.

    Connections are not reset between uses (that would cost a round trip each): use `SET LOCAL`, and a
    connection of your own for LISTEN.

    Args:
        url: `postgresql://user:password@host:port/database`, or with `?host=/socket/folder`. Of several hosts
            (`host:port,host:port`) the primary is taken, and the next one after a failover.
        min_size: Connections opened at once; 0 defers all but one that finds out whether a pooler is between.
        max_size: Most connections.
        name: `application_name`, as pg_stat_activity shows it.
        server_settings: More of PostgreSQL's settings for these connections.

    Raises:
        StoreAwayError: The database cannot be reached, which may pass.
        StartupError: It refuses us.
    """
    if not url:
        raise StartupError("HERMESH_DATABASE_URL is not set; it names the PostgreSQL database")
    try:
        hosts = Hosts(url)
        way = await find_way(hosts.connect, name[:63], {**LIMITS, **(server_settings or {})})
        pool = Pool(
            hosts,
            pooled=way.pooled,
            min_size=min_size,
            max_size=max_size,
            timeout=CONNECT_TIMEOUT,
            command_timeout=_COMMAND_TIMEOUT,
            **way.options,
        )
        await pool.open({"statement_cache_size": 0, "server_settings": {"application_name": name[:63]}})
    except FAILURES as error:
        raise cannot_connect(url, error) from error
    return pool


def fast_uuid(text: str) -> UUID:
    """Returns an id in the driver's own form, which hashes, compares and is sent without a line of Python.

    Raises:
        ValueError: The text is not a UUID.
    """
    return cast(UUID, _FastUUID(text))


async def _reset(connection: Any) -> None:
    if connection.is_in_transaction():
        await connection.reset()


# What connecting raises; a URL that is none raises a ValueError.
FAILURES = (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError, ValueError)
_NAME_AUTHORITY = "name its authority's file in the URL: ?sslmode=verify-full&sslrootcert=/path/ca.pem"
# OpenSSL's X509_V_ERR_CERT_HAS_EXPIRED.
_EXPIRED = 10
# What a later try may not meet: the server starts, restarts, fails over, or is full.
_PASSING = (
    asyncpg.CannotConnectNowError,
    asyncpg.InsufficientResourcesError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.PostgresConnectionError,
    TimeoutError,
    OSError,
)


def cannot_connect(url: str, error: BaseException) -> StartupError:
    """Returns the error for a connection that failed; of the kind that passes where waiting may help."""
    # One that is not trusted, or whose file is not there, stays so; one that has run out is replaced.
    lasting = (isinstance(error, ssl.SSLError) and not _has_expired(error)) or _missing_file(url, error)
    kind = StoreAwayError if isinstance(error, _PASSING) and not lasting else StartupError
    return kind(connect_failure(url, error))


def connect_failure(url: str, error: BaseException) -> str:
    """Returns one line about a connection that failed, with the place but without the password."""
    remedy = "check HERMESH_DATABASE_URL and that it runs"
    if isinstance(error, TimeoutError):
        cause = f"no answer within {CONNECT_TIMEOUT:.0f} s"
    elif isinstance(error, asyncpg.InvalidPasswordError | asyncpg.InvalidAuthorizationSpecificationError):
        cause = "the user or password is refused"
    elif isinstance(error, asyncpg.InvalidCatalogNameError):
        cause = "the database does not exist"
    elif isinstance(error, asyncpg.PostgresError):
        cause = str(error).splitlines()[0]
    elif _has_expired(error):
        cause = "its certificate has expired"
        remedy = "give the server a new one, nothing has to be restarted here"
    elif isinstance(error, ssl.SSLCertVerificationError):
        cause = f"its certificate is not trusted ({error.verify_message})"
        remedy = _NAME_AUTHORITY
    elif isinstance(error, ssl.SSLError):
        cause = f"TLS fails ({error.reason or 'no reason given'})"
    elif missing := _missing_file(url, error):
        cause = f"there is no file {missing}"
    elif isinstance(error, asyncpg.exceptions.ClientConfigurationError) and "certificate" in str(error):
        cause = "its certificate is to be checked, and no authority is named"
        remedy = _NAME_AUTHORITY
    elif isinstance(error, socket.gaierror):
        cause = "its name is not known"
    elif isinstance(error, OSError):
        cause = error.strerror or type(error).__name__
    else:
        cause = "the URL is not valid"
    return f"cannot use PostgreSQL at {place(url)}: {cause}; {remedy}"


def _has_expired(error: BaseException) -> bool:
    return isinstance(error, ssl.SSLCertVerificationError) and error.verify_code == _EXPIRED


def _missing_file(url: str, error: BaseException) -> str:
    """The first file for TLS that a URL names and that is not there; Python's error names none."""
    if not isinstance(error, FileNotFoundError):
        return ""
    query = parse_qs(urlsplit(url).query)
    named = [query[name][-1] for name in ("sslrootcert", "sslcert", "sslkey", "sslcrl") if name in query]
    return next((file for file in named if not Path(file).exists()), "")


def place(url: str) -> str:
    """Returns the hosts and the database of a URL, without its credentials."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "the configured address"
    if parts.scheme not in ("postgresql", "postgres"):
        # Anything may be anywhere in it, a password too.
        return "the configured address"
    return f"{parts.netloc.rpartition('@')[2] or 'the local socket'}{parts.path}"


# Broken or refused connections, restarts, failovers, and a server out of disk, memory or connections.
_DOWN = (
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    # What the driver says of a connection whose server has said its last word and not hung up yet.
    asyncpg.InternalClientError,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.InsufficientResourcesError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.IdleSessionTimeoutError,
    asyncpg.PostgresSystemError,
    asyncpg.PostgresIOError,
    OSError,
    TimeoutError,
)
# A statement that lost against its time limit or against another one.
_BUSY = (
    asyncpg.QueryCanceledError,
    asyncpg.LockNotAvailableError,
    asyncpg.DeadlockDetectedError,
    asyncpg.SerializationError,
)
# What a server that answers refuses to everybody, by SQLSTATE, as people are told it.
_REFUSED: Mapping[str, str] = {
    "25006": "it is read-only",
    "53100": "its disk is full",
    "53200": "it is out of memory",
    "53300": "it has no free connection",
    "53400": "it is at a limit of its configuration",
    "58030": "its disk fails",
}
_BAD_TEXT = (asyncpg.CharacterNotInRepertoireError, asyncpg.UntranslatableCharacterError)


# Of those that end a connection: what says for certain that a statement came to nothing.
_UNDONE = (
    ConnectionRefusedError,
    asyncpg.CannotConnectNowError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.IdleSessionTimeoutError,
)


def map_pg_error(exc: BaseException, *, sent: bool = False) -> HermeshError:
    """Returns the error that a caller may see for a failure in asyncpg.

    The driver's own text stays out of it: log the original beside.

    Args:
        exc: What was raised.
        sent: Whether it was raised for a statement that changes something and may have reached the server:
            then no answer does not mean that nothing was changed.
    """
    if isinstance(exc, HermeshError):
        return exc
    if getattr(exc, "sqlstate", None) == _ELSEWHERE:
        return tenant_elsewhere(str(exc.args[0]))
    if isinstance(exc, _BUSY):
        return UnavailableError(
            "DATABASE_UNAVAILABLE",
            "the database is too busy; try again",
            retry_after_ms=_RETRY_BUSY_MS,
        )
    if isinstance(exc, _BAD_TEXT):
        return InvalidArgumentError(
            "INVALID_ARGUMENT", "a text holds a character that cannot be stored, such as U+0000"
        )
    # asyncpg also reports misuse, such as a wrong parameter type, as an InterfaceError: that is our bug.
    if isinstance(exc, asyncpg.DataError | asyncpg.exceptions.UnsupportedClientFeatureError):
        return InternalError()
    refused = refusal(exc)
    if refused is not None:
        return UnavailableError(
            "DATABASE_UNAVAILABLE",
            f"the database cannot do this now: {refused}; nothing was changed, try again",
            retry_after_ms=_RETRY_REFUSED_MS,
        )
    if isinstance(exc, _DOWN) and sent and not isinstance(exc, _UNDONE):
        return outcome_unknown()
    if isinstance(exc, _DOWN):
        return UnavailableError(
            "DATABASE_UNAVAILABLE",
            "the database does not answer; nothing was changed, try again",
            retry_after_ms=_RETRY_DOWN_MS,
        )
    return InternalError()


def tenant_elsewhere(reason: str) -> UnavailableError:
    """Returns the error for a tenant on its way to another cell (TENANT_MOVING) or there (TENANT_MOVED)."""
    said = (
        "the tenant was moved to another cell; nothing was changed here, ask the cells' common address again"
        if reason == "TENANT_MOVED"
        else "the tenant is being moved to another cell; nothing was changed, try again"
    )
    return UnavailableError(reason, said, retry_after_ms=_RETRY_MOVING_MS)


def outcome_unknown() -> UnavailableError:
    """Returns the error for a statement that may have been carried out, or may be yet."""
    return UnavailableError(
        "OUTCOME_UNKNOWN",
        "the database gave no answer, so whether this was done is not known; send it again with the same key "
        "or request id, and it is done once",
        retry_after_ms=_RETRY_DOWN_MS,
    )


# Functions of ours that change nothing.
_READING = frozenset(
    {"refusal", "in_force", "quiet_in_ms", "now_ms", "ms_until", "call_waits", "uuid7_floor"}
)
_CHANGING = re.compile(r"\b(?:INSERT|UPDATE|DELETE)\b(?! OF\b)|\bsession\.(?P<function>[a-z0-9_]+)\(")


@cache
def changes(statement: str) -> bool:
    """Whether a statement may change anything; one that calls a function that is not known may."""
    text = re.sub(r"--[^\n]*|FOR (?:NO KEY )?UPDATE", "", statement)
    return any(match["function"] not in _READING for match in _CHANGING.finditer(text))


def refusal(exc: BaseException) -> str | None:
    """Returns what a server that answers lacks to do its work, in words of ours; None for any other error."""
    return _REFUSED.get(getattr(exc, "sqlstate", None) or "")


def is_retryable(exc: BaseException) -> bool:
    """Returns True if the same statement may work a moment later (its first try may still have committed)."""
    return isinstance(map_pg_error(exc), UnavailableError)


_NAME = re.compile(r"--\s*name:\s*(?P<name>[a-z][a-z0-9_]*)\s*")


def load_sql(package_or_path: str | Path | ModuleType, file: str) -> dict[str, str]:
    """Reads the named statements of one SQL file.

    A block is `-- name: foo`, then at least one comment line that describes it, then one statement. A final
    semicolon is dropped.

    Args:
        package_or_path: The folder, or the package (dotted name or module) that holds the file.
        file: Its name.

    Returns:
        Statement by name.

    Raises:
        ValueError: A name comes twice, or a block has no description or no statement.
    """
    if isinstance(package_or_path, Path):
        text = (package_or_path / file).read_text(encoding="utf-8")
    elif isinstance(package_or_path, str) and "/" in package_or_path:
        text = (Path(package_or_path) / file).read_text(encoding="utf-8")
    else:
        text = importlib.resources.files(package_or_path).joinpath(file).read_text(encoding="utf-8")
    return parse_sql(text, file)


def parse_sql(text: str, file: str = "<text>") -> dict[str, str]:
    """Splits the text of a SQL file into its named statements; see `load_sql`."""
    blocks: dict[str, list[str]] = {}
    name: str | None = None
    for number, line in enumerate(text.splitlines(), start=1):
        match = _NAME.fullmatch(line.strip())
        if match is not None:
            name = match["name"]
            if name in blocks:
                raise ValueError(f"{file}:{number}: {name} is there twice")
            blocks[name] = []
        elif name is not None:
            blocks[name].append(line)
        elif line.strip() and not line.lstrip().startswith("--"):
            raise ValueError(f"{file}:{number}: a statement without a '-- name:' line")
    return {name: _statement(name, lines, file) for name, lines in blocks.items()}


def _statement(name: str, lines: list[str], file: str) -> str:
    description = 0
    while description < len(lines) and lines[description].lstrip().startswith("--"):
        description += 1
    if not description:
        raise ValueError(f"{file}: {name} has no description")
    statement = "\n".join(lines[description:]).strip().removesuffix(";").rstrip()
    if not statement:
        raise ValueError(f"{file}: {name} has no statement")
    return statement
