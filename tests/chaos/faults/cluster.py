"""A mesh to break: real processes, stores that the suite itself starts and stops, proxies on every path.

The mesh is what `hermesh up` starts; PostgreSQL and Valkey are ours, so that they can be stopped for as long
as a fault asks, and the supervisor of the mesh cannot bring them back. Nothing here ends a process by name.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.mesh import UP_SECONDS, Mesh, MeshError, ModelServer, Replica, free_ports
from launcher.control import ask
from launcher.errors import LaunchError
from launcher.folder import Folder
from launcher.plan import parse_replicas
from launcher.processes import Identity
from launcher.state import State
from tests.chaos.faults.audit import Audit
from tests.chaos.faults.stores import PASSWORD, START_SECONDS, Store, own_postgres, own_valkey
from tests.chaos.traffic.tools import LEDGER

ROOT = Path(__file__).resolve().parents[3]
REPLICAS = "gateway=2,agent=3,session=2,tool=2,memory=1"
ROUTES = ("postgres", "valkey", "mesh", "model", "ledger")
_HEALTHY_SECONDS = 60.0
# For so long what puts a mesh right is tried again: another fault may keep it from that for a while.
_REPAIR_SECONDS = 90.0
_DISK_BYTES = 1536 * 1024 * 1024


class Proxies:
    """The proxy process and its control socket."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._process: subprocess.Popen[bytes] | None = None
        self.ports: dict[str, int] = {}

    async def start(self, targets: Mapping[str, str]) -> None:
        """Listens for every route; a target need not be there yet."""
        self.ports = dict(zip(targets, free_ports(len(targets)), strict=True))
        routes = {name: {"port": self.ports[name], "to": to} for name, to in targets.items()}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.faults.proxy", str(self._socket), json.dumps(routes)],
            cwd=ROOT,
        )
        async with asyncio.timeout(START_SECONDS):
            while not self._socket.exists():
                await asyncio.sleep(0.02)

    async def set(self, route: str, mode: str, **fields: Any) -> None:
        """Changes what a route does; see `proxy`."""
        async with asyncio.timeout(5):
            reader, writer = await asyncio.open_unix_connection(self._socket)
            writer.write(json.dumps({"route": route, "mode": mode} | fields).encode() + b"\n")
            await reader.readline()
            writer.close()

    def stop(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=10)


