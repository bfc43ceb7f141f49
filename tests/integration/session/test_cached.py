"""Contexts with a cached history are those of PostgreSQL, whatever happens to the cache."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from uuid import UUID

import asyncpg
import pytest
import redis.asyncio

from meshkit.errors import UnavailableError
from meshkit.ids import uuid7
from meshkit.postgres import open_pool
from meshkit.redis import Breaker
from meshkit.redis_servers import open_redis
from meshkit.tasks import TaskOwner
from services.session import metrics
from services.session.domain import (
    Claim,
    ClaimOutcome,
    ConcurrencyPolicy,
    Message,
    NewEvent,
    NewMessage,
    RunAppend,
    RunContext,
    RunStatus,
    StepCommit,
    Submission,
)
from services.session.shards import Shards
from services.session.store.cached import CachedContexts
from services.session.store.port import CONTEXT_PAGE_BYTES, MAX_CONTEXT_BYTES
from services.session.store.postgres import PostgresStore
from services.session.store.redis_calls import Caller
from services.session.store.redis_conversations import RedisConversations, conversation_key
from services.session.store.rows import context_of
from tests.conftest import ValkeyServer


class Unreliable(RedisConversations):
    """Loses some writes, as a Redis does that hiccups."""

    losses = 0.0
    random = random.Random(0)

    def _fail(self) -> None:
        if self.random.random() < self.losses:
            raise UnavailableError("SERVICE_UNAVAILABLE", "lost")

    async def replace(self, session_id: UUID, messages: Sequence[Message]) -> None:
        self._fail()
        await super().replace(session_id, messages)

    async def extend(self, after: Message, messages: Sequence[Message]) -> None:
        self._fail()
        await super().extend(after, messages)

    async def add(self, session_id: UUID, run_id: UUID, seq: int, messages: Sequence[NewMessage]) -> None:
        self._fail()
        await super().add(session_id, run_id, seq, messages)


@dataclass
class World:
    store: PostgresStore
    pool: asyncpg.Pool[asyncpg.Record]
    tenant: UUID
    client: redis.asyncio.Redis
    conversations: Unreliable
    contexts: CachedContexts
    tasks: TaskOwner

    async def session(self) -> UUID:
        session = await self.store.create_session(
            self.tenant, title="", metadata={}, agent="a", user="u", request_id="", fingerprint=b""
        )
        return session.session_id

    async def claimed(
        self, session_id: UUID, *texts: str, policy: ConcurrencyPolicy = ConcurrencyPolicy.DEFAULT
    ) -> Claim | None:
        """Submits input and asks for the lease; None if the session is busy."""
        submitted = await self.contexts.submit(
            self.tenant,
            Submission(
                session_id, [("user", text) for text in texts], b"", "", "", b"", policy, claim_owner="a"
            ),
        )
        return submitted.claim

    async def check(self, claim: Claim) -> None:
        """The claim's context is what PostgreSQL would have given."""
        page = CONTEXT_PAGE_BYTES if claim.run.attempt > 1 else None
        text = await self.pool.fetchval(
            "SELECT session.run_context($1, 200, 524288, $2)", claim.run.run_id, page
        )
        expected = context_of(text, claim.run)
        assert claim.context is not None
        assert plain(claim.context) == plain(expected)
        await self.settle()

    async def settle(self) -> None:
        assert await self.tasks.wait_idle(5)

    async def step(
        self, claim: Claim, seq: int, *messages: tuple[str, str], status: RunStatus | None = None
    ) -> int:
        assert claim.grant is not None
        commit = StepCommit([NewMessage(uuid7(), role, content) for role, content in messages], status=status)
        grant = claim.grant
        append = RunAppend(
            grant.session_id, grant.run_id, grant.fence, seq, [NewEvent("usage", 1, "{}")], commit
        )
        result = await self.store.append_step(append)
        assert result.outcome == 1
        self.contexts.committed(append)
        await self.settle()
        return seq + 1


def plain(context: RunContext) -> RunContext:
    """Without the times: a step's messages get theirs from PostgreSQL's clock."""
    return replace(context, messages=[replace(message, create_time_ms=0) for message in context.messages])


