"""Real PostgreSQL and Valkey for every test that asks: the embedded ones, in folders of their own."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from itertools import count
from pathlib import Path

import asyncpg
import pytest

from launcher import probes
from launcher.embedded.postgres import Postgres
from launcher.embedded.valkey import Valkey
from meshkit.migrate import migrate

IN_CI = bool(os.environ.get("CI"))
ROOT = Path(__file__).resolve().parents[1]
MIGRATIONS = {
    "session": ROOT / "services/session/store/migrations",
    "memory": ROOT / "services/memory/store/migrations",
}
START_SECONDS = 30
_numbers = count(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Makes a skip a failure in CI, which installs everything: what it leaves out is tested nowhere."""
    report = yield
    if IN_CI and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {item.nodeid}: {report.longrepr}"
    return report


def wait_for(answers: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Returns once a server answers; fails when it ends or takes too long."""
    end = time.monotonic() + START_SECONDS
    while not answers():
        assert process.poll() is None, "the server ended while it started"
        assert time.monotonic() < end, "the server does not answer"
        time.sleep(0.02)


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A PostgreSQL of this test run; the URL of its `postgres` database."""
    folder = Path(tempfile.mkdtemp(prefix="hm-pg-"))
    server = Postgres.in_folder(folder / "data", folder, "test-password")
    try:
        server.initialize()
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(server.command(), stdout=log, stderr=log, cwd="/")
        try:
            wait_for(lambda: asyncio.run(probes.postgres(server.url())), process)
            yield server.url()
        finally:
            # Its folder goes away with it, so it need not write anything down first.
            process.send_signal(signal.SIGQUIT)
            process.wait(timeout=30)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def create_database(postgres_url: str, template: str = "template1") -> str:
    """Makes a database and returns its URL."""
    name = f"t{next(_numbers)}"

    async def create() -> None:
        connection = await asyncpg.connect(postgres_url, timeout=30)
        try:
            await connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        finally:
            await connection.close()

    asyncio.run(create())
    return postgres_url.replace("/postgres?", f"/{name}?")


@pytest.fixture(scope="session")
def migrated_template(postgres_url: str) -> str:
    """The name of a database with every service's schema, to copy from."""
    url = create_database(postgres_url)

    async def fill() -> None:
        for schema, directory in MIGRATIONS.items():
            await migrate(url, directory, schema=schema)

    asyncio.run(fill())
    return url.partition("?")[0].rpartition("/")[2]


@pytest.fixture(scope="module")
def database(postgres_url: str, migrated_template: str) -> str:
    """The URL of a database with every service's schema, new for each test module."""
    return create_database(postgres_url, migrated_template)


@pytest.fixture
def fresh_database(postgres_url: str, migrated_template: str) -> str:
    """The same, new for each test."""
    return create_database(postgres_url, migrated_template)


@pytest.fixture
def empty_database(postgres_url: str) -> str:
    """The URL of a database without any schema, new for each test."""
    return create_database(postgres_url)


class ValkeyServer:
    """A Valkey that a test may kill, freeze and start again at its place."""

    def __init__(self, folder: Path) -> None:
        self._server = Valkey(folder, folder / "valkey.conf", "test-password")
        self.url = self._server.url
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        assert self.process is None
        self.process = subprocess.Popen(
            self._server.command(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_for(lambda: asyncio.run(probes.valkey(self.url)), self.process)

    def freeze(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(timeout=30)
            self.process = None


@pytest.fixture
def valkey() -> Iterator[ValkeyServer]:
    """A Valkey of this test's own."""
    folder = Path(tempfile.mkdtemp(prefix="hm-vk-"))
    server = ValkeyServer(folder)
    server.start()
    yield server
    server.kill()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def redis_url(valkey: ValkeyServer) -> str:
    """The URL of a Valkey of this test's own."""
    return valkey.url
