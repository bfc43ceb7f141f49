"""A variable that is no setting is named, with the setting that is meant."""

import json
import subprocess
import sys

import pytest

from meshkit.variables import known, unknown


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("HERMESH_DATABSE_URL", "HERMESH_DATABASE_URL"),
        ("HERMESH_LLM_BASEURL", "HERMESH_LLM_BASE_URL"),
        ("HERMESH_DB_URL", ""),
        ("HERMESH_XYZZY", ""),
    ],
)
def test_a_mistyped_setting_is_named_with_the_one_that_is_meant(typed: str, meant: str) -> None:
    [found] = unknown({typed: "x", "HERMESH_HTTP_PORT": "1", "PATH": "/bin"})
    assert (found.name, found.nearest) == (typed, meant)
    assert typed in str(found)
    assert meant in str(found)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HERMESH_FAILPOINTS", "x"),
        ("hermesh_http_port", "1"),
        ("HERMESH_GATEWAY_SERVICE_HOST", "10.0.0.1"),
        ("HERMESH_GATEWAY_SERVICE_PORT_HTTP", "8080"),
        ("HERMESH_GATEWAY_PORT", "tcp://10.0.0.1:8080"),
        ("HERMESH_GATEWAY_PORT_8080_TCP_ADDR", "10.0.0.1"),
        ("HERMESH_HTTP_URL", "http://127.0.0.1:8080"),
        ("HERMESH_CELL_B2_DATABASE_URL_FILE", "/run/secrets/b"),
        ("HERMESH_CELLS_FILE", "cells.toml"),
    ],
)
def test_what_nobody_mistyped_is_not_named(name: str, value: str) -> None:
    assert unknown({name: value}) == []


def test_the_names_are_those_of_all_processes() -> None:
    assert {"HERMESH_DATA_DIR", "HERMESH_MAX_TURNS", "HERMESH_LOGIN_SECONDS", "HERMESH_LISTEN"} <= known()


STARTS = """
from meshkit.settings import MeshSettings, load
from meshkit.telemetry import setup_logging
setup_logging(load(MeshSettings), "agent")
"""


def test_each_process_says_so_when_it_starts() -> None:
    done = subprocess.run(
        [sys.executable, "-c", STARTS],
        env={"HERMESH_MAX_TURN": "3", "HERMESH_MAX_TURNS": "3"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    [line] = done.stderr.splitlines()
    said = json.loads(line)
    assert (said["level"], said["variable"], said["nearest"]) == (
        "warning",
        "HERMESH_MAX_TURN",
        "HERMESH_MAX_TURNS",
    )
