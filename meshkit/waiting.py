"""Waiting for what a process cannot begin without."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog

from meshkit.errors import StoreAwayError
from meshkit.probes import ProbeServer
from meshkit.settings import MeshSettings
from meshkit.tasks import Backoff
from meshkit.telemetry import setup_logging

_log = structlog.get_logger("meshkit.waiting")

_FIRST_SECONDS = 0.5
_MOST_SECONDS = 5.0

T = TypeVar("T")


async def once_there(settings: MeshSettings, service: str, opening: Callable[[], Awaitable[T]]) -> T:
    """Opens a store, and tries again for as long as it is away: a store that starts later is no error.

    Meanwhile /health says that the process lives, and /ready why it does not serve. There is no limit: who
    started the process has one, or none.

    Raises:
        StartupError: What waiting does not help.
    """
    try:
        return await opening()
    except StoreAwayError as error:
        away = error
    setup_logging(settings, service)
    backoff = Backoff(_FIRST_SECONDS, _MOST_SECONDS)
    said = ""
    async with ProbeServer(settings.metrics_listen) as probes:
        while True:
            probes.set_ready(str(away))
            if str(away) != said:
                said = str(away)
                _log.warning("waiting to begin", reason=said)
            await backoff.sleep()
            try:
                opened = await opening()
            except StoreAwayError as error:
                away = error
            else:
                _log.info("what was waited for is there")
                return opened
