"""The cells' file and the table of tenants."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launcher.cells import edge, table
from launcher.cli import app
from launcher.errors import LaunchError
from meshkit.api_keys import tag_of

GOOD = """
default = "a"
[edge]
folders = ["one", "two"]
[cells.a]
http = ["10.0.0.1:8080", "[::1]:8080"]
grpc = ["cell-a.example:50051"]
[cells.b]
http = ["10.0.0.2:8080"]
grpc = ["10.0.0.2:50051"]
max_requests = 5
"""


def read(tmp_path: Path, text: str) -> table.Cells:
    file = tmp_path / table.FILE
    file.write_text(text)
    return table.read(file)


def test_a_table_is_written_for_every_edge(tmp_path: Path) -> None:
    cells = read(tmp_path, GOOD)
    assert cells.table() == {}
    assert cells.where("acme").name == "a"
    edge.write(cells, {"acme": "b"})
    assert cells.where("acme").name == "b"
    assert cells.where("other").name == "a"
    for folder in ("one", "two"):
        assert json.loads((tmp_path / folder / table.TABLE).read_text()) == {"acme": "b"}
        assert '"acme"' in (tmp_path / folder / edge.HTTP_ROUTES).read_text()
        assert str(tmp_path / folder) in (tmp_path / folder / edge.CONFIG).read_text()
    assert cells.cell("b").max_requests == 5


def test_secrets_come_from_variables_or_files(tmp_path: Path) -> None:
    cell = read(tmp_path, GOOD).cell("b")
    file = tmp_path / "secret"
    file.write_text("postgresql://in-a-file\n")
    assert cell.secret("DATABASE_URL", {}) == ""
    assert cell.secret("DATABASE_URL", {"HERMESH_CELL_B_DATABASE_URL": "x"}) == "x"
    named = {"HERMESH_CELL_B_DATABASE_URL_FILE": str(file)}
    assert cell.secret("DATABASE_URL", named) == "postgresql://in-a-file"
    with pytest.raises(LaunchError, match="HERMESH_CELL_B_DATABASE_URL_FILE"):
        cell.secret("DATABASE_URL", {"HERMESH_CELL_B_DATABASE_URL_FILE": str(tmp_path / "none")})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (('default = "a"', 'default = "c"'), "default names c"),
        (("[cells.b]", "[cells.B-1]"), "not B-1"),
        (('"10.0.0.2:8080"', '"10.0.0.2"'), "'10.0.0.2' is no HOST:PORT"),
        (('"10.0.0.2:8080"', '"10.0.0.2:70000"'), "is no HOST:PORT"),
        (("max_requests = 5", "max_requests = 0"), "cells.b.max_requests"),
        (("max_requests = 5", "max_request = 5"), "cells.b.max_request"),
        (('default = "a"', "default = a"), "is no TOML"),
    ],
)
def test_what_is_wrong_with_the_file_is_one_line(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    with pytest.raises(LaunchError) as raised:
        read(tmp_path, GOOD.replace(*change))
    assert said in str(raised.value)


def test_a_damaged_table_stops_commands_and_not_the_edge(tmp_path: Path) -> None:
    cells = read(tmp_path, GOOD)
    edge.write(cells, {})
    path = tmp_path / "one" / table.TABLE
    for text in ("{", '{"acme": "c"}', '{"ACME": "a"}', "[]"):
        path.write_text(text)
        with pytest.raises(LaunchError, match=r"tenants\.json"):
            cells.table()


def test_the_command_makes_keys_and_lists_cells(tmp_path: Path) -> None:
    file = tmp_path / table.FILE
    file.write_text(GOOD)
    edge.write(table.read(file), {"acme": "b"})
    runner = CliRunner()
    made = runner.invoke(app, ["cells", "key", "acme"])
    assert tag_of(made.stdout.strip()) == "acme"
    listed = runner.invoke(app, ["cells", "list", "--cells", str(file)]).stdout
    assert "b  http 10.0.0.2:8080  grpc 10.0.0.2:50051  tenants: acme" in listed
    assert "whoever is placed nowhere" in listed
    refused = runner.invoke(app, ["cells", "key", "Acme Inc"])
    assert "cannot be a key's tag" in str(refused.exception)
