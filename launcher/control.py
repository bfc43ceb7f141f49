"""How the command `hermesh` talks to the supervisor."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.errors import LaunchError
from launcher.folder import Folder
from launcher.leftovers import end_leftovers
from launcher.processes import Identity, end_all, identify, spawn
from launcher.state import Remembered, State

START_SECONDS = 15.0
ANSWER_SECONDS = 240.0
DOWN_SECONDS = 60.0


def supervisor_of(folder: Folder) -> Identity | None:
    """The supervisor that runs for this data folder, if one does."""
    found = State.load(folder.state_file).supervisor_identity
    if found is None:
        # Without a readable state.json a living supervisor is still the one that listens.
        found = _listener(folder.control_socket)
    return found if found and found.alive else None


def _listener(path: Path) -> Identity | None:
    """The process that listens on a unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(1)
        try:
            sock.connect(os.fspath(path))
            credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        except OSError:
            return None
    return identify(struct.unpack("3i", credentials)[0])


def ask(folder: Folder, request: dict[str, Any], progress: Callable[[str], None] = lambda text: None) -> Any:
    """Sends a command and returns its answer.

    Raises:
        LaunchError: What the supervisor says went wrong, or that it does not answer.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(ANSWER_SECONDS)
            sock.connect(os.fspath(folder.control_socket))
            sock.sendall(json.dumps(request).encode() + b"\n")
            with sock.makefile("rb") as lines:
                for line in lines:
                    record = json.loads(line)
                    if "progress" in record:
                        progress(record["progress"])
                    elif "error" in record:
                        raise LaunchError(record["error"])
                    else:
                        return record["ok"]
    except OSError as error:
        raise LaunchError(
            f"the supervisor does not answer ({error}); hermesh down ends it, hermesh up starts again"
        ) from error
    raise LaunchError(f"the supervisor ended in the middle; see {folder.logs / 'supervisor.log'}")


def start_supervisor(folder: Folder) -> None:
    """Starts a supervisor in the background and returns when it listens."""
    log = folder.logs / "supervisor.log"
    before = log.stat().st_size if log.exists() else 0
    # Its own bytecode, and the services', make the next start faster.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    process = spawn([sys.executable, "-m", "launcher.supervisor"], environment, log)
    try:
        _wait_listening(folder, process, log, before)
    except BaseException:
        # Nobody knows of it yet, and it has started nothing.
        process.kill()
        process.wait()
        raise


def _wait_listening(folder: Folder, process: subprocess.Popen[bytes], log: Path, before: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            if supervisor_of(folder) is not None:
                # Another `up` was quicker; its supervisor does for both.
                return
            said = log.read_bytes()[before:].decode(errors="replace").strip().splitlines()
            raise LaunchError(said[-1].removeprefix("hermesh: ") if said else "the supervisor ended at once")
        if folder.control_socket.exists() and identify(process.pid) == supervisor_of(folder):
            return
        time.sleep(0.02)
    raise LaunchError(f"the supervisor did not listen within {START_SECONDS:.0f} s; see {log}")


def stop(folder: Folder) -> int:
    """Ends the supervisor and everything it started; returns how many processes there were."""
    supervisor = supervisor_of(folder)
    count = len(_living(folder)) + (supervisor is not None)
    if supervisor is not None:
        try:
            # What the file says may be damaged; the supervisor knows whom it keeps.
            count = ask(folder, {"command": "down"})["processes"] + 1
            deadline = time.monotonic() + DOWN_SECONDS
            while supervisor.alive and time.monotonic() < deadline:
                time.sleep(0.05)
        except LaunchError:
            # It does not answer: what it started is known all the same.
            pass
        end_all([supervisor], grace=1)
    end_leftovers(_living(folder))
    folder.state_file.unlink(missing_ok=True)
    folder.control_socket.unlink(missing_ok=True)
    folder.remove_sockets()
    return count


def _living(folder: Folder) -> list[Remembered]:
    return [child for child in State.load(folder.state_file).children if child.identity.alive]
