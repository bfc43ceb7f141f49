"""What the log says of requests that were refused."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any
from uuid import UUID, uuid4

import pytest
from structlog.testing import capture_logs

from gateway.refusals import Refusals
from meshkit.identity import Identity, use_identity

FLOOD, POLITE = uuid4(), uuid4()


@pytest.fixture
def lines() -> Iterator[list[Any]]:
    with capture_logs() as captured:
        yield captured


def refuse(refusals: Refusals, tenant_id: UUID | None, times: int, route: str = "/runs") -> None:
    with use_identity(Identity(tenant_id, mesh=False)):
        for _ in range(times):
            refusals.add(route)


def test_a_line_counts_what_was_refused_and_names_whose_most_was(lines: list[Any]) -> None:
    refusals = Refusals()
    refuse(refusals, POLITE, 1)
    refuse(refusals, FLOOD, 400)
    refuse(refusals, None, 2, "/chat")
    refusals.say()
    assert lines == [
        {
            "event": "requests refused",
            "log_level": "info",
            "path": path,
            "status": 429,
            "count": count,
            "tenants": tenants,
            "most_of": str(whose),
            "most": most,
        }
        for path, count, tenants, whose, most in (
            ("/runs", 401, 2, FLOOD, 400),
            ("/chat", 2, 1, None, 2),
        )
    ]
    refusals.say()
    assert len(lines) == 2


async def test_what_is_not_yet_said_is_said_at_the_end(
    lines: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals = Refusals()
    monkeypatch.setattr("gateway.refusals.PERIOD_S", 0.01)
    reporting = asyncio.create_task(refusals.report())
    refuse(refusals, FLOOD, 3)
    async with asyncio.timeout(5):
        while not lines:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    refuse(refusals, FLOOD, 2)
    reporting.cancel()
    await asyncio.gather(reporting, return_exceptions=True)
    assert [line["count"] for line in lines] == [3, 2]