@pytest.fixture
async def world(database: str, valkey: ValkeyServer) -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        pool = await open_pool(database, min_size=1, max_size=4, name="test-cached")
        stack.push_async_callback(pool.close)
        servers = open_redis(valkey.url)
        assert servers is not None
        link = servers.link()
        stack.push_async_callback(link.aclose)
        store = PostgresStore(pool)
        tenant = await store.ensure_key(f"tenant-{uuid7()}", uuid7().hex * 2, "test")
        conversations = Unreliable(Shards([Caller(link, Breaker("test"))]), ttl_seconds=60)
        tasks = await stack.enter_async_context(TaskOwner("test"))
        contexts = CachedContexts(store, conversations, tasks=tasks)
        yield World(store, pool, tenant, link.redis, conversations, contexts, tasks)


def count(result: str) -> float:
    return metrics.cached_contexts.labels(result)._value.get()


async def test_turns_of_a_conversation_hit_the_cache(world: World) -> None:
    session_id = await world.session()
    hits, misses = count("hit"), count("miss")
    for turn in range(5):
        claim = await world.claimed(session_id, f"question {turn}", 'é\u2028\\"')
        assert claim is not None
        await world.check(claim)
        seq = await world.step(claim, 2, ("assistant", ""), ("tool", "42"))
        await world.step(claim, seq, ("assistant", f"answer {turn}"), status=RunStatus.COMPLETED)
    assert (count("hit") - hits, count("miss") - misses) == (4, 0)
    assert 0 < await world.client.ttl(conversation_key(session_id)) <= 60


