"""All that a replica has of Redis: for each shard its streams, their publisher and reader, and a probe."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Protocol
from uuid import NAMESPACE_URL, uuid5

import structlog

from meshkit.errors import StartupError
from meshkit.redis import Breaker
from meshkit.redis_servers import RedisServers, open_redis
from services.session.publisher import Fences, RedisPublisher, ShardedPublisher
from services.session.shards import Shards
from services.session.store.redis_calls import Caller
from services.session.store.redis_conversations import RedisConversations
from services.session.store.redis_live import READ_TIMEOUT, RedisReader, RedisStreams

_log = structlog.get_logger("session.redis")

_PROBE_S = 1.0
_INSTEAD = "reads and live tails use PostgreSQL"
# The value of HERMESH_REDIS_READ_FROM that is no URL.
REPLICAS = "replicas"


class Settings(Protocol):
    """The part of the service's settings that is about Redis."""

    @property
    def replica(self) -> str:
        """This replica's name."""
        ...

    @property
    def stream_ttl_seconds(self) -> int:
        """See `RedisStreams`."""
        ...

    @property
    def stream_max_events(self) -> int:
        """See `RedisStreams`."""
        ...

    @property
    def conversation_ttl_seconds(self) -> int:
        """See `RedisConversations`."""
        ...


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard: its live streams, and who calls it for conversations."""

    streams: RedisStreams
    publisher: RedisPublisher
    reader: RedisReader
    keeper: Caller


class LiveRedis:
    """All shards.

    Attributes:
        publisher: Takes commits.
        readers: For the tail.
        conversations: The cache of conversations.
    """

    def __init__(self, shards: Shards[Shard], conversations: RedisConversations, name: str) -> None:
        """Use `open_live`."""
        self.shards = shards
        self.publisher = ShardedPublisher(Shards([shard.publisher for shard in shards]))
        self.readers = Shards([shard.reader for shard in shards])
        self.conversations = conversations
        self._probe_run = uuid5(NAMESPACE_URL, name)
        self._random = random.Random()  # noqa: S311 -- spreads load, keeps no secret

    async def problem(self) -> str | None:
        """Writes to each shard now: None if all of them can be written and read, else what is wrong.

        Reading back takes its time where a replica lags; what `keep_looking` found of that counts.
        """
        await asyncio.gather(*(shard.streams.probe(self._probe_run) for shard in self.shards))
        found = [shard.reader.trouble for shard in self.shards]
        troubles = Counter(trouble.text for trouble in found if trouble is not None)
        if troubles:
            [(text, _)] = troubles.most_common(1)
            some = f" ({troubles.total()} of {len(found)} shards)" if len(found) > 1 else ""
            return f"{text}{some}; {_INSTEAD}"
        text = self.conversations.trouble
        return f"{text}; conversations are read from PostgreSQL" if text else None

    async def keep_looking(self, shard: Shard) -> None:
        """Looks again and again, until cancelled: what is wrong is known, and over, within about a second."""
        while True:
            try:
                await self._look(shard)
            except Exception as error:
                _log.error("looking at Redis failed by a bug", exc_info=error)
            await asyncio.sleep(_PROBE_S * self._random.uniform(0.8, 1.2))

    async def _look(self, shard: Shard) -> None:
        position, trouble = await shard.streams.probe(self._probe_run)
        if trouble is not None:
            return
        await shard.reader.probe(self._probe_run, position)
        if shard.keeper.trouble is not None:
            # Perhaps no conversation is written that would find out that it works again.
            await self.conversations.probe(shard.keeper)


def open_live(
    stack: AsyncExitStack, settings: Settings, url: str, read_from: str, store: Fences
) -> LiveRedis | None:
    """Makes all of it, or nothing without a URL; connects at first use.

    Args:
        stack: Closes the connections in the end.
        settings: The service's.
        url: HERMESH_REDIS_URL.
        read_from: HERMESH_REDIS_READ_FROM.
        store: Knows the fences that Redis has lost.

    Raises:
        StartupError: A URL cannot be used.
    """
    servers = open_redis(url)
    if servers is None:
        return None
    stack.push_async_callback(servers.aclose)
    readable = _readable(servers, read_from)
    if readable is not servers:
        stack.push_async_callback(readable.aclose)
    shards = []
    for tag in servers.tags:
        link = servers.link(tag)
        reading = readable.link(tag, max_connections=4, timeout=READ_TIMEOUT, replica=bool(read_from))
        for each in (link, reading):
            stack.push_async_callback(each.aclose)
        caller = Caller(link, Breaker(f"session-live{tag and '-'}{tag}"), tag)
        keeper = Caller(link, Breaker(f"session-conversations{tag and '-'}{tag}"), tag)
        streams = RedisStreams(
            caller, ttl_seconds=settings.stream_ttl_seconds, max_events=settings.stream_max_events
        )
        reader = RedisReader(reading, caller, settings.replica)
        shards.append(Shard(streams, RedisPublisher(streams, store), reader, keeper))
    keepers = Shards([shard.keeper for shard in shards])
    conversations = RedisConversations(keepers, ttl_seconds=settings.conversation_ttl_seconds)
    return LiveRedis(Shards(shards), conversations, settings.replica)


def _readable(servers: RedisServers, read_from: str) -> RedisServers:
    """Returns where the live streams are read."""
    if not read_from:
        return servers
    if read_from == REPLICAS:
        if not servers.lists_replicas:
            raise StartupError(
                f"HERMESH_REDIS_READ_FROM is {REPLICAS}, but only Sentinel and a cluster tell which they "
                "are; name the replica by its URL"
            )
        return servers
    found = open_redis(read_from, "HERMESH_REDIS_READ_FROM")
    assert found is not None
    if found.tags != servers.tags:
        raise StartupError(
            "HERMESH_REDIS_READ_FROM is a URL of another kind than HERMESH_REDIS_URL; of a cluster write "
            f"{REPLICAS}"
        )
    return found
