"""`python -m services.memory` as a process."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest

DEADLINE = 30.0
COMMAND = [sys.executable, "-m", "services.memory"]


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    return {
        **{key: value for key, value in os.environ.items() if not key.startswith("HERMESH_")},
        "HERMESH_MESH_TOKEN": "token",
        "HERMESH_READY_FILE": str(tmp_path / "ready.json"),
        "HERMESH_DRAIN_DELAY_SECONDS": "0",
        **more,
    }


def run(env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], env=env, cwd="/", capture_output=True, text=True, timeout=DEADLINE
    )


@pytest.fixture
def process(tmp_path: Path, database: str) -> Iterator[subprocess.Popen[str]]:
    env = environment(tmp_path, HERMESH_DATABASE_URL=database)
    started = subprocess.Popen(COMMAND, env=env, cwd="/", stderr=subprocess.PIPE, text=True)
    yield started
    if started.poll() is None:
        started.kill()
    started.communicate(timeout=DEADLINE)


def test_it_starts_is_ready_and_stops(process: subprocess.Popen[str], tmp_path: Path) -> None:
    path = tmp_path / "ready.json"
    end = time.monotonic() + DEADLINE
    while not path.exists():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < end, "it did not become ready"
        time.sleep(0.02)
    record = json.loads(path.read_text())
    assert record["service"] == "memory"
    with urlopen(f"http://{record['metrics_address']}/ready", timeout=DEADLINE) as answer:
        found = json.load(answer)
    # Nobody serves a mesh here: that only degrades.
    assert found["status"] == "degraded"
    ok = {name: check["ok"] for name, check in found["checks"].items()}
    assert ok == {"postgresql": True, "mesh": False, "embedder": True}
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=DEADLINE) == 0


def test_migrate_says_what_it_did(tmp_path: Path, empty_database: str) -> None:
    env = environment(tmp_path, HERMESH_DATABASE_URL=empty_database)
    assert "0001_pre_memory.sql" in run(env, "migrate").stdout
    assert run(env, "migrate").stdout == "nothing to apply\n"
    assert run(env, "reembed").stdout == "0 memories have new vectors\n"


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({}, "HERMESH_DATABASE_URL is not set"),
        ({"HERMESH_DATABASE_URL": "nonsense"}, "HERMESH_DATABASE_URL"),
        ({"HERMESH_MEMORY_MIN_SCORE": "2"}, "HERMESH_MEMORY_MIN_SCORE"),
    ],
)
@pytest.mark.parametrize("arguments", [(), ("migrate",), ("reembed",)])
def test_what_is_wrong_at_the_start_is_one_line(
    tmp_path: Path, more: dict[str, str], word: str, arguments: tuple[str, ...]
) -> None:
    done = run(environment(tmp_path, **more), *arguments)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert word in line
    assert "secret" not in line


@pytest.mark.parametrize("command", ["migrate", "reembed"])
def test_a_command_does_not_wait_for_a_database(tmp_path: Path, command: str) -> None:
    done = run(environment(tmp_path, HERMESH_DATABASE_URL="postgresql://u:secret@127.0.0.1:1/d"), command)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert "cannot use PostgreSQL" in line
    assert "secret" not in line


def test_a_database_without_tables_says_to_migrate(tmp_path: Path, empty_database: str) -> None:
    done = run(environment(tmp_path, HERMESH_DATABASE_URL=empty_database))
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert "python -m services.memory migrate" in line


def test_another_argument_is_a_usage_error(tmp_path: Path) -> None:
    assert run(environment(tmp_path), "nonsense").returncode == 2