async def test_a_hit_reads_no_history_from_postgresql(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    session_id = await world.session()
    claim = await world.claimed(session_id, "one")
    assert claim is not None
    await world.settle()
    await world.step(claim, 2, ("assistant", "two"), status=RunStatus.COMPLETED)
    monkeypatch.setattr(PostgresStore, "history", None)
    claim = await world.claimed(session_id, "three")
    assert claim is not None
    assert claim.context is not None
    assert [message.content for message in claim.context.messages] == ["one", "two", "three"]
    assert [message.ordinal for message in claim.context.messages] == [1, 2, 3]


async def test_a_long_conversation_is_cut_like_postgresql_cuts_it(world: World) -> None:
    session_id = await world.session()
    for turn in range(4):
        claim = await world.claimed(session_id, *[f"{turn} {n}" for n in range(60)], "x" * 100_000)
        assert claim is not None
        await world.check(claim)
        await world.step(claim, 2, ("assistant", "y" * 60_000), status=RunStatus.COMPLETED)
    assert await world.client.llen(conversation_key(session_id)) <= 200


async def test_without_redis_contexts_are_the_same(world: World, valkey: ValkeyServer) -> None:
    session_id = await world.session()
    for turn in range(4):
        claim = await world.claimed(session_id, f"question {turn}")
        assert claim is not None
        await world.check(claim)
        await world.step(claim, 2, ("assistant", "answer"), status=RunStatus.COMPLETED)
        if turn == 1:
            valkey.kill()


@pytest.mark.parametrize(
    "change",
    ["flush", "trim", "reorder", "duplicate", "foreign", "text", "type"],
)
async def test_a_wrong_cache_is_not_believed(world: World, change: str) -> None:
    session_id = await world.session()
    for turn in range(3):
        claim = await world.claimed(session_id, f"question {turn}")
        assert claim is not None
        await world.settle()
        await world.step(claim, 2, ("assistant", f"answer {turn}"), status=RunStatus.COMPLETED)
    key = conversation_key(session_id)
    elements = await world.client.lrange(key, 0, -1)
    assert len(elements) == 6
    await world.client.delete(key)
    if change == "trim":
        await world.client.rpush(key, *elements[:-1])
    elif change == "reorder":
        await world.client.rpush(key, elements[1], elements[0], *elements[2:])
    elif change == "duplicate":
        await world.client.rpush(key, elements[0], *elements)
    elif change == "foreign":
        await world.client.rpush(key, *elements, b"[1]")
    elif change == "text":
        await world.client.rpush(key, b"\xff nonsense")
    elif change == "type":
        await world.client.set(key, "nonsense")
    claim = await world.claimed(session_id, "next")
    assert claim is not None
    await world.check(claim)
    await world.step(claim, 2, ("assistant", "answer"), status=RunStatus.COMPLETED)
    hits = count("hit")
    claim = await world.claimed(session_id, "after")
    assert claim is not None
    await world.check(claim)
    assert count("hit") == hits + 1


@pytest.mark.parametrize("seed", range(12))
async def test_random_histories_with_lost_writes_give_postgresqls_contexts(world: World, seed: int) -> None:
    """Turns, rollbacks, takeovers and flushes, while a third of the cache's writes is lost."""
    rng = random.Random(seed)
    world.conversations.losses = 0.33
    world.conversations.random = random.Random(seed + 1000)
    session_id = await world.session()
    for turn in range(15):
        policy = rng.choice([ConcurrencyPolicy.ENQUEUE, ConcurrencyPolicy.ROLLBACK])
        claim = await world.claimed(
            session_id, *[f"{turn}.{n}" for n in range(rng.randint(1, 3))], policy=policy
        )
        assert claim is not None
        await world.check(claim)
        seq = 2
        for number in range(rng.randint(0, 3)):
            seq = await world.step(claim, seq, ("assistant", f"{turn}:{number}"), ("tool", "x"))
        if rng.random() < 0.2:
            # The agent dies, and another one takes over.
            await world.pool.execute(
                "UPDATE session.lease SET lease_until = clock_timestamp() - interval '1 s' "
                "WHERE session_id = $1",
                session_id,
            )
            claim = await world.contexts.claim(claim.run.run_id, "b")
            assert claim.outcome is ClaimOutcome.CLAIMED
            await world.check(claim)
        if rng.random() < 0.3:
            # The run is taken back: the lease ends, and the next input finds it so.
            await world.pool.execute(
                "UPDATE session.run SET rollback = true WHERE run_id = $1", claim.run.run_id
            )
            await world.step(claim, seq, status=RunStatus.CANCELLED)
        else:
            await world.step(claim, seq, ("assistant", f"{turn} end"), status=RunStatus.COMPLETED)
        if rng.random() < 0.1:
            await world.client.flushall()


async def test_a_list_keeps_no_more_bytes_than_a_context_needs(world: World) -> None:
    session_id = await world.session()
    key = conversation_key(session_id)
    seq = 2
    for _ in range(12):
        claim = await world.claimed(session_id, "next")
        assert claim is not None
        await world.check(claim)
        seq = await world.step(claim, 2, ("assistant", ""), *[("tool", "t" * 60_000)] * 3)
        await world.step(claim, seq, ("assistant", "done"), status=RunStatus.COMPLETED)
        held = sum(map(len, await world.client.lrange(key, 0, -1)))
        assert held < MAX_CONTEXT_BYTES + 70_000
    hits = count("hit")
    claim = await world.claimed(session_id, "last")
    assert claim is not None
    await world.check(claim)
    assert count("hit") == hits + 1


async def test_what_is_too_large_for_the_cache_is_not_in_it(world: World) -> None:
    session_id = await world.session()
    key = conversation_key(session_id)
    claim = await world.claimed(session_id, "first")
    assert claim is not None
    await world.settle()
    seq = await world.step(claim, 2, ("assistant", ""), *[("tool", "t" * 60_000)] * 40)
    assert await world.client.exists(key) == 0
    # A takeover of what does not fit one page caches nothing, either.
    await world.pool.execute(
        "UPDATE session.lease SET lease_until = clock_timestamp() - interval '1 s' WHERE session_id = $1",
        session_id,
    )
    claim = await world.contexts.claim(claim.run.run_id, "b")
    await world.check(claim)
    assert claim.context is not None
    assert claim.context.next is not None
    assert await world.client.exists(key) == 0
    await world.step(claim, seq, ("assistant", "done"), status=RunStatus.COMPLETED)
    claim = await world.claimed(session_id, "second")
    assert claim is not None
    await world.check(claim)
    assert await world.client.exists(key) == 1
