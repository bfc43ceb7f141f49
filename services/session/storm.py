"""Tells a dead agent from a broken network: by how many agent streams end together, and by our own link."""

import asyncio
import time
from collections import deque
from collections.abc import Callable

import grpc
import grpc.aio

GRACE_MS = 500
STORM_GRACE_MS = 3000
_WINDOW_S = 1.0
_SHARE = 0.2
_AT_LEAST = 2


class StormGuard:
    """Counts broken agent streams.

    One stream that breaks is an agent that died: its runs should move soon. Many that break within a second
    are Envoy or the network: the agents live, will be back at once, and their runs must not move.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Makes a guard that has seen nothing; `clock` counts seconds."""
        self._clock = clock
        self._breaks: deque[float] = deque()

    def broke(self) -> None:
        """Records that a stream which held runs broke."""
        self._breaks.append(self._clock())

    def grace_ms(self, still_open: int) -> int:
        """Returns what is left to the leases of broken streams, with `still_open` others left.

        It is a storm if more than max(2, 20 %) of the streams broke within the last second, or all of
        several.
        """
        oldest = self._clock() - _WINDOW_S
        while self._breaks and self._breaks[0] < oldest:
            self._breaks.popleft()
        broken = len(self._breaks)
        if broken > max(_AT_LEAST, _SHARE * (still_open + broken)):
            return STORM_GRACE_MS
        if broken >= _AT_LEAST and still_open == 0:
            return STORM_GRACE_MS
        return GRACE_MS


class MeshLink:
    """Our own connection to Envoy's mesh listener: if it is gone, the agents' streams went with it."""

    def __init__(self, channel: grpc.aio.Channel, *, check_seconds: float = 1.0) -> None:
        """Makes a link over the replica's channel; `keep` holds it connected."""
        self._channel = channel
        self._check_seconds = check_seconds

    @property
    def up(self) -> bool:
        """Whether Envoy can be reached at this moment."""
        return self._channel.get_state() is grpc.ChannelConnectivity.READY

    async def keep(self) -> None:
        """Connects again whenever the connection is idle or lost, until cancelled."""
        while True:
            self._channel.get_state(try_to_connect=True)
            await asyncio.sleep(self._check_seconds)
