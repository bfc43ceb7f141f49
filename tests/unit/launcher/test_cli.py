"""The command without a mesh: what a person did not do right is one line and status 1."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.folder import Folder
from launcher.kept import Kept, told
from launcher.ports import free_port, port_problem
from launcher.processes import identify
from launcher.state import Remembered, State


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    for name in [name for name in os.environ if name.startswith("HERMESH_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HERMESH_DATA_DIR", str(tmp_path / "data"))
    # A command adds to its environment; the next test is another command.
    monkeypatch.setattr(os, "environ", dict(os.environ))
    return Folder(tmp_path / "data")


def hermesh(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["hermesh", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "hello"),
        ("chat",),
        ("sessions",),
        ("actions",),
        ("resolve", "r", "1:0", "retry"),
        ("scale", "agent=2"),
        ("migrate",),
        ("status",),
        ("restart", "all"),
    ],
)
def test_what_needs_a_mesh_says_how_to_start_one(
    folder: Folder,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
) -> None:
    folder.prepare()
    assert hermesh(monkeypatch, *arguments) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "hermesh up" in said


def test_a_word_that_is_no_decision_is_one_line(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hermesh(monkeypatch, "resolve", "r", "1:0", "maybe") == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "approve" in said


def test_status_for_programs_is_an_empty_list(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hermesh(monkeypatch, "status", "--json") == 0
    assert json.loads(capsys.readouterr().out) == []


def test_status_shows_what_a_killed_supervisor_left(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.prepare()
    me = identify(os.getpid())
    assert me is not None
    State(children=[Remembered("agent", "agent-1", me.pid, me.start_time, "127.0.0.1:1")]).save(
        folder.state_file
    )
    assert hermesh(monkeypatch, "status", "--json") == 0
    [row] = json.loads(capsys.readouterr().out)
    assert (row["replica"], row["pid"], row["health"]) == ("agent-1", me.pid, "unsupervised")
    assert hermesh(monkeypatch, "status") == 0
    assert "hermesh up takes these over" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "value"),
    [("HERMESH_HTTP_PORT", "eighty"), ("HERMESH_GRPC_PORT", "70000"), ("HERMESH_HTTP_PORT", "0")],
)
def test_a_setting_that_cannot_be_is_named(
    folder: Folder,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    value: str,
) -> None:
    monkeypatch.setenv(name, value)
    assert hermesh(monkeypatch, "up") == 1
    said = capsys.readouterr().err
    assert name in said
    assert said.count("\n") == 1


def test_two_listeners_on_one_port_are_refused(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HERMESH_HTTP_PORT", "12345")
    monkeypatch.setenv("HERMESH_GRPC_PORT", "12345")
    assert hermesh(monkeypatch, "up") == 1
    assert "are the same" in capsys.readouterr().err


def test_gateways_that_would_need_another_listeners_port_are_refused(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HERMESH_HTTP_PORT", "12345")
    monkeypatch.setenv("HERMESH_GATEWAY_PORT", "12300")
    assert hermesh(monkeypatch, "up") == 1
    said = capsys.readouterr().err
    assert "HERMESH_HTTP_PORT is 12345, and gateways may need 12300 to 12364" in said
    assert said.count("\n") == 1


def test_too_little_space_is_said_before_anything_starts(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("launcher.folder.NEEDED_BYTES", 1 << 60)
    assert hermesh(monkeypatch, "up") == 1
    said = capsys.readouterr().err
    assert "too little space" in said
    assert "HERMESH_DATA_DIR" in said
    assert not folder.postgres.exists()


def test_down_with_nothing_running_is_harmless(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hermesh(monkeypatch, "down") == 0
    assert "Nothing runs" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [("down",), ("up",), ("doctor",), ("env",)])
def test_a_data_folder_below_a_file_is_one_line(
    tmp_path: Path,
    folder: Folder,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HERMESH_DATA_DIR", str(tmp_path / "file" / "data"))
    assert hermesh(monkeypatch, *arguments) == 1
    said = capfd.readouterr()
    assert "HERMESH_DATA_DIR" in said.out + said.err
    assert str(tmp_path / "file") in said.out + said.err
    assert "Traceback" not in said.err


def test_a_key_that_only_the_person_has_is_asked_for(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.prepare()
    me = identify(os.getpid())
    assert me is not None
    State(supervisor={"pid": me.pid, "start_time": me.start_time}).save(folder.state_file)
    assert hermesh(monkeypatch, "run", "hello") == 1
    assert "HERMESH_API_KEY" in capsys.readouterr().err
    assert not folder.api_key_file.exists()


INTERRUPTED = """
import os, signal, sys
from launcher.command import main

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "launcher.cli":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
main()
"""


def test_an_interrupt_while_modules_are_read_says_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


@pytest.mark.parametrize("fresh", [True, False])
def test_an_interrupted_up_leaves_what_it_found(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fresh: bool
) -> None:
    me = identify(os.getpid())
    stopped: list[Folder] = []

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("launcher.control.supervisor_of", lambda _: None if fresh else me)
    monkeypatch.setattr("launcher.upgrade.other", lambda _: None)
    monkeypatch.setattr("launcher.control.start_supervisor", lambda _: None)
    monkeypatch.setattr("launcher.control.ask", interrupted)
    monkeypatch.setattr("launcher.control.stop", stopped.append)
    monkeypatch.setenv("HERMESH_DATABASE_URL", "postgresql://127.0.0.1:1/x")
    monkeypatch.setenv("HERMESH_HTTP_PORT", str(free_port()))
    monkeypatch.setenv("HERMESH_GRPC_PORT", str(free_port()))
    assert hermesh(monkeypatch, "up") == 1
    assert "interrupted" in capsys.readouterr().err
    assert bool(stopped) is fresh


class Started(Exception):
    """Stands for a supervisor that is started."""


def starts(monkeypatch: pytest.MonkeyPatch, folder: Folder, *arguments: str) -> dict[str, str] | str:
    """Returns the settings that `hermesh up` would start a supervisor with."""
    found: dict[str, str] = {}

    def start(_: Folder) -> None:
        found.update(told(os.environ))
        raise Started

    monkeypatch.setattr("launcher.control.start_supervisor", start)
    monkeypatch.setattr("launcher.cli._check_ports", lambda *_: None)
    monkeypatch.setattr("launcher.embedded.postgres.Postgres.initialize", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["hermesh", "up", *arguments])
    with pytest.raises(Started):
        main()
    return found


KEPT = {"HERMESH_DATABASE_URL": "postgresql://a:pw@db/x", "HERMESH_HTTP_PORT": "18080"}


def keep(folder: Folder, settings: dict[str, str]) -> None:
    folder.prepare()
    Kept(settings, "f", exists=True).save(folder)


def test_up_goes_by_what_it_was_told_last_time_and_says_so(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keep(folder, KEPT)
    monkeypatch.setenv("HERMESH_HTTP_PORT", "18081")
    assert starts(monkeypatch, folder) == KEPT | {"HERMESH_HTTP_PORT": "18081"}
    said = capsys.readouterr()
    assert "HERMESH_DATABASE_URL=postgresql://db/x" in said.out
    assert "pw" not in said.out + said.err
    assert "HERMESH_HTTP_PORT" not in said.out


@pytest.mark.parametrize("now", ["", "postgresql://elsewhere:5433/x"])
def test_up_on_another_database_than_last_time_needs_a_word(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], now: str
) -> None:
    keep(folder, KEPT)
    monkeypatch.setenv("HERMESH_DATABASE_URL", now)
    assert hermesh(monkeypatch, "up") == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for part in ("postgresql://db:5432/x", now or "embedded", "--yes", "HERMESH_DATABASE_URL unset", "stays"):
        assert part in said
    assert "pw" not in said
    expected = {name: value for name, value in (KEPT | {"HERMESH_DATABASE_URL": now}).items() if value}
    assert starts(monkeypatch, folder, "--yes") == expected


@pytest.mark.parametrize("word", [True, False])
def test_up_on_another_database_asks_who_sits_at_a_terminal(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], word: bool
) -> None:
    keep(folder, KEPT)
    monkeypatch.setenv("HERMESH_DATABASE_URL", "postgresql://elsewhere/x")
    monkeypatch.setattr("launcher.cli._somebody_there", lambda: True)
    monkeypatch.setattr("typer.confirm", lambda *_, **__: word)
    if word:
        starts(monkeypatch, folder)
    else:
        assert hermesh(monkeypatch, "up") == 1
        assert "nothing was changed" in capsys.readouterr().err


def test_up_names_a_mistyped_setting(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HERMESH_DATABSE_URL", "postgresql://db/x")
    starts(monkeypatch, folder)
    said = capsys.readouterr().err
    assert "HERMESH_DATABSE_URL is no setting" in said
    assert "is HERMESH_DATABASE_URL meant?" in said


def test_doctor_names_a_mistyped_setting(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HERMESH_MAX_TURN", "3")
    assert hermesh(monkeypatch, "doctor") == 1
    assert "is HERMESH_MAX_TURNS meant?" in capsys.readouterr().out


def test_env_is_of_the_running_mesh_whatever_the_shell_says(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keep(folder, KEPT | {"HERMESH_INSTRUCTIONS": "Be kind, & brief."})
    me = identify(os.getpid())
    assert me is not None
    supervisor = {"pid": me.pid, "start_time": me.start_time}
    addresses = {"http": "127.0.0.1:18080", "grpc": "127.0.0.1:15051"}
    monkeypatch.setenv("HERMESH_DATABASE_URL", "postgresql://elsewhere/x")
    State(supervisor=supervisor, addresses=addresses, settings="f").save(folder.state_file)
    assert hermesh(monkeypatch, "env") == 0
    printed = dict(line.split("=", 1) for line in capsys.readouterr().out.splitlines())
    assert printed["HERMESH_DATABASE_URL"] == KEPT["HERMESH_DATABASE_URL"]
    assert printed["HERMESH_HTTP_URL"] == "http://127.0.0.1:18080"
    assert printed["HERMESH_GRPC_ADDRESS"] == "127.0.0.1:15051"
    assert printed["HERMESH_DATA_DIR"] == str(folder.root)
    assert printed["HERMESH_INSTRUCTIONS"] == "'Be kind, & brief.'"
    # Another mesh is being started in its place: what is kept is not of it.
    monkeypatch.setenv("HERMESH_DATABASE_URL", "postgresql://elsewhere/x")
    State(supervisor=supervisor, addresses=addresses, settings="g").save(folder.state_file)
    assert hermesh(monkeypatch, "env", "HERMESH_DATABASE_URL") == 0
    assert capsys.readouterr().out == "postgresql://elsewhere/x\n"


def test_logs_are_of_one_service_or_replica(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder.prepare()
    for name in ("agent-1", "agent-2", "envoy-1", "supervisor"):
        (folder.logs / f"{name}.log").write_text(f"from {name}\n")
    for asked, names in {
        "agent": ["agent-1", "agent-2"],
        "agent-2": ["agent-2"],
        "supervisor": ["supervisor"],
        "": ["agent-1", "agent-2", "envoy-1", "supervisor"],
    }.items():
        assert hermesh(monkeypatch, "logs", *filter(None, [asked])) == 0
        lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("from")]
        assert lines == [f"from {name}" for name in names]
    assert hermesh(monkeypatch, "logs", "age") == 1
    assert "there is no log of age" in capfd.readouterr().err


def test_ports_of_ours_are_none_that_outgoing_connections_take() -> None:
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    port = free_port()
    assert port_problem(port) == ""
    assert port < lowest or lowest < 11_240
