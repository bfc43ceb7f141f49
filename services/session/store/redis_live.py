"""Live streams in Redis: a copy of what is committed, fenced, short-lived, and good for nothing but speed.

Keys are `hermesh:{<session>}:fence` and `hermesh:{<session>}:run:<run>:events`; in a cluster those of all
sessions of a shard have its tag, `hermesh:{<shard>}:<session>:...`, and so are of one slot. A stream's
entries have the explicit ids `<seq>-0` and one field, e: `<type> <time, ms> <data>`. A stream holds a run's
events without a gap from some seq on; what is before is in PostgreSQL. So is the data of large events: their
field ends with the time.

Many runs of a shard are written by one script and read by one command, because a command costs this process
far more than an event does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any
from uuid import UUID

import structlog

from meshkit import failpoints
from meshkit.clock import now_ms
from meshkit.errors import UnavailableError
from meshkit.redis_servers import REDIS_ERRORS, RedisLink
from meshkit.redis_trouble import Trouble
from services.session import metrics
from services.session.domain import Event, NewEvent
from services.session.publisher import Publication, Reply
from services.session.store.redis_calls import Caller, Script, note, session_key, stop_if_cancelled
from services.session.tail import Position

_log = structlog.get_logger("session.redis")

# Writes the events of many publications, each under its own session's fence and with its own reply. A fence
# that is older than the session's writes nothing. An absent one fails closed: after a loss of data an old
# writer must not look like the current one. A gap is refused unless the caller asks to begin anew there.
# KEYS: fence and stream of each; ARGV: reseed, TTL, length, then of each: fence, first seq, count, events.
_PUBLISH = """
local function broken(reply)
  if type(reply) ~= 'table' or not reply.err then return false end
  -- Anything else that Redis refuses says nothing about what is there.
  if not string.find(reply.err, 'WRONGTYPE', 1, true) then error(reply.err, 0) end
  return true
end
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
  if type(held) == 'table' and not string.find(held.err, 'WRONGTYPE', 1, true) then error(held.err, 0) end
  if type(held) == 'table' or not held or not tonumber(held) or tonumber(held) < tonumber(ARGV[n + 1]) then
    redis.call('SET', KEYS[n], ARGV[n + 1], 'EX', ARGV[1] * 2)
  end
end
return 'OK'
"""

_BLOCK_MS = 1000
# A replica that is further behind than this is no help.
_LAG_MS = 1000
_FOREIGN = Trouble("foreign", "something that is not ours is in Redis at a live stream's key")
_LAG = Trouble("lag", "a read replica of Redis is more than a second behind its primary", elsewhere=True)
# The client of blocking reads waits a little longer than the server does.
READ_TIMEOUT = _BLOCK_MS / 1000 + 1.0
_READ_COUNT = 500
# Keys are asked for at each publication of a run; making them costs more than finding them. As many as a
# replica has runs that publish: those of runs that are over would only fill memory.
_KEYS = 1024


@lru_cache(maxsize=_KEYS)
def fence_key(session_id: UUID, tag: str = "") -> str:
    """Returns the key of a session's fence."""
    return session_key(session_id, tag, "fence")


@lru_cache(maxsize=_KEYS)
def stream_key(session_id: UUID, run_id: UUID, tag: str = "") -> str:
    """Returns the key of a run's stream."""
    return session_key(session_id, tag, f"run:{run_id}:events")


_REPLIES = {reply.value.encode(): reply for reply in Reply}

_PUBLISH_SCRIPT = Script(_PUBLISH)
_SEED_SCRIPT = Script(_SEED)


# Whom the probe writes as: no session has this id.
_NOBODY = UUID(int=0)


class RedisStreams:
    """Writes the live streams of a shard."""

    def __init__(self, caller: Caller, *, ttl_seconds: int, max_events: int) -> None:
        """Makes a writer.

        Args:
            caller: The shard's.
            ttl_seconds: How long a stream outlives its last event.
            max_events: About how many events a stream keeps.
        """
        self._caller = caller
        self._ttl = ttl_seconds
        self._max_events = max_events

    @property
    def refuses(self) -> bool:
        """True while Redis is known to be down."""
        return self._caller.refuses

    async def probe(self, run_id: UUID) -> tuple[Position, Trouble | None]:
        """Writes an event as those of runs are written, past the breaker, which goes by how it ends.

        Args:
            run_id: No run's id; each replica has its own.

        Returns:
            What a reader must find something past, and what is wrong, if anything is.
        """
        seq = now_ms()
        item = Publication(_NOBODY, run_id, 1, seq, [NewEvent("probe", seq, "")])

        async def write() -> None:
            await self._caller.attempt(_SEED_SCRIPT, [fence_key(_NOBODY, self._caller.tag)], [self._ttl, 1])
            await self._caller.attempt(_PUBLISH_SCRIPT, *self._call([item], reseed=True))

        trouble = await self._caller.probe(write)
        return Position(_NOBODY, seq - 1), trouble

    @failpoints.around("session.publish")
    async def publish(self, items: Sequence[Publication], *, reseed: bool = False) -> list[Reply]:
        """Writes publications in order; see `publisher.Streams`."""
        answer = await self._caller.script(_PUBLISH_SCRIPT, *self._call(items, reseed=reseed))
        replies = [_REPLIES[reply] for reply in answer]
        for item, reply in zip(items, replies, strict=True):
            if reply is Reply.BROKEN:
                # Something that is not ours is at these keys; without them readers use PostgreSQL.
                _log.warning("a live stream is broken and dropped", run_id=str(item.run_id))
                await self._drop(item)
        return replies

    async def seed(self, fences: Mapping[UUID, int]) -> None:
        """Sets fences that PostgreSQL named, unless higher ones are there."""
        keys = [fence_key(session_id, self._caller.tag) for session_id in fences]
        await self._caller.script(_SEED_SCRIPT, keys, [self._ttl, *fences.values()])

    def _call(self, items: Sequence[Publication], *, reseed: bool) -> tuple[list[str], list[Any]]:
        tag = self._caller.tag
        keys: list[str] = []
        arguments: list[Any] = [int(reseed), self._ttl, self._max_events]
        for item in items:
            keys += (fence_key(item.session_id, tag), stream_key(item.session_id, item.run_id, tag))
            arguments += (item.fence, item.first_seq, len(item.events))
            arguments += [
                f"{event.type} {event.time_ms} {event.data}"
                if event.data
                else f"{event.type} {event.time_ms}"
                for event in item.events
            ]
        return keys, arguments

    async def _drop(self, item: Publication) -> None:
        tag = self._caller.tag
        keys = fence_key(item.session_id, tag), stream_key(item.session_id, item.run_id, tag)
        try:
            await self._caller.redis.delete(*keys)
            stop_if_cancelled()
        except REDIS_ERRORS:
            pass


