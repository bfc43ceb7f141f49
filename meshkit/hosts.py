"""The hosts that a PostgreSQL URL names, and which of them is the primary.

asyncpg tries the hosts of a URL one after the other under one time limit, so that a frozen first one uses it
up, and a pool goes on with a former primary for as long as that one answers. Here every host has a limit of
its own, and of two that call themselves primary the one that was promoted later is taken.
"""

from __future__ import annotations

import asyncio
import random
import weakref
from dataclasses import dataclass
from typing import Any, TypeAlias
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

import asyncpg
import structlog

_log = structlog.get_logger("meshkit.hosts")

CONNECT_TIMEOUT = 5.0
# One host's limit, where there are others.
_HOST_SECONDS = 2.0
# How much longer than the first primary the others may take to answer: a former one may live.
_SECOND_THOUGHT = 0.3
# Between two looks whether another host was promoted.
WATCH_SECONDS = 5.0

# Several hosts are looked at at the same time; a connection is made to one.
Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"

_FAILURES = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
    TimeoutError,
)

# Each promotion begins a new timeline. NULL in recovery, where nobody writes.
_TIMELINE = """
SELECT CASE WHEN NOT pg_is_in_recovery()
            THEN ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::int END
"""


class NoPrimaryError(OSError):
    """Hosts answer, and each is a standby."""

    def __init__(self) -> None:
        """Says so."""
        super().__init__(None, "none of its hosts is a primary")


@dataclass(frozen=True, slots=True)
class _Found:
    host: str
    timeline: int | None


def split_hosts(url: str) -> list[str]:
    """Returns a URL for each host that one names: `//a:1,b:2/db`, or `//db?host=/a,/b&port=1,2`."""
    parts = urlsplit(url)
    credentials, at, place = parts.netloc.rpartition("@")
    if "," in place:
        return [urlunsplit(parts._replace(netloc=f"{credentials}{at}{one}")) for one in place.split(",")]
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    hosts, ports = query.get("host", "").split(","), query.get("port", "").split(",")
    if len(hosts) == 1:
        return [url]
    if len(ports) == 1:
        ports *= len(hosts)
    return [
        urlunsplit(
            parts._replace(query=urlencode(query | {"host": host, "port": port}, quote_via=quote, safe=""))
        )
        for host, port in zip(hosts, ports, strict=True)
    ]


class Hosts:
    """Makes connections to the primary among a URL's hosts; with one host, simply to it.

    Attributes:
        several: Whether there is a choice.
    """

    def __init__(self, url: str) -> None:
        """Looks at nothing yet.

        Raises:
            ValueError: The URL does not name as many ports as hosts.
        """
        self._hosts = split_hosts(url)
        self.several = len(self._hosts) > 1
        self._primary = "" if self.several else self._hosts[0]
        self._looking = asyncio.Lock()
        self._made: weakref.WeakKeyDictionary[Connection, str] = weakref.WeakKeyDictionary()

    async def connect(self, *_: Any, timeout: float = CONNECT_TIMEOUT, **options: Any) -> Connection:
        """Returns a connection to the primary, as `asyncpg.connect` with these options makes it.

        A pool may take it for its `connect`: the URL that it hands on is ignored.

        Raises:
            NoPrimaryError: Hosts answer, and each is a standby.
            OSError: No host can be reached; and whatever else `asyncpg.connect` raises.
        """
        if not self.several:
            return await asyncpg.connect(self._primary, timeout=timeout, **options)
        known = self._primary
        if known:
            try:
                connection = await asyncpg.connect(known, timeout=_HOST_SECONDS, **options)
                if await _timeline(connection) is not None:
                    return self._keep(connection, known)
                connection.terminate()
            except _FAILURES:
                pass
        async with self._looking:
            # Whoever waited finds what the one before it has found.
            if self._primary == known:
                await self._look(options)
        primary = self._primary
        return self._keep(await asyncpg.connect(primary, timeout=_HOST_SECONDS, **options), primary)

    def _keep(self, connection: Connection, host: str) -> Connection:
        self._made[connection] = host
        return connection

    async def look(self, **options: Any) -> None:
        """Looks which host is the primary now; connections to another one are cut, whatever they wait for.

        Raises:
            NoPrimaryError: As `connect`.
            OSError: As `connect`.
        """
        async with self._looking:
            await self._look(options)

    async def _look(self, options: dict[str, Any]) -> None:
        primary = (await _primary_of(self._hosts, options)).host
        if primary == self._primary:
            return
        former, self._primary = self._primary, primary
        if not former:
            return
        _log.warning("PostgreSQL has another primary", host=_name(primary))
        for connection, host in list(self._made.items()):
            if host != primary:
                # What is under way there may have come to something or not; nobody is kept waiting for it.
                connection.terminate()

    async def watch(self, seconds: float = WATCH_SECONDS, **options: Any) -> None:
        """Looks again and again, until cancelled: a former primary that hangs ends no connection."""
        jitter = random.Random()  # noqa: S311 -- spreads load, keeps no secret
        while True:
            await asyncio.sleep(seconds * jitter.uniform(0.8, 1.2))
            try:
                await self.look(**options)
            except _FAILURES:
                # Who needs a connection is told so; here it is looked for again.
                continue


def _name(url: str) -> str:
    """A host without the credentials beside it."""
    parts = urlsplit(url)
    return parts.netloc.rpartition("@")[2] or dict(parse_qsl(parts.query)).get("host", "")


async def _timeline(connection: Connection) -> int | None:
    """A primary's timeline; None for a standby."""
    timeline: int | None = await connection.fetchval(_TIMELINE, timeout=_HOST_SECONDS)
    return timeline


async def _ask(host: str, options: dict[str, Any]) -> _Found:
    connection = await asyncpg.connect(host, timeout=_HOST_SECONDS, **options)
    try:
        return _Found(host, await _timeline(connection))
    finally:
        connection.terminate()


async def _primary_of(hosts: list[str], options: dict[str, Any]) -> _Found:
    """Asks all hosts at once; returns the primary of the highest timeline.

    Raises:
        NoPrimaryError: All that answered are standbys.
        OSError: None answered; and whatever else `asyncpg.connect` raises.
    """
    asked = {asyncio.create_task(_ask(host, options), name="host") for host in hosts}
    waiting, best, failure = set(asked), None, None
    standbys = False
    try:
        limit: float | None = None
        while waiting:
            done, waiting = await asyncio.wait(waiting, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                break
            for task in done:
                error = task.exception()
                if isinstance(error, _FAILURES):
                    failure = error
                elif error is not None:
                    raise error
                elif (timeline := task.result().timeline) is None:
                    standbys = True
                elif best is None or timeline > (best.timeline or 0):
                    best = task.result()
            if best is not None:
                limit = _SECOND_THOUGHT
    finally:
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
    if best is not None:
        return best
    if standbys or failure is None:
        raise NoPrimaryError()
    raise failure
