"""Clients that delete their sessions in the middle of what they do, and look whether anything comes back."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from contextlib import aclosing, suppress
from itertools import count

from tests.chaos.model.history import Recorder
from tests.chaos.traffic.clients import TERMINAL
from tests.chaos.traffic.transport import Broken, Event, Malformed, Refused, Transport
from tests.chaos.traffic.work import draw

FOUND = "found"
STILL_OPEN = "still open"
# A reader of what was deleted is told within so many seconds, whatever else is broken at the time.
_READER_SECONDS = 40.0
_UNDER_WAY = "CALLS_UNDER_WAY"
_TRIES = 200
# What share of sessions is in the middle of a call.
_CALLING = 0.6
_FIRST_PAUSE, _MAX_PAUSE = 0.05, 1.0


def _slow_call(rng: random.Random) -> str:
    """A call that is likely to be under way when its session is deleted."""
    arguments = {"before": round(rng.uniform(0.2, 1.5), 2)}
    return f"tool={rng.choice(['charge', 'reserve'])} {json.dumps(arguments)}"


class Leaver:
    """Session after session: input, a reader, a deletion somewhere in between, and questions afterwards.

    What it is answered goes into the history as `delete`, `deleted` and `after`; none of its sessions is in
    the records of other clients.
    """

    def __init__(
        self,
        name: str,
        transport: Transport,
        rng: random.Random,
        recorder: Recorder,
        stopping: asyncio.Event,
        on_deleted: Callable[[str, str], None],
    ) -> None:
        self.name = name
        self._transport = transport
        self._rng = rng
        self._recorder = recorder
        self._stopping = stopping
        self._on_deleted = on_deleted

    async def run(self) -> None:
        """Works until told to stop; what was begun is ended."""
        try:
            for number in count(1):
                if self._stopping.is_set():
                    return
                await self._one(f"{self.name}-{number}")
        finally:
            await self._transport.close()

    def _write(self, kind: str, **fields: object) -> None:
        self._recorder.write(kind, client=self.name, **fields)

    async def _one(self, key: str) -> None:
        session = await self._insist(lambda: self._transport.create_session(f"{key}-session"))
        text = (
            f"{key} [[{_slow_call(self._rng)}]]"
            if self._rng.random() < _CALLING
            else draw(self._rng, key).text
        )
        run = await self._insist(lambda: self._transport.submit(session, text, key, "enqueue"))
        if not session or not run:
            return
        async with asyncio.TaskGroup() as group:
            reading = group.create_task(self._read(run))
            # In the queue, before the first word, in the middle of a call, or when it is over.
            await asyncio.sleep(self._rng.uniform(0, 1.2))
            self._write("delete", session=session, run=run)
            await self._delete(session)
            self._on_deleted(session, run)
            self._write("deleted", session=session, run=run)
            for what, ask in (
                ("session", lambda: self._transport.get_session(session)),
                ("input", lambda: self._transport.submit(session, text, f"{key}-late", "enqueue")),
                ("run", lambda: self._watched(run)),
            ):
                self._after(session, run, what, await self._insist(ask) or FOUND)
            with suppress(TimeoutError):
                async with asyncio.timeout(_READER_SECONDS):
                    await asyncio.wait({reading})
            if not reading.done():
                reading.cancel()
                self._after(session, run, "reader", STILL_OPEN)

    async def _delete(self, session: str) -> None:
        """Deletes a session; one whose calls still act is deleted again."""
        for _ in range(_TRIES):
            if await self._insist(lambda: self._transport.delete_session(session)) != _UNDER_WAY:
                return
            await asyncio.sleep(self._rng.uniform(0.2, 1))
        raise RuntimeError(f"{self.name} could not delete session {session}")

    def _after(self, session: str, run: str, what: str, answer: str) -> None:
        self._write("after", session=session, run=run, what=what, answer=answer)

    async def _insist(self, call: Callable[[], Awaitable[str]]) -> str:
        """Makes a call until it is answered, and returns the answer: the reason if it is a no for good."""
        for tries in range(_TRIES):
            try:
                return await call()
            except Refused as refused:
                if not refused.retryable:
                    return refused.reason
            except Malformed as malformed:
                self._write("error", where="delete", detail=str(malformed))
            except Broken:
                pass
            bound = min(_MAX_PAUSE, _FIRST_PAUSE * 2**tries)
            await asyncio.sleep(self._rng.uniform(bound / 2, bound))
        raise RuntimeError(f"{self.name} was not answered in {_TRIES} tries")

    async def _watched(self, run: str) -> str:
        """Asks for a run's events; raises what that is refused with."""
        async with aclosing(self._transport.watch(run, 0)) as items:  # type: ignore[type-var]
            async for item in items:
                if isinstance(item, Event):
                    return FOUND
        raise Broken("a stream without an event")

    async def _read(self, run: str) -> None:
        """Reads as long as there is something to read."""
        last = 0
        while True:
            try:
                async with aclosing(self._transport.watch(run, last)) as items:  # type: ignore[type-var]
                    async for item in items:
                        if isinstance(item, Event):
                            last = item.seq
                            if item.type in TERMINAL:
                                return
            except Refused as refused:
                if not refused.retryable:
                    return
            except Malformed as malformed:
                self._write("error", where="reader of a deleted run", detail=str(malformed))
                return
            except Broken:
                pass
            await asyncio.sleep(self._rng.uniform(0.05, 0.3))
