"""An open load: requests go out at their times, whatever became of those before. A process of its own.

    python -m bench.open_loop JOB

JOB is JSON: `arrivals` is a list of [seconds from the beginning, name of a tenant]; `tenants` has, by name,
the requests {"url", "headers", "body"} of its sessions, each used by one request at a time; `out` is where
the records go; `silence_seconds` how long nothing may come. It speaks with its parent as `bench.generator`
does, and writes `OUT.json`: a record for each arrival, in order, with times in nanoseconds of the monotonic
clock, the status, what the server said about coming back (`retry_after_ms`), the body of a reply, and an
error if there was one.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
import uvloop

from bench.connection import Connection, Record, Request
from bench.generator import timed
from launcher.processes import raise_open_files

REFUSED = 429


class _Connection(Connection):
    """Keeps when to come back, too."""

    retry_after_ms = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        """Takes one header."""
        if name.lower() == b"retry-after-ms":
            self.retry_after_ms = int(value)


class Arrival:
    """One request of the open load."""

    def __init__(self, tenant: str, due: int) -> None:
        self.tenant = tenant
        self.due = due
        self.record: Record | None = None
        self.retry_after_ms = 0

    def row(self) -> dict[str, Any]:
        """Returns what is written of it; a body is kept only where it is an error's."""
        record = self.record
        if record is None:
            return {"tenant": self.tenant, "due": self.due, "error": "no session was free"}
        body = b"".join(record.parts)
        return {
            "tenant": self.tenant,
            "due": self.due,
            "began": record.began,
            "first": record.marks[0][0] if record.marks else 0,
            "ended": record.ended,
            "status": record.status,
            "retry_after_ms": self.retry_after_ms,
            "text": body.decode(errors="replace") if record.status == 200 else "",
            "error": "" if record.status == REFUSED else record.error,
        }


class Load:
    """Sends what is due over connections that are kept."""

    def __init__(self, tenants: Mapping[str, list[dict[str, Any]]]) -> None:
        self._free = {
            name: deque(Request.render("POST", ask["url"], ask["headers"], ask["body"]) for ask in asks)
            for name, asks in tenants.items()
        }
        self._idle: list[_Connection] = []
        self._busy: dict[_Connection, tuple[Arrival, Request]] = {}
        self.arrivals: list[Arrival] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._quiet = asyncio.Event()

    def send(self, arrival: Arrival) -> None:
        """Sends a request in a session of its tenant that has none under way."""
        self.arrivals.append(arrival)
        free = self._free[arrival.tenant]
        if not free:
            return
        request = free.pop()
        while self._idle:
            connection = self._idle.pop()
            if connection.open:
                self._go(connection, arrival, request)
                return
        task = asyncio.create_task(self._connect(arrival, request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, arrival: Arrival, request: Request) -> None:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(
            lambda: _Connection(lambda record: self._done(connection, record)), request.host, request.port
        )
        self._go(connection, arrival, request)

    def _go(self, connection: _Connection, arrival: Arrival, request: Request) -> None:
        connection.retry_after_ms = 0
        self._busy[connection] = (arrival, request)
        arrival.record = connection.send(request)

    def _done(self, connection: _Connection, record: Record) -> None:
        arrival, request = self._busy.pop(connection)
        arrival.retry_after_ms = connection.retry_after_ms
        if record.status in (200, REFUSED):
            # Of any other a run may be left in its session.
            self._free[arrival.tenant].append(request)
        if connection.open:
            self._idle.append(connection)
        if not self._busy:
            self._quiet.set()

    async def wait(self, silence_seconds: float) -> None:
        """Returns when nothing is under way; gives up what says nothing for too long."""
        while self._busy or self._tasks:
            self._quiet.clear()
            try:
                async with asyncio.timeout(1.0):
                    await self._quiet.wait()
            except TimeoutError:
                oldest = time.monotonic_ns() - int(silence_seconds * 1e9)
                for connection, (arrival, _) in list(self._busy.items()):
                    record = arrival.record
                    if (
                        record is not None
                        and (record.marks[-1][0] if record.marks else record.began) < oldest
                    ):
                        connection.fail("nothing came for too long")


async def play(load: Load, arrivals: list[list[Any]], began: int) -> None:
    """Sends each request at its time."""
    for seconds, tenant in arrivals:
        due = began + int(seconds * 1e9)
        wait = (due - time.monotonic_ns()) / 1e9
        if wait > 0:
            await asyncio.sleep(wait)
        load.send(Arrival(tenant, due))


async def run(job: dict[str, Any]) -> None:
    """Plays one job."""
    load = Load(job["tenants"])

    async def whole(began: int) -> None:
        await play(load, job["arrivals"], began)
        await load.wait(job["silence_seconds"])

    await timed(whole)
    rows = [arrival.row() for arrival in load.arrivals]
    Path(job["out"]).with_suffix(".json").write_bytes(orjson.dumps(rows))


def main() -> None:
    """Reads the job and plays it."""
    raise_open_files()
    uvloop.run(run(orjson.loads(Path(sys.argv[1]).read_bytes())))


if __name__ == "__main__":
    main()
