"""Starts a peer with its stores in a folder of its own, waits until it is ready, and ends all of it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from bench.mesh import MeshError, free_ports, wait_until
from bench.peers.catalog import Peer
from bench.peers.install import FOLDER, python_of
from bench.peers.processes import end
from bench.peers.stores import Stores
from bench.peers.targets import PeerTarget
from launcher.processes import raise_open_files, spawn

READY_SECONDS = 120.0
_SHOWN = 3000


@dataclass(frozen=True, slots=True)
class Running:
    """A peer that answers.

    Attributes:
        url: of its HTTP API.
        pids: of its server and its stores.
        stores: None where it needs none.
        python: the version that it runs on.
    """

    peer: Peer
    url: str
    pids: dict[str, int]
    stores: Stores | None
    python: str

    def targets(self) -> list[PeerTarget]:
        """Returns what is asked of it."""
        return [make(self.url, self.pids) for make in self.peer.targets]


@contextmanager
def running(peer: Peer, programs: Path, model: str) -> Iterator[Running]:
    """Starts a peer and its stores; they are ended and their files removed when it is left.

    Args:
        peer: which.
        programs: the folder of its environment's programs.
        model: base URL of the model with its /v1.

    Raises:
        MeshError: It did not become ready; the message has the end of its log.
    """
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix=f"peer-{peer.name}-"))
        if not os.environ.get("HERMESH_KEEP_DATA"):
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        work = folder / "app"
        shutil.copytree(FOLDER / peer.files, work, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "store").mkdir()
        stores = Stores.start(folder, stack) if peer.stores else None
        port = free_ports(1)[0]
        values = _values(folder, programs, model, port, stores)
        command = [str(programs / peer.command[0]), *(word.format(**values) for word in peer.command[1:])]
        variables = {name: text.format(**values) for name, text in peer.variables.items()}
        raise_open_files()
        # A shell that becomes the server: `spawn` starts everything in /.
        in_folder = ["/bin/sh", "-c", 'cd "$0" && exec "$@"', str(work), *command]
        log = folder / "server.log"
        process = spawn(in_folder, _environment(folder, programs) | variables, log)
        stack.callback(end, process)
        url = f"http://127.0.0.1:{port}"
        try:
            wait_until(
                lambda: process.poll() is not None or _answers(url + peer.ready), READY_SECONDS, peer.title
            )
        except MeshError as error:
            raise MeshError(f"{error}; its log ends with:\n{_end_of(log)}") from error
        if process.poll() is not None:
            raise MeshError(f"{peer.title} ended with {process.returncode}:\n{_end_of(log)}")
        pids = {"server": process.pid} | (stores.pids if stores else {})
        yield Running(peer, url, pids, stores, python_of(programs))


def _values(folder: Path, programs: Path, model: str, port: int, stores: Stores | None) -> dict[str, str]:
    values = {
        "port": str(port),
        "model": model,
        "folder": str(folder),
        "packages": str(next((programs.parent / "lib").glob("python*/site-packages"))),
    }
    if stores is not None:
        values |= {
            "postgres": stores.postgres_url,
            "postgres_psycopg": stores.postgres_url.replace("postgresql://", "postgresql+psycopg://"),
            "redis": stores.redis_url,
        }
    return values


def _environment(folder: Path, programs: Path) -> dict[str, str]:
    """What every peer sees: nothing of this environment but where programs are, and no proxy."""
    return {
        "PATH": f"{programs}:/usr/bin:/bin",
        "HOME": str(folder),
        "LANG": "C.UTF-8",
        "OPENAI_API_KEY": "none",
        "NO_PROXY": "*",
    }


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def _end_of(log: Path) -> str:
    return log.read_text(errors="replace")[-_SHOWN:]
