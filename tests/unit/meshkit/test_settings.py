import os
import socket
from pathlib import Path

import pytest
from pydantic import Field, SecretStr
from pydantic_core import ValidationError
from pydantic_settings import BaseSettings

from meshkit.settings import MeshSettings, env_name, load, parse_address, settings_table


class AgentSettings(MeshSettings):
    model_url: str = Field("http://x|y", description="Where the\nmodel is.")
    model_key: SecretStr | None = Field(None, description="Its key.")
    max_runs: int = Field(description="Most runs.", ge=1)


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("HERMESH_"):
            monkeypatch.delenv(name)


def test_defaults_come_without_any_variable() -> None:
    settings = load(MeshSettings)
    assert settings.listen == "127.0.0.1:0"
    assert settings.ready_file is None
    assert settings.drain_seconds == 10
    assert settings.drain_delay_seconds == 2.5
    assert settings.replica == f"{MeshSettings.service_name()}-{socket.gethostname()}-{os.getpid()}"


def test_variables_win_and_empty_ones_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERMESH_REPLICA", "agent-1")
    monkeypatch.setenv("HERMESH_READY_FILE", "/tmp/x.json")
    monkeypatch.setenv("HERMESH_LOG_LEVEL", "DEBUG")
    monkeypatch.setenv("HERMESH_DRAIN_SECONDS", "")
    settings = load(MeshSettings)
    assert settings.replica == "agent-1"
    assert settings.ready_file == Path("/tmp/x.json")
    assert settings.log_level == "debug"
    assert settings.drain_seconds == 10


def test_settings_are_frozen() -> None:
    settings = load(MeshSettings)
    with pytest.raises(ValidationError):
        settings.listen = "0.0.0.0:1"  # type: ignore[misc]


def test_bad_values_end_in_one_line_that_names_the_variables(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HERMESH_LISTEN", "nowhere")
    monkeypatch.setenv("HERMESH_DRAIN_SECONDS", "soon")
    monkeypatch.setenv("HERMESH_MODEL_KEY", "hunter2")
    with pytest.raises(SystemExit) as end:
        load(AgentSettings)
    assert end.value.code == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "HERMESH_LISTEN: must be host:port" in error
    assert "HERMESH_DRAIN_SECONDS" in error
    assert "HERMESH_MAX_RUNS: is not set" in error
    assert "hunter2" not in error
    assert "nowhere" not in error


def test_secrets_are_not_shown() -> None:
    settings = MeshSettings(mesh_token=SecretStr("hunter2"))
    assert "hunter2" not in repr(settings)
    assert "hunter2" not in str(settings.model_dump())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:80", ("127.0.0.1", 80)),
        ("localhost:0", ("localhost", 0)),
        ("[::1]:65535", ("::1", 65535)),
    ],
)
def test_addresses_are_split(text: str, expected: tuple[str, int]) -> None:
    assert parse_address(text) == expected


@pytest.mark.parametrize(
    "text", ["", "80", ":80", "host", "host:", "host:x", "host:65536", "host:-1", "host:²", "tcp://host:80"]
)
def test_bad_addresses_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        parse_address(text)


def test_table_lists_each_variable_once_and_no_secret() -> None:
    table = settings_table(MeshSettings, AgentSettings)
    lines = table.splitlines()
    assert len([line for line in lines if "`HERMESH_LISTEN`" in line]) == 1
    row = next(line for line in lines if "`HERMESH_MODEL_URL`" in line)
    assert row.count("|") - row.count("\\|") == 5
    assert "Where the model is." in row
    assert "required" in next(line for line in lines if "`HERMESH_MAX_RUNS`" in line)
    assert "| none |" in next(line for line in lines if "`HERMESH_MESH_TOKEN`" in line)
    assert "`<service>-<host>-<pid>`" in next(line for line in lines if "`HERMESH_REPLICA`" in line)


def test_every_setting_is_described() -> None:
    assert all(field.description for field in MeshSettings.model_fields.values())
    assert env_name(MeshSettings, "log_level") == "HERMESH_LOG_LEVEL"


def test_table_says_who_uses_what(monkeypatch: pytest.MonkeyPatch) -> None:
    class ToolSettings(MeshSettings):
        folder: str = Field("<here>", description="Where <data> is.")

    class Launcher(BaseSettings):
        port: int = Field(1, description="Port.")

    monkeypatch.setattr(AgentSettings, "__module__", "services.agent.settings")
    monkeypatch.setattr(ToolSettings, "__module__", "services.tool.settings")
    monkeypatch.setattr(Launcher, "__module__", "launcher.settings")
    lines = settings_table(Launcher, AgentSettings, ToolSettings).splitlines()
    by_name = {line.split("`")[1]: line for line in lines[2:]}
    assert "| every process |" in by_name["HERMESH_LISTEN"]
    assert "| agent |" in by_name["HERMESH_MAX_RUNS"]
    assert "| launcher |" in by_name["PORT"]
    assert "| `<here>` |" in by_name["HERMESH_FOLDER"]
    assert "&lt;data>" in by_name["HERMESH_FOLDER"]
