"""Has the load generator put load on a server, and reads what it wrote when the load is over."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from bench.target import Ask

START_SECONDS = 120.0
SILENCE_SECONDS = 60.0
LONGEST_SECONDS = 600.0


class LoadError(Exception):
    """The load generator failed; the message says how."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer as bytes; times in nanoseconds of the monotonic clock.

    Attributes:
        client: number of the client that asked, from 0.
        began: when the request was sent.
        ended: when the answer was complete.
        marks: when body bytes came, and how many there were then.
        body: the whole of it.
        error: what went wrong, empty for nothing.
    """

    client: int
    began: int
    ended: int
    marks: Sequence[tuple[int, int]]
    body: bytes
    error: str = ""


@dataclass(frozen=True, slots=True)
class Window:
    """The time under load: beginning and end in nanoseconds, the generator's own CPU seconds."""

    began: int
    ended: int
    cpu: float

    @property
    def seconds(self) -> float:
        """How long it was."""
        return (self.ended - self.began) / 1e9


class Generator:
    """A load generator's process that is ready to begin."""

    def __init__(self, process: asyncio.subprocess.Process, out: Path) -> None:
        self._process = process
        self._out = out

    async def line(self, seconds: float) -> str:
        """Returns what it says next. Raises LoadError when it ends, or says nothing for `seconds`."""
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(seconds):
                said = await self._process.stdout.readline()
        except TimeoutError as error:
            raise LoadError(f"the load generator said nothing for {seconds:.0f} s") from error
        if not said:
            raise LoadError("the load generator ended; its message is above")
        return said.decode().strip()

    def tell(self, line: str) -> None:
        """Has it go on."""
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")

    async def go(self, seconds: float = LONGEST_SECONDS) -> Window:
        """Begins the load; returns when the last answer is there. Raises LoadError after so many seconds."""
        self.tell("go")
        said: dict[str, Any] = orjson.loads(await self.line(seconds))
        return Window(said["began"], said["ended"], said["cpu"])

    async def _ended(self) -> None:
        async with asyncio.timeout(START_SECONDS):
            status = await self._process.wait()
        if status:
            raise LoadError(f"the load generator ended with {status}; its message is above")

    async def replies(self) -> list[Reply]:
        """Returns what came, once the process has ended. Raises LoadError when it failed."""
        await self._ended()
        return read_replies(self._out)

    async def written(self) -> Any:
        """Returns what it wrote as JSON, once the process has ended. Raises LoadError when it failed."""
        await self._ended()
        return orjson.loads(self._out.with_suffix(".json").read_bytes())


def read_replies(out: Path) -> list[Reply]:
    """Reads the records that a generator wrote to `OUT.json` and `OUT.bin`."""
    replies = []
    with out.with_suffix(".bin").open("rb") as bodies:
        for row in orjson.loads(out.with_suffix(".json").read_bytes()):
            marks = [(at, size) for at, size in row["marks"]]
            body = bodies.read(row["size"])
            replies.append(Reply(row["client"], row["began"], row["ended"], marks, body, row["error"]))
    return replies


@asynccontextmanager
async def started(module: str, job: dict[str, Any]) -> AsyncIterator[Generator]:
    """Starts a generator with a job and yields it when it is ready; it is ended when it is left."""
    with tempfile.TemporaryDirectory(prefix="hermesh-load-") as folder:
        out = Path(folder) / "replies"
        path = Path(folder) / "job.json"
        path.write_bytes(orjson.dumps(job | {"out": str(out), "silence_seconds": SILENCE_SECONDS}))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", module, str(path)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            generator = Generator(process, out)
            ready = await generator.line(START_SECONDS)
            if ready != "ready":
                raise LoadError(f"the load generator said {ready!r} where it should be ready")
            yield generator
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def load(
    clients: Sequence[Sequence[Ask]], spread_seconds: float = 0.0, background: int = 0
) -> contextlib.AbstractAsyncContextManager[Generator]:
    """Makes a generator ready in which each client sends its requests one after the other.

    Args:
        clients: the requests of each.
        spread_seconds: the time over which they begin; 0 for all at once.
        background: how many of the first clients go on asking the same until all others are done.
    """
    job = {
        "background": background,
        "spread_seconds": spread_seconds,
        "clients": [
            [
                {"url": ask.url, "headers": dict(ask.headers), "body": dict(ask.body), "form": ask.form}
                for ask in asks
            ]
            for asks in clients
        ],
    }
    return started("bench.generator", job)
