"""Clients that watch and wait, as a process of its own.

    python -m bench.watch_generator JOB

JOB is JSON: `watchers` are requests {"url", "headers"} for streams of events, `posts` are requests {"url",
"headers", "body"}; of P posts number p brings watchers p, p + P, p + 2 P, ... their next event. `per_second`
is the rate at which they are sent, `deadline_seconds` how long after the last of them events may come, `out`
is where the records go. It says `ready`, and then does what lines from stdin say, and says when it is done:

    open N     open streams until there are N
    post       send the posts and wait for each watcher's event
    end        write the records and end

Of each watcher `OUT.json` has when its post was due, and when its event came: nanoseconds of the monotonic
clock, 0 for never.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import uvloop

from bench.connection import Connection, Record, Request
from bench.generator import say
from launcher.processes import raise_open_files

OPENS_AT_ONCE = 100
OPEN_SECONDS = 30.0


class Watcher:
    """One stream of events.

    Attributes:
        opened: done when the stream has begun.
        due: when the post that brings its event was due, 0 before.
        event: when that event came, 0 before.
        error: why the stream ended, empty while it has not.
    """

    def __init__(self, request: Request) -> None:
        self.opened = asyncio.Event()
        self.due = 0
        self.event = 0
        self.error = ""
        self._request = request
        self._connection: Connection | None = None

    async def open(self) -> None:
        """Opens the stream. Raises TimeoutError when it does not begin in time."""
        _, self._connection = await asyncio.get_running_loop().create_connection(
            lambda: Connection(self._ended, self._noted), self._request.host, self._request.port
        )
        self._connection.send(self._request)
        async with asyncio.timeout(OPEN_SECONDS):
            await self.opened.wait()

    def _noted(self, record: Record) -> None:
        if record.status:
            self.opened.set()
        if self.due and not self.event and _has_event(record):
            self.event = record.marks[-1][0]

    def _ended(self, record: Record) -> None:
        self.error = record.error or "the stream ended"
        self.opened.set()

    def close(self) -> None:
        """Leaves."""
        if self._connection is not None:
            self._connection.close()


def _has_event(record: Record) -> bool:
    """Whether there is an event among the heartbeats; parts cut the body anywhere."""
    return b"id: " in b"".join(record.parts)


class Posts:
    """Sends requests at a steady rate, over as many connections as that takes."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.error = ""
        self._requests = requests
        self._idle: list[Connection] = []
        self._under_way = 0

    async def send(self, watchers: Sequence[Watcher], per_second: float) -> None:
        """Sends all of them; a request is due by the clock, however slow the answers before it are."""
        loop = asyncio.get_running_loop()
        began = time.monotonic()
        for number, request in enumerate(self._requests):
            due = began + number / per_second
            # The loop's clock is of milliseconds: it may wake up before it is time.
            while (wait := due - time.monotonic()) > 0:  # noqa: ASYNC110 -- there is no event, only the time
                await asyncio.sleep(wait)
            for watcher in watchers[number :: len(self._requests)]:
                watcher.due = int(due * 1e9)
            connection = self._idle.pop() if self._idle else None
            if connection is None or not connection.open:
                made = await loop.create_connection(lambda: _Post(self._answered), request.host, request.port)
                connection = made[1]
            self._under_way += 1
            connection.send(request)

    def _answered(self, connection: Connection, record: Record) -> None:
        self._under_way -= 1
        if record.error:
            self.error = record.error
        elif connection.open:
            self._idle.append(connection)

    @property
    def done(self) -> bool:
        """Whether no answer is owed."""
        return not self._under_way

    def close(self) -> None:
        """Closes the connections."""
        for connection in self._idle:
            connection.close()


class _Post(Connection):
    """A connection that says which one it is when it is free again."""

    def __init__(self, answered: Any) -> None:
        super().__init__(lambda record: answered(self, record))


class Session:
    """Carries the commands out."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.watchers = [Watcher(Request.render("GET", w["url"], w["headers"])) for w in job["watchers"]]
        self.posts = Posts([Request.render("POST", p["url"], p["headers"], p["body"]) for p in job["posts"]])
        self.job = job
        self.count = 0

    async def open(self, until: int) -> dict[str, Any]:
        """Opens streams until there are so many."""
        gate = asyncio.Semaphore(OPENS_AT_ONCE)

        async def one(watcher: Watcher) -> None:
            async with gate:
                await watcher.open()

        async with asyncio.TaskGroup() as group:
            for watcher in self.watchers[self.count : until]:
                group.create_task(one(watcher))
        self.count = until
        gc.collect()
        gc.disable()
        return {"open": until, "error": self.problem()}

    def problem(self) -> str:
        """Returns what went wrong with any stream or request, empty for nothing."""
        return next((w.error for w in self.watchers if w.error), "") or self.posts.error

    async def post(self) -> dict[str, Any]:
        """Brings each watcher its event and waits for all of them."""
        cpu = time.process_time()
        await self.posts.send(self.watchers, self.job["per_second"])
        deadline = time.monotonic() + self.job["deadline_seconds"]
        while time.monotonic() < deadline and not self.problem():
            if self.posts.done and all(watcher.event for watcher in self.watchers):
                break
            await asyncio.sleep(0.1)
        return {"cpu": time.process_time() - cpu, "error": self.problem()}

    def close(self) -> None:
        """Closes every connection."""
        for watcher in self.watchers:
            watcher.close()
        self.posts.close()

    def write(self) -> None:
        """Writes what came of it."""
        rows = [{"due": watcher.due, "event": watcher.event} for watcher in self.watchers]
        Path(self.job["out"]).with_suffix(".json").write_bytes(orjson.dumps(rows))


async def run(job: dict[str, Any]) -> None:
    """Plays one job."""
    session = Session(job)
    say("ready")
    while True:
        command, *arguments = (await asyncio.to_thread(sys.stdin.readline)).split() or ["end"]
        if command == "open":
            said = await session.open(int(arguments[0]))
        elif command == "post":
            said = await session.post()
        else:
            break
        say(orjson.dumps(said).decode())
    session.close()
    session.write()


def main() -> None:
    """Reads the job and plays it."""
    raise_open_files()
    uvloop.run(run(orjson.loads(Path(sys.argv[1]).read_bytes())))


if __name__ == "__main__":
    main()
