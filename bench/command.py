"""What the bench's commands share: how they print, and what keeps them from a result."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from rich.console import Console

from bench.load import LoadError
from bench.mesh import MeshError
from bench.process_cpu import ProcessGone
from bench.report import ReportError
from bench.target import IncompleteReply

FAILURES = (IncompleteReply, LoadError, MeshError, ProcessGone, ReportError)


def new_console() -> Console:
    """Returns a console that is wide enough for the tables where no terminal sets its width."""
    return Console(width=None if sys.stdout.isatty() else 140)


def clock(console: Console) -> Callable[[str], None]:
    """Returns what prints how far it is, with the seconds since the beginning."""
    began = time.monotonic()

    def said(text: str) -> None:
        console.print(f"[dim]{time.monotonic() - began:5.0f} s  {text}[/dim]", highlight=False)

    return said
