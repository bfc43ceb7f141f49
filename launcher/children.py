"""The processes that a supervisor keeps running: started, adopted, started again when they end, and ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from launcher.code import code_here
from launcher.errors import LaunchError, explain_output
from launcher.folder import Folder
from launcher.plan import SERVICES, Spec
from launcher.processes import Identity, identify, spawn
from launcher.state import Remembered

READY_SECONDS = 60.0
FAILURES_BEFORE_GIVING_UP = 3
FIRST_BACKOFF = 0.1
MAX_BACKOFF = 5.0
STEADY_SECONDS = 10.0
LOOK_SECONDS = 0.03
SILENT_SECONDS = 3.0
# A start is the processor's work: more of them at once than there are cores only make each other late.
STARTS_AT_ONCE = max(2, os.cpu_count() or 1)
TURN_SECONDS = 5.0
# After the grace a second signal ends what a service still does, then SIGKILL ends the service.
HURRY_SECONDS = 3.0
LOG_BYTES = 64 * 1024 * 1024


def note(text: str) -> None:
    """Writes a line into the supervisor's log; a full disk must not end what supervises."""
    with contextlib.suppress(OSError):
        print(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {text}", flush=True)  # noqa: T201


@dataclass(slots=True)
class Child:
    """A process that is kept running."""

    spec: Spec
    identity: Identity | None = None
    process: subprocess.Popen[bytes] | None = None
    address: str = ""
    metrics_address: str = ""
    hung: str = ""
    restarts: int = 0
    failures: int = 0
    last_exit: str = ""
    code: str = ""
    hopeless: str = ""
    log_start: int = 0
    waits: bool = False
    stopping: bool = False
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    def leaving(self) -> bool:
        """Whether it is to end; asked again after every wait."""
        return self.stopping

    def stop(self) -> None:
        """Has it not started again."""
        self.stopping = True
        self.changed.set()

    def remembered(self, identity: Identity) -> Remembered:
        """What the next supervisor has to know."""
        spec = self.spec
        return Remembered(
            spec.service,
            spec.replica,
            identity.pid,
            identity.start_time,
            self.address,
            self.restarts,
            self.last_exit,
            self.code,
        )


class Children:
    """All processes of one mesh.

    Args:
        folder: Where logs are.
        group: Owns a task for each child.
        publish: Called when a child got ready, ended, or is to end.
        save: Called when a child has a new pid.
        at_once: How many replicas may be on their way to ready at the same time.
    """

    def __init__(
        self,
        folder: Folder,
        group: asyncio.TaskGroup,
        publish: Callable[[], None],
        save: Callable[[], None],
        at_once: int = STARTS_AT_ONCE,
    ) -> None:
        self._folder = folder
        self._at_once = at_once
        self._group = group
        self._publish = publish
        self._save = save
        self.all: dict[str, Child] = {}

    def of(self, service: str) -> list[Child]:
        """The children of one service that are not on their way out."""
        return [child for child in self.all.values() if child.spec.service == service and not child.stopping]

    def count(self, service: str) -> int:
        """How many of them there are."""
        return len(self.of(service))

    def start(self, spec: Spec, left: Remembered | None) -> Child:
        """Keeps a process running from now on: `left` of an earlier supervisor, or a new one."""
        child = Child(spec, address=spec.address)
        if left is not None:
            child.identity = left.identity
            child.address = left.address or spec.address
            child.restarts = left.restarts
            child.last_exit = left.last_exit
            child.code = left.code
        self.all[spec.replica] = child
        child.task = self._group.create_task(self._keep(child), name=spec.replica)
        return child

    async def wait_ready(self, children: Iterable[Child]) -> None:
        """Returns when all are ready. Raises LaunchError naming the one that does not get there."""
        children = list(children)

        async def one(child: Child) -> None:
            while not child.ready.is_set():
                child.changed.clear()
                if child.failures >= FAILURES_BEFORE_GIVING_UP or child.hopeless:
                    raise LaunchError(
                        child.hopeless or f"{child.spec.replica} does not start: {child.last_exit}"
                    )
                if child.stopping:
                    return
                await child.changed.wait()

        # Raised after `except*`: a raise within it comes out as a group in early releases of Python 3.11.
        failed: BaseException | None = None
        try:
            async with asyncio.timeout(READY_SECONDS):
                async with asyncio.TaskGroup() as group:
                    for child in children:
                        group.create_task(one(child))
        except* LaunchError as errors:
            failed = errors.exceptions[0]
        except* TimeoutError:
            late = [child.spec.replica for child in children if not child.ready.is_set()]
            failed = LaunchError(
                f"{', '.join(late)} did not get ready within {READY_SECONDS:.0f} s; see {self._folder.logs}"
            )
        if failed is not None:
            raise failed

    async def drain(self, child: Child, grace: float) -> None:
        """Ends a replica for good: taken out of Envoy's list, told to end, and forgotten when it has."""
        child.stop()
        self._publish()
        await self.end(child, grace)
        self.all.pop(child.spec.replica, None)
        self._save()

    async def end(self, child: Child, grace: float) -> None:
        """Ends a process and its keeping; what is still there after `grace` seconds is killed."""
        child.stop()
        if child.task is None:
            return
        # PostgreSQL's SIGTERM waits for its clients; its SIGINT is the fast and clean stop.
        polite = signal.SIGINT if child.spec.service == "postgresql" else signal.SIGTERM
        for number, seconds in ((polite, grace), (polite, HURRY_SECONDS), (signal.SIGKILL, 5.0)):
            if child.identity is not None:
                child.identity.send(number)
            await asyncio.wait([child.task], timeout=seconds)
            if child.task.done():
                return
        child.task.cancel()

    def trim_logs(self) -> None:
        """Keeps the logs of long lives from filling the disk: what is too long starts anew."""
        for log in self._folder.logs.glob("*.log"):
            with contextlib.suppress(OSError):
                if log.stat().st_size > LOG_BYTES:
                    # Its writers go on with the same file: it is copied and cut, not renamed.
                    shutil.copyfile(log, log.with_suffix(".log.1"))
                    os.truncate(log, 0)

    async def _keep(self, child: Child) -> None:
        backoff = FIRST_BACKOFF
        while not child.leaving():
            began = time.monotonic()
            try:
                await self._live(child)
                child.last_exit = self._describe_exit(child)
            except LaunchError as error:
                child.last_exit = child.hopeless = str(error)
            except Exception as error:
                # Whatever it is, it must end neither the supervisor nor what else it keeps.
                child.last_exit = f"{type(error).__name__}: {error}"
                await self._discard(child)
            child.identity = None
            child.process = None
            child.ready.clear()
            if child.leaving():
                break
            child.restarts += 1
            child.failures = 0 if time.monotonic() - began > STEADY_SECONDS else child.failures + 1
            child.changed.set()
            note(f"{child.spec.replica} ended ({child.last_exit}); starting it again")
            self._publish()
            backoff = FIRST_BACKOFF if child.failures <= 1 else min(MAX_BACKOFF, backoff * 2)
            await self._pause(child, backoff)
        self._publish()

    async def _discard(self, child: Child) -> None:
        """Ends a process that nobody could keep: the next one must not run beside it."""
        if child.identity is not None:
            child.identity.send(signal.SIGKILL)
        if child.process is not None:
            await asyncio.to_thread(child.process.wait)

    async def _pause(self, child: Child, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not child.leaving():
                    child.changed.clear()
                    await child.changed.wait()

    async def _wait_turn(self, child: Child) -> None:
        """Returns when a replica is to start: the first one of each service before the second of any.

        So a mesh that lost everything serves again once one of each is there. What never gets ready keeps the
        others waiting for `TURN_SECONDS` at most.
        """
        if child.spec.service not in SERVICES:
            return
        child.waits = True
        try:
            async with asyncio.timeout(TURN_SECONDS):
                while True:
                    # A moment in any case: what ended together is to be seen together.
                    await asyncio.sleep(LOOK_SECONDS)
                    if child.leaving() or self._next() is child:
                        return
        except TimeoutError:
            note(f"{child.spec.replica} starts beside others that take long")
        finally:
            child.waits = False

    def _next(self) -> Child | None:
        """Whose turn it is to start; None while as many start as the machine can do at once.

        What others need goes first: an agent asks for the list of tools as soon as it serves.
        """
        replicas = [child for child in self.all.values() if child.spec.service in SERVICES]
        started = [child for child in replicas if child.identity is not None]
        if sum(not child.ready.is_set() for child in started) >= self._at_once:
            return None
        has = Counter(child.spec.service for child in started)
        waiting = [child for child in replicas if child.waits]

        def place(child: Child) -> tuple[int, int]:
            return has[child.spec.service], SERVICES.index(child.spec.service)

        return min(waiting, key=place, default=None)

    async def _live(self, child: Child) -> None:
        """One life of a process: from its start or adoption to its end."""
        if child.identity is None:
            await self._wait_turn(child)
            if child.leaving():
                return
            await self._launch(child)
        assert child.identity is not None
        exited = asyncio.ensure_future(_wait_exit(child.identity))
        try:
            await self._wait_first_ready(child, exited)
            await exited
        finally:
            exited.cancel()

    async def _launch(self, child: Child) -> None:
        if child.spec.prepare:
            await asyncio.to_thread(child.spec.prepare)
        log = self._log(child)
        child.log_start = log.stat().st_size if log.exists() else 0
        child.process = spawn(child.spec.command, dict(child.spec.environment), log)
        child.identity = identify(child.process.pid)
        child.code = code_here()
        self._save()

    async def _wait_first_ready(self, child: Child, exited: asyncio.Future[None]) -> None:
        began = time.monotonic()
        while not exited.done():
            address = await _asked_ready(child)
            if address:
                child.address = address
                child.hopeless = ""
                child.ready.set()
                child.changed.set()
                self._publish()
                return
            if time.monotonic() - began > SILENT_SECONDS and not child.hopeless:
                # It runs and does not serve: perhaps it has said why it never will.
                child.hopeless = self._explain(child, self._last_words(child))
                child.changed.set()
            await asyncio.wait([exited], timeout=LOOK_SECONDS)

    def _log(self, child: Child) -> Path:
        return self._folder.logs / f"{child.spec.replica}.log"

    def _describe_exit(self, child: Child) -> str:
        code = child.process.wait() if child.process else None
        hung, child.hung = child.hung, ""
        if hung:
            return hung
        if code is None:
            return "it ended under another supervisor"
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        said = self._last_words(child)
        child.hopeless = self._explain(child, said)
        last = said.splitlines()[-1][:500] if said else ""
        return f"exit status {code}: {last}" if last else f"exit status {code}"

    def _explain(self, child: Child, said: str) -> str:
        explained = child.spec.explain(said) if child.spec.explain else ""
        return explained or explain_output(child.spec.replica, said)

    def _last_words(self, child: Child) -> str:
        try:
            with self._log(child).open("rb") as log:
                end = log.seek(0, os.SEEK_END)
                # Not what an earlier life of it said.
                log.seek(max(child.log_start if child.log_start <= end else 0, end - 2000))
                return log.read().decode(errors="replace").strip()
        except OSError:
            return ""


async def _wait_exit(identity: Identity) -> None:
    loop = asyncio.get_running_loop()
    try:
        handle = os.pidfd_open(identity.pid)
    except ProcessLookupError:
        return
    ended = asyncio.Event()
    loop.add_reader(handle, ended.set)
    try:
        # Between the adoption and the handle it may have ended, and its pid be another's.
        if identity.alive:
            await ended.wait()
    finally:
        loop.remove_reader(handle)
        os.close(handle)


async def _asked_ready(child: Child) -> str:
    assert child.identity is not None
    if child.spec.ready_file is None:
        assert child.spec.probe is not None
        return child.spec.address if await child.spec.probe() else ""
    try:
        record = json.loads(child.spec.ready_file.read_text())
        if record["pid"] != child.identity.pid:
            return ""
        child.metrics_address = str(record.get("metrics_address", ""))
        return str(record["address"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
