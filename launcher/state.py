"""What the supervisor remembers on disk, so that the next one can take over."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

from pydantic import TypeAdapter

from launcher.folder import write_private
from launcher.processes import Identity, boot_id


@dataclass(slots=True)
class Remembered:
    """A child as the last supervisor knew it; `code` as `State.code`."""

    service: str
    replica: str
    pid: int
    start_time: int
    address: str = ""
    restarts: int = 0
    last_exit: str = ""
    code: str = ""

    @property
    def identity(self) -> Identity:
        """Which process it is."""
        return Identity(self.pid, self.start_time)


@dataclass(slots=True)
class State:
    """The content of `state.json`.

    Attributes:
        supervisor: the supervisor that wrote it.
        ports: ports of ours that must stay the same while children live: `mesh`, `model`.
        addresses: the public addresses, by `http` and `grpc`.
        settings: a fingerprint of the settings it all was started with.
        children: everything that was started.
        code: what the supervisor runs, see `launcher.code`; empty for a version that did not say.
        boot: the machine's boot in which it was: pids and start times begin anew with the next.
    """

    supervisor: dict[str, int] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)
    addresses: dict[str, str] = field(default_factory=dict)
    settings: str = ""
    children: list[Remembered] = field(default_factory=list)
    code: str = ""
    boot: str = field(default_factory=boot_id)

    @classmethod
    def load(cls, path: Path) -> State:
        """Reads the file; a missing or broken one, or one of before a reboot, is an empty state."""
        try:
            state = _shape().validate_json(path.read_bytes())
        except (OSError, ValueError):
            return cls()
        return state if state.boot == boot_id() else cls()

    def save(self, path: Path) -> None:
        """Writes the file by rename."""
        write_private(path, json.dumps(asdict(self), indent=1) + "\n")

    @property
    def supervisor_identity(self) -> Identity | None:
        """Which process supervised."""
        if {"pid", "start_time"} <= self.supervisor.keys():
            return Identity(self.supervisor["pid"], self.supervisor["start_time"])
        return None


@cache
def _shape() -> TypeAdapter[State]:
    return TypeAdapter(State)
