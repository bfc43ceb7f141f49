"""The data folder: what lies where, who may read it, and the secrets that are made once."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import LaunchError, explain_os_error

NEEDED_BYTES = 300 * 1024 * 1024
# A unix socket's path has to fit into 107 bytes; ours add at most this many to the folder's.
_SOCKET_NAME = 24
_PLAIN = re.compile(r"[\w./+-]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class Folder:
    """The layout of one data folder."""

    root: Path

    @property
    def state_file(self) -> Path:
        """Who runs: pids, start times, addresses."""
        return self.root / "state.json"

    @property
    def targets(self) -> Path:
        """Where Prometheus finds everything; see `launcher.targets`."""
        return self.root / "prometheus.json"

    @property
    def settings_file(self) -> Path:
        """What the mesh was told; see `launcher.kept`."""
        return self.root / "settings.json"

    @property
    def api_key_file(self) -> Path:
        """The API key of the first tenant."""
        return self.root / "api-key"

    @property
    def logs(self) -> Path:
        """One log file a process."""
        return self.root / "logs"

    @property
    def ready(self) -> Path:
        """What each service says once it serves."""
        return self.root / "ready"

    @property
    def envoy(self) -> Path:
        """Envoy's configuration and its endpoint files."""
        return self.root / "envoy"

    @property
    def postgres(self) -> Path:
        """PostgreSQL's data."""
        return self.root / "postgresql"

    @property
    def objects(self) -> Path:
        """The object store, where no URL names another."""
        return self.root / "objects"

    @property
    def sockets(self) -> Path:
        """Unix sockets: in the data folder where their paths fit, else in a folder of the user's in /tmp.

        Paths with commas, quotes and the like do not fit either: URLs and configurations name sockets, each
        with its own way of quoting. The place depends on nothing but the data folder and the user, so that
        every shell finds it.
        """
        inside = self.root / "run"
        if len(os.fsencode(inside)) + _SOCKET_NAME <= 107 and _PLAIN.fullmatch(str(inside)):
            return inside
        name = hashlib.sha256(os.fsencode(self.root)).hexdigest()[:16]
        return Path("/tmp") / f"hermesh-{os.getuid()}-{name}"  # noqa: S108 - private, checked in prepare

    @property
    def control_socket(self) -> Path:
        """Where the supervisor listens."""
        return self.sockets / "control.sock"

    def prepare(self) -> None:
        """Makes the folder and what is in it. Raises LaunchError when it cannot be used."""
        try:
            if self.root.exists() and not self.root.is_dir():
                raise LaunchError(
                    f"{self.root} is a file, not a folder. "
                    "Move it away, or set HERMESH_DATA_DIR to another one."
                )
            for path in (self.root, self.logs, self.ready, self.envoy, self.envoy / "eds", self.sockets):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self.sockets.lstat()
            if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode):
                raise LaunchError(f"{self.sockets} is not a folder of yours; remove it")
            self.sockets.chmod(0o700)
            free = shutil.disk_usage(self.root).free
        except OSError as error:
            raise explain_os_error(error, f"use the data folder {self.root}") from error
        if not (self.postgres / "PG_VERSION").exists() and free < NEEDED_BYTES:
            raise LaunchError(
                f"there is too little space in {self.root}: {free >> 20} MiB free, "
                f"{NEEDED_BYTES >> 20} MiB needed. "
                "Free some, or set HERMESH_DATA_DIR to a folder on another disk."
            )

    def remove_sockets(self) -> None:
        """Leaves nothing in /tmp, once nothing runs."""
        if self.root not in self.sockets.parents:
            shutil.rmtree(self.sockets, ignore_errors=True)

    def secret(self, name: str, prefix: str = "") -> str:
        """Returns a secret that is made once and kept with mode 0600."""
        path = self.root / name
        try:
            if path.exists():
                text = path.read_text().strip()
                if text:
                    return text
            text = prefix + secrets.token_urlsafe(32)
            write_private(path, text + "\n")
        except OSError as error:
            raise explain_os_error(error, f"keep a secret in {path}") from error
        return text


def write_private(path: Path, text: str) -> None:
    """Writes a file that only its owner may read, by rename: a reader sees all of it or none."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(text)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
