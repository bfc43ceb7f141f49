"""A commit whose wait for a standby somebody cancelled is no success."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import asyncpg
import pytest

from meshkit.commit_watch import CommitWatch
from meshkit.errors import UnavailableError

CANCELLED, OTHER = "01000", "01003"


class FakeConnection:
    """Has listeners, as asyncpg's has; `broken`: it has left its pool."""

    def __init__(self) -> None:
        self.listeners: list[Callable[[Any, Any], None]] = []
        self.broken = False

    def add_log_listener(self, listener: Callable[[Any, Any], None]) -> None:
        self.listeners.append(listener)

    def remove_log_listener(self, listener: Callable[[Any, Any], None]) -> None:
        if self.broken:
            raise asyncpg.InterfaceError("connection has been released back to the pool")
        self.listeners.remove(listener)

    def warn(self, sqlstate: str) -> None:
        for listener in self.listeners:
            listener(self, SimpleNamespace(sqlstate=sqlstate))


def test_what_the_standby_has_is_a_success_whatever_else_is_warned_of() -> None:
    connection = FakeConnection()
    with CommitWatch(connection):
        connection.warn(OTHER)
    assert connection.listeners == []


def test_a_wait_that_was_cancelled_is_called_unknown() -> None:
    connection = FakeConnection()
    with pytest.raises(UnavailableError) as raised, CommitWatch(connection):
        connection.warn(CANCELLED)
    assert raised.value.reason == "OUTCOME_UNKNOWN"
    assert connection.listeners == []


def test_the_next_use_of_a_connection_knows_nothing_of_the_last_ones_warning() -> None:
    connection = FakeConnection()
    with pytest.raises(UnavailableError), CommitWatch(connection):
        connection.warn(CANCELLED)
    with CommitWatch(connection):
        pass


def test_what_a_block_raises_is_told_also_where_the_connection_broke() -> None:
    connection = FakeConnection()

    def use() -> None:
        with CommitWatch(connection):
            connection.warn(CANCELLED)
            connection.broken = True
            raise asyncpg.ConnectionDoesNotExistError

    with pytest.raises(asyncpg.ConnectionDoesNotExistError):
        use()
