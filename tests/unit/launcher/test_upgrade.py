"""A mesh of another version is told by its code; nothing is touched before its schema is there."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher import upgrade
from launcher.code import code_here
from launcher.errors import LaunchError
from launcher.folder import Folder
from launcher.plan import fingerprint
from launcher.processes import Identity, identify
from launcher.state import State

PLACE = "/opt/hermesh-0.9/.venv"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    for name in [name for name in os.environ if name.startswith("HERMESH_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HERMESH_DATA_DIR", str(tmp_path / "data"))
    folder = Folder(tmp_path / "data")
    folder.prepare()
    return folder


@pytest.fixture
def former(folder: Folder) -> Iterator[Identity]:
    """A process that stands for the supervisor of another version, with what it was told."""
    told = os.environ | {"HERMESH_LLM_MODEL": "told-before", "HERMESH_HTTP_PORT": "18080"}
    process = subprocess.Popen(["sleep", "60"], env=told)
    found = identify(process.pid)
    assert found is not None
    state = State(supervisor={"pid": found.pid, "start_time": found.start_time}, settings="of its own way")
    state.ports.update(mesh=1, model=2)
    state.save(folder.state_file)
    yield found
    process.kill()
    process.wait()


def test_another_code_is_told_and_where_it_is(folder: Folder, former: Identity) -> None:
    # A version that does not say what it is is another one.
    assert upgrade.other(folder) == former
    assert upgrade.elsewhere(folder) == ""
    state = State.load(folder.state_file)
    state.code = f"0123456789abcdef@{PLACE}"
    state.save(folder.state_file)
    assert upgrade.other(folder) == former
    assert upgrade.elsewhere(folder) == PLACE
    state.code = code_here()
    state.save(folder.state_file)
    assert upgrade.other(folder) is None
    assert upgrade.elsewhere(folder) == ""


def test_the_former_supervisor_ends_when_the_schema_is_there_and_its_settings_stay(
    folder: Folder, former: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HERMESH_LLM_MODEL", "of-this-shell")
    monkeypatch.setenv("HERMESH_HTTP_PORT", "28080")
    before: list[bool] = []
    monkeypatch.setattr(upgrade, "set_up", lambda *_, **__: before.append(former.alive))
    monkeypatch.setattr("launcher.control.start_supervisor", lambda _: before.append(former.alive))
    upgrade.take_over(folder, former, lambda _: None)
    assert before == [True, False]
    assert (os.environ["HERMESH_LLM_MODEL"], os.environ["HERMESH_HTTP_PORT"]) == ("told-before", "18080")
    # The next supervisor takes over what has its settings.
    assert State.load(folder.state_file).settings == fingerprint()


def test_the_former_supervisor_is_never_told_to_end(
    folder: Folder, former: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    # At SIGTERM it would end all that it keeps, as far as it got before SIGKILL.
    sent: list[int] = []
    send = Identity.send

    def note(identity: Identity, number: signal.Signals) -> None:
        sent.append(number)
        send(identity, number)

    monkeypatch.setattr(Identity, "send", note)
    monkeypatch.setattr(upgrade, "set_up", lambda *_, **__: None)
    monkeypatch.setattr("launcher.control.start_supervisor", lambda _: None)
    upgrade.take_over(folder, former, lambda _: None)
    assert set(sent) == {signal.SIGKILL}
    assert not former.alive


def test_a_schema_that_cannot_be_made_leaves_all_as_it_is(
    folder: Folder, former: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise LaunchError("the session service's migrations failed: no")

    monkeypatch.setattr(upgrade, "set_up", fail)
    with pytest.raises(LaunchError, match="migrations failed: no; nothing was replaced") as told:
        upgrade.take_over(folder, former, lambda _: None)
    assert "\n" not in str(told.value)
    assert former.alive
    assert State.load(folder.state_file).supervisor_identity == former
