"""Clients of the public gRPC services beside those of HTTP: run after run, each read to its end."""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

from tests.chaos.drills.load import STUCK_SECONDS, TERMINAL, Script
from tests.chaos.traffic.transport import Broken, Event, Grpc, Item, Malformed, Refused

_PAUSE_SECONDS = 0.3
SCRIPTS = (Script(60, 10), Script(200, 10), Script(20, 10, tool=True))


@dataclass(slots=True)
class Called:
    """What they saw.

    Attributes:
        acknowledged: the input of each run whose first event came, or whose id was the answer.
        completed: how many runs were read to a good end.
        reconnects: how often they were asked to come back.
        errors: what else ended a call or a stream.
        wrong: gaps, duplicates, runs that ended otherwise.
    """

    acknowledged: list[str] = field(default_factory=list)
    completed: int = 0
    reconnects: int = 0
    errors: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    async def client(self, transport: Grpc, script: Script, stopping: asyncio.Event, *, apart: bool) -> None:
        """One client. With `apart` it submits and then watches, else it reads the run that it begins."""
        session = await transport.create_session(str(uuid.uuid4()))
        while not stopping.is_set():
            await self._run(transport, session, script, apart=apart)

    async def _run(self, transport: Grpc, session: str, script: Script, *, apart: bool) -> None:
        text, key = f"{script.text} {uuid.uuid4()}", str(uuid.uuid4())
        run, seq, since = "", 0, time.monotonic()
        while time.monotonic() - since < STUCK_SECONDS:
            try:
                if apart and not run:
                    run = await transport.submit(session, text, key, "enqueue")
                    self.acknowledged.append(text)
                stream: AsyncIterator[Item] = (
                    transport.watch(run, seq) if run else transport.run(session, text, key, "enqueue")
                )
                async with aclosing(stream) as items:  # type: ignore[type-var]
                    async for item in items:
                        if not isinstance(item, Event):
                            self.reconnects += 1
                            break
                        if not run:
                            run = item.run
                            self.acknowledged.append(text)
                        if (item.run, item.seq) != (run, seq + 1):
                            self.wrong.append(f"{run}: {item.run}:{item.seq} came after seq {seq}")
                        seq, since = item.seq, time.monotonic()
                        if item.type in TERMINAL:
                            self.completed += item.type == "run.completed"
                            if item.type != "run.completed":
                                self.wrong.append(f"{run}: {item.type} {item.text[:200]}")
                            return
                    else:
                        self.errors.append("a stream ended without a terminal event or a reconnect")
            except (Broken, Refused, Malformed) as error:
                self.errors.append(f"{type(error).__name__}: {error}{' (at work)' if run else ''}")
                await asyncio.sleep(_PAUSE_SECONDS)
        self.wrong.append(f"{run or 'a submission'}: stuck after seq {seq}")


@asynccontextmanager
async def callers(address: str, api_key: str, count: int) -> AsyncIterator[Called]:
    """Has `count` of them work inside the block, each on a connection of its own."""
    found, stopping = Called(), asyncio.Event()
    transports = [Grpc(address, api_key) for _ in range(count)]
    try:
        async with asyncio.TaskGroup() as group:
            for number, (transport, script) in enumerate(
                zip(transports, itertools.cycle(SCRIPTS), strict=False)
            ):
                group.create_task(found.client(transport, script, stopping, apart=number % 2 == 1))
            try:
                yield found
            finally:
                stopping.set()
    finally:
        for transport in transports:
            await transport.close()
