"""One Envoy a module, and replicas a test."""

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack

import pytest

from tests.integration.launcher.envoy_kit import SERVING, Replica, Running, serving_envoy


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    """An Envoy, without any endpoints at first."""
    with serving_envoy() as found:
        yield found


@pytest.fixture
async def replicas() -> AsyncIterator[list[Replica]]:
    async with AsyncExitStack() as stack:
        found = [Replica(name) for name in ("a", "b", "c")]
        for replica in found:
            await replica.health.set("", SERVING)
            await replica.server.start()
            stack.push_async_callback(replica.server.stop, 0)
        yield found
