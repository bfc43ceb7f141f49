"""Servers that no Python package carries come from Debian."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

# Where Debian puts servers, which an ordinary user's PATH may lack.
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_SECONDS = 300


def debian(package: str, binary: str) -> Path:
    """Returns the path of a package's binary; installs the package first where it lacks and we are root."""
    found = shutil.which(binary, path=_PATH)
    command = ["apt-get", "install", "-y", "--no-install-recommends", package]
    if found is None and os.geteuid() == 0:
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "update", "-q"], capture_output=True, timeout=_SECONDS, check=False)
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
        found = shutil.which(binary, path=_PATH)
        if found is None:
            pytest.fail(f"{' '.join(command)} brought no {binary}: {done.stderr.strip()[-500:]}")
    if found is None:
        pytest.fail(f"{binary} is missing: sudo {' '.join(command)}")
    return Path(found)
