"""One thing for each shard of Redis, and which of them is a session's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar
from uuid import UUID

T = TypeVar("T")


class Shards(Generic[T]):
    """What there is once for each shard; without a cluster there is one shard.

    All replicas must come to the same answer: a session's shard follows from its id and their number alone.
    """

    def __init__(self, items: Sequence[T]) -> None:
        """Takes one of each shard, in their order."""
        self._items = tuple(items)

    def of(self, session_id: UUID) -> T:
        """Returns the one of a session's shard."""
        # The last digits of an id are random.
        return self._items[session_id.int % len(self._items)]

    def __iter__(self) -> Iterator[T]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)
