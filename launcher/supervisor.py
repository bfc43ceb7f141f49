"""The supervisor: keeps every process of the mesh running, and answers on a unix socket.

    python -m launcher.supervisor

It is started by `hermesh up` and outlives it. It writes whom it started to `state.json`; when it is
killed itself, its children go on, and the next supervisor takes them over, known by pid and start time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from launcher import envoy
from launcher.errors import LaunchError, explain_os_error
from launcher.folder import Folder
from launcher.plan import DEFAULT_REPLICAS, PARTS, SERVICES, Plan, Spec, free_port
from launcher.processes import Identity, identify, spawn
from launcher.settings import LauncherSettings
from launcher.state import Remembered, State
from meshkit.settings import load

READY_SECONDS = 60.0
SETUP_SECONDS = 60.0
STOP_SECONDS = 12.0
DRAIN_SECONDS = 30.0
FAILURES_BEFORE_GIVING_UP = 3
MAX_BACKOFF = 5.0
STEADY_SECONDS = 10.0
LOG_BYTES = 64 * 1024 * 1024

Say = Callable[[str], Awaitable[None]]


@dataclass(slots=True)
class Child:
    """A process that is kept running."""

    spec: Spec
    identity: Identity | None = None
    process: subprocess.Popen[bytes] | None = None
    address: str = ""
    restarts: int = 0
    failures: int = 0
    last_exit: str = ""
    stopping: bool = False
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    def leaving(self) -> bool:
        """Whether it is to end; asked again after every wait."""
        return self.stopping


class Supervisor:
    """Everything that one data folder's mesh consists of."""

    def __init__(self, settings: LauncherSettings) -> None:
        self.folder = Folder(settings.folder)
        self.folder.prepare()
        self.state = State.load(self.folder.state_file)
        for name in ("mesh", "model"):
            self.state.ports.setdefault(name, free_port())
        self.plan = Plan(settings, self.folder, self.state.ports)
        self.state.settings = self.plan.fingerprint()
        self.state.addresses = {
            "http": f"127.0.0.1:{settings.http_port}",
            "grpc": f"127.0.0.1:{settings.grpc_port}",
        }
        me = identify(os.getpid())
        assert me is not None
        self.state.supervisor = {"pid": me.pid, "start_time": me.start_time}
        self.children: dict[str, Child] = {}
        self.leftovers = {child.replica: child for child in self.state.children if child.identity.alive}
        self.stopped = asyncio.Event()
        self.lock = asyncio.Lock()
        self.group: asyncio.TaskGroup | None = None

    async def run(self) -> None:
        """Serves the control socket until `down`."""
        socket = self.folder.control_socket
        socket.unlink(missing_ok=True)
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as group:
            self.group = group
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self.stopped.set)
            server = await asyncio.start_unix_server(self._serve, socket)
            os.chmod(socket, 0o600)
            self.save()
            async with server:
                await self.stopped.wait()
            async with self.lock:
                await self.stop_everything()
        socket.unlink(missing_ok=True)
        self.folder.state_file.unlink(missing_ok=True)

    # Control

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def send(record: dict[str, Any]) -> None:
            # A client that left does not stop what it asked for.
            with contextlib.suppress(ConnectionError, TimeoutError):
                writer.write(json.dumps(record).encode() + b"\n")
                async with asyncio.timeout(5):
                    await writer.drain()

        try:
            async with asyncio.timeout(5):
                request = json.loads(await reader.readline())
            answer = await self._answer(request, lambda text: send({"progress": text}))
            await send({"ok": answer})
        except LaunchError as error:
            await send({"error": str(error)})
        except (ValueError, TimeoutError, ConnectionError) as error:
            await send({"error": f"the supervisor did not understand: {error}"})
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError, TimeoutError):
                await asyncio.wait_for(writer.wait_closed(), 2)

    async def _answer(self, request: dict[str, Any], say: Say) -> Any:
        match request["command"]:
            case "status":
                return await self.status()
            case "up":
                async with self.lock:
                    await self.up(request.get("replicas") or {}, say)
                return {"settings_changed": request.get("settings") not in (None, self.state.settings)}
            case "scale":
                async with self.lock:
                    await self.scale(request["replicas"], say)
                return None
            case "down":
                self.stopped.set()
                return None
            case other:
                raise LaunchError(f"the supervisor knows no command {other!r}")

    # Commands

    async def up(self, replicas: dict[str, int], say: Say) -> None:
        """Starts what is missing and returns when all of it is healthy."""
        parts = self.plan.parts()
        missing = [spec.service for spec in parts if spec.replica not in self.children]
        if missing:
            await say(f"starting {', '.join(missing)}")
        for spec in parts:
            self.start(spec)
        await self.wait_ready([self.children[spec.replica] for spec in parts])
        await self._check_external()
        if not any(child.spec.service in SERVICES for child in self.children.values()):
            await say("preparing the database")
            await asyncio.gather(*(self._set_up(*one) for one in self.plan.setup_commands()[:2]))
            await self._set_up(*self.plan.setup_commands()[2])
        wanted = {
            service: replicas.get(service, max(self.count(service), self._left(service)) or default)
            for service, default in DEFAULT_REPLICAS.items()
        }
        await self.scale(wanted, say)

    async def scale(self, wanted: dict[str, int], say: Say) -> None:
        """Brings services to these numbers of replicas and returns when Envoy has them."""
        if not self.children:
            raise LaunchError("nothing runs yet; start it with: hermesh up")
        starting = [name for name in SERVICES if self.count(name) < wanted.get(name, 0)]
        if starting:
            await say(f"starting {', '.join(starting)}")
        surplus: list[Child] = []
        for service, number in wanted.items():
            for index in range(1, number + 1):
                self.start(self.plan.service(service, index))
            surplus += [
                child for child in self.of(service) if int(child.spec.replica.rpartition("-")[2]) > number
            ]
        await self.wait_ready(list(self.children.values()))
        if surplus:
            await say(f"draining {', '.join(child.spec.replica for child in surplus)}")
            await asyncio.gather(*(self.drain(child) for child in surplus))
        await say("waiting until Envoy finds every replica healthy")
        await self._wait_balanced()

    async def status(self) -> list[dict[str, Any]]:
        """One row a process, parts that a URL names among them."""
        balanced = await self.plan.admin.healthy()
        rows = []
        for child in self.children.values():
            rows.append(self._row(child, await self._health(child, balanced)))
        for service, address, probe in self.plan.external():
            health = "healthy" if await probe() else "unhealthy"
            rows.append(
                {"service": service, "replica": service, "pid": None, "address": address, "health": health}
                | {"restarts": 0, "last_exit": "", "external": True}
            )
        order = (*PARTS, *SERVICES)
        return sorted(rows, key=lambda row: (order.index(row["service"]), row["replica"]))

    def _row(self, child: Child, health: str) -> dict[str, Any]:
        return {
            "service": child.spec.service,
            "replica": child.spec.replica,
            "pid": child.identity.pid if child.identity else None,
            "address": child.address,
            "health": health,
            "restarts": child.restarts,
            "last_exit": child.last_exit,
            "external": False,
        }

    async def _health(self, child: Child, balanced: Any) -> str:
        if child.stopping:
            return "draining"
        if not child.ready.is_set():
            return "restarting" if child.restarts else "starting"
        if child.spec.probe:
            return "healthy" if await child.spec.probe() else "unhealthy"
        return "healthy" if balanced.get(f"{child.spec.service}/{child.address}") else "unhealthy"

    # Children

    def of(self, service: str) -> list[Child]:
        """The children of one service that are not on their way out."""
        return [c for c in self.children.values() if c.spec.service == service and not c.stopping]

    def count(self, service: str) -> int:
        """How many of them there are."""
        return len(self.of(service))

    def _left(self, service: str) -> int:
        return sum(child.service == service for child in self.leftovers.values())

    def start(self, spec: Spec) -> None:
        """Keeps a process running from now on, an earlier supervisor's if it still lives."""
        if spec.replica in self.children:
            return
        child = Child(spec, address=spec.address)
        left = self.leftovers.pop(spec.replica, None)
        if left is not None:
            child.identity = left.identity
            child.address = left.address or spec.address
            child.restarts = left.restarts
            child.last_exit = left.last_exit
        self.children[spec.replica] = child
        assert self.group is not None
        child.task = self.group.create_task(self._keep(child), name=spec.replica)

    async def _keep(self, child: Child) -> None:
        backoff = 0.1
        while not child.leaving():
            began = time.monotonic()
            try:
                if child.identity is None:
                    await self._launch(child)
                assert child.identity is not None
                exited = asyncio.ensure_future(self._wait_exit(child))
                try:
                    await self._wait_first_ready(child, exited)
                    await exited
                finally:
                    exited.cancel()
                child.last_exit = self._describe_exit(child)
            except (LaunchError, OSError) as error:
                child.last_exit = str(error)
            child.identity = None
            child.process = None
            child.ready.clear()
            if child.leaving():
                break
            child.restarts += 1
            child.failures = 0 if time.monotonic() - began > STEADY_SECONDS else child.failures + 1
            child.changed.set()
            print(f"{child.spec.replica} ended ({child.last_exit}); starting it again", flush=True)  # noqa: T201
            self.publish()
            backoff = 0.1 if child.failures <= 1 else min(MAX_BACKOFF, backoff * 2)
            await asyncio.sleep(backoff)
        self.publish()

    async def _launch(self, child: Child) -> None:
        log = self.folder.logs / f"{child.spec.replica}.log"
        if log.exists() and log.stat().st_size > LOG_BYTES:
            log.replace(log.with_suffix(".log.1"))
        if child.spec.prepare:
            await asyncio.to_thread(child.spec.prepare)
        child.process = spawn(child.spec.command, dict(child.spec.environment), log)
        child.identity = identify(child.process.pid)
        self.save()

    async def _wait_exit(self, child: Child) -> None:
        assert child.identity is not None
        loop = asyncio.get_running_loop()
        try:
            handle = os.pidfd_open(child.identity.pid)
        except ProcessLookupError:
            return
        ended = asyncio.Event()
        loop.add_reader(handle, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(handle)
            os.close(handle)

    async def _wait_first_ready(self, child: Child, exited: asyncio.Future[None]) -> None:
        while not exited.done():
            address = await self._asked_ready(child)
            if address:
                child.address = address
                child.ready.set()
                child.changed.set()
                self.publish()
                return
            await asyncio.wait([exited], timeout=0.03)

    async def _asked_ready(self, child: Child) -> str:
        assert child.identity is not None
        if child.spec.ready_file is None:
            assert child.spec.probe is not None
            return child.spec.address if await child.spec.probe() else ""
        try:
            record = json.loads(child.spec.ready_file.read_text())
        except (OSError, ValueError):
            return ""
        return str(record["address"]) if record.get("pid") == child.identity.pid else ""

    def _describe_exit(self, child: Child) -> str:
        code = child.process.poll() if child.process else None
        if code is None:
            return "it ended under another supervisor"
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return f"exit status {code}{self._last_words(child)}"

    def _last_words(self, child: Child) -> str:
        try:
            with (self.folder.logs / f"{child.spec.replica}.log").open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - 2000))
                lines = log.read().decode(errors="replace").strip().splitlines()
        except OSError:
            return ""
        return f": {lines[-1][:500]}" if lines else ""

    async def wait_ready(self, children: list[Child]) -> None:
        """Returns when all are ready. Raises LaunchError naming the one that does not get there."""

        async def one(child: Child) -> None:
            while not child.ready.is_set():
                child.changed.clear()
                if child.failures >= FAILURES_BEFORE_GIVING_UP or "HERMESH_DATA_DIR" in child.last_exit:
                    raise LaunchError(f"{child.spec.replica} does not start: {child.last_exit}")
                if child.stopping:
                    return
                await child.changed.wait()

        try:
            async with asyncio.timeout(READY_SECONDS):
                async with asyncio.TaskGroup() as group:
                    for child in children:
                        group.create_task(one(child))
        except* LaunchError as errors:
            raise errors.exceptions[0] from None
        except* TimeoutError:
            late = [child.spec.replica for child in children if not child.ready.is_set()]
            raise LaunchError(
                f"{', '.join(late)} did not get ready within {READY_SECONDS:.0f} s; see {self.folder.logs}"
            ) from None

    async def drain(self, child: Child) -> None:
        """Takes a replica out: Envoy first, then the process, which finishes what it has."""
        child.stopping = True
        child.changed.set()
        self.publish()
        await self._end(child, DRAIN_SECONDS)
        self.children.pop(child.spec.replica, None)
        self.save()

    async def _end(self, child: Child, grace: float) -> None:
        child.stopping = True
        child.changed.set()
        if child.identity and child.task:
            # PostgreSQL's SIGTERM waits for its clients; its SIGINT is the fast and clean stop.
            number = signal.SIGINT if child.spec.service == "postgresql" else signal.SIGTERM
            child.identity.send(number)
            await asyncio.wait([child.task], timeout=grace)
            if not child.task.done() and child.identity is not None:
                child.identity.send(signal.SIGKILL)
        if child.task:
            await asyncio.wait([child.task], timeout=5)
            child.task.cancel()

    async def stop_everything(self) -> None:
        """Ends services, then the parts they need."""
        for left in self.leftovers.values():
            left.identity.send(signal.SIGKILL)
        for names in (SERVICES, ("envoy", "model", "valkey"), ("postgresql",)):
            group = [child for child in self.children.values() if child.spec.service in names]
            await asyncio.gather(*(self._end(child, STOP_SECONDS) for child in group))

    # What others see

    def publish(self) -> None:
        """Tells Envoy where the replicas are, and the disk who runs."""
        eds = self.folder.envoy / "eds"
        for service in envoy.CLUSTERS:
            # A replica that died keeps its place until its successor says where it is: an empty list
            # would take the cluster away, and health checks already keep calls off it.
            known = [child.address for child in self.of(service) if child.address]
            envoy.write_endpoints(eds, service, sorted(known))
        self.save()

    def save(self) -> None:
        """Writes `state.json`."""
        self.state.children = [
            Remembered(
                child.spec.service,
                child.spec.replica,
                child.identity.pid,
                child.identity.start_time,
                child.address,
                child.restarts,
                child.last_exit,
            )
            for child in self.children.values()
            if child.identity
        ] + list(self.leftovers.values())
        with contextlib.suppress(OSError):
            self.state.save(self.folder.state_file)

    async def _check_external(self) -> None:
        for service, address, probe in self.plan.external():
            if not await probe():
                variable = {"postgresql": "DATABASE_URL", "valkey": "REDIS_URL", "model": "LLM_BASE_URL"}[
                    service
                ]
                raise LaunchError(f"{service} at {address} does not answer; check HERMESH_{variable}")

    async def _set_up(self, what: str, command: list[str], environment: dict[str, str]) -> None:
        process = await asyncio.create_subprocess_exec(
            *command,
            env=environment,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(SETUP_SECONDS):
                _, said = await process.communicate()
        except TimeoutError:
            process.kill()
            await process.wait()
            raise LaunchError(f"{what} took longer than {SETUP_SECONDS:.0f} s and were given up") from None
        if process.returncode != 0:
            lines = said.decode(errors="replace").strip().splitlines()
            raise LaunchError(f"{what} failed: {lines[-1] if lines else f'status {process.returncode}'}")

    async def _wait_balanced(self) -> None:
        wanted = {
            f"{service}/{child.address}": child.spec.replica
            for service in SERVICES
            for child in self.of(service)
        }
        missing = list(wanted.values())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(READY_SECONDS):
                while missing:
                    found = await self.plan.admin.healthy()
                    missing = [replica for key, replica in wanted.items() if not found.get(key)]
                    if missing:
                        await asyncio.sleep(0.05)
        if missing:
            raise LaunchError(
                f"Envoy does not find {', '.join(missing)} healthy after {READY_SECONDS:.0f} s; "
                f"see {self.folder.logs}"
            )


async def _main() -> None:
    await Supervisor(load(LauncherSettings)).run()


def main() -> None:
    """Supervises the mesh of the data folder that the environment names."""
    try:
        asyncio.run(_main())
    except LaunchError as error:
        sys.stderr.write(f"hermesh: {error}\n")
        raise SystemExit(1) from None
    except OSError as error:
        sys.stderr.write(f"hermesh: {explain_os_error(error, 'supervise the mesh')}\n")
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
