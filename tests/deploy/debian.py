"""Programs of Debian's that tests run for real."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

_SECONDS = 300
# Where Debian puts what only root is expected to run, and what has several versions.
_FOLDERS = ("/usr/sbin", "/sbin", "/usr/lib/postgresql/15/bin")


def debian(package: str, binary: str) -> Path:
    """Returns a program of a package of Debian's, which is installed first where we are root.

    Where we are not, the test fails with the command that does it.
    """
    path = os.pathsep.join((os.environ.get("PATH", ""), *_FOLDERS))
    found = shutil.which(binary, path=path)
    if found is None and os.geteuid() == 0 and shutil.which("apt-get"):
        _install(package)
        found = shutil.which(binary, path=path)
    if found is None:
        pytest.fail(f"{binary} is missing: apt-get install {package}", pytrace=False)
    return Path(found)


def _install(package: str) -> None:
    # Nothing is to be started, and nothing asked.
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    install = ["apt-get", "install", "-y", "--no-install-recommends", package]
    for command in (install, ["apt-get", "update"], install):
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
        if command is install and done.returncode == 0:
            return
    last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    pytest.fail(f"apt-get install {package} failed: {last}", pytrace=False)
