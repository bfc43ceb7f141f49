"""Processes that outlive the one that started them, known by pid and start time."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# Many default to 1,024, and every stream is one.
OPEN_FILES = 65_536


@dataclass(frozen=True, slots=True)
class Identity:
    """A process that cannot be mistaken for a later one with the same pid.

    `start_time` is field 22 of /proc/PID/stat: clock ticks since boot.
    """

    pid: int
    start_time: int

    @property
    def alive(self) -> bool:
        """Whether this very process runs; a zombie does not."""
        fields = stat_fields(self.pid)
        return bool(fields) and int(fields[19]) == self.start_time and fields[0] not in "ZX"

    @property
    def cpu_ticks(self) -> int:
        """How much CPU time it has used, in clock ticks; 0 once it is gone."""
        fields = stat_fields(self.pid)
        return int(fields[11]) + int(fields[12]) if fields else 0

    def send(self, number: signal.Signals) -> None:
        """Sends a signal, to this very process or to none."""
        try:
            handle = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            if self.alive:
                signal.pidfd_send_signal(handle, number)
        except ProcessLookupError:
            return
        finally:
            os.close(handle)


def stat_fields(pid: int) -> list[str]:
    """Returns /proc/PID/stat from its third field (the state) on; empty if there is no such process."""
    # The command may hold spaces and brackets; what follows its last bracket does not.
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


@cache
def boot_id() -> str:
    """Which boot of the machine this is; empty where the kernel does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def identify(pid: int) -> Identity | None:
    """Returns the identity of the process that has this pid now."""
    fields = stat_fields(pid)
    return Identity(pid, int(fields[19])) if fields else None


def raise_open_files() -> None:
    """Lets this process and those it starts open as many files as the hard limit allows, within reason."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def spawn(command: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Starts a process in a session of its own, its output appended to `log`.

    Raises:
        OSError: The program or the log cannot be opened.
    """
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd="/",
        )


def end_all(processes: list[Identity], grace: float, polite: signal.Signals = signal.SIGTERM) -> None:
    """Ends processes: `polite`, and SIGKILL for what is still there after `grace` seconds."""
    for process in processes:
        process.send(polite)
    deadline = time.monotonic() + grace
    while any(process.alive for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in processes:
        process.send(signal.SIGKILL)
    deadline = time.monotonic() + 5
    while any(process.alive for process in processes) and time.monotonic() < deadline:
        time.sleep(0.02)
