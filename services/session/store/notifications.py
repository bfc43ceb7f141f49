"""What other replicas commit, told by PostgreSQL's NOTIFY over a connection of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Self

import asyncpg
import structlog

from meshkit.hosts import CONNECT_TIMEOUT, Connection, Hosts
from meshkit.ids import uuid7
from meshkit.pooler import is_pooled
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
# A notice that is sent to see whether any arrives gets this long; after one that did not, the next try waits.
_ECHO_SECONDS = 2.0
_DEAF_SECONDS = 60.0
DEAF = (
    "no notice of PostgreSQL comes through the pooler, so that cancelling and starting runs takes longer; "
    "name a way past it in HERMESH_DATABASE_DIRECT_URL"
)


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
        self._hosts = Hosts(url)
        self._channels = tuple(channels)
        self._name = name
        self._queue: asyncio.Queue[tuple[str, str]] = asyncio.Queue(_MAX_QUEUED)
        self._overflow = False
        self._task: asyncio.Task[None] | None = None
        self._listening = asyncio.Event()
        self._deaf = False

    async def problem(self) -> str | None:
        """Returns why notices never arrive; None while they do, or while a connection is looked for."""
        return DEAF if self._deaf else None

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
                connection = await self._connect()
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
            if self._deaf:
                await asyncio.sleep(_DEAF_SECONDS)
            else:
                await backoff.sleep()

    async def _connect(self) -> Connection:
        return await self._hosts.connect(
            command_timeout=CONNECT_TIMEOUT,
            # A pooler may be between: no statement has a name.
            statement_cache_size=0,
            server_settings={"application_name": self._name},
        )

    async def _hears(self, connection: Connection) -> bool:
        """Whether this connection is told what another one notifies; one that is lent out is not."""
        heard = asyncio.Event()
        channel = f"hermesh_echo_{uuid7().hex}"
        await connection.add_listener(channel, lambda *_: heard.set())
        other = await self._connect()
        try:
            await other.execute("SELECT pg_notify($1, '')", channel)
            async with asyncio.timeout(_ECHO_SECONDS):
                await heard.wait()
        except TimeoutError:
            return False
        finally:
            other.terminate()
        return True

    async def _listen(self, connection: Connection, backoff: Backoff) -> None:
        """Listens until the connection breaks, or turns out to hear nothing."""
        pooled = await is_pooled(connection)
        self._deaf = pooled and not await self._hears(connection)
        if self._deaf:
            _log.warning(DEAF)
            return
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
