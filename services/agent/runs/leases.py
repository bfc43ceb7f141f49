"""Keeps the leases of this replica's runs: one renewal for all of them, each third of their time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog

from meshkit.errors import HermeshError
from services.agent.runs.writer import Attachment, RunWriter, WriterStopped

_log = structlog.get_logger("agent.leases")

DEFAULT_TTL = 10.0
MIN_INTERVAL = 0.2


@dataclass(frozen=True, slots=True)
class Renewal:
    """What a renewal came to; `ttl` in seconds from when it was asked for, `busy` to be asked for again."""

    lost: Sequence[str]
    cancelled: Sequence[str]
    ttl: float
    busy: Sequence[str] = ()


class LeasePort(Protocol):
    """The part of the session service that leases need."""

    async def renew(self, leases: Sequence[tuple[str, str, int]], timeout: float) -> Renewal:
        """Renew leases, each (session id, run id, fence)."""
        ...


class LeaseKeeper:
    """Renews in the background; `run` is its one task.

    Args:
        port: where to renew.
        writers: the writers whose leases are held now.
        on_cancel: told about runs that somebody asked to cancel.
        monotonic: the clock of leases.
    """

    def __init__(
        self,
        port: LeasePort,
        writers: Callable[[], Iterable[RunWriter]],
        on_cancel: Callable[[str], None],
        monotonic: Callable[[], float],
    ) -> None:
        self._port = port
        self._writers = writers
        self._on_cancel = on_cancel
        self._monotonic = monotonic
        self.ttl = DEFAULT_TTL
        # Runs whose lease could not be renewed, because something had it locked: asked for again soon.
        self._busy: set[str] = set()

    async def run(self) -> None:
        """Renew until cancelled."""
        while True:
            due = self._monotonic() + max(MIN_INTERVAL, self.ttl / 3)
            while (left := due - self._monotonic()) > 0:
                await asyncio.sleep(min(left, MIN_INTERVAL) if self._busy else left)
                if self._busy:
                    await self.renew_once(self._busy)
            await self.renew_once()

    async def renew_once(self, only: Collection[str] | None = None) -> None:
        """Renew all leases now, or only some; a renewal that fails is only logged, as the next one may do."""
        self._busy = set()
        writers = {
            writer.run_id: writer
            for writer in self._writers()
            if not writer.stopped and (only is None or writer.run_id in only)
        }
        if not writers:
            return
        asked_at = self._monotonic()
        fences = {run_id: writer.fence for run_id, writer in writers.items()}
        leases = [(writer.session_id, run_id, fences[run_id]) for run_id, writer in writers.items()]
        try:
            renewal = await self._port.renew(leases, timeout=max(MIN_INTERVAL, self.ttl / 3))
        except HermeshError as error:
            _log.warning("leases were not renewed", runs=len(leases), reason=error.reason)
            return
        self.ttl = renewal.ttl or self.ttl
        lost = set(renewal.lost)
        self._busy = set(renewal.busy)
        for run_id, writer in writers.items():
            if writer.fence != fences[run_id]:
                continue  # attached anew in the meantime: this answer is about the fence before
            if run_id in lost:
                # While it is not attached the answer to its re-attach is what counts.
                if writer.attachment is not Attachment.DETACHED:
                    writer.stop(WriterStopped("lost"))
            elif run_id not in self._busy:
                writer.lease_until = max(writer.lease_until, asked_at + self.ttl)
        for run_id in renewal.cancelled:
            self._on_cancel(run_id)
