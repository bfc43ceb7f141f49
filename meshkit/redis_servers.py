"""Where Redis is: one server, the one that Sentinel names, or a cluster; and clients that find it again.

A connection asks where its server is whenever it connects, so that a failover needs no more than a
connection that ends. Nothing is sent again behind the caller's back, also with a cluster: what is lost is
lost, and the caller goes to PostgreSQL.

A cluster is used by a fixed number of hash tags (`RedisServers.tags`), each of one slot, and a client for
each: scripts and blocking reads over many keys are of one slot then, as a cluster asks.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote

import hiredis
import redis.asyncio
import redis.asyncio.connection
import redis.asyncio.retry
import redis.backoff
import redis.crc
import redis.exceptions
import redis.maint_notifications

from meshkit.errors import StartupError
from meshkit.redis_trouble import Trouble, TroubledError, explain
from meshkit.settings import parse_address

# PostgreSQL answers in about a millisecond: waiting longer than this for a cache is worse than having none.
TIMEOUT = 0.25
_MAX_CONNECTIONS = 64
# So many hash tags a cluster is used by. Each costs every session replica a command a batch and a blocked
# read; more primaries than this get nothing to do. Replicas that disagree about it would not hear each other.
_SHARDS = 16
# What is known of a failover may be so old: every connection asks, and each second somebody looks.
_MAX_AGE_S = 0.5
# Who asks waits TIMEOUT in all: there is time for another one when the first hangs.
_ASK_S = TIMEOUT / 2
_KNOWN = ("redis", "rediss", "unix", "redis+cluster", "rediss+cluster", "redis+sentinel", "rediss+sentinel")
_FORMS = (
    "redis://host:port, rediss:// (TLS), unix://path, redis+cluster://host:port,host:port "
    "or redis+sentinel://host:port,host:port/name"
)
_NO_TLS = Trouble("timeout", "Redis does not answer in time; if it speaks no TLS, the URL begins with redis")
_NO_SENTINEL = "the servers in Redis's URL are no Sentinels"

Address = tuple[str, int]
REDIS_ERRORS = (redis.exceptions.RedisError, OSError, TimeoutError)


class _FastPacking:
    """Encodes commands in C: redis-py's asyncio connections do it in Python, argument by argument."""

    def pack_command(self, *args: Any) -> list[bytes]:
        """Returns a command as it goes over the wire.

        Raises:
            DataError: An argument is neither text, bytes nor a number.
        """
        name = args[0]
        if isinstance(name, str) and " " in name:
            # "SCRIPT LOAD" is two words there.
            args = (*name.split(), *args[1:])
        try:
            return [hiredis.pack_command(args)]
        except TypeError as error:
            raise redis.exceptions.DataError(str(error)) from error


