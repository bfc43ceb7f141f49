"""Live streams in Redis: a copy of what is committed, fenced, short-lived, and good for nothing but speed.

Keys are `hermesh:{<session>}:fence` and `hermesh:{<session>}:run:<run>:events`. A stream's entries have the
explicit ids `<seq>-0` and one field, e: `<type> <time, ms> <data>`. A stream holds a run's events without a
gap from some seq on; what is before is in PostgreSQL. So is the data of large events: their field ends with
the time.

Many runs are written by one script and read by one command, because a command costs this process far more
than an event does. That asks for one Redis (or one with replicas), not for a Redis Cluster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any
from uuid import UUID

import redis.asyncio
import structlog

from meshkit import failpoints
from meshkit.errors import UnavailableError
from meshkit.redis import REDIS_ERRORS, Breaker
from services.session.domain import Event
from services.session.publisher import Publication, Reply
from services.session.store.redis_scripts import Script, run_script, stop_if_cancelled
from services.session.tail import Position

_log = structlog.get_logger("session.redis")

# Writes the events of many publications, each under its own session's fence and with its own reply. A fence
# that is older than the session's writes nothing. An absent one fails closed: after a loss of data an old
# writer must not look like the current one. A gap is refused unless the caller asks to begin anew there.
# KEYS: fence and stream of each; ARGV: reseed, TTL, length, then of each: fence, first seq, count, events.
_PUBLISH = """
local function broken(reply) return type(reply) == 'table' and reply.err end
local ttl, length = ARGV[2], ARGV[3]
local at = 4
local function publish(fence_key, stream, fence, first, count)
  local held = redis.pcall('GET', fence_key)
  if broken(held) then return 'BROKEN' end
  if not held then return 'MISSING' end
  held = tonumber(held)
  if not held then return 'BROKEN' end
  if tonumber(fence) < held then return 'STALE' end
  local last = redis.pcall('XREVRANGE', stream, '+', '-', 'COUNT', 1)
  if broken(last) then return 'BROKEN' end
  local have = 0
  if last[1] then
    have = tonumber(string.match(last[1][1], '^%d+'))
    if first > have + 1 then
      if ARGV[1] ~= '1' then return 'GAP' end
      redis.call('DEL', stream)
      have = 0
    end
  end
  if tonumber(fence) > held then redis.call('SET', fence_key, fence) end
  for i = math.max(0, have + 1 - first), count - 1 do
    redis.call('XADD', stream, 'MAXLEN', '~', length, string.format('%d-0', first + i), 'e', ARGV[at + i])
  end
  redis.call('EXPIRE', fence_key, ttl * 2)
  redis.call('EXPIRE', stream, ttl)
  return 'OK'
