from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from meshkit.tasks import TaskOwner
from tests.unit.agent.fakes import Bench


@pytest.fixture
async def make_bench() -> AsyncIterator[Callable[..., Bench]]:
    """Makes supervisors on fakes; their tasks end with the test."""
    async with TaskOwner("background") as background, TaskOwner("runs") as runs:

        def make(model: Any, **settings: Any) -> Bench:
            return Bench(model, runs, background, **settings)

        yield make