class _Connection(_FastPacking, redis.asyncio.Connection):
    """A connection, to wherever `where` says if that is given; with `replica` to a replica of a cluster."""

    def __init__(
        self,
        *,
        where: Callable[[], Awaitable[Address]] | None = None,
        replica: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._where = where
        self._replica = replica

    async def _connect(self) -> None:
        if self._where is not None:
            async with asyncio.timeout(self.socket_connect_timeout):
                self.host, self.port = await self._where()
        await super()._connect()  # type: ignore[no-untyped-call]

    async def on_connect_check_health(self, check_health: bool = True) -> None:
        """Greets the server; one of a cluster's replicas answers reads only if it is asked to."""
        await super().on_connect_check_health(check_health=check_health)
        if self._replica:
            await self.send_command("READONLY", check_health=False)
            await self.read_response()


class _SSLConnection(_Connection, redis.asyncio.SSLConnection):
    async def _connect(self) -> None:
        try:
            await super()._connect()
        except TimeoutError as error:
            # A server without TLS waits for the end of what it takes for a command.
            raise TroubledError(_NO_TLS) from error


class _UnixConnection(_FastPacking, redis.asyncio.UnixDomainSocketConnection):
    pass


_KINDS: dict[str, type[Any]] = {"redis": _Connection, "rediss": _SSLConnection, "unix": _UnixConnection}


def _client(kind: type[Any], options: dict[str, Any]) -> redis.asyncio.Redis:
    """Makes a client that gives up soon and tries nothing again; it connects at first use."""
    fixed = {
        "retry": redis.asyncio.retry.Retry(redis.backoff.NoBackoff(), 0),
        "retry_on_error": [],
        "health_check_interval": 0,
        "decode_responses": False,
        "maint_notifications_config": redis.maint_notifications.MaintNotificationsConfig(enabled=False),
    }
    given = {"socket_connect_timeout": TIMEOUT, "socket_timeout": TIMEOUT} | options | fixed
    pool = redis.asyncio.ConnectionPool(connection_class=kind, **given)
    return redis.asyncio.Redis.from_pool(pool)


class _Directory(Protocol):
    """Knows which server is the one to talk to now."""

    async def find(self, tag: str, *, replica: bool) -> Address:
        """Returns where a tag's primary is, or one of its replicas, or the primary where there is none.

        Raises:
            TroubledError: Nobody can tell.
        """
        ...

    async def aclose(self) -> None:
        """Closes the connections that it asks by."""
        ...


class _Asked:
    """Servers that can be asked who serves; each is asked by a client of its own."""

    def __init__(self, seeds: Sequence[Address], kind: type[Any], options: dict[str, Any]) -> None:
        self._seeds = tuple(seeds)
        self._kind = kind
        self._options = options
        self._clients: dict[Address, redis.asyncio.Redis] = {}
        self._lock = asyncio.Lock()
        self._asked_at = float("-inf")

    @property
    def known(self) -> Sequence[Address]:
        """Whom to ask."""
        return self._seeds

    async def renew(self) -> None:
        """Asks one of them, unless one was asked a moment ago.

        Raises:
            TroubledError: None answers as it should.
        """
        async with self._lock:
            if time.monotonic() - self._asked_at < _MAX_AGE_S:
                return
            trouble = Trouble("connection", "none of the servers in Redis's URL can be reached")
            # In another order each time: one that is cut off from the others would always say the same.
            for address in random.sample(self.known, len(self.known)):
                client = self._clients.get(address)
                if client is None:
                    host, port = address
                    place = {"host": host, "port": port, "max_connections": 1, "socket_timeout": _ASK_S}
                    client = self._clients[address] = _client(self._kind, self._options | place)
                try:
                    await self._ask(client, address)
                except (*REDIS_ERRORS, LookupError, ValueError, TypeError) as error:
                    found = explain(error)
                    if found is not None and (found.sure or not trouble.sure):
                        trouble = found
                    continue
                self._asked_at = time.monotonic()
                for gone in set(self._clients) - set(self.known):
                    await self._clients.pop(gone).aclose()
                return
        raise TroubledError(trouble)

    async def _ask(self, client: redis.asyncio.Redis, address: Address) -> None:
        raise NotImplementedError

    async def aclose(self) -> None:
        """Closes the connections."""
        for client in self._clients.values():
            await client.aclose()


class _Sentinels(_Asked):
    """The sentinels of one primary."""

    def __init__(self, name: str, seeds: Sequence[Address], kind: type[Any], options: dict[str, Any]) -> None:
        super().__init__(seeds, kind, options)
        self._name = name
        self._primary: Address | None = None
        self._replicas: list[Address] = []

    async def find(self, tag: str, *, replica: bool) -> Address:
        """See `_Directory`."""
        await self.renew()
        assert self._primary is not None
        return _any(self._replicas) if replica and self._replicas else self._primary

    async def _ask(self, client: redis.asyncio.Redis, address: Address) -> None:
        try:
            found = await client.execute_command(  # type: ignore[no-untyped-call]
                "SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._name
            )
        except redis.exceptions.ResponseError as error:
            if "unknown command" not in str(error):
                raise
            raise TroubledError(Trouble("topology", _NO_SENTINEL, sure=True)) from error
        if not found:
            text = f"Redis's Sentinel watches no primary that is named {self._name}"
            raise TroubledError(Trouble("topology", text, sure=True))
        replicas = await client.execute_command(  # type: ignore[no-untyped-call]
            "SENTINEL", "REPLICAS", self._name
        )
        self._primary = (_text(found[0]), int(found[1]))
        self._replicas = [(one["ip"], int(one["port"])) for one in map(_pairs, replicas) if _follows(one)]


class _Cluster(_Asked):
    """The nodes of a cluster, and which of them has which slots."""

    def __init__(self, seeds: Sequence[Address], kind: type[Any], options: dict[str, Any]) -> None:
        super().__init__(seeds, kind, options)
        self._ranges: list[tuple[int, int, list[Address]]] = []

    @property
    def known(self) -> Sequence[Address]:
        """The nodes as last told, and those of the URL, which may be a name for all of them."""
        nodes = [address for _, _, addresses in self._ranges for address in addresses]
        return tuple(dict.fromkeys([*nodes, *self._seeds]))

    async def find(self, tag: str, *, replica: bool) -> Address:
        """See `_Directory`."""
        await self.renew()
        slot = redis.crc.key_slot(tag.encode())
        for first, last, addresses in self._ranges:
            if first <= slot <= last and addresses:
                return _any(addresses[1:]) if replica and len(addresses) > 1 else addresses[0]
        raise TroubledError(
            Trouble("cluster", "the Redis Cluster has no server for some slots", sure=True, elsewhere=True)
        )

    async def _ask(self, client: redis.asyncio.Redis, address: Address) -> None:
        answer = await client.execute_command("CLUSTER", "SLOTS")  # type: ignore[no-untyped-call]
        # A node that does not know its own name, or wants it not to be used, leaves it out: the one asked is
        # meant.
        self._ranges = [
            (
                int(first),
                int(last),
                [(_text(node[0]) or address[0], int(node[1])) for node in nodes if _text(node[0]) != "?"],
            )
            for first, last, *nodes in answer
        ]


def _any(addresses: Sequence[Address]) -> Address:
    return random.choice(addresses)  # noqa: S311 -- spreads load, keeps no secret


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else value or ""


def _pairs(reply: Any) -> dict[str, str]:
    """Returns one of Sentinel's descriptions of a server, whichever protocol version brought it."""
    items = reply.items() if isinstance(reply, dict) else zip(reply[::2], reply[1::2], strict=True)
    return {_text(name): _text(value) for name, value in items}


def _follows(replica: dict[str, str]) -> bool:
    flags = replica["flags"].split(",")
    return not {"s_down", "o_down", "disconnected"} & set(flags) and replica["master-link-status"] == "ok"


@dataclass
class RedisLink:
    """A client of one shard, and how to leave a server that is no longer the right one."""

    redis: redis.asyncio.Redis
    _where: Callable[[], Awaitable[Address]] | None = None
    _at: Address | None = field(default=None, init=False)

    async def moved(self) -> bool:
        """Whether the shard is served elsewhere than at the last look.

        Raises:
            TroubledError: Nobody can tell.
            TimeoutError: Nobody tells in time.
        """
        if self._where is None:
            return False
        async with asyncio.timeout(TIMEOUT):
            before, self._at = self._at, await self._where()
        return before is not None and before != self._at

    async def leave(self) -> None:
        """Closes the connections, those in use once they are not; the next ones find their server anew."""
        pool = self.redis.connection_pool
        await pool.update_active_connections_for_reconnect()  # type: ignore[no-untyped-call]
        with suppress(*REDIS_ERRORS):
            await pool.disconnect(inuse_connections=False)

    async def aclose(self) -> None:
        """Closes all of them."""
        await self.redis.aclose()


class RedisServers:
    """All that a URL of Redis's leads to.

    Attributes:
        tags: The hash tags to use, one for each client; an empty one where all keys go together.
        lists_replicas: Whether replicas to read from are found by themselves.
    """

    def __init__(self, url: str, variable: str) -> None:
        """Use `open_redis`; raises ValueError where the form is wrong."""
        scheme, _, rest = url.partition("://")
        if scheme not in _KNOWN:
            raise ValueError("scheme")
        base, _, topology = scheme.partition("+")
        self._kind: type[Any] = {"redis": _Connection, "rediss": _SSLConnection, "unix": _UnixConnection}[
            base
        ]
        self._directory: _Directory | None = None
        self.tags: Sequence[str] = ("",)
        self.lists_replicas = bool(topology)
        self._cluster = topology == "cluster"
        if topology:
            place, options = _place(base, rest, named=topology == "sentinel")
            sentinels = _sentinels_own(options)
            _check(self._kind, options, variable)
            if self._cluster:
                self._directory = _Cluster(place.seeds, self._kind, options)
                self.tags = cluster_tags(_SHARDS)
            else:
                self._directory = _Sentinels(place.name, place.seeds, self._kind, sentinels)
        else:
            path = "" if base == "unix" else _parts(rest)[1].strip("/")
            if path and not path.isdigit():
                raise ValueError("path")
            options = _options(url)
            _check(self._kind, options, variable)
        self._options = options

    def link(
        self,
        tag: str = "",
        *,
        max_connections: int = _MAX_CONNECTIONS,
        timeout: float = TIMEOUT,
        replica: bool = False,
    ) -> RedisLink:
        """Returns a client; replies are bytes, every wait has an end, and nothing is tried again.

        Args:
            tag: One of `tags`.
            max_connections: Most connections; a call beyond them fails at once.
            timeout: Longest wait for a reply in seconds; longer only for a client of blocking reads.
            replica: Reads from a replica where one is known.
        """
        options = self._options | {"max_connections": max_connections}
        if timeout != TIMEOUT:
            options["socket_timeout"] = timeout
        directory = self._directory
        if directory is None:
            return RedisLink(_client(self._kind, options))

        async def where() -> Address:
            return await directory.find(tag, replica=replica)

        options |= {"where": where, "replica": replica and self._cluster}
        # Of replicas, each look may name another one: that is no reason to leave.
        return RedisLink(_client(self._kind, options), None if replica else where)

    async def aclose(self) -> None:
        """Closes the connections that are not a link's."""
        if self._directory is not None:
            await self._directory.aclose()


def open_redis(url: str, variable: str = "HERMESH_REDIS_URL") -> RedisServers | None:
    """Returns what a URL leads to, or None for an empty one; nothing is connected yet.

    Args:
        url: In one of the forms of docs/deploy/redis.md.
        variable: Where it is from, for an error.

    Raises:
        StartupError: The URL cannot be used.
    """
    if not url:
        return None
    try:
        return RedisServers(url, variable)
    except ValueError as error:
        raise StartupError(f"{variable} must be {_FORMS}; special characters of a password as %XX") from error


def cluster_tags(count: int) -> tuple[str, ...]:
    """Returns hash tags whose slots are spread evenly over all: numbers, the smallest that do."""
    found: dict[int, str] = {}
    number = 0
    while len(found) < count:
        part = redis.crc.key_slot(str(number).encode()) * count // redis.crc.REDIS_CLUSTER_HASH_SLOTS
        found.setdefault(part, str(number))
        number += 1
    return tuple(found[part] for part in range(count))


def _parts(rest: str) -> tuple[str, str, str]:
    """Splits what follows a scheme into authority, path and query."""
    place, _, query = rest.partition("?")
    authority, _, path = place.partition("/")
    return authority, path, query


@dataclass(frozen=True, slots=True)
class _Place:
    """The servers to ask, and with Sentinel the name of what it watches."""

    seeds: Sequence[Address]
    name: str


def _place(base: str, rest: str, *, named: bool) -> tuple[_Place, dict[str, Any]]:
    """Reads the URL of a cluster, or with `named` of Sentinel, and the options of a server's connection."""
    authority, path, query = _parts(rest)
    user, at, hosts = authority.rpartition("@")
    name, _, database = path.strip("/").partition("/") if named else ("", "", path.strip("/"))
    if named != bool(name) or (database and not database.isdigit()):
        raise ValueError("path")
    if not named and database.strip("0"):
        # A cluster has the database 0 and no other.
        raise ValueError("path")
    default = 26379 if named else 6379
    seeds = [
        parse_address(host if ":" in host.rpartition("]")[2] else f"{host}:{default}")
        for host in hosts.split(",")
    ]
    options = _options(f"{base}://{user}{at}host/{database or 0}?{query}")
    options.pop("host")
    return _Place(seeds, unquote(name)), options


def _options(url: str) -> dict[str, Any]:
    options: dict[str, Any] = dict(redis.asyncio.connection.parse_url(url))
    options.pop("connection_class", None)
    return options


def _sentinels_own(options: dict[str, Any]) -> dict[str, Any]:
    """Takes what is the sentinels' out of the options; TLS and time limits are the same, credentials not."""
    own = {name: value for name, value in options.items() if name.startswith(("ssl_", "socket_"))}
    for name in ("username", "password"):
        value = options.pop(f"sentinel_{name}", None)
        if value is not None:
            own[name] = value
    return own


def _check(kind: type[Any], options: dict[str, Any], variable: str) -> None:
    """Raises StartupError for options that would fail at each connection."""
    for option in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile"):
        file = options.get(option)
        if file is not None and not Path(file).is_file():
            raise StartupError(f"{variable}: {option} names {file}, and there is no such file")
    try:
        kind(**options)
    except (TypeError, redis.exceptions.RedisError) as error:
        raise StartupError(
            f"{variable} has an option behind its ? that means nothing there; docs/deploy/redis.md lists them"
        ) from error
