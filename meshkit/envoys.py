"""Envoys that are about to stop: the streams that came by them are told to come back by another one.

An Envoy tells streams that are open nothing, and cuts them when it ends. So whoever stops one fails its
health first (deploy/envoy/serve.sh), and who serves streams looks at the Envoys that they came by.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

import structlog

from meshkit.probes import status_of

_log = structlog.get_logger("meshkit.envoys")

_LOOK_SECONDS = 1.0
_ANSWER_SECONDS = 1.0
# Whoever reaches us is an Envoy or a balancer; there are few of them.
_MAX_ENVOYS = 64


class Streams(Protocol):
    """The streams of a process."""

    def peers(self) -> set[str]:
        """Returns the addresses that streams came by."""
        ...

    def drain_from(self, peer: str) -> int:
        """Ends those that came by an address, with `reconnect`; returns how many."""
        ...


class Envoys:
    """Looks at the Envoys that streams came by."""

    def __init__(
        self,
        streams: Streams,
        port: int,
        delay: float,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepares to look.

        Args:
            streams: Whose.
            port: Where an Envoy answers `GET /ready`: 503 once it is about to stop.
            delay: Seconds after that in which whatever stands before it notices, too; clients would come
                back by the same one.
            monotonic: A clock, seconds.
        """
        self._streams = streams
        self._port = port
        self._delay = delay
        self._monotonic = monotonic
        self._since: dict[str, float] = {}

    async def watch(self) -> None:
        """Looks again and again, until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(_LOOK_SECONDS)

    async def look(self) -> None:
        """Looks at each once, and ends the streams of those that have been about to stop for long enough."""
        peers = sorted(self._streams.peers())[:_MAX_ENVOYS]
        found = await asyncio.gather(*(self._ready(peer) for peer in peers))
        now = self._monotonic()
        # One that does not answer is no Envoy, or gone, and its streams with it.
        self._since = {
            peer: self._since.get(peer, now)
            for peer, status in zip(peers, found, strict=True)
            if status == 503
        }
        for peer, since in self._since.items():
            if now - since >= self._delay and (ended := self._streams.drain_from(peer)):
                _log.info("an Envoy is about to stop; its streams are moved", envoy=peer, streams=ended)

    async def _ready(self, peer: str) -> int | None:
        return await status_of(peer, self._port, "/ready", _ANSWER_SECONDS)
