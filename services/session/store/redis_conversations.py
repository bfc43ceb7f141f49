"""Conversations in Redis: one list a session, `hermesh:{<session>}:messages`, oldest message first.

In a cluster its key is `hermesh:{<shard>}:<session>:messages`.

An element is a head and a body. The head is its ordinal, how many bytes of text the list has got up to and
with it, the seq of the commit that brought it (0 for input), message id and run id, each followed by a space.
The body is a JSON array: role, content, tool calls, tool call id, time made (ms).

A list holds no more than a context needs: so many messages, and so many bytes and the message they end in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

import orjson

from meshkit.clock import now_ms
from services.session.domain import Message, NewMessage
from services.session.shards import Shards
from services.session.store.cached import size_of
from services.session.store.port import MAX_CONTEXT_BYTES, MAX_CONTEXT_MESSAGES
from services.session.store.redis_calls import Caller, Script, session_key

# Both scripts add elements after the last one and give them their ordinals. ARGV: TTL, most elements, most
# bytes, two words that the last one must fit, then of each new element its bytes and what follows those.
_PUSH = """
local function head(element)
  local ordinal, total, seq, id, run = string.match(element, '^(%d+) (%d+) (%d+) (%S+) (%S+) ')
  return tonumber(ordinal), tonumber(total), tonumber(seq), id, run
end
local function push(ordinal, total)
  for i = 6, #ARGV, 2 do
    ordinal, total = ordinal + 1, total + tonumber(ARGV[i])
    redis.call('RPUSH', KEYS[1], string.format('%d %d ', ordinal, total) .. ARGV[i + 1])
  end
  redis.call('LTRIM', KEYS[1], -ARGV[2], -1)
  while true do
    -- What follows the first is enough by itself.
    local _, upto = head(redis.call('LINDEX', KEYS[1], 0))
    if total - upto < tonumber(ARGV[3]) then break end
    redis.call('LPOP', KEYS[1])
  end
  redis.call('EXPIRE', KEYS[1], ARGV[1])
  return 1
end
local last = redis.call('LINDEX', KEYS[1], -1)
if not last then return 0 end
local ordinal, total, seq, id, run = head(last)
"""

# After a known last one. The words: its id and its ordinal.
_EXTEND = Script(
    _PUSH
    + """
if id ~= ARGV[4] or ordinal ~= tonumber(ARGV[5]) then return 0 end
return push(ordinal, total)
"""
)

# What a run committed. The words: the run, and the commit's seq.
_ADD = Script(
    _PUSH
    + """
if run ~= ARGV[4] or seq >= tonumber(ARGV[5]) then
  redis.call('DEL', KEYS[1])
  return 0
end
return push(ordinal, total)
"""
)


# Whom the probe writes for: no session has this id.
_NOBODY = UUID(int=0)
# Of one write to a list, characters.
_MAX_CHARS = MAX_CONTEXT_BYTES * 4


def conversation_key(session_id: UUID, tag: str = "") -> str:
    """Returns the key of a session's conversation."""
    return session_key(session_id, tag, "messages")


