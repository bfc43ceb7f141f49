"""Those who only read: a session's events, run after run, by a way of their own and cut now and then."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing
from itertools import count

from tests.chaos.model.history import Recorder, digest
from tests.chaos.traffic.clients import TERMINAL
from tests.chaos.traffic.transport import Broken, Event, Malformed, Reconnect, Refused, SessionTransport
from tests.chaos.traffic.work import CUT


class Watcher:
    """Follows one session until it is cancelled; each run's part of a stream is a stream in the history."""

    def __init__(
        self, name: str, session: str, transport: SessionTransport, rng: random.Random, recorder: Recorder
    ) -> None:
        self.name = name
        self._session = session
        self._transport = transport
        self._rng = rng
        self._recorder = recorder
        self._streams = count(1)
        self._stream = ""
        self._run = ""
        self._seq = 0
        self._over = True

    async def watch(self) -> None:
        """Watches until cancelled."""
        try:
            while True:
                reason = "broken"
                try:
                    reason = await self._once()
                except asyncio.CancelledError:
                    reason = "cut"
                    raise
                except Malformed as malformed:
                    self._error(str(malformed))
                except Refused as refused:
                    if not refused.retryable:
                        self._error(str(refused))
                        return
                except Broken:
                    pass
                finally:
                    self._close(reason)
                await asyncio.sleep(self._rng.uniform(0.02, 0.3))
        finally:
            await self._transport.close()

    async def _once(self) -> str:
        """Reads one stream as long as it lasts, or until it is cut; returns how it ended."""
        cut_after = self._rng.randint(3, 60) if self._rng.random() < CUT else 0
        cursor = f"{self._run}:{self._seq}" if self._run else ""
        reason = "broken"
        async with aclosing(self._transport.watch_session(self._session, cursor)) as items:  # type: ignore[type-var]
            async for item in items:
                if isinstance(item, Reconnect):
                    reason = "reconnect"
                    continue
                self._take(item)
                cut_after -= 1
                if not cut_after:
                    return "cut"
        return reason

    def _take(self, event: Event) -> None:
        if event.run != self._run:
            if not self._over:
                self._error(f"run {event.run} came before the end of {self._run}")
            self._run, self._over = event.run, False
            self._open(event.run, 0)
        elif not self._stream:
            self._open(event.run, self._seq)
        self._seq = event.seq
        self._recorder.write(
            "event",
            client=self.name,
            stream=self._stream,
            run=event.run,
            seq=event.seq,
            type=event.type,
            digest=digest(event.text),
        )
        if event.type in TERMINAL:
            self._over = True
            self._close("terminal")

    def _open(self, run: str, after: int) -> None:
        self._stream = f"{self.name}-s{next(self._streams)}"
        self._recorder.write(
            "open",
            client=self.name,
            stream=self._stream,
            via=self._transport.via,
            session=self._session,
            run=run,
            after=after,
        )

    def _close(self, reason: str) -> None:
        if self._stream:
            self._recorder.write("closed", client=self.name, stream=self._stream, reason=reason)
            self._stream = ""

    def _error(self, detail: str) -> None:
        self._recorder.write("error", client=self.name, where="session", detail=detail)