end
local replies = {}
for n = 1, #KEYS, 2 do
  local fence, first, count = ARGV[at], tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2])
  at = at + 3
  replies[#replies + 1] = publish(KEYS[n], KEYS[n + 1], fence, first, count)
  at = at + count
end
return replies
"""

# Sets fences unless higher ones are there. KEYS: fences; ARGV: TTL, then the value of each.
_SEED = """
for n = 1, #KEYS do
  local held = redis.pcall('GET', KEYS[n])
  if type(held) == 'table' or not held or not tonumber(held) or tonumber(held) < tonumber(ARGV[n + 1]) then
    redis.call('SET', KEYS[n], ARGV[n + 1], 'EX', ARGV[1] * 2)
  end
end
return 'OK'
"""

_BLOCK_MS = 1000
# The client of blocking reads waits a little longer than the server does.
READ_TIMEOUT = _BLOCK_MS / 1000 + 1.0
_READ_COUNT = 500
# Keys are asked for at each publication of a run; making them costs more than finding them. As many as a
# replica has runs that publish: those of runs that are over would only fill memory.
_KEYS = 1024


@lru_cache(maxsize=_KEYS)
def fence_key(session_id: UUID) -> str:
    """Returns the key of a session's fence."""
    return f"hermesh:{{{session_id}}}:fence"


@lru_cache(maxsize=_KEYS)
def stream_key(session_id: UUID, run_id: UUID) -> str:
    """Returns the key of a run's stream."""
    return f"hermesh:{{{session_id}}}:run:{run_id}:events"


_REPLIES = {reply.value.encode(): reply for reply in Reply}

_PUBLISH_SCRIPT = Script(_PUBLISH)
_SEED_SCRIPT = Script(_SEED)


class RedisStreams:
    """Writes the live streams."""

    def __init__(
        self, client: redis.asyncio.Redis, breaker: Breaker, *, ttl_seconds: int, max_events: int
    ) -> None:
        """Makes a writer over a client that its caller closes.

        Args:
            client: With short timeouts.
            breaker: Shared with whatever else uses this client.
            ttl_seconds: How long a stream outlives its last event.
            max_events: About how many events a stream keeps.
        """
        self._client = client
        self._breaker = breaker
        self._ttl = ttl_seconds
        self._max_events = max_events

    @property
    def refuses(self) -> bool:
        """True while Redis is known to be down."""
        return self._breaker.is_open

    async def problem(self) -> str | None:
        """Returns None if Redis answers, else what is wrong; past the breaker, so it is the truth of now."""
        try:
            await self._client.ping()
            stop_if_cancelled()
        except REDIS_ERRORS:
            return "Redis does not answer; reads and live tails use PostgreSQL"
        return None

    @failpoints.around("session.publish")
    async def publish(self, items: Sequence[Publication], *, reseed: bool = False) -> list[Reply]:
        """Writes publications in order; see `publisher.Streams`."""
        keys: list[str] = []
        arguments: list[Any] = [int(reseed), self._ttl, self._max_events]
        for item in items:
            keys += (fence_key(item.session_id), stream_key(item.session_id, item.run_id))
            arguments += (item.fence, item.first_seq, len(item.events))
            arguments += [
                f"{event.type} {event.time_ms} {event.data}"
                if event.data
                else f"{event.type} {event.time_ms}"
                for event in item.events
            ]
        answer = await run_script(self._client, self._breaker, _PUBLISH_SCRIPT, keys, arguments)
        replies = [_REPLIES[reply] for reply in answer]
        for item, reply in zip(items, replies, strict=True):
            if reply is Reply.BROKEN:
                # Something that is not ours is at these keys; without them readers use PostgreSQL.
                _log.warning("a live stream is broken and dropped", run_id=str(item.run_id))
                await self._drop(item)
        return replies

    async def seed(self, fences: Mapping[UUID, int]) -> None:
        """Sets fences that PostgreSQL named, unless higher ones are there."""
        keys = [fence_key(session_id) for session_id in fences]
        await run_script(self._client, self._breaker, _SEED_SCRIPT, keys, [self._ttl, *fences.values()])

    async def _drop(self, item: Publication) -> None:
        try:
            await self._client.delete(fence_key(item.session_id), stream_key(item.session_id, item.run_id))
            stop_if_cancelled()
        except REDIS_ERRORS:
            pass


class RedisReader:
    """Reads many live streams with one blocking command; see `tail.LiveReader`."""

    def __init__(self, reading: redis.asyncio.Redis, client: redis.asyncio.Redis, name: str) -> None:
        """Makes a reader over clients that its caller closes.

        Args:
            reading: Waits up to `READ_TIMEOUT` for a reply.
            client: With short timeouts, for the wake.
            name: This replica's; names the key that ends a read early.
        """
        self._reading = reading
        self._client = client
        self._wake_key = f"hermesh:wake:{name}"
        self._wake_id = "0-0"
        self._healthy = True

    @property
    def healthy(self) -> bool:
        """Whether the last read worked."""
        return self._healthy

    async def read(self, positions: Mapping[UUID, Position]) -> Mapping[UUID, Sequence[Event]]:
        """Waits about a second at most for events past the positions.

        Raises:
            UnavailableError: Redis does not answer, or what it holds is not ours.
        """
        runs = {
            stream_key(position.session_id, run_id).encode(): run_id for run_id, position in positions.items()
        }
        ids = [f"{position.seq}-0" for position in positions.values()]
        try:
            answer = await self._reading.execute_command(  # type: ignore[no-untyped-call]
                "XREAD",
                "COUNT",
                _READ_COUNT,
                "BLOCK",
                _BLOCK_MS,
                "STREAMS",
                self._wake_key,
                *runs,
                self._wake_id,
                *ids,
            )
            stop_if_cancelled()
            found = {}
            for key, entries in _streams(answer):
                run_id = runs.get(key)
                if run_id is not None:
                    found[run_id] = [_event(run_id, entry, fields) for entry, fields in entries]
                elif entries:
                    self._wake_id = entries[-1][0].decode()
        except (*REDIS_ERRORS, LookupError, ValueError, TypeError) as error:
            if self._healthy:
                _log.warning(
                    "live streams cannot be read; watchers use PostgreSQL", error=type(error).__name__
                )
            self._healthy = False
            raise UnavailableError("SERVICE_UNAVAILABLE", "Redis does not answer") from error
        if not self._healthy:
            _log.info("live streams can be read again")
        self._healthy = True
        return found

    async def wake(self) -> None:
        """Ends the read that is under way.

        Raises:
            UnavailableError: Redis does not answer.
        """
        try:
            await self._client.xadd(self._wake_key, {"w": "1"}, maxlen=1, approximate=False)
            await self._client.expire(self._wake_key, 3600)
            stop_if_cancelled()
        except REDIS_ERRORS as error:
            raise UnavailableError("SERVICE_UNAVAILABLE", "Redis does not answer") from error


def _streams(answer: Any) -> list[tuple[bytes, list[tuple[bytes, dict[bytes, bytes]]]]]:
    """Returns an XREAD reply as pairs of key and entries, whichever protocol version brought it."""
    if not answer:
        return []
    if isinstance(answer, dict):
        return [(key, parts[0] if len(parts) == 1 else parts) for key, parts in answer.items()]
    return [(key, entries) for key, entries in answer]


def _event(run_id: UUID, entry: bytes, fields: dict[bytes, bytes]) -> Event:
    kind, time_ms, *data = fields[b"e"].decode().split(" ", 2)
    return Event(run_id, int(entry.partition(b"-")[0]), kind, int(time_ms), data[0] if data else "")