class RedisConversations:
    """See `cached.Conversations`."""

    def __init__(self, shards: Shards[Caller], *, ttl_seconds: int) -> None:
        """Makes a cache."""
        self._shards = shards
        self._ttl = ttl_seconds

    def refuses(self, session_id: UUID | None) -> bool:
        """See the port."""
        if session_id is None:
            return all(caller.refuses for caller in self._shards)
        return self._shards.of(session_id).refuses

    @property
    def trouble(self) -> str:
        """What is wrong with it; empty for nothing."""
        return next((caller.trouble.text for caller in self._shards if caller.trouble), "")

    async def probe(self, caller: Caller) -> None:
        """Writes to a shard as conversations are written, past its breaker, which goes by how it ends."""
        key = conversation_key(_NOBODY, caller.tag)
        element = b"0 %b %b []" % (str(_NOBODY).encode(), str(_NOBODY).encode())
        words = [self._ttl, MAX_CONTEXT_MESSAGES, MAX_CONTEXT_BYTES, str(_NOBODY), 1, 1, element]

        async def write() -> None:
            pipeline = caller.redis.pipeline(transaction=True)
            pipeline.delete(key)
            pipeline.rpush(key, b"1 1 %b" % element)
            pipeline.lrange(key, 0, -1)
            pipeline.expire(key, self._ttl)
            await pipeline.execute()
            await caller.attempt(_EXTEND, [key], words)

        await caller.probe(write)

    async def load(self, session_id: UUID) -> Sequence[Message]:
        """See the port."""
        caller = self._shards.of(session_id)
        key = conversation_key(session_id, caller.tag)
        pipeline = caller.redis.pipeline(transaction=False)
        pipeline.lrange(key, 0, -1)
        pipeline.expire(key, self._ttl)
        elements, _ = await caller.run(pipeline.execute)
        try:
            runs: dict[bytes, UUID] = {}
            messages = [_message(session_id, element, runs) for element in elements]
        except (ValueError, TypeError, LookupError):
            return ()
        first = messages[0].ordinal if messages else 0
        if [message.ordinal for message in messages] != list(range(first, first + len(messages))):
            return ()
        return messages if len({message.message_id for message in messages}) == len(messages) else ()

    async def replace(self, session_id: UUID, messages: Sequence[Message]) -> None:
        """See the port."""
        caller = self._shards.of(session_id)
        key = conversation_key(session_id, caller.tag)
        pipeline = caller.redis.pipeline(transaction=True)
        pipeline.delete(key)
        if messages and _worth_it(messages):
            total = 0
            elements = []
            for message in messages:
                total += size_of(message)
                elements.append(b"%d %d %b" % (message.ordinal, total, _rest(message)))
            pipeline.rpush(key, *elements)
            pipeline.expire(key, self._ttl)
        await caller.run(pipeline.execute)

    async def extend(self, after: Message, messages: Sequence[Message]) -> None:
        """See the port."""
        if not _worth_it(messages):
            await self.replace(after.session_id, ())
            return
        arguments: list[Any] = [str(after.message_id), after.ordinal]
        for message in messages:
            arguments += (size_of(message), _rest(message))
        await self._script(_EXTEND, after.session_id, arguments)

    async def add(self, session_id: UUID, run_id: UUID, seq: int, messages: Sequence[NewMessage]) -> None:
        """See the port."""
        if not _worth_it(messages):
            await self.replace(session_id, ())
            return
        arguments: list[Any] = [str(run_id), seq]
        made = now_ms()
        for message in messages:
            body = [message.role, message.content, message.tool_calls, message.tool_call_id, made]
            head = b"%d %b %b " % (seq, str(message.message_id).encode(), str(run_id).encode())
            arguments += (size_of(message), head + orjson.dumps(body))
        await self._script(_ADD, session_id, arguments)

    async def _script(self, script: Script, session_id: UUID, arguments: Sequence[Any]) -> None:
        caller = self._shards.of(session_id)
        await caller.script(
            script,
            [conversation_key(session_id, caller.tag)],
            [self._ttl, MAX_CONTEXT_MESSAGES, MAX_CONTEXT_BYTES, *arguments],
        )


def _worth_it(messages: Sequence[Message | NewMessage]) -> bool:
    """Whether messages may be cached: what is larger than a history and an input costs more than a look."""
    return sum(len(message.content) + len(message.tool_calls) for message in messages) <= _MAX_CHARS


def _rest(message: Message) -> bytes:
    """Returns what follows ordinal and bytes in an element of a stored message."""
    body = [message.role, message.content, message.tool_calls, message.tool_call_id, message.create_time_ms]
    ids = b"0 %b %b " % (str(message.message_id).encode(), str(message.run_id).encode())
    return ids + orjson.dumps(body)


def _message(session_id: UUID, element: bytes, runs: dict[bytes, UUID]) -> Message:
    """Reads an element; `runs` keeps what a run's text means, which comes with each of its messages."""
    ordinal, _, _, message_id, run_id, body = element.split(b" ", 5)
    run = runs.get(run_id) or runs.setdefault(run_id, UUID(run_id.decode()))
    role, content, calls, call_id, made = orjson.loads(body)
    return Message(
        UUID(message_id.decode()), session_id, run, int(ordinal), role, content, calls, call_id, made
    )
