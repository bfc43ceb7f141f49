"""The time limit of one model turn, beside those of its first byte and of its silences."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.agent.model.errors import ModelTimeoutError


@asynccontextmanager
async def turn_limit(seconds: float) -> AsyncIterator[None]:
    """Bound a model turn: one that takes longer is a turn that broke off.

    Raises:
        ModelTimeoutError: the block took longer than `seconds`.
    """
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise ModelTimeoutError(f"the model's turn took longer than {seconds:g} seconds") from None
