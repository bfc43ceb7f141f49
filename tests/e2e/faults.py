"""Takes parts of a whole mesh away for a while.

The supervisor is stopped meanwhile, or it would start them again at once.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.mesh import Mesh, ModelServer, free_ports, wait_until


class Models:
    """Two model backends; the first is the preferred one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.ports = free_ports(2)
        self.servers: list[ModelServer | None] = [None, None]
        for number in (0, 1):
            self.start(number)

    @classmethod
    @contextmanager
    def serving(cls) -> Iterator[Models]:
        """Two of them, in a folder of their own, until the block is left."""
        with tempfile.TemporaryDirectory(prefix="hm-models-") as folder:
            models = cls(Path(folder))
            try:
                yield models
            finally:
                models.stop(0)
                models.stop(1)

    @property
    def urls(self) -> str:
        return ", ".join(f"http://127.0.0.1:{port}/v1" for port in self.ports)

    def start(self, number: int) -> None:
        if self.servers[number] is None:
            self.servers[number] = ModelServer.start(self._folder, self.ports[number])

    def stop(self, number: int) -> None:
        server, self.servers[number] = self.servers[number], None
        if server is not None:
            server.process.kill()
            server.process.wait(timeout=10)


@contextmanager
def down(mesh: Mesh, service: str) -> Iterator[None]:
    """Takes all replicas of a part away for the time of the block."""
    pids = [row.pid for row in mesh.of(service)]
    supervisor = json.loads((mesh.data_dir / "state.json").read_text())["supervisor"]["pid"]
    os.kill(supervisor, signal.SIGSTOP)
    try:
        for pid in pids:
            # PostgreSQL's immediate stop; anything else dies as it does when it is killed.
            os.kill(pid, signal.SIGQUIT if service == "postgresql" else signal.SIGKILL)
        wait_until(lambda: all(gone(pid) for pid in pids), 10, f"the end of {service}")
        yield
    finally:
        os.kill(supervisor, signal.SIGCONT)


def gone(pid: int) -> bool:
    """Whether a process has ended; its supervisor, stopped, may not have noticed."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@contextmanager
def no_object_store(mesh: Mesh) -> Iterator[None]:
    """What is at the object store's place holds nothing, not even for root."""
    folder, aside = mesh.data_dir / "objects", mesh.data_dir / "objects-aside"
    folder.mkdir(exist_ok=True)
    folder.rename(aside)
    folder.touch()
    try:
        yield
    finally:
        folder.unlink()
        aside.rename(folder)
