"""Input is refused while too much waits."""

from __future__ import annotations

import pytest

from meshkit.errors import ResourceExhaustedError
from meshkit.ids import uuid7
from services.session.backlog import Backlog
from tests.unit.session.fake_store import FakeStore


async def test_a_flood_is_refused_and_others_are_not() -> None:
    store = FakeStore()
    flood, polite = uuid7(), uuid7()
    backlog = Backlog(store, 900)
    backlog.check(flood)
    store.queued_runs = {flood: 800}
    await backlog.look()
    with pytest.raises(ResourceExhaustedError) as caught:
        backlog.check(flood)
    assert caught.value.reason == "OVERLOADED"
    assert caught.value.retry_after_ms
    backlog.check(polite)


async def test_what_was_queued_since_the_last_look_counts() -> None:
    tenant = uuid7()
    backlog = Backlog(FakeStore(), 4)
    for _ in range(4):
        backlog.check(tenant)
        backlog.added(tenant)
    with pytest.raises(ResourceExhaustedError):
        backlog.check(tenant)
    await backlog.look()
    backlog.check(tenant)
