"""What the bench's commands share: how they print, and what keeps them from a result."""

from __future__ import annotations

import argparse
import math
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


def whole(least: int) -> Callable[[str], int]:
    """Returns a type for argparse: a whole number of at least `least`."""

    def parsed(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {text}")
        return value

    return parsed


def more_than(bound: float) -> Callable[[str], float]:
    """Returns a type for argparse: a finite number above `bound`."""

    def parsed(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
        if not math.isfinite(value) or value <= bound:
            raise argparse.ArgumentTypeError(f"must be more than {bound:g}, not {text}")
        return value

    return parsed


def new_console() -> Console:
    """Returns a console that is wide enough for the tables where no terminal sets its width."""
    return Console(width=None if sys.stdout.isatty() else 140)


def clock(console: Console) -> Callable[[str], None]:
    """Returns what prints how far it is, with the seconds since the beginning."""
    began = time.monotonic()

    def said(text: str) -> None:
        console.print(f"[dim]{time.monotonic() - began:5.0f} s  {text}[/dim]", highlight=False)

    return said
