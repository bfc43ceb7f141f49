"""How `hermesh bench` starts the benchmark: a process of its own, with packages that a mesh does without."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec

from launcher.errors import LaunchError

NEEDED = ("bench", "hdrh", "matplotlib")


def command(arguments: Sequence[str]) -> list[str]:
    """Returns the command that runs it.

    Raises:
        LaunchError: What it needs is not installed.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise LaunchError(
            f"the benchmark is not installed ({', '.join(missing)} is missing): make install in a checkout, "
            "elsewhere pip install 'hermesh[bench,embedded]'"
        )
    # A folder of the same name where the person stands is not meant.
    return [sys.executable, "-P", "-m", "bench", *arguments]
