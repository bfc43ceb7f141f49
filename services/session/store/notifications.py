"""What other replicas commit, told by PostgreSQL's NOTIFY over a connection of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Self, TypeAlias

import asyncpg
import structlog

from meshkit.postgres import CONNECT_TIMEOUT
from meshkit.tasks import Backoff

_log = structlog.get_logger("session.notifications")

# A run waits for an agent; the payload is its session.
DUE = "hermesh_due"
# Somebody asked to cancel a run that an agent holds; the payload is the run.
CANCEL = "hermesh_cancel"
# The store itself wrote to a run's log; the payload is the run.
LOG = "hermesh_log"
CHANNELS = (DUE, CANCEL, LOG)

_MAX_QUEUED = 4096
# A peer that went away without a word is noticed after this.
_PROBE_SECONDS = 10.0

Driver: TypeAlias = "asyncpg.Connection[asyncpg.Record]"


class Notifications:
    """Listens as long as it is open, and connects again by itself.

    Iterate it for pairs of channel and payload. Notices may be lost (PostgreSQL keeps none for a listener
    that is away): after every connect, and when too many are queued, there is one of DUE with an empty
    payload, which says to look at everything. A lost CANCEL is told by the next renewal of the run's lease,
    a lost LOG by the next look at the run.

        async with Notifications(url) as notifications:
            async for channel, payload in notifications:
                ...
    """

    def __init__(self, url: str, channels: Sequence[str] = CHANNELS, *, name: str = "hermesh-listen") -> None:
        """Makes a closed listener.

        Args:
            url: The database.
            channels: What to listen to.
            name: `application_name`, as pg_stat_activity shows it.
        """
        self._url = url
        self._channels = tuple(channels)
        self._name = name
        self._queue: asyncio.Queue[tuple[str, str]] = asyncio.Queue(_MAX_QUEUED)
        self._overflow = False
        self._task: asyncio.Task[None] | None = None
        self._listening = asyncio.Event()

    @property
    def listening(self) -> bool:
        """True while notices arrive."""
        return self._listening.is_set()

    @property
    def overflowed(self) -> bool:
        """True once notices were dropped, until the next one is taken."""
        return self._overflow

    async def wait_listening(self) -> None:
        """Returns once notices arrive; the caller sets the deadline."""
        await self._listening.wait()

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="notifications")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait([self._task], timeout=CONNECT_TIMEOUT)

    def __aiter__(self) -> AsyncIterator[tuple[str, str]]:
        return self

    async def __anext__(self) -> tuple[str, str]:
        if self._overflow:
            self._overflow = False
            while not self._queue.empty():
                self._queue.get_nowait()
            self._anything()
        return await self._queue.get()

    async def _run(self) -> None:
        backoff = Backoff(first=0.1, limit=5.0)
        while True:
            try:
                connection = await asyncpg.connect(
                    self._url,
                    timeout=CONNECT_TIMEOUT,
                    command_timeout=CONNECT_TIMEOUT,
                    server_settings={"application_name": self._name},
                )
                try:
                    await self._listen(connection, backoff)
                finally:
                    self._listening.clear()
                    # Not close(): it would wait for a server that may be gone.
                    connection.terminate()
            except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as error:
                _log.warning("not listening to PostgreSQL; trying again", error=type(error).__name__)
            except Exception as error:
                # A bug must not end the listening for good: without it every run waits for the next sweep.
                _log.error("listening to PostgreSQL failed by a bug; trying again", exc_info=error)
            await backoff.sleep()

    async def _listen(self, connection: Driver, backoff: Backoff) -> None:
        """Listens until the connection breaks."""
        closed = asyncio.Event()
        connection.add_termination_listener(lambda _: closed.set())
        for channel in self._channels:
            await connection.add_listener(channel, self._take)
        self._anything()
        self._listening.set()
        backoff.reset()
        while not closed.is_set():
            try:
                async with asyncio.timeout(_PROBE_SECONDS):
                    await closed.wait()
            except TimeoutError:
                await connection.fetchval("SELECT 1")

    def _anything(self) -> None:
        if DUE in self._channels:
            self._put(DUE, "")

    def _take(self, _connection: object, _pid: int, channel: str, payload: str) -> None:
        self._put(channel, payload)

    def _put(self, channel: str, payload: str) -> None:
        try:
            self._queue.put_nowait((channel, payload))
        except asyncio.QueueFull:
            self._overflow = True
