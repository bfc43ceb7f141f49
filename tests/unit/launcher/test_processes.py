"""Processes are known by pid and start time, and state survives what a crash leaves on disk."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from launcher.errors import LaunchError, explain_os_error
from launcher.folder import Folder
from launcher.plan import parse_replicas
from launcher.processes import Identity, end_all, identify, spawn
from launcher.settings import CHECKOUT, LauncherSettings
from launcher.state import Remembered, State


def test_a_process_is_itself_and_no_other(tmp_path: Path) -> None:
    process = spawn(["sleep", "60"], dict(os.environ), tmp_path / "log")
    try:
        me = identify(process.pid)
        assert me is not None
        assert me.alive
        other = Identity(me.pid, me.start_time + 1)
        assert not other.alive
        other.send(signal.SIGKILL)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait(timeout=10)
    assert not me.alive
    assert identify(process.pid) is None
    me.send(signal.SIGTERM)


def test_a_zombie_is_not_alive(tmp_path: Path) -> None:
    process = spawn(["true"], dict(os.environ), tmp_path / "log")
    me = identify(process.pid)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert me is None or not me.alive
    process.wait(timeout=10)


def test_what_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    process = subprocess.Popen(
        ["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 60 & wait; done"],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    me = identify(process.pid)
    assert me is not None
    end_all([me], grace=0.2)
    assert process.wait(timeout=10) == -signal.SIGKILL
    process.stdout.close()
    os.killpg(process.pid, signal.SIGKILL)


def test_state_is_read_back_and_a_broken_file_is_an_empty_one(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    assert State.load(path) == State()
    state = State(
        supervisor={"pid": 1, "start_time": 2},
        ports={"mesh": 3},
        children=[Remembered("agent", "agent-1", 4, 5, "127.0.0.1:6", 7, "killed")],
    )
    state.save(path)
    assert State.load(path) == state
    broken = ("", "{", "[]", "null", '{"children": [{"pid": 1}]}', '{"children": 5}', '{"supervisor": [1]}')
    for text in (*broken, '{"supervisor": {"pid": "me", "start_time": 1}}', '{"ports": {"mesh": null}}'):
        path.write_text(text)
        assert State.load(path) == State()


def test_what_ran_before_a_reboot_runs_no_more(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    me = identify(os.getpid())
    assert me is not None
    child = Remembered("agent", "agent-1", me.pid, me.start_time)
    State(children=[child], boot="another").save(path)
    assert State.load(path) == State()
    State(children=[child]).save(path)
    assert State.load(path).children == [child]


def test_secrets_are_made_once_and_private(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "data")
    folder.prepare()
    first = folder.secret("api-key", "hm_")
    assert first.startswith("hm_")
    assert len(first) == 46
    assert folder.secret("api-key", "hm_") == first
    assert folder.api_key_file.stat().st_mode & 0o777 == 0o600


def test_a_long_data_folder_gets_its_sockets_elsewhere(tmp_path: Path) -> None:
    short, long = Folder(Path("/tmp/x")), Folder(tmp_path / ("d" * 120))
    assert short.sockets == Path("/tmp/x/run")
    assert len(str(long.control_socket)) < 107


@pytest.mark.parametrize("text", ["agent", "agent=", "agent=x", "nobody=1", "agent=1000", "agent=-1"])
def test_replicas_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(LaunchError, match="agent=3"):
        parse_replicas(text)


def test_a_relative_data_folder_is_in_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert LauncherSettings(data_dir=Path("other/data")).folder == CHECKOUT / "other" / "data"
    assert LauncherSettings(data_dir=tmp_path).folder == tmp_path


def test_replicas_are_read() -> None:
    assert parse_replicas("agent=3, session=2") == {"agent": 3, "session": 2}
    assert parse_replicas("") == {}


def test_a_full_disk_and_a_foreign_folder_have_their_remedies() -> None:
    assert "no space left" in str(explain_os_error(OSError(28, "No space left on device"), "write"))
    for error in (PermissionError(13, "Permission denied"), NotADirectoryError(20, "Not a directory")):
        assert "HERMESH_DATA_DIR" in str(explain_os_error(error, "write"))
