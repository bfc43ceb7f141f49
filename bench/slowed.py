"""A process that gets a tenth of the time: stopped and continued by signals, as often as it takes."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import TracebackType
from typing import Self

PERIOD_SECONDS = 0.5
SHARE = 0.1


class Slowed:
    """While it is entered, a process runs for `SHARE` of each period and is stopped for the rest.

    The pauses are shorter than a health check's timeout: to the load balancer the replica is well.

    Args:
        pid: the process.
        seconds: after which it is left alone, although it is not left yet.
    """

    def __init__(self, pid: int, seconds: float) -> None:
        self._pid = pid
        self._seconds = seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._cycle, name="slowed", daemon=True)
        self._failed: OSError | None = None

    def __enter__(self) -> Self:
        """Begins."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Lets the process run on. Raises OSError when it could not be slowed all the time."""
        self._over.set()
        self._thread.join()
        if self._failed is not None:
            raise self._failed

    def _cycle(self) -> None:
        try:
            until = time.monotonic() + self._seconds
            while not self._over.is_set() and time.monotonic() < until:
                os.kill(self._pid, signal.SIGSTOP)
                try:
                    self._over.wait(PERIOD_SECONDS * (1 - SHARE))
                finally:
                    os.kill(self._pid, signal.SIGCONT)
                self._over.wait(PERIOD_SECONDS * SHARE)
        except OSError as error:
            self._failed = error
