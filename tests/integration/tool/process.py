"""Tool replicas as processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

DEADLINE = 30.0
COMMAND = [sys.executable, "-m", "services.tool"]


def environment(folder: Path, **more: str) -> dict[str, str]:
    """The environment of a tool process that tells its address in `folder`."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HERMESH_")}
    return {
        **inherited,
        "HERMESH_MESH_TOKEN": "token",
        "HERMESH_READY_FILE": str(folder / "ready.json"),
        "HERMESH_DRAIN_DELAY_SECONDS": "0",
        **more,
    }


class ToolProcess:
    """One replica."""

    def __init__(self, folder: Path, **more: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.ready = folder / "ready.json"
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                COMMAND, env=environment(folder, **more), cwd=folder, stdout=log, stderr=log
            )
        self.address = ""

    def wait_ready(self) -> None:
        end = time.monotonic() + DEADLINE
        while not self.ready.exists():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, "it did not become ready"
            time.sleep(0.02)
        self.address = json.loads(self.ready.read_text())["address"]

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(timeout=DEADLINE)
