"""The processes of a mesh that drills break, and stores that a drill owns itself."""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from bench.mesh import Mesh
from launcher import probes
from launcher.embedded.postgres import Postgres
from launcher.embedded.valkey import Valkey
from launcher.processes import Identity
from launcher.state import State

START_SECONDS = 30.0


def process(mesh: Mesh, replica: str) -> Identity:
    """The process of a replica at this moment, as the supervisor wrote it down."""
    for child in State.load(mesh.data_dir / "state.json").children:
        if child.replica == replica:
            return child.identity
    raise LookupError(f"no {replica} runs")


async def healthy(mesh: Mesh, seconds: float = 60.0) -> None:
    """Returns once every replica is healthy."""
    await asyncio.to_thread(mesh.wait_healthy, seconds)


class Store:
    """A server process that is stopped and started at its place."""

    def __init__(self, command: list[str], log: Path) -> None:
        self._command = command
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def _spawn(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self._command, stdout=log, stderr=log, cwd="/")

    async def answers(self) -> bool:
        """Whether it serves."""
        raise NotImplementedError

    async def start(self) -> None:
        """Starts it and returns when it serves."""
        with self._log.open("ab") as log:
            self._process = await asyncio.to_thread(self._spawn, log)
        end = time.monotonic() + START_SECONDS
        while not await self.answers():
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"it does not start:\n{self._log.read_text()[-2000:]}")
            await asyncio.sleep(0.02)

    def send(self, number: signal.Signals) -> None:
        """Sends it a signal."""
        if self._process is not None:
            self._process.send_signal(number)

    async def end(self, number: signal.Signals) -> None:
        """Ends it by a signal and returns when it has ended."""
        if self._process is not None:
            self._process.send_signal(number)
            await asyncio.to_thread(self._process.wait, START_SECONDS)
            self._process = None


class OwnPostgres(Store):
    """A PostgreSQL of the drill's."""

    def __init__(self, folder: Path) -> None:
        self._server = Postgres.in_folder(folder / "data", folder, "drill-password")
        self._server.initialize()
        super().__init__(self._server.command(), folder / "log")
        self.url = self._server.url()

    async def answers(self) -> bool:
        """Whether it takes connections."""
        return await probes.postgres(self.url)


class OwnValkey(Store):
    """A Valkey of the drill's."""

    def __init__(self, folder: Path) -> None:
        server = Valkey(folder, folder / "valkey.conf", "drill-password")
        super().__init__(server.command(), folder / "log")
        self.url = server.url

    async def answers(self) -> bool:
        """Whether it answers a PING."""
        return await probes.valkey(self.url)


@contextmanager
def folder(prefix: str) -> Iterator[Path]:
    """A folder that goes away with the block."""
    path = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
