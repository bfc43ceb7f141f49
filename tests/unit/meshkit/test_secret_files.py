"""A secret comes from its variable or from a file, and what is wrong is one line that does not show it."""

import os
from pathlib import Path

import pytest
from pydantic_settings import BaseSettings

from gateway.settings import GatewaySettings
from launcher.settings import LauncherSettings
from meshkit.secret_files import SecretFileError, secret
from meshkit.settings import load, secret_names
from meshkit.variables import secret_files
from services.agent.settings import AgentSettings
from services.memory.settings import MemorySettings
from services.session.settings import SessionSettings
from services.tool.settings import ToolSettings

CLASSES = (LauncherSettings, SessionSettings, AgentSettings, ToolSettings, MemorySettings, GatewaySettings)
EACH = [(cls, name, field) for cls in CLASSES for name, field in secret_names(cls).items()]


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("HERMESH_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def held(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text("hunter2\n")
    return path


@pytest.mark.parametrize(("cls", "name", "field"), EACH)
def test_every_secret_of_every_process_may_be_in_a_file(
    cls: type[BaseSettings], name: str, field: str, held: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"{name}_FILE", str(held))
    assert getattr(load(cls), field).get_secret_value() == "hunter2"
    assert secret_files()[f"{name}_FILE"] == name


def test_all_secrets_are_known_as_such() -> None:
    assert set(secret_files().values()) == {name for _, name, _ in EACH}
    assert "HERMESH_LLM_PROFILE_FILE" not in secret_files()


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"x", "x"), (b"x\r\n", "x"), (b" x y \n\n", " x y "), ("Grüße\n".encode(), "Grüße")],
)
def test_only_the_line_end_that_closes_the_file_is_cut(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "secret"
    path.write_bytes(content)
    assert secret({"HERMESH_X_FILE": str(path), "HERMESH_X": ""}, "HERMESH_X") == expected


def test_without_a_file_the_variable_counts_however_it_is_written() -> None:
    assert secret({"hermesh_x": "y", "HERMESH_X_FILE": ""}, "HERMESH_X") == "y"
    assert secret({}, "HERMESH_X") == ""


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"\xff\xfe", "is not text in UTF-8"),
        (b"s" * 65537, "is larger than 64 KiB"),
    ],
)
def test_a_file_without_a_secret_is_named(tmp_path: Path, content: bytes | None, why: str) -> None:
    path = tmp_path / "secret"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SecretFileError) as raised:
        secret({"HERMESH_X_FILE": str(path)}, "HERMESH_X")
    assert str(raised.value) == f"HERMESH_X_FILE: {path} {why}"


@pytest.mark.parametrize(("path", "why"), [("secret", "is not an absolute path"), ("/", "Is a directory")])
def test_a_path_that_cannot_be_one_is_refused(path: str, why: str) -> None:
    with pytest.raises(SecretFileError, match=why):
        secret({"HERMESH_X_FILE": path}, "HERMESH_X")


def test_a_secret_in_the_place_of_its_path_is_not_shown() -> None:
    with pytest.raises(SecretFileError) as raised:
        secret({"HERMESH_X_FILE": "hunter2"}, "HERMESH_X")
    assert "hunter2" not in str(raised.value)


def test_an_endless_file_ends() -> None:
    with pytest.raises(SecretFileError, match="larger"):
        secret({"HERMESH_X_FILE": "/dev/zero"}, "HERMESH_X")


def test_all_that_is_wrong_is_one_line_without_any_secret(
    held: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HERMESH_DATABASE_URL_FILE", "/nowhere/url")
    monkeypatch.setenv("HERMESH_MESH_TOKEN", "hunter3")
    monkeypatch.setenv("HERMESH_MESH_TOKEN_FILE", str(held))
    with pytest.raises(SystemExit) as end:
        load(SessionSettings)
    assert end.value.code == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "HERMESH_DATABASE_URL_FILE: /nowhere/url cannot be read: No such file or directory" in said
    assert "HERMESH_MESH_TOKEN and HERMESH_MESH_TOKEN_FILE are both set; set one of them" in said
    assert "hunter" not in said
