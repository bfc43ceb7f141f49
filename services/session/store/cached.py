"""Contexts whose history comes from a cache of conversations, proved against PostgreSQL or not used.

A conversation only grows and shrinks at its end: a run's messages are added while it holds the session, and
taken back, if at all, when it ends. So if a cached conversation ends with the very message (place and id)
that PostgreSQL names as the one before the run's own, everything before that is the same, too.
"""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import Any, Protocol
from uuid import UUID

import structlog

from meshkit.errors import HermeshError
from meshkit.tasks import TaskOwner
from services.session import metrics
from services.session.domain import Claim, Message, NewMessage, RunAppend, Submission, Submitted
from services.session.store.port import MAX_CONTEXT_BYTES, MAX_CONTEXT_MESSAGES

_log = structlog.get_logger("session.cache")

# Writes to the cache that may be under way; beyond them a write is left out, and the next claim repairs it.
_MAX_WRITES = 256


class Contexts(Protocol):
    """Accepting and claiming, as the store does it."""

    async def submit(self, tenant_id: UUID, submission: Submission) -> Submitted:
        """See `port.Runs`."""
        ...

    async def claim(self, run_id: UUID, owner: str) -> Claim:
        """See `port.Runs`."""
        ...


class ContextStore(Protocol):
    """The part of the store that this decorates; see `port`."""

    async def submit(self, tenant_id: UUID, submission: Submission, *, history: bool = True) -> Submitted:
        """Accepts input."""
        ...

    async def claim(self, run_id: UUID, owner: str, *, history: bool = True) -> Claim:
        """Takes a lease."""
        ...

    async def history(self, tenant_id: UUID, session_id: UUID, last: int) -> list[Message]:
        """Returns the newest messages up to an ordinal, within the limits of a context."""
        ...


class Conversations(Protocol):
    """The cache; it may forget anything and fail at any time. Methods raise HermeshError."""

    def refuses(self, session_id: UUID | None) -> bool:
        """Whether it is known to be down for a session; with None, for all of them."""
        ...

    async def load(self, session_id: UUID) -> Sequence[Message]:
        """Returns what is cached, oldest first and with consecutive ordinals; renews its life."""
        ...

    async def replace(self, session_id: UUID, messages: Sequence[Message]) -> None:
        """Stores a conversation's newest messages in place of what was there."""
        ...

    async def extend(self, after: Message, messages: Sequence[Message]) -> None:
        """Adds messages if `after` is the last one there, else does nothing."""
        ...

    async def add(self, session_id: UUID, run_id: UUID, seq: int, messages: Sequence[NewMessage]) -> None:
        """Adds what a run committed at `seq` if the last one there is the same run's, of an earlier commit;
        else forgets the conversation, if it is there at all.
        """
        ...


class CachedContexts:
    """Decorates the store's `submit` and `claim`, and keeps the cache up to date behind them."""

    def __init__(self, store: ContextStore, cache: Conversations, *, tasks: TaskOwner) -> None:
        """Makes a decorator; `tasks` owns its background writes."""
        self._store = store
        self._cache = cache
        self._tasks = tasks
        self._writes = 0

    async def submit(self, tenant_id: UUID, submission: Submission) -> Submitted:
        """See `port.Runs`. The cache is read while PostgreSQL works."""
        if not submission.claim_owner or self._cache.refuses(submission.session_id):
            return await self._store.submit(tenant_id, submission)
        loading = self._tasks.start(self._load(submission.session_id), name="load")
        submitted = await self._store.submit(tenant_id, submission, history=False)
        if submitted.claim is None or submitted.claim.context is None:
            return submitted
        return replace(submitted, claim=await self._complete(submitted.claim, await loading))

    async def claim(self, run_id: UUID, owner: str) -> Claim:
        """See `port.Runs`."""
        if self._cache.refuses(None):
            return await self._store.claim(run_id, owner)
        claim = await self._store.claim(run_id, owner, history=False)
        if claim.context is None:
            return claim
        return await self._complete(claim, await self._load(claim.run.session_id))

    def committed(self, append: RunAppend) -> None:
        """Takes a committed step whose messages belong to a conversation; does not wait."""
        commit = append.commit
        if commit is not None and commit.messages:
            writing = self._cache.add(append.session_id, append.run_id, append.first_seq, commit.messages)
            self._write(append.session_id, writing)

    def forget(self, session_id: UUID) -> None:
        """Takes that a session was deleted; does not wait."""
        self._write(session_id, self._cache.replace(session_id, ()))

    async def _load(self, session_id: UUID) -> Sequence[Message]:
        try:
            return await self._cache.load(session_id)
        except HermeshError:
            return ()

    async def _complete(self, claim: Claim, cached: Sequence[Message]) -> Claim:
        """Puts the history into a claim's context, from the cache if that is proved right."""
        context, run = claim.context, claim.run
        assert context is not None
        own = [message for message in context.messages if message.run_id == run.run_id]
        before = context.messages[0] if len(own) < len(context.messages) else None
        history: Sequence[Message]
        hit = False
        if before is None:
            history = ()
        elif cached and (cached[-1].ordinal, cached[-1].message_id) == (before.ordinal, before.message_id):
            metrics.cached_contexts.labels("hit").inc()
            history, hit = cached, True
            if run.attempt == 1:
                self._write(run.session_id, self._cache.extend(before, own))
        else:
            metrics.cached_contexts.labels("miss").inc()
            # The run's lease is held, so nobody else changes what precedes it.
            history = await self._store.history(run.tenant_id, run.session_id, before.ordinal)
        history = within_limits(history)
        if context.next is not None:
            # More than one page is more than is worth its place; the next run begins it anew.
            self._write(run.session_id, self._cache.replace(run.session_id, ()))
        elif before is None or not hit or run.attempt > 1:
            self._write(run.session_id, self._cache.replace(run.session_id, [*history, *own]))
        omitted = before.ordinal - len(history) if before is not None else 0
        return replace(claim, context=replace(context, messages=[*history, *own], omitted_messages=omitted))

    def _write(self, session_id: UUID, writing: Coroutine[Any, Any, None]) -> None:
        if self._writes >= _MAX_WRITES or self._cache.refuses(session_id):
            writing.close()
            return
        self._writes += 1
        self._tasks.start(self._finish(writing), name="cache")

    async def _finish(self, writing: Coroutine[Any, Any, None]) -> None:
        try:
            await writing
        except HermeshError as error:
            _log.debug("the conversation cache was not written", error=str(error))
        finally:
            self._writes -= 1


def within_limits(messages: Sequence[Message]) -> Sequence[Message]:
    """Returns what a context holds of what precedes a run: the newest within both limits."""
    first = len(messages)
    size = 0
    for message in reversed(messages[-MAX_CONTEXT_MESSAGES:]):
        size += size_of(message)
        if size > MAX_CONTEXT_BYTES:
            break
        first -= 1
    return messages[first:]


def size_of(message: Message | NewMessage) -> int:
    """Returns how many bytes a message's text has, as the limit on a context counts them."""
    return len(message.content.encode()) + len(message.tool_calls.encode())
