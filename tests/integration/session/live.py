"""Replicas on some Redis, and how what is written on one comes to watchers on another."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from tests.integration.session.process import Client, SessionProcess, connect, environment
from tests.integration.session.test_faults import readiness
from tests.unit.session.calls import append_stream, events_until, new_writer, watch

Start = Callable[..., SessionProcess]


@contextmanager
def replicas_on(database: str) -> Iterator[Start]:
    """Starts replicas that end with the block; the database has its tenant."""
    replicas: list[SessionProcess] = []

    def begin(redis_url: str, **more: str) -> SessionProcess:
        values = environment(database, redis_url, **more)
        replica = SessionProcess(f"session-{len(replicas) + 1}", values)
        replicas.append(replica)
        return replica

    try:
        yield begin
    finally:
        for replica in replicas:
            replica.kill()
            shutil.rmtree(replica.folder, ignore_errors=True)


@asynccontextmanager
async def two(
    start: Start, url: str, **more: str
) -> AsyncIterator[tuple[Client, Client, list[SessionProcess]]]:
    replicas = [start(url, **more), start(url, **more)]
    for replica in replicas:
        await asyncio.to_thread(replica.wait_ready)
    async with connect(replicas[0]) as first, connect(replicas[1]) as second:
        yield first, second, replicas


async def problem(replica: SessionProcess, says: str | None) -> str:
    """What /ready says of Redis, once it says this, or with None nothing."""
    reason = ""
    async with asyncio.timeout(60):
        while True:
            status, checks = await asyncio.to_thread(readiness, replica)
            # It serves in any case.
            assert status == 200
            reason = checks["redis"]["reason"] or ""
            if not reason if says is None else says in reason:
                return str(reason)
            await asyncio.sleep(0.05)


def lines(replica: SessionProcess) -> list[dict[str, Any]]:
    """What the replica has logged from warnings on."""
    return [json.loads(line) for line in replica.log.read_text().splitlines() if line.startswith("{")]


async def shows(first: Client, second: Client, count: int = 20) -> list[float]:
    """Writes a run on one replica and watches it on the other: how late each event came, in seconds."""
    writer = await new_writer(first)
    delays = []
    async with append_stream(first) as stream, watch(second, writer.run_id) as watched:
        async with asyncio.timeout(30):
            assert [event.seq for event in await events_until(watched, writer.next_seq - 1)] == [1]
            for _ in range(count):
                began = time.monotonic()
                await stream.write(writer.append("text.delta"))
                seq = writer.next_seq - 1
                assert [event.seq for event in await events_until(watched, seq)] == [seq]
                delays.append(time.monotonic() - began)
    return sorted(delays)
