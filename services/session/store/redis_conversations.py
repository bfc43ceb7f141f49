"""Conversations in Redis: one list a session, `hermesh:{<session>}:conversation`, oldest message first.

An element is a JSON array: message id, run id, ordinal, role, content, tool calls, tool call id, time made
(ms), and the seq of the commit that brought it (0 for input).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

import orjson
import redis.asyncio

from meshkit.clock import now_ms
from meshkit.redis import Breaker
from services.session.domain import Message, NewMessage
from services.session.store.port import MAX_CONTEXT_BYTES, MAX_CONTEXT_MESSAGES
from services.session.store.redis_scripts import Script, guarded, run_script

# Adds elements after a known last one. ARGV: TTL, most elements, the last one's id and ordinal, elements.
_EXTEND = Script("""
local last = redis.call('LINDEX', KEYS[1], -1)
if not last then return 0 end
local known = cjson.decode(last)
if known[1] ~= ARGV[3] or known[3] ~= tonumber(ARGV[4]) then return 0 end
for i = 5, #ARGV do redis.call('RPUSH', KEYS[1], ARGV[i]) end
redis.call('LTRIM', KEYS[1], -ARGV[2], -1)
redis.call('EXPIRE', KEYS[1], ARGV[1])
return 1
""")

# Adds what a run committed, and gives it its ordinals. ARGV: TTL, most elements, run id, seq, then the
# parts of each element before and after its ordinal.
_ADD = Script("""
local last = redis.call('LINDEX', KEYS[1], -1)
if not last then return 0 end
local known = cjson.decode(last)
if known[2] ~= ARGV[3] or known[9] >= tonumber(ARGV[4]) then
  redis.call('DEL', KEYS[1])
  return 0
end
local ordinal = known[3]
for i = 5, #ARGV, 2 do
  ordinal = ordinal + 1
  redis.call('RPUSH', KEYS[1], ARGV[i] .. string.format('%d', ordinal) .. ARGV[i + 1])
end
redis.call('LTRIM', KEYS[1], -ARGV[2], -1)
redis.call('EXPIRE', KEYS[1], ARGV[1])
return 1
""")

# More than a context ever holds is not worth its transfer.
_MAX_BYTES = MAX_CONTEXT_BYTES * 4


def conversation_key(session_id: UUID) -> str:
    """Returns the key of a session's conversation."""
    return f"hermesh:{{{session_id}}}:conversation"


class RedisConversations:
    """See `cached.Conversations`."""

    def __init__(self, client: redis.asyncio.Redis, breaker: Breaker, *, ttl_seconds: int) -> None:
        """Makes a cache over a client that its caller closes; `breaker` may be shared."""
        self._client = client
        self._breaker = breaker
        self._ttl = ttl_seconds

    @property
    def refuses(self) -> bool:
        """True while Redis is known to be down."""
        return self._breaker.is_open

    async def load(self, session_id: UUID) -> Sequence[Message]:
        """See the port."""
        key = conversation_key(session_id)
        pipeline = self._client.pipeline(transaction=False)
        pipeline.lrange(key, 0, -1)
        pipeline.expire(key, self._ttl)
        elements, _ = await guarded(self._breaker, pipeline.execute)
        if sum(map(len, elements)) > _MAX_BYTES:
            return ()
        try:
            runs: dict[str, UUID] = {}
            messages = [_message(session_id, orjson.loads(element), runs) for element in elements]
        except (ValueError, TypeError, LookupError):
            return ()
        first = messages[0].ordinal if messages else 0
        if [message.ordinal for message in messages] != list(range(first, first + len(messages))):
            return ()
        return messages if len({message.message_id for message in messages}) == len(messages) else ()

    async def replace(self, session_id: UUID, messages: Sequence[Message]) -> None:
        """See the port."""
        key = conversation_key(session_id)
        pipeline = self._client.pipeline(transaction=True)
        pipeline.delete(key)
        if messages:
            pipeline.rpush(key, *map(_element, messages))
            pipeline.expire(key, self._ttl)
        await guarded(self._breaker, pipeline.execute)

    async def extend(self, after: Message, messages: Sequence[Message]) -> None:
        """See the port."""
        arguments = [str(after.message_id), after.ordinal, *map(_element, messages)]
        await self._script(_EXTEND, after.session_id, arguments)

    async def add(self, session_id: UUID, run_id: UUID, seq: int, messages: Sequence[NewMessage]) -> None:
        """See the port."""
        arguments: list[Any] = [str(run_id), seq]
        made = now_ms()
        for message in messages:
            head = orjson.dumps([str(message.message_id), str(run_id)])
            rest = [message.role, message.content, message.tool_calls, message.tool_call_id, made, seq]
            arguments += (head[:-1] + b",", b"," + orjson.dumps(rest)[1:])
        await self._script(_ADD, session_id, arguments)

    async def _script(self, script: Script, session_id: UUID, arguments: Sequence[Any]) -> None:
        await run_script(
            self._client,
            self._breaker,
            script,
            [conversation_key(session_id)],
            [self._ttl, MAX_CONTEXT_MESSAGES, *arguments],
        )


def _element(message: Message) -> bytes:
    return orjson.dumps(
        [
            str(message.message_id),
            str(message.run_id),
            message.ordinal,
            message.role,
            message.content,
            message.tool_calls,
            message.tool_call_id,
            message.create_time_ms,
            0,
        ]
    )


def _message(session_id: UUID, element: list[Any], runs: dict[str, UUID]) -> Message:
    """Reads an element; `runs` keeps what a run's text means, which comes with each of its messages."""
    message_id, run_id, ordinal, role, content, calls, call_id, made, _ = element
    run = runs.get(run_id) or runs.setdefault(run_id, UUID(run_id))
    return Message(UUID(message_id), session_id, run, ordinal, role, content, calls, call_id, made)
