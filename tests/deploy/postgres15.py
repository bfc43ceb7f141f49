"""Debian's PostgreSQL 15: no pgvector, and TLS."""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launcher import probes
from launcher.embedded.postgres import as_ordinary_user
from tests.conftest import wait_for
from tests.deploy.debian import debian

PASSWORD = "test-password"


@contextmanager
def postgres15(*options: str, port: int = 5432) -> Iterator[str]:
    """Runs one with more on its command line; yields its URL, by its socket's folder."""
    binaries = debian("postgresql-15", "initdb").resolve().parent
    folder = Path(tempfile.mkdtemp(prefix="hm-15-"))
    words = as_ordinary_user()
    try:
        (folder / "password").write_text(PASSWORD)
        initdb = [str(binaries / "initdb"), "-D", str(folder / "data"), "-U", "postgres", "-E", "UTF8"]
        initdb += ["--locale=C.UTF-8", "-A", "scram-sha-256", f"--pwfile={folder / 'password'}", "-N"]
        subprocess.run([*words, *initdb], check=True, capture_output=True, timeout=60, cwd="/")
        server = [str(binaries / "postgres"), "-D", str(folder / "data"), "-k", str(folder)]
        server += ["-c", "listen_addresses=", "-c", "fsync=off", *options]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen([*words, *server], stdout=log, stderr=log, cwd="/")
        url = f"postgresql://postgres:{PASSWORD}@/postgres?host={folder}&port={port}"
        try:
            wait_for(lambda: asyncio.run(probes.postgres(url)), process)
            yield url
        finally:
            process.send_signal(signal.SIGQUIT)
            process.wait(timeout=30)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
