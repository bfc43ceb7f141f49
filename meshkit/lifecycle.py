"""The life of a process: start-up errors in one line, stop signals, and the file that says it is ready."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import structlog

from meshkit.errors import StartupError
from meshkit.settings import MeshSettings, parse_address

_log = structlog.get_logger("meshkit.lifecycle")

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def run(main: Callable[[], Awaitable[None]]) -> None:
    """Runs a process's main coroutine on uvloop and ends the process with its status.

    A `StartupError` becomes one line on stderr and status 1.
    """
    import uvloop

    schedule_in_batches()

    async def body() -> None:
        await main()

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(body())
    except StartupError as error:
        fail(str(error))
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def schedule_in_batches() -> None:
    """Has this process, its threads and its children not interrupt others when there is work for them.

    They begin as soon as a core is free or whoever is on it has had its time, and then find several messages
    instead of one (SCHED_BATCH, sched(7)). On idle cores nothing changes. Whoever chose another policy for
    the process keeps it. Measured in docs/adr/0019.
    """
    if os.sched_getscheduler(0) != os.SCHED_OTHER:
        return
    # It saves work; where a sandbox forbids it everything works as well, and `scheduling` tells.
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def scheduling() -> str:
    """Returns the name of this process's scheduling policy, for the log."""
    policy = os.sched_getscheduler(0)
    return {os.SCHED_OTHER: "other", os.SCHED_BATCH: "batch", os.SCHED_IDLE: "idle"}.get(policy, f"{policy}")


def fail(text: str) -> None:
    """Ends the process with one line on stderr and status 1."""
    sys.stderr.write(f"hermesh: {' '.join(text.split())}\n")
    sys.stderr.flush()
    raise SystemExit(1)


class StopSignals:
    """Turns SIGTERM and SIGINT into events: the first asks for a drain, the second for an end at once.

    Example:
        with StopSignals() as signals:
            await signals.stop.wait()
    """

    def __init__(self) -> None:
        """Makes the events; they are set by signals only inside the `with` block."""
        self.stop = asyncio.Event()
        self.now = asyncio.Event()
        self._installed: list[signal.Signals] = []

    def __enter__(self) -> Self:
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            try:
                loop.add_signal_handler(number, self.trigger)
            except (ValueError, RuntimeError, NotImplementedError):
                # Not the main thread: whoever runs us there stops us by `trigger`.
                break
            self._installed.append(number)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        loop = asyncio.get_running_loop()
        for number in self._installed:
            loop.remove_signal_handler(number)
        self._installed.clear()

    def trigger(self) -> None:
        """Does what a signal does."""
        if self.stop.is_set():
            self.now.set()
        self.stop.set()

    async def pause(self, seconds: float) -> bool:
        """Waits, but no longer than until the second signal; returns True if that came."""
        try:
            async with asyncio.timeout(seconds):
                await self.now.wait()
        except TimeoutError:
            return False
        return True


def check_free(address: str, variable: str) -> None:
    """Checks that an address can be bound.

    gRPC's own failure is several lines on stderr and no cause; a plain socket says which.

    Raises:
        StartupError: It cannot; one line with the reason and the variable to change.
    """
    host, port = parse_address(address)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, place = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
            probe.listen(1)
    except OSError as error:
        raise bind_failure(address, variable, error) from error


def bind_failure(address: str, variable: str, error: OSError) -> StartupError:
    """Returns the one-line error for an address that cannot be bound."""
    # asyncio puts a text of its own, with the address, in place of the system's.
    named = error.errno is not None and error.errno > 0
    cause = (os.strerror(error.errno or 0) if named else error.strerror or str(error)).lower()
    return StartupError(f"cannot listen on {address}: {cause}; free it or set {variable} to another")


def reachable(host: str, port: int) -> str:
    """Returns IP:port for a peer on this machine, such as Envoy, whose endpoint files hold no names.

    A wildcard host becomes loopback, and a name its first address.
    """
    if host in ("", "0.0.0.0"):  # noqa: S104 -- compared, not bound
        host = "127.0.0.1"
    elif host == "::":
        host = "::1"
    else:
        with contextlib.suppress(OSError):
            host = str(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4][0])
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def freeze_heap() -> None:
    """Takes what a started process holds out of what the garbage collector walks: it stays for good.

    A full collection of all modules and classes takes 20 ms and more, in which no token moves. Call it once,
    when the process serves.
    """
    gc.collect()
    gc.freeze()


def write_ready_file(
    settings: MeshSettings, service: str, address: str, metrics_address: str, **more: Any
) -> None:
    """Writes `settings.ready_file`, if set, by rename: a reader sees all of it or none.

    Raises:
        StartupError: The file cannot be written.
    """
    path = settings.ready_file
    if path is None:
        return
    record = {
        "service": service,
        "replica": settings.replica,
        "pid": os.getpid(),
        "address": address,
        "metrics_address": metrics_address,
        **more,
    }
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(record) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        cause = (error.strerror or str(error)).lower()
        raise StartupError(f"cannot write {path} (HERMESH_READY_FILE): {cause}") from error


def remove_ready_file(path: Path | None) -> None:
    """Removes the ready file if this process wrote it."""
    if path is None:
        return
    try:
        if json.loads(path.read_text(encoding="utf-8")).get("pid") == os.getpid():
            path.unlink()
    except (OSError, ValueError, AttributeError):
        _log.debug("no ready file to remove", path=str(path))
