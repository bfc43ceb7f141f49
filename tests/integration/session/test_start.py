"""What a replica finds when it starts: no database yet, another schema, a certificate that nobody trusts."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest
from pydantic import SecretStr

from bench.mesh import free_ports
from launcher import probes
from launcher.embedded.postgres import Postgres
from meshkit.errors import StartupError, StoreAwayError
from meshkit.migrate import migrate
from services.session.app import serve
from services.session.settings import SessionSettings
from tests.conftest import MIGRATIONS, wait_for
from tests.integration.session.process import SessionProcess, environment

SECONDS = 90.0


class Server:
    """A PostgreSQL that is started later."""

    def __init__(self, folder: Path) -> None:
        self.server = Postgres.in_folder(folder / "data", folder, "test-password")
        self.server.initialize()
        self.log = folder / "log"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return self.server.url()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.server.command(), stdout=log, stderr=log, cwd="/")
        wait_for(lambda: asyncio.run(probes.postgres(self.url)), self.process)

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGQUIT)
            self.process.wait(timeout=30)
            self.process = None


@pytest.fixture
def server() -> Iterator[Server]:
    folder = Path(tempfile.mkdtemp(prefix="hm-st-"))
    found = Server(folder)
    yield found
    found.stop()
    shutil.rmtree(folder, ignore_errors=True)


def get(address: str, path: str) -> tuple[int, dict[str, object]]:
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=5) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_a_replica_waits_for_its_database_says_so_and_then_serves(server: Server) -> None:
    server.start()
    asyncio.run(migrate(server.url, MIGRATIONS["session"], schema="session"))
    server.stop()
    address = f"127.0.0.1:{free_ports(1)[0]}"
    replica = SessionProcess("early", environment(server.url, HERMESH_METRICS_LISTEN=address))
    try:
        end = time.monotonic() + SECONDS
        while True:
            assert replica.process.poll() is None, replica.log.read_text()
            assert time.monotonic() < end, "it says nothing"
            try:
                status, said = get(address, "/ready")
                break
            except OSError:
                time.sleep(0.05)
        assert status == 503
        assert "cannot use PostgreSQL" in str(said["reason"])
        assert "test-password" not in str(said)
        assert get(address, "/health")[0] == 200
        assert not replica.ready.exists()
        assert "waiting to begin" in replica.log.read_text()
        server.start()
        replica.wait_ready()
        assert get(address, "/ready")[0] == 200
        assert replica.stop() == 0
    finally:
        replica.kill()
        shutil.rmtree(replica.folder, ignore_errors=True)


def refusal(url: str) -> str:
    """What a replica says that does not start."""
    with pytest.raises(StartupError) as error:
        asyncio.run(serve(SessionSettings(database_url=SecretStr(url))))
    assert not isinstance(error.value, StoreAwayError)
    line = str(error.value)
    assert "\n" not in line
    assert "test-password" not in line
    return line


async def execute(url: str, statement: str) -> None:
    connection = await asyncpg.connect(url, timeout=30)
    await connection.execute(statement)
    await connection.close()


def test_a_schema_of_another_version_is_named(fresh_database: str, empty_database: str) -> None:
    assert "no tables of the session service; run: python -m services.session migrate" in refusal(
        empty_database
    )
    last = sorted(path.name for path in MIGRATIONS["session"].glob("*.sql"))[-1]
    table = "session.hermesh_migration"
    asyncio.run(execute(fresh_database, f"DELETE FROM {table} WHERE name = '{last}'"))
    assert f"schema is older than this version: {last} not applied" in refusal(fresh_database)
    asyncio.run(execute(fresh_database, f"INSERT INTO {table} VALUES (9999, '9999_post_new.sql', 'x')"))
    assert "newer: it has migration 9999_post_new.sql" in refusal(fresh_database)


def test_what_waiting_does_not_help_ends_it_with_one_line(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/absent")
    assert "user or password is refused" in refusal(postgres_url.replace("test-password", "hunter2"))
    assert "does not exist" in refusal(postgres_url.replace("/postgres?", "/absent?"))
    assert "HERMESH_DATABASE_URL" in refusal("http://u:test-password@h/d")
    checked = "postgresql://u:test-password@127.0.0.1:1/d?sslmode=verify-full"
    assert "no authority is named; name its authority's file" in refusal(checked)
    assert "there is no file /absent.pem" in refusal(f"{checked}&sslrootcert=/absent.pem")
