"""Debian's PgBouncer before a real PostgreSQL."""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

from bench.mesh import free_ports
from launcher.embedded.postgres import as_ordinary_user
from tests.conftest import wait_for
from tests.deploy.debian import debian


def _listens(port: int) -> bool:
    import socket

    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def pgbouncer(postgres_url: str, *, mode: str = "transaction", **settings: str) -> Iterator[str]:
    """Runs one before a server; yields the URL of the same user and database through it.

    Args:
        postgres_url: The server's, by its socket's folder.
        mode: `pool_mode`.
        settings: More of PgBouncer's settings.
    """
    binary = debian("pgbouncer", "pgbouncer")
    parts = urlsplit(postgres_url)
    query = {name: values[0] for name, values in parse_qs(parts.query).items()}
    folder = Path(tempfile.mkdtemp(prefix="hm-pb-"))
    [port] = free_ports(1)
    # As root it runs in a user namespace, in which the folder stays its own.
    (folder / "users.txt").write_text(f'"{parts.username}" "{parts.password}"\n')
    lines = {
        "listen_addr": "127.0.0.1",
        "listen_port": str(port),
        "unix_socket_dir": "",
        "auth_type": "scram-sha-256",
        "auth_file": str(folder / "users.txt"),
        "pool_mode": mode,
        "default_pool_size": "4",
        **settings,
    }
    text = "\n".join(f"{name} = {value}" for name, value in lines.items())
    server = f"host={query['host']} port={query['port']}"
    (folder / "pgbouncer.ini").write_text(f"[databases]\n* = {server}\n[pgbouncer]\n{text}\n")
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*as_ordinary_user(), str(binary), str(folder / "pgbouncer.ini")], stdout=log, stderr=log, cwd="/"
        )
    try:
        wait_for(lambda: _listens(port), process)
        credentials = f"{parts.username}:{quote(parts.password or '', safe='')}"
        yield f"postgresql://{credentials}@127.0.0.1:{port}{parts.path}"
    finally:
        process.send_signal(signal.SIGQUIT)
        process.wait(timeout=30)
        shutil.rmtree(folder, ignore_errors=True)
