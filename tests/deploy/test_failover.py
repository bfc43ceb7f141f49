"""The primary dies under load, and its synchronous standby takes its place."""

from __future__ import annotations

import asyncio

import pytest

from tests.chaos.drills import failover


@pytest.mark.deploy_long
@pytest.mark.timeout(400)
def test_a_failover_loses_and_doubles_no_acknowledged_input() -> None:
    report = asyncio.run(failover.drill(streams=10, count=1))
    assert report.show(), report.broken


@pytest.mark.deploy_long
@pytest.mark.timeout(1800)
def test_twenty_failovers_under_fifty_streams_lose_and_double_nothing() -> None:
    report = asyncio.run(failover.drill(streams=50, count=20))
    assert report.show(), report.broken