@dataclass
class Cluster:
    """Everything that runs, with handles to break it.

    Attributes:
        folder: where histories of the ledger and logs go; the caller's.
        source: the tree whose code runs; another one than this for mutations.
        prefill: whether the model continues a reply that was cut off.
        disk: where PostgreSQL's data is, if that can be filled up: a mounted one of its own.
        whole: held by who changes what the supervisor does: two faults must not do that at a time.
    """

    folder: Path
    source: Path = ROOT
    replicas: str = REPLICAS
    prefill: bool = True
    settings: Mapping[str, str] = field(default_factory=dict)
    mesh: Mesh = field(init=False)
    proxies: Proxies = field(init=False)
    postgres: Store = field(init=False)
    valkey: Store = field(init=False)
    failpoints: Path = field(init=False)
    disk: Path | None = field(init=False, default=None)
    whole: asyncio.Lock = field(init=False, default_factory=asyncio.Lock)
    _stack: AsyncExitStack = field(init=False, default_factory=AsyncExitStack)
    _ledger: subprocess.Popen[bytes] | None = field(init=False, default=None)

    async def __aenter__(self) -> Self:
        """Starts all of it and waits until it is healthy."""
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops it and leaves no process."""
        await self._stack.aclose()

    @property
    def ledger_file(self) -> Path:
        """Where the ledger writes."""
        return self.folder / "ledger.jsonl"

    async def _start(self) -> None:
        stack = self._stack
        work = Path(tempfile.mkdtemp(prefix="hm-chaos-"))
        stack.callback(shutil.rmtree, work, ignore_errors=True)
        self.failpoints = work / "failpoints"
        self.failpoints.mkdir()
        self.disk = _mount(work / "disk")
        if self.disk is not None:
            stack.callback(_unmount, self.disk)
        data = (self.disk or work) / "pg"
        # When a transaction was committed is in the history, too.
        option = ("-c", "track_commit_timestamp=on")
        self.postgres = await asyncio.to_thread(
            own_postgres, work, data, self.folder / "postgresql.log", *option
        )
        self.valkey = own_valkey(work, self.folder / "valkey.log")
        for store in (self.postgres, self.valkey):
            stack.push_async_callback(store.stop, signal.SIGKILL)
            await store.start()
        audit = Audit(self.postgres.url)
        await audit.prepare_clock()
        model = await asyncio.to_thread(ModelServer.start, work)
        stack.callback(model.stop)
        ledger_port, mesh_port = free_ports(2)
        self._ledger = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.traffic.ledger", str(ledger_port), str(self.ledger_file)],
            cwd=ROOT,
        )
        stack.callback(self._ledger.kill)
        self.proxies = Proxies(work / "proxy.sock")
        stack.callback(self.proxies.stop)
        await self.proxies.start(
            {
                "postgres": str(self.postgres.socket),
                "valkey": str(self.valkey.socket),
                "mesh": f"127.0.0.1:{mesh_port}",
                "model": model.url.removeprefix("http://").removesuffix("/v1"),
                "ledger": f"127.0.0.1:{ledger_port}",
            }
        )
        ports = self.proxies.ports
        self.mesh = Mesh(
            scripted_model=False,
            replicas=self.replicas,
            settings={
                "PYTHONPATH": f"{self.source}:{self.source / 'gen'}",
                LEDGER: f"127.0.0.1:{ports['ledger']}",
                "HERMESH_DATABASE_URL": f"postgresql://postgres:{PASSWORD}@127.0.0.1:{ports['postgres']}/postgres",
                "HERMESH_REDIS_URL": f"redis://:{PASSWORD}@127.0.0.1:{ports['valkey']}/0",
                "HERMESH_MESH_PORT": str(mesh_port),
                "HERMESH_MESH_ADDRESS": f"127.0.0.1:{ports['mesh']}",
                "HERMESH_LLM_BASE_URL": f"http://127.0.0.1:{ports['model']}/v1",
                "HERMESH_LLM_MODEL": "scripted",
                "HERMESH_LLM_TOOL_MODE": "native",
                "HERMESH_LLM_PREFILL": "true" if self.prefill else "false",
                "HERMESH_LLM_FIRST_BYTE_TIMEOUT": "3",
                "HERMESH_LLM_IDLE_TIMEOUT": "5",
                "HERMESH_TOOL_MODULES": "tests.chaos.traffic.tools",
                "HERMESH_FAILPOINTS": str(self.failpoints),
            }
            | dict(self.settings),
        )
        stack.callback(self._leave_mesh)
        await asyncio.to_thread(self.mesh.__enter__)
        await audit.install()

    def _leave_mesh(self) -> None:
        # What was stopped must hear that it is to end.
        for child in self._state().children:
            child.identity.send(signal.SIGCONT)
        logs = self.mesh.data_dir / "logs"
        if logs.is_dir():
            shutil.copytree(logs, self.folder / "logs", dirs_exist_ok=True)
        self.mesh.__exit__(None, None, None)

    def _state(self) -> State:
        """Who runs, from the file that the supervisor keeps: a command would cost a second of a core."""
        return State.load(self.mesh.data_dir / "state.json")

    def _rows(self) -> list[Replica]:
        return [
            Replica(child.service, child.replica, child.pid, child.address, "", child.restarts)
            for child in self._state().children
        ]

    @property
    def processes(self) -> list[Identity]:
        """Everything that the mesh consists of, its supervisor first."""
        state = self._state()
        supervisor = state.supervisor_identity
        return [*([supervisor] if supervisor else []), *(child.identity for child in state.children)]

    def of(self, service: str) -> list[Replica]:
        """The living replicas of a service, or of `envoy`."""
        return [row for row in self._rows() if row.service == service and row.pid]

    def signal(self, replica: Replica, number: signal.Signals) -> None:
        """Sends a signal to one replica, if it is still the one that it was."""
        for child in self._state().children:
            if child.pid == replica.pid:
                child.identity.send(number)

    async def up(self) -> None:
        """`hermesh up`, until it says that all is well. Raises MeshError if it never does."""
        deadline = time.monotonic() + _REPAIR_SECONDS
        while True:
            try:
                arguments = ("up", "--no-reply", "--replicas", self.replicas)
                await asyncio.to_thread(self.mesh.command, *arguments, seconds=UP_SECONDS)
            except (MeshError, subprocess.TimeoutExpired):
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.5)
            else:
                return

    @property
    def wanted(self) -> dict[str, int]:
        """How many replicas each service is to have."""
        return parse_replicas(self.replicas)

    async def scale(self, service: str, number: int) -> None:
        """`hermesh scale`, until it says that all is well. Raises LaunchError if it never does."""
        deadline = time.monotonic() + _REPAIR_SECONDS
        request = {"command": "scale", "replicas": {service: number}}
        while True:
            try:
                await asyncio.to_thread(ask, Folder(self.mesh.data_dir), request)
            except LaunchError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.5)
            else:
                return

    async def healthy(self, seconds: float = _HEALTHY_SECONDS) -> bool:
        """Returns once a call goes through every service; False if it does not within the time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                rows = await asyncio.to_thread(self.mesh.status)
            except Exception:
                rows = []
            if rows and all(row.health == "healthy" for row in rows):
                return True
            await asyncio.sleep(0.3)
        return False


def _mount(folder: Path) -> Path | None:
    """Mounts a disk that can be filled up; None where that is not allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES},mode=755", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, timeout=10, check=False)
    return folder if done.returncode == 0 else None


def _unmount(folder: Path) -> None:
    subprocess.run(["umount", "-l", str(folder)], capture_output=True, timeout=10, check=False)
