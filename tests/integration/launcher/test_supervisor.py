"""The supervisor as a process: one for a folder, deaf to nonsense, and thorough when it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher import control
from launcher.errors import LaunchError
from launcher.folder import Folder
from launcher.plan import fingerprint
from launcher.ports import free_port
from launcher.processes import Identity, identify, spawn
from launcher.state import Remembered, State

SECONDS = 30.0


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Folder]:
    """A data folder, and an environment in which every command means it."""
    for name in [name for name in os.environ if name.startswith("HERMESH_")]:
        monkeypatch.delenv(name)
    with tempfile.TemporaryDirectory(prefix="hm-ls-") as path:
        monkeypatch.setenv("HERMESH_DATA_DIR", path)
        monkeypatch.setenv("HERMESH_HTTP_PORT", str(free_port()))
        monkeypatch.setenv("HERMESH_GRPC_PORT", str(free_port()))
        folder = Folder(Path(path))
        folder.prepare()
        yield folder
        control.stop(folder)


START = """
from launcher import control
from launcher.folder import Folder
from launcher.settings import LauncherSettings

control.start_supervisor(Folder(LauncherSettings().folder))
"""


def start_supervisor() -> None:
    """Starts one as a command does: the supervisor outlives who started it."""
    done = subprocess.run(
        [sys.executable, "-c", START], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def supervisor(folder: Folder) -> Identity:
    found = control.supervisor_of(folder)
    assert found is not None
    return found


def sleeper(folder: Folder, replica: str) -> tuple[subprocess.Popen[bytes], Remembered]:
    """A process that stands for one that an earlier supervisor left."""
    process = spawn(["sleep", "120"], dict(os.environ), folder.logs / f"{replica}.log")
    me = identify(process.pid)
    assert me is not None
    # The test is its parent, and has to take note of its end.
    threading.Thread(target=process.wait, daemon=True).start()
    return process, Remembered(replica.partition("-")[0], replica, me.pid, me.start_time, "127.0.0.1:1")


def test_a_second_supervisor_of_a_folder_refuses(folder: Folder) -> None:
    start_supervisor()
    first = supervisor(folder)
    done = subprocess.run(
        [sys.executable, "-m", "launcher.supervisor"], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "another supervisor" in done.stderr
    assert supervisor(folder) == first
    assert control.ask(folder, {"command": "status"}) == []


@pytest.mark.parametrize("text", ["", "[]", '{"supervisor": [1]}'])
def test_down_ends_a_supervisor_whose_state_is_damaged(folder: Folder, text: str) -> None:
    start_supervisor()
    first = supervisor(folder)
    folder.state_file.write_text(text)
    assert supervisor(folder) == first
    assert control.stop(folder) == 1
    assert not first.alive


@pytest.mark.parametrize("text", ["", "{}"])
def test_down_with_a_damaged_state_counts_and_ends_all(folder: Folder, text: str) -> None:
    _, left = sleeper(folder, "tool-7")
    State(settings=fingerprint(), ports={"mesh": 1, "model": 1}, children=[left]).save(folder.state_file)
    start_supervisor()
    folder.state_file.write_text(text)
    assert control.stop(folder) == 2
    assert not left.identity.alive


def test_two_that_start_one_at_once_get_the_same(folder: Folder) -> None:
    failed: list[BaseException] = []

    def start() -> None:
        try:
            start_supervisor()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=start) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=SECONDS)
    assert failed == []
    assert control.ask(folder, {"command": "status"}) == []


@pytest.mark.parametrize("sent", [b"", b"\n", b"{\n", b"[]\n", b"{}\n", b'{"command": "scale"}\n', b"\xff\n"])
def test_nonsense_is_answered_and_does_no_harm(folder: Folder, sent: bytes) -> None:
    start_supervisor()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(SECONDS)
        sock.connect(str(folder.control_socket))
        sock.sendall(sent)
        sock.shutdown(socket.SHUT_WR)
        with sock.makefile("rb") as answer:
            assert "error" in json.loads(answer.readline())
    assert control.ask(folder, {"command": "status"}) == []


def test_a_command_that_it_does_not_know_is_an_error(folder: Folder) -> None:
    start_supervisor()
    with pytest.raises(LaunchError, match="knows no command 'dance'"):
        control.ask(folder, {"command": "dance"})
    with pytest.raises(LaunchError, match="nothing runs yet"):
        control.ask(folder, {"command": "scale", "replicas": {"agent": 2}})


def test_down_ends_what_an_earlier_supervisor_left_whatever_its_settings(folder: Folder) -> None:
    for settings in ("others", fingerprint()):
        process, left = sleeper(folder, "tool-7")
        State(settings=settings, ports={"mesh": 1, "model": 1}, children=[left]).save(folder.state_file)
        start_supervisor()
        assert left.identity.alive
        # What the new one writes still names it: yet another supervisor would know it too.
        assert [c.pid for c in State.load(folder.state_file).children] == [process.pid]
        control.stop(folder)
        assert not left.identity.alive
        assert not folder.state_file.exists()


def test_down_without_a_supervisor_ends_what_is_known_and_nothing_else(folder: Folder) -> None:
    _, left = sleeper(folder, "agent-1")
    _, other = sleeper(folder, "agent-2")
    stranger = Remembered("agent", "agent-2", other.pid, other.start_time + 1)
    State(settings=fingerprint(), children=[left, stranger]).save(folder.state_file)
    assert control.stop(folder) == 1
    assert not left.identity.alive
    assert other.identity.alive
    other.identity.send(signal.SIGKILL)
    until(lambda: not other.identity.alive)


def test_a_killed_supervisor_is_followed_by_another_on_the_same_ports(folder: Folder) -> None:
    _, left = sleeper(folder, "agent-1")
    State(settings=fingerprint(), ports={"mesh": 12345, "model": 12346}, children=[left]).save(
        folder.state_file
    )
    start_supervisor()
    first = supervisor(folder)
    first.send(signal.SIGKILL)
    until(lambda: not first.alive)
    assert control.supervisor_of(folder) is None
    start_supervisor()
    assert supervisor(folder) != first
    assert State.load(folder.state_file).ports == {"mesh": 12345, "model": 12346}
    assert left.identity.alive


def test_down_in_the_middle_of_up_leaves_nothing(folder: Folder) -> None:
    start_supervisor()
    said: list[str] = []
    errors: list[LaunchError] = []

    def up() -> None:
        try:
            control.ask(folder, {"command": "up"}, said.append)
        except LaunchError as error:
            errors.append(error)

    thread = threading.Thread(target=up)
    thread.start()
    until(lambda: len(State.load(folder.state_file).children) >= 4)
    children = [child.identity for child in State.load(folder.state_file).children]
    control.stop(folder)
    thread.join(timeout=SECONDS)
    assert not thread.is_alive()
    assert [str(error) for error in errors] == ["hermesh down ended it in the middle"]
    assert not any(child.alive for child in children)


def test_a_url_that_nobody_answers_at_is_named_without_its_password(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HERMESH_REDIS_URL", "redis://:secret@127.0.0.1:1/0")
    start_supervisor()
    with pytest.raises(LaunchError) as failed:
        control.ask(folder, {"command": "up"})
    assert str(failed.value) == "valkey at redis://127.0.0.1:1/0 does not answer; check HERMESH_REDIS_URL"
