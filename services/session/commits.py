"""What follows a commit, whoever made it: watchers here, Redis for watchers elsewhere, the dispatcher."""

from collections.abc import Callable
from typing import Protocol
from uuid import UUID

from services.session.domain import Event, Run, RunAppend, RunStatus, Submitted
from services.session.store.cached import CachedContexts
from services.session.tail import Tail


class Publisher(Protocol):
    """Takes committed events for watchers on other replicas; never blocks, and may lose them."""

    def offer(self, append: RunAppend) -> None:
        """Takes a committed append."""
        ...

    def offer_event(self, run: Run, event: Event) -> None:
        """Takes an event that was committed without a lease."""
        ...


class Commits:
    """Tells everyone concerned; PostgreSQL has the truth before any of these methods is called."""

    def __init__(
        self,
        tail: Tail,
        publisher: Publisher | None,
        contexts: CachedContexts | None,
        dispatch: Callable[[], None],
    ) -> None:
        """Makes the place that commits are reported to.

        Args:
            tail: The watchers of this replica.
            publisher: The way to those of other replicas, if there is Redis.
            contexts: The cache of conversations, if there is Redis.
            dispatch: Wakes the dispatcher.
        """
        self._tail = tail
        self._publisher = publisher
        self._contexts = contexts
        self._dispatch = dispatch

    def appended(self, append: RunAppend) -> None:
        """An append was committed."""
        self._tail.deliver(append.run_id, append.first_seq, append.events)
        if self._publisher is not None and append.events:
            self._publisher.offer(append)
        if self._contexts is not None and append.commit is not None:
            self._contexts.committed(append)

    def submitted(self, submitted: Submitted) -> None:
        """Input was accepted."""
        run = submitted.run
        if submitted.duplicate:
            return
        self._tail.announce(run.session_id, run.ordinal)
        if run.status is RunStatus.QUEUED:
            self._dispatch()

    def deleted(self, session_id: UUID) -> None:
        """A session was deleted; what Redis has of its events ends by itself, soon."""
        if self._contexts is not None:
            self._contexts.forget(session_id)

    def cancelled(self, run: Run, event: Event | None) -> None:
        """A cancel was asked for; `event` is the terminal one if nobody held the run."""
        if event is None:
            return
        self._tail.deliver_events(run.run_id, [event])
        if self._publisher is not None:
            self._publisher.offer_event(run, event)
        self._dispatch()

    def changed(self, run: Run) -> None:
        """A run changed in a way that only PostgreSQL tells."""
        self._tail.nudge(run.run_id)
        self._dispatch()
