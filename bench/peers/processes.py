"""Processes of peers and their stores: ended by pid, with whatever they started."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress

GRACE_SECONDS = 15.0


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process that leads a session of its own, and what is left of its session."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(GRACE_SECONDS)
