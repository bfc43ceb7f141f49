"""The load generator: a process of its own, so that what it costs is never counted as the servers' work.

    python -m bench.generator JOB

JOB is JSON: `clients` is a list of clients, each a list of requests {"url", "headers", "body"} that it sends
one after the other over one connection; `out` is where the records go; `spread_seconds` is the time over
which the clients begin, `silence_seconds` how long nothing may come. The first `background` of the clients
begin again with their first request after their last one, until all others are done.

It says `ready` once everything is rendered and connected, begins on a line from stdin, and says one line of
JSON when the last answer is there (`began` and `ended` in nanoseconds of the monotonic clock, `cpu` in
seconds of its own). Then it writes `OUT.json`, one record a request, and `OUT.bin`, their bodies.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import orjson
import uvloop

from bench.connection import Connection, Record, Request
from launcher.processes import raise_open_files

CONNECTS_AT_ONCE = 50
CHECK_SECONDS = 1.0


class Client:
    """One user: the next request goes out when the answer to the one before is complete.

    Attributes:
        records: of the requests that were sent.
        finished: done when the last answer is complete.
    """

    def __init__(self, requests: Sequence[Request], *, beside: Sequence[Client] = ()) -> None:
        """Begins with the first request again after the last one until all of those `beside` it are done."""
        self.records: list[Record] = []
        self.finished = asyncio.get_running_loop().create_future()
        self._beside = beside
        self._requests = deque(requests)
        self._connection: Connection | None = None
        self._connecting: asyncio.Task[None] | None = None

    async def connect(self) -> None:
        """Opens the connection that the next request goes over."""
        first = self._requests[0]
        loop = asyncio.get_running_loop()
        _, self._connection = await loop.create_connection(
            lambda: Connection(self._answered), first.host, first.port
        )

    def go(self) -> None:
        """Sends the next request, or ends."""
        if self._beside and all(client.finished.done() for client in self._beside):
            self._requests.clear()
        if not self._requests:
            if not self.finished.done():
                self.finished.set_result(None)
            return
        if self._connection is None or not self._connection.open:
            self._connecting = asyncio.create_task(self._reconnect())
            return
        request = self._requests.popleft()
        if self._beside:
            self._requests.append(request)
        self.records.append(self._connection.send(request))

    async def _reconnect(self) -> None:
        try:
            await self.connect()
        except OSError as error:
            self.finished.set_exception(error)
        else:
            self.go()

    def _answered(self, _: Record) -> None:
        self.go()

    def check(self, oldest: int) -> None:
        """Gives up a request to which nothing came since `oldest`."""
        record = self.records[-1] if self.records else None
        if record is None or record.ended or self._connection is None:
            return
        if (record.marks[-1][0] if record.marks else record.began) < oldest:
            self._connection.fail("nothing came for too long")

    def close(self) -> None:
        """Closes the connection."""
        if self._connection is not None:
            self._connection.close()


async def connect_all(clients: Sequence[Client]) -> None:
    """Opens every client's connection, not all at the same moment."""
    gate = asyncio.Semaphore(CONNECTS_AT_ONCE)

    async def one(client: Client) -> None:
        async with gate:
            await client.connect()

    async with asyncio.TaskGroup() as group:
        for client in clients:
            group.create_task(one(client))


async def play(clients: Sequence[Client], spread_seconds: float, silence_seconds: float) -> None:
    """Has all clients ask, the last `spread_seconds` after the first; returns when all is answered."""
    everything = asyncio.gather(*(client.finished for client in clients))
    loop = asyncio.get_running_loop()
    for number, client in enumerate(clients):
        loop.call_later(spread_seconds * number / len(clients), client.go)
    while not everything.done():
        await asyncio.wait([everything], timeout=CHECK_SECONDS)
        oldest = time.monotonic_ns() - int(silence_seconds * 1e9)
        for client in clients:
            client.check(oldest)
    everything.result()


def write(out: Path, records: Sequence[tuple[int, Record]]) -> None:
    """Writes records, each with its client's number, and their bodies."""
    index = []
    with out.with_suffix(".bin").open("wb") as bodies:
        for client, record in records:
            index.append(
                {
                    "client": client,
                    "began": record.began,
                    "ended": record.ended,
                    "status": record.status,
                    "error": record.error,
                    "marks": record.marks,
                    "size": record.size,
                }
            )
            bodies.writelines(record.parts)
    out.with_suffix(".json").write_bytes(orjson.dumps(index))


def say(line: str) -> None:
    """Tells the one who waits for this process."""
    print(line, flush=True)


async def timed(play: Callable[[int], Awaitable[None]]) -> None:
    """Says that it is ready, plays when it is told to, and says when that was and what CPU it took.

    `play` is given the beginning, in nanoseconds of the monotonic clock.
    """
    gc.collect()
    gc.disable()
    say("ready")
    await asyncio.to_thread(sys.stdin.readline)
    cpu, began = time.process_time(), time.monotonic_ns()
    await play(began)
    ended = time.monotonic_ns()
    say(orjson.dumps({"began": began, "ended": ended, "cpu": time.process_time() - cpu}).decode())


async def run(job: dict[str, Any]) -> None:
    """Plays one job."""
    requests = [
        [Request.render("POST", ask["url"], ask["headers"], ask["body"], form=ask["form"]) for ask in asks]
        for asks in job["clients"]
    ]
    background = job["background"]
    others = [Client(asks) for asks in requests[background:]]
    clients = [*(Client(asks, beside=others) for asks in requests[:background]), *others]
    await connect_all(clients)
    await timed(lambda _: play(clients, job["spread_seconds"], job["silence_seconds"]))
    for client in clients:
        client.close()
    write(Path(job["out"]), [(number, r) for number, client in enumerate(clients) for r in client.records])


def main() -> None:
    """Reads the job and plays it."""
    raise_open_files()
    uvloop.run(run(orjson.loads(Path(sys.argv[1]).read_bytes())))


if __name__ == "__main__":
    main()
