"""A whole mesh of one's own, for benches and end-to-end tests: started by the command `hermesh`.

It has its own data folder and ports, so it runs beside a mesh that a person started, and it reaches
the mesh only as a person would: by the command and by its public addresses.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

HERMESH = Path(sys.executable).parent / "hermesh"
UP_SECONDS = 120.0
COMMAND_SECONDS = 60.0


class MeshError(Exception):
    """A command of the mesh failed; the message is what it printed."""


@dataclass(frozen=True, slots=True)
class Replica:
    """One row of `hermesh status --json`."""

    service: str
    replica: str
    pid: int
    address: str
    health: str
    restarts: int = 0


def free_ports(count: int) -> list[int]:
    """Returns ports of loopback that nobody listens on now; another process may still take them."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]
    finally:
        for sock in sockets:
            sock.close()


def wait_until(check: Callable[[], bool], seconds: float, what: str) -> None:
    """Returns when `check` is true. Raises MeshError naming `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not check():
        if time.monotonic() > deadline:
            raise MeshError(f"waited {seconds:.0f} s in vain for: {what}")
        time.sleep(0.05)


@dataclass(slots=True)
class ModelServer:
    """The scripted model server (`bench.model_server`) as a process of its own."""

    url: str
    process: subprocess.Popen[bytes]

    @classmethod
    def start(cls, folder: Path, port: int = 0) -> Self:
        """Starts one on a port, 0 for a free one; its ready file goes into `folder`."""
        ready = folder / f"model-server-{port}.json"
        ready.unlink(missing_ok=True)
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.model_server", "--port", str(port), "--ready-file", str(ready)]
        )
        wait_until(lambda: ready.exists() or process.poll() is not None, 20, "the scripted model server")
        if not ready.exists():
            raise MeshError("the scripted model server ended at once; its message is above")
        facts = json.loads(ready.read_text())
        return cls(url=f"http://{facts['address']}/v1", process=process)

    def stop(self) -> None:
        """Ends it."""
        self.process.terminate()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(timeout=10)


@dataclass(slots=True)
class Mesh:
    """A running mesh.

    Attributes:
        data_dir: its data folder, removed when the mesh is left.
        http_port: Envoy's HTTP listener.
        grpc_port: Envoy's public gRPC listener.
        settings: `HERMESH_*` variables beside those two ports and the folder.
        replicas: what `hermesh up --replicas` gets, such as "agent=2,session=2".
        program: the command `hermesh`; another version's, where that is what is asked.
        scripted_model: whether a scripted model server stands in for the embedded model.
    """

    settings: Mapping[str, str] = field(default_factory=dict)
    replicas: str = ""
    scripted_model: bool = True
    program: Path = HERMESH
    data_dir: Path = field(init=False)
    http_port: int = field(init=False)
    grpc_port: int = field(init=False)
    model: ModelServer | None = field(init=False, default=None)

    def __enter__(self) -> Self:
        """Starts the mesh and waits until it is ready."""
        self.data_dir = Path(tempfile.mkdtemp(prefix="hermesh-"))
        self.http_port, self.grpc_port = free_ports(2)
        try:
            if self.scripted_model:
                self.model = ModelServer.start(self.data_dir)
            arguments = ["--replicas", self.replicas] if self.replicas else []
            self.command("up", "--no-reply", *arguments, seconds=UP_SECONDS)
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops the mesh and removes its folder."""
        self._leave()

    def _leave(self) -> None:
        try:
            self.command("down")
        finally:
            if self.model is not None:
                self.model.stop()
            kept = os.environ.get("HERMESH_KEEP_DATA")
            if not kept:
                shutil.rmtree(self.data_dir, ignore_errors=True)

    @property
    def environment(self) -> dict[str, str]:
        """The environment in which the command `hermesh` means this mesh."""
        outside = {name: value for name, value in os.environ.items() if not name.startswith("HERMESH_")}
        model = (
            {
                "HERMESH_LLM_BASE_URL": self.model.url,
                "HERMESH_LLM_MODEL": "scripted",
                "HERMESH_LLM_TOOL_MODE": "native",
                "HERMESH_LLM_PREFILL": "false",
            }
            if self.model
            else {}
        )
        return (
            outside
            | model
            | {
                "HERMESH_DATA_DIR": str(self.data_dir),
                "HERMESH_HTTP_PORT": str(self.http_port),
                "HERMESH_GRPC_PORT": str(self.grpc_port),
            }
            | dict(self.settings)
        )

    @property
    def url(self) -> str:
        """The gateway's address through Envoy."""
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def grpc_address(self) -> str:
        """The public gRPC address."""
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def api_key(self) -> str:
        """The key that `up` made."""
        return (self.data_dir / "api-key").read_text().strip()

    @property
    def headers(self) -> dict[str, str]:
        """What an HTTP request needs to be let in."""
        return {"Authorization": f"Bearer {self.api_key}"}

    def command(self, *arguments: str, seconds: float = COMMAND_SECONDS) -> str:
        """Runs `hermesh ARGUMENTS` and returns what it printed. Raises MeshError when it fails."""
        done = subprocess.run(
            [str(self.program), *arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        if done.returncode != 0:
            raise MeshError(
                f"hermesh {' '.join(arguments)} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
            )
        return done.stdout

    def new_tenant(self, name: str) -> str:
        """Makes a tenant, as an operator does beside a running mesh, and returns its API key."""
        key = f"hm_{secrets.token_urlsafe(32)}"
        database = self.command("env", "HERMESH_DATABASE_URL").strip()
        done = subprocess.run(
            [sys.executable, "-m", "services.session", "bootstrap", "--tenant", name],
            env=self.environment | {"HERMESH_DATABASE_URL": database, "HERMESH_API_KEY": key},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )
        if done.returncode != 0:
            raise MeshError(f"no tenant {name!r} could be made:\n{done.stdout}{done.stderr}")
        return key

    def status(self) -> list[Replica]:
        """Every replica and every part, as `hermesh status --json` lists them."""
        rows: list[dict[str, Any]] = json.loads(self.command("status", "--json"))
        return [
            Replica(
                service=row["service"],
                replica=row["replica"],
                pid=row["pid"] or 0,
                address=row["address"] or "",
                health=row["health"],
                restarts=row.get("restarts", 0),
            )
            for row in rows
        ]

    def of(self, service: str) -> list[Replica]:
        """The replicas of one service."""
        return [row for row in self.status() if row.service == service]

    def wait_healthy(self, seconds: float = 60) -> None:
        """Returns once everything is healthy. Raises MeshError after `seconds`."""
        wait_until(
            lambda: all(row.health == "healthy" for row in self.status()), seconds, "a mesh that is healthy"
        )