class RedisReader:
    """Reads many live streams of a shard with one blocking command; see `tail.LiveReader`."""

    def __init__(self, reading: RedisLink, caller: Caller, name: str) -> None:
        """Makes a reader.

        Args:
            reading: Waits up to `READ_TIMEOUT` for a reply, perhaps from a replica; its owner closes it.
            caller: The shard's, on its primary, for the wake.
            name: This replica's; names the key that ends a read early.
        """
        self._reading = reading
        self._caller = caller
        self._wake_key = f"hermesh:{{{caller.tag}}}:wake:{name}" if caller.tag else f"hermesh:wake:{name}"
        self._wake_id = "0-0"
        self._failed: Trouble | None = None
        self._probed: Trouble | None = None

    @property
    def trouble(self) -> Trouble | None:
        """What keeps commits of other replicas from coming by here: nobody can write, or this cannot read."""
        return self._caller.trouble or self._failed or self._probed

    @property
    def healthy(self) -> bool:
        """See the port."""
        return self.trouble is None

    async def probe(self, run_id: UUID, position: Position) -> None:
        """Looks for what the probe has written: a replica that is cut off answers, and has nothing new."""
        key = stream_key(position.session_id, run_id, self._caller.tag)
        try:
            if await self._reading.moved():
                await self._reading.leave()
            answer = await self._read(_LAG_MS, {key.encode(): f"{position.seq}-0"})
            stop_if_cancelled()
        except REDIS_ERRORS as error:
            self._probed = await note(self._reading, error)
            return
        if answer:
            self._probed = None
            if self._failed is not _FOREIGN:
                self._failed = None
        else:
            self._probed = _LAG
            metrics.redis_failures.labels(_LAG.cause).inc()
            # Another one may be up to date.
            await self._reading.leave()

    async def read(self, positions: Mapping[UUID, Position]) -> Mapping[UUID, Sequence[Event]]:
        """Waits about a second at most for events past the positions.

        Raises:
            UnavailableError: Redis does not answer, or what it holds is not ours.
        """
        tag = self._caller.tag
        runs = {
            stream_key(position.session_id, run_id, tag).encode(): run_id
            for run_id, position in positions.items()
        }
        ids = [f"{position.seq}-0" for position in positions.values()]
        asked = {self._wake_key.encode(): self._wake_id} | dict(zip(runs, ids, strict=True))
        try:
            answer = await self._read(_BLOCK_MS, asked)
            stop_if_cancelled()
            found = {}
            for key, entries in _streams(answer):
                run_id = runs.get(key)
                if run_id is not None:
                    found[run_id] = [_event(run_id, entry, fields) for entry, fields in entries]
                elif entries:
                    self._wake_id = entries[-1][0].decode()
        except REDIS_ERRORS as error:
            self._failed = await note(self._reading, error) or _FOREIGN
            raise UnavailableError("SERVICE_UNAVAILABLE", self._failed.text) from error
        except (LookupError, ValueError, TypeError) as error:
            self._failed = _FOREIGN
            raise UnavailableError("SERVICE_UNAVAILABLE", self._failed.text) from error
        self._failed = None
        return found

    async def _read(self, block_ms: int, asked: Mapping[bytes, str]) -> Any:
        return await self._reading.redis.execute_command(  # type: ignore[no-untyped-call]
            "XREAD", "COUNT", _READ_COUNT, "BLOCK", block_ms, "STREAMS", *asked, *asked.values()
        )

    async def wake(self) -> None:
        """Ends the read that is under way.

        Raises:
            UnavailableError: Redis does not answer.
        """
        client = self._caller.redis
        try:
            await client.xadd(self._wake_key, {"w": "1"}, maxlen=1, approximate=False)
            await client.expire(self._wake_key, 3600)
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
