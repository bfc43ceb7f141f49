"""PostgreSQL and Valkey as processes of the suite's own, stopped and started at their place."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path

from launcher import probes
from launcher.embedded.postgres import Postgres
from launcher.embedded.valkey import Valkey
from launcher.processes import stat_fields

START_SECONDS = 30.0
PASSWORD = "chaos-password"


class Store:
    """A server process; however often it starts, it is at the same place.

    Attributes:
        name: "postgres" or "valkey".
        url: where it is.
        socket: its unix socket.
        process: None while it is stopped.
        down: held while it is kept down: two faults must not start it twice.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        url: str,
        socket: Path,
        answers: Callable[[str], Awaitable[bool]],
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.url = url
        self.socket = socket
        self.process: subprocess.Popen[bytes] | None = None
        self.down = asyncio.Lock()
        self._command = command
        self._log = log
        self._answers = answers
        self._prepare = prepare

    async def start(self) -> None:
        """Starts it and returns once it serves; a full disk may keep it from that for a while.

        Raises:
            RuntimeError: It does not serve within `START_SECONDS`.
        """
        self._prepare()
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self.process is None or self.process.poll() is not None:
                with self._log.open("ab") as log:
                    self.process = subprocess.Popen(self._command, stdout=log, stderr=log, cwd="/")
            if await self._answers(self.url):
                return
            await asyncio.sleep(0.05)
        raise RuntimeError(f"{self.name} does not start:\n{self._log.read_text()[-2000:]}")

    def send(self, number: signal.Signals) -> None:
        """Sends it a signal."""
        if self.process is not None:
            self.process.send_signal(number)

    def send_all(self, number: signal.Signals) -> None:
        """Sends a signal to it and to every process that it started: a backend lives on by itself."""
        if self.process is None:
            return
        # Itself first: who is stopped starts nobody whom this would miss.
        self.send(number)
        for pid in children_of(self.process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    async def stop(self, number: signal.Signals) -> None:
        """Ends it by a signal and returns when it has ended: SIGQUIT is PostgreSQL's immediate stop."""
        if self.process is not None:
            self.process.send_signal(number)
            await asyncio.to_thread(self.process.wait, START_SECONDS)
            self.process = None


def children_of(parent: int) -> list[int]:
    """Returns the processes that one has started."""
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    # The state, the parent, ...
    return [pid for pid in pids if (fields := stat_fields(pid)) and int(fields[1]) == parent]


def own_postgres(folder: Path, data: Path, log: Path, *options: str) -> Store:
    """Returns a PostgreSQL with an initialized data folder; `options` go to its command line."""
    server = Postgres.in_folder(data, folder, PASSWORD)
    server.initialize()

    def prepare() -> None:
        # A new and empty database in its place would look like a mesh that lost everything.
        if not (server.data / "PG_VERSION").exists():
            raise RuntimeError(f"the data folder {server.data} is gone")
        server.prepare()

    command = [*server.command(), *options]
    return Store("postgres", command, log, server.url(), server.socket, probes.postgres, prepare)


def own_valkey(folder: Path, log: Path) -> Store:
    """Returns a Valkey that keeps nothing."""
    server = Valkey(folder, folder / "valkey.conf", PASSWORD)
    return Store("valkey", server.command(), log, server.url, server.socket, probes.valkey)
