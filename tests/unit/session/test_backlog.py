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
    await backlog.check(flood, "")
    store.queued_runs = {flood: 800}
    await backlog.look()
    with pytest.raises(ResourceExhaustedError) as caught:
        await backlog.check(flood, "")
    assert caught.value.reason == "OVERLOADED"
    assert caught.value.retry_after_ms
    await backlog.check(polite, "")


async def test_what_was_queued_since_the_last_look_counts() -> None:
    tenant = uuid7()
    backlog = Backlog(FakeStore(), 4)
    for _ in range(4):
        await backlog.check(tenant, "")
        backlog.added(tenant)
    with pytest.raises(ResourceExhaustedError):
        await backlog.check(tenant, "")
    await backlog.look()
    await backlog.check(tenant, "")


async def test_what_was_accepted_before_is_not_refused() -> None:
    store, tenant = FakeStore(), uuid7()
    backlog = Backlog(store, 0)
    store.requests[tenant, "known"] = (b"", uuid7())
    await backlog.check(tenant, "known")
    for stranger, key in ((tenant, "new"), (tenant, ""), (uuid7(), "known")):
        with pytest.raises(ResourceExhaustedError):
            await backlog.check(stranger, key)
