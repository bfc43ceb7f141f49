"""The supervisor: keeps every process of the mesh running, and answers on a unix socket.

    python -m launcher.supervisor

It is started by `hermesh up` and outlives it. It writes whom it started to `state.json`; when it is
killed itself, its children go on, and the next supervisor takes them over, known by pid and start time.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from itertools import count
from typing import Any

from launcher import envoy, probes, targets
from launcher.children import READY_SECONDS, Child, Children, note
from launcher.code import code_here
from launcher.errors import LaunchError, explain_os_error
from launcher.folder import Folder
from launcher.hangs import HangWatch
from launcher.kept import Kept, places, told
from launcher.leftovers import STOP_SECONDS, end_leftovers
from launcher.plan import DEFAULT_REPLICAS, PARTS, SERVICES, STAGES, Plan, Spec, fingerprint
from launcher.ports import free_port
from launcher.processes import identify, raise_open_files
from launcher.renew import Renewal
from launcher.restart import Restart, parse_service
from launcher.settings import LauncherSettings
from launcher.state import Remembered, State
from meshkit.lifecycle import schedule_in_batches
from meshkit.settings import load

SETUP_SECONDS = 60.0
TRIM_SECONDS = 30.0
WRITE_AGAIN_SECONDS = 1.0
# An endpoint file is seen within milliseconds; an Envoy that does not answer must not hold a drain up.
REMOVED_SECONDS = 2.0

Say = Callable[[str], Awaitable[None]]


class Supervisor:
    """Everything that one data folder's mesh consists of.

    Raises:
        LaunchError: Another one supervises this data folder.
    """

    def __init__(self, settings: LauncherSettings) -> None:
        self.folder = Folder(settings.folder)
        self.folder.prepare()
        # Held as long as the process lives: two at once would each start everything.
        self._lock_file = (self.folder.root / "supervisor.lock").open("a")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise LaunchError("another supervisor runs for this data folder; see hermesh status") from None
        self.state = State.load(self.folder.state_file)
        left = [child for child in self.state.children if child.identity.alive]
        # What was started with other settings is ended instead of taken over, or they would never apply.
        same = self.state.settings == fingerprint()
        self.leftovers = {child.replica: child for child in left} if same else {}
        self.strangers = [] if same else left
        if not self.leftovers:
            self.state.ports.clear()
        if settings.mesh_port:
            self.state.ports["mesh"] = settings.mesh_port
        for name in ("mesh", "model"):
            self.state.ports.setdefault(name, free_port())
        self.plan = Plan(settings, self.folder, self.state.ports)
        self.plan.envoy_number = self._newest_envoy()
        self.state.settings = fingerprint()
        self.state.code = code_here()
        self.state.addresses = {
            "http": f"127.0.0.1:{settings.http_port}",
            "grpc": f"127.0.0.1:{settings.grpc_port}",
        }
        if settings.envoy_metrics_port:
            self.state.addresses["envoy_metrics"] = f"127.0.0.1:{settings.envoy_metrics_port}"
        me = identify(os.getpid())
        assert me is not None
        self.state.supervisor = {"pid": me.pid, "start_time": me.start_time}
        self.stopped = asyncio.Event()
        self.lock = asyncio.Lock()
        self.unwritten = asyncio.Event()
        self.kept: Kept | None = None

    def close(self) -> None:
        """Lets another one supervise this folder."""
        self._lock_file.close()

    async def run(self) -> None:
        """Serves the control socket until `down`."""
        socket = self.folder.control_socket
        socket.unlink(missing_ok=True)
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as group:
            self.children = Children(self.folder, group, self.publish, self.save)
            upkeep = [
                group.create_task(self._trim_logs(), name="trim-logs"),
                group.create_task(self.write_again(), name="write-again"),
            ]
            if self.plan.settings.hang_seconds:
                watch = HangWatch(self.children, self.plan.settings.hang_seconds)
                upkeep.append(group.create_task(watch.run(), name="hangs"))
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self.stopped.set)
            server = await asyncio.start_unix_server(self._serve, socket)
            os.chmod(socket, 0o600)
            self.save()
            note("the supervisor serves")
            async with server:
                await self.stopped.wait()
                # Its caller hears how the command under way ended.
                async with self.lock:
                    await self.stop_everything()
            for task in upkeep:
                task.cancel()
        socket.unlink(missing_ok=True)
        self.folder.state_file.unlink(missing_ok=True)
        note("the supervisor ends")

    async def _trim_logs(self) -> None:
        while True:
            await asyncio.sleep(TRIM_SECONDS)
            await asyncio.to_thread(self.children.trim_logs)

    async def write_again(self) -> None:
        """What a full disk kept from being written is written when there is space again."""
        while True:
            await self.unwritten.wait()
            await asyncio.sleep(WRITE_AGAIN_SECONDS)
            self.unwritten.clear()
            self.publish()

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
        except OSError as error:
            await send({"error": str(explain_os_error(error, "do that"))})
        except (ValueError, KeyError, TypeError, TimeoutError) as error:
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
                replicas, prepared = request.get("replicas") or {}, bool(request.get("prepared"))
                await self._unless_stopped(self.up(replicas, say, prepared=prepared))
                # What it was told is kept, now that it works.
                self.publish()
                return {"settings_changed": request.get("settings") not in (None, self.state.settings)}
            case "scale":
                await self._unless_stopped(self.scale(request["replicas"], say))
                return None
            case "restart":
                services = parse_service(request["service"])
                await self._unless_stopped(self.restart(services, say, rolling=bool(request["rolling"])))
                return {"settings_changed": request.get("settings") not in (None, self.state.settings)}
            case "down":
                # Whatever became of the file meanwhile: if we do not get to the end, it says who is left.
                self.save()
                self.stopped.set()
                return {"processes": sum(child.identity.alive for child in self.state.children)}
            case other:
                raise LaunchError(f"the supervisor knows no command {other!r}")

    async def _unless_stopped(self, work: Coroutine[Any, Any, None]) -> None:
        """Does one command at a time, and gives it up when all is to end."""

        async def alone() -> None:
            async with self.lock:
                await work

        working = asyncio.ensure_future(alone())
        stopping = asyncio.ensure_future(self.stopped.wait())
        try:
            await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
            if not working.done():
                working.cancel()
                await asyncio.wait((working,))
            work.close()
        if working.cancelled():
            raise LaunchError("hermesh down ended it in the middle")
        await working

    # Commands

    async def up(self, replicas: dict[str, int], say: Say, *, prepared: bool = False) -> None:
        """Starts what is missing, replaces what is of another version, and returns when all of it is healthy.

        With `prepared` whoever asks has brought the schema as far as replicas of this version need it.
        """
        if self.strangers:
            await say("ending what an earlier mesh with other settings left behind")
            await asyncio.to_thread(end_leftovers, self.strangers)
            self.strangers = []
        # What somebody else has to mend is said before anything is started.
        await self.check_external()
        parts = self.plan.parts()
        here = self.children.all.keys() | self.leftovers.keys()
        missing = [spec.service for spec in parts if spec.replica not in here]
        if missing:
            await say(f"starting {', '.join(missing)}")
        for spec in parts:
            self.start(spec)
        for left in self._left("envoy"):
            # An upgrade was broken off; it goes on below.
            self.start(self.plan.envoy_spec(left))
        await self.children.wait_ready(self.children.all[spec.replica] for spec in parts)
        if not prepared and not any(self.children.count(service) for service in SERVICES):
            await self._prepare_database(say)
        wanted = {
            service: replicas.get(
                service, max(self.children.count(service), len(self._left(service))) or default
            )
            for service, default in DEFAULT_REPLICAS.items()
        }
        await self.scale(wanted, say)
        # Kept once it works: a start that comes to nothing must not be what the next one repeats.
        now = told(os.environ)
        self.kept = Kept(now, self.state.settings, exists=True, places=places(now, self.folder))
        await self._renew(say)

    async def scale(self, wanted: dict[str, int], say: Say) -> None:
        """Brings services to these numbers of replicas and returns when Envoy has them."""
        if not self.children.all:
            raise LaunchError("nothing runs yet; start it with: hermesh up")
        starting = [
            name
            for name in SERVICES
            if self.children.count(name) + len(self._left(name)) < wanted.get(name, 0)
        ]
        if starting:
            await say(f"starting {', '.join(starting)}")
        surplus: list[Child] = []
        for service, number in wanted.items():
            # What an earlier supervisor left beyond that is taken over too, to be drained.
            for left in self._left(service):
                self.start(self.plan.service(service, left))
            while self.children.count(service) < number:
                self.start(self.plan.service(service, self.free_number(service)))
            surplus += sorted(self.children.of(service), key=lambda child: child.spec.number)[number:]
        await self.children.wait_ready(c for c in self.children.all.values() if c not in surplus)
        if surplus:
            await say(f"draining {', '.join(child.spec.replica for child in surplus)}")
            await asyncio.gather(*(self._take_out(child) for child in surplus))
        # Whatever became of the files meanwhile: from others Envoy would wait in vain.
        self.publish()
        await say("waiting until Envoy finds every replica healthy")
        await self._wait_balanced([child for service in SERVICES for child in self.children.of(service)])

    async def restart(self, services: Sequence[str], say: Say, *, rolling: bool) -> None:
        """Restarts services with the settings that the mesh was started with; see `Restart`."""
        restart = self._restart(say)
        await (restart.rolling if rolling else restart.at_once)(services)

    def _restart(self, say: Say) -> Restart:
        return Restart(
            self.plan,
            self.children,
            number=self.free_number,
            balanced=self._wait_balanced,
            take_out=self._take_out,
            say=say,
        )

    async def _renew(self, say: Say) -> None:
        """Replaces what another version's code started."""
        renewal = Renewal(
            self.plan,
            self.children,
            self._restart(say),
            balanced=self._wait_balanced,
            code=self.state.code,
            say=say,
        )
        if await renewal.run():
            # What had to wait until the former version is gone.
            await self._prepare_database(say)

    async def status(self) -> list[dict[str, Any]]:
        """One row a process, parts that a URL names among them."""
        balanced = await self.plan.admin.healthy()
        children = list(self.children.all.values())
        health = await asyncio.gather(*(self._health(child, balanced) for child in children))
        rows: list[dict[str, Any]] = [
            {
                "service": child.spec.service,
                "replica": child.spec.replica,
                "pid": child.identity.pid if child.identity else None,
                "address": child.address,
                "health": well,
                "reason": why,
                "restarts": child.restarts,
                "last_exit": child.last_exit,
                "external": False,
            }
            for child, (well, why) in zip(children, health, strict=True)
        ]
        external = self.plan.external()
        problems = await asyncio.gather(*(problem() for _, _, problem in external))
        for (service, address, _), wrong in zip(external, problems, strict=True):
            rows.append(
                {"service": service, "replica": service, "pid": None, "address": address}
                | {"health": "unhealthy" if wrong else "healthy", "reason": wrong}
                | {"restarts": 0, "last_exit": "", "external": True}
            )
        order = (*PARTS, "objects", *SERVICES)
        return sorted(
            rows, key=lambda row: (order.index(row["service"]), len(row["replica"]), row["replica"])
        )

    async def _health(self, child: Child, balanced: Any) -> tuple[str, str]:
        """How a process is, in one word, and why."""
        if child.stopping:
            return "draining", ""
        if not child.ready.is_set():
            return ("restarting" if child.restarts else "starting"), ""
        if child.spec.probe:
            if not await child.spec.probe():
                return "unhealthy", probes.NO_ANSWER
            why = await child.spec.trouble() if child.spec.trouble else ""
            return ("degraded", why) if why else ("healthy", "")
        if not balanced.get(f"{child.spec.service}/{child.address}"):
            return "unhealthy", "Envoy does not find it healthy"
        why = await probes.degraded(child.metrics_address)
        return ("degraded", why) if why else ("healthy", "")

    # Steps

    def start(self, spec: Spec) -> None:
        """Keeps a process running from now on, an earlier supervisor's if it still lives."""
        if spec.replica not in self.children.all:
            self.children.start(spec, self.leftovers.pop(spec.replica, None))

    def _waiting(self, service: str) -> list[Remembered]:
        """What an earlier supervisor left of a service and this one does not keep yet."""
        return [child for child in self.leftovers.values() if child.service == service]

    def _newest_envoy(self) -> int:
        """The number of the Envoy that takes new connections, of those that an earlier supervisor left."""
        found = self._waiting("envoy")
        newest = max(found, key=lambda child: child.identity.start_time, default=None)
        return int(newest.replica.rpartition("-")[2]) if newest else 1

    def _left(self, service: str) -> list[int]:
        return [int(child.replica.rpartition("-")[2]) for child in self._waiting(service)]

    def free_number(self, service: str) -> int:
        """The lowest number from 1 that no replica of a service has, not even one that is about to end."""
        taken = {child.spec.number for child in self.children.all.values() if child.spec.service == service}
        taken.update(self._left(service))
        return next(number for number in count(1) if number not in taken)

    async def _take_out(self, child: Child) -> None:
        """Takes a replica out: Envoy sends it nothing more; only then it is told to finish and end."""
        child.stop()
        self.publish()
        place = f"{child.spec.service}/{child.address}"
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REMOVED_SECONDS):
                while place in await self.plan.admin.healthy():  # noqa: ASYNC110 - Envoy has no event for it
                    await asyncio.sleep(0.02)
        await self.children.drain(child, self.plan.drain_seconds)

    async def stop_everything(self) -> None:
        """Ends services, then the parts they need."""
        await asyncio.to_thread(end_leftovers, [*self.leftovers.values(), *self.strangers])
        for services in STAGES:
            group = [child for child in self.children.all.values() if child.spec.service in services]
            await asyncio.gather(*(self.children.end(child, STOP_SECONDS) for child in group))

    def publish(self) -> None:
        """Tells Envoy where the replicas are, and the disk who runs."""
        eds = self.folder.envoy / "eds"
        for service in envoy.CLUSTERS:
            # A replica that died keeps its place until its successor says where it is: an empty list
            # would take the cluster away, and health checks already keep calls off it. So does one of an
            # earlier supervisor's that is still to be taken over: it serves all the time.
            known = {child.address for child in self.children.of(service)}
            known |= {child.address for child in self._waiting(service)}
            try:
                envoy.write_endpoints(eds, service, sorted(filter(None, known)))
            except OSError as error:
                self._failed_to_write(f"the endpoints of {service}", error)
        try:
            targets.write(self.folder.targets, self.children.all.values(), self.state.addresses)
        except OSError as error:
            self._failed_to_write(str(self.folder.targets), error)
        self.save()
        self._keep_settings()

    def _keep_settings(self) -> None:
        if self.kept is None or Kept.load(self.folder) == self.kept:
            return
        try:
            self.kept.save(self.folder)
        except OSError as error:
            self._failed_to_write(str(self.folder.settings_file), error)

    def save(self) -> None:
        """Writes `state.json`."""
        self.state.children = [
            *(child.remembered(child.identity) for child in self.children.all.values() if child.identity),
            *self.leftovers.values(),
            *self.strangers,
        ]
        try:
            self.state.save(self.folder.state_file)
        except OSError as error:
            self._failed_to_write(str(self.folder.state_file), error)

    def _failed_to_write(self, what: str, error: OSError) -> None:
        note(f"{what} cannot be written: {error}")
        self.unwritten.set()

    async def check_external(self) -> None:
        """Raises LaunchError naming a part that a URL names and that does not work."""
        names = {
            "postgresql": "DATABASE_URL",
            "valkey": "REDIS_URL",
            "model": "LLM_BASE_URL",
            "objects": "OBJECT_STORE_URL",
        }
        working: set[str] = set()
        complaints: dict[str, str] = {}
        for service, address, problem in self.plan.external():
            if wrong := await problem():
                complaints.setdefault(
                    service, f"{service} at {address} {wrong}; check HERMESH_{names[service]}"
                )
            else:
                working.add(service)
        for service, complaint in complaints.items():
            # Of several model backends one is enough to begin with; hermesh status names the others.
            if service not in working:
                raise LaunchError(complaint)

    async def _prepare_database(self, say: Say) -> None:
        """Brings the schema up to date and makes the first tenant, unless this was done before."""
        # A database of ours keeps a mark beside its data; what a URL names may be another one tomorrow.
        if self.plan.postgres and self.plan.postgres.mark() == self.plan.schema_fingerprint():
            return
        # Those of another version work on: what they do not survive waits until they are replaced.
        rollout = any(left.code != self.state.code for left in self._waiting("session"))
        await say("preparing the database")
        *migrations, bootstrap = self.plan.setup_commands(rollout=rollout)
        await asyncio.gather(*(self._set_up(*one) for one in migrations))
        await self._set_up(*bootstrap)
        if self.plan.postgres and not rollout:
            self.plan.postgres.write_mark(self.plan.schema_fingerprint())

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
            raise LaunchError(f"{what} took longer than {SETUP_SECONDS:.0f} s and were given up") from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode != 0:
            lines = said.decode(errors="replace").strip().splitlines()
            why = lines[-1].removeprefix("hermesh: ") if lines else f"status {process.returncode}"
            raise LaunchError(f"{what} failed: {why}")

    async def _wait_balanced(self, children: Sequence[Child]) -> None:
        missing: list[str] = []
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(READY_SECONDS):
                while missing := await self._unbalanced(children):  # noqa: ASYNC110 - Envoy has no event
                    await asyncio.sleep(0.05)
        if missing:
            raise LaunchError(
                f"Envoy does not find {', '.join(missing)} healthy after {READY_SECONDS:.0f} s; "
                f"see {self.folder.logs}"
            )

    async def _unbalanced(self, children: Sequence[Child]) -> list[str]:
        found = await self.plan.admin.healthy()
        return [
            child.spec.replica
            for child in children
            if not child.stopping and not found.get(f"{child.spec.service}/{child.address}")
        ]


async def _main() -> None:
    await Supervisor(load(LauncherSettings)).run()


def main() -> None:
    """Supervises the mesh of the data folder that the environment names."""
    raise_open_files()
    # For Envoy and the stores too, which inherit it.
    schedule_in_batches()
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
