from __future__ import annotations

import asyncio
import time

import pytest

from meshkit.redis import Breaker, BreakerOpenError
from meshkit.redis_servers import REDIS_ERRORS
from tests.conftest import ValkeyServer
from tests.valkeys import client_of


async def test_a_client_works_and_survives_a_restart(valkey: ValkeyServer) -> None:
    client = client_of(valkey.url)
    await client.set("k", b"v")
    assert await client.get("k") == b"v"
    valkey.kill()
    with pytest.raises(REDIS_ERRORS):
        await client.get("k")
    await asyncio.to_thread(valkey.start)
    assert await client.get("k") is None
    await client.aclose()


async def test_a_dead_redis_costs_nothing_behind_the_breaker(valkey: ValkeyServer) -> None:
    client = client_of(valkey.url)
    breaker = Breaker(open_seconds=60)
    assert await breaker.run(lambda: client.set("k", b"v"))
    valkey.kill()
    for _ in range(3):
        with pytest.raises(REDIS_ERRORS):
            await breaker.run(lambda: client.get("k"))
    began = time.perf_counter()
    for _ in range(100):
        with pytest.raises(BreakerOpenError):
            await breaker.run(lambda: client.get("k"))
    assert time.perf_counter() - began < 0.1
    await client.aclose()
