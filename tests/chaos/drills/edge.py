"""HAProxy before a mesh as compose has it, without TLS, and replaced as its operator does: by a reload."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.fronts import binary_of, listens
from bench.mesh import Mesh, MeshError, free_ports, wait_until
from tests.chaos.drills.parts import folder as temporary

START_SECONDS = 20.0
_FILES = ("haproxy.cfg", "compose.cfg")


@dataclass(frozen=True, slots=True)
class Front:
    """A running HAProxy.

    Attributes:
        folder: its files and its log.
        http: host and port of the HTTP API.
        grpc: host and port of gRPC.
        mesh: what is behind.
        process: its master.
    """

    folder: Path
    http: str
    grpc: str
    mesh: Mesh
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        """Where its HTTP API is."""
        return f"http://{self.http}"

    def workers(self) -> list[int]:
        """Its workers, former ones that still have streams among them."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(word) for word in path.read_text().split()]

    def reload(self, source: Path) -> None:
        """Has it work by the files of another tree; former workers go on with what they have."""
        before = self.workers()
        _write(self.folder, source, self.mesh, self.http, self.grpc)
        self.process.send_signal(signal.SIGUSR2)
        wait_until(lambda: bool(set(self.workers()) - set(before)), START_SECONDS, "HAProxy's new worker")


def _write(folder: Path, source: Path, mesh: Mesh, http: str, grpc: str) -> None:
    """Copies HAProxy's files of a tree; nothing but addresses is another."""
    places = {
        "bind :8080\n": f"bind {http}\n",
        "bind :50051 ": f"bind {grpc} ",
        "server-template envoy 4 envoy:8080 resolvers docker init-addr none": (
            f"server envoy1 127.0.0.1:{mesh.http_port}"
        ),
        "server-template envoy 4 envoy:50051 resolvers docker init-addr none": (
            f"server envoy1 {mesh.grpc_address}"
        ),
        "port 8080\n": f"port {mesh.http_port}\n",
    }
    texts = {name: (source / "deploy" / "haproxy" / name).read_text() for name in _FILES}
    for old, new in places.items():
        if not any(old in text for text in texts.values()):
            raise MeshError(f"{old!r} is in none of {', '.join(_FILES)} of {source}")
        texts = {name: text.replace(old, new) for name, text in texts.items()}
    for name, text in texts.items():
        (folder / name).write_text(text)


@contextmanager
def front(mesh: Mesh, source: Path) -> Iterator[Front]:
    """Runs one by the files of a tree. Raises MeshError where it is not installed."""
    binary = binary_of("haproxy")
    if binary is None:
        raise MeshError("haproxy is not installed here: apt-get install haproxy")
    http, grpc = (f"127.0.0.1:{port}" for port in free_ports(2))
    with temporary("hm-front-") as folder:
        _write(folder, source, mesh, http, grpc)
        command = [
            str(binary),
            "-W",
            "-db",
            *(word for name in _FILES for word in ("-f", str(folder / name))),
        ]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            port = int(http.rpartition(":")[2])
            wait_until(lambda: process.poll() is not None or listens(port), START_SECONDS, "HAProxy")
            if process.poll() is not None:
                raise MeshError(f"HAProxy ended at once: {(folder / 'log').read_text()[-500:]}")
            yield Front(folder, http, grpc, mesh, process)
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(timeout=10)
