"""Which code a process runs, so that what was started by another version can be told and replaced."""

from __future__ import annotations

import hashlib
import sys
from functools import cache

from launcher.settings import CHECKOUT

# What a process is started from, as folders of the checkout or of an installed package.
_FOLDERS = ("meshkit", "services", "gateway", "launcher", "gen", "hermesh", "deploy/envoy")
_SUFFIXES = frozenset({".py", ".sql", ".tmpl", ".yaml", ".txt", ".html", ".js", ".css"})


@cache
def code_here() -> str:
    """The code that is started from here, as `<digest>@<environment>`, as this process first found it.

    It changes with any file of ours, with the locked packages and with the environment's folder: what was
    started from another folder would be lost with that folder.
    """
    digest = hashlib.sha256()
    files = [CHECKOUT / "uv.lock"]
    for folder in _FOLDERS:
        files += [path for path in (CHECKOUT / folder).rglob("*") if path.suffix in _SUFFIXES]
    for path in sorted(files):
        try:
            content = path.read_bytes()
        except OSError:
            continue
        digest.update(f"{path.relative_to(CHECKOUT)}\0{len(content)}\0".encode() + content)
    return f"{digest.hexdigest()[:16]}@{sys.prefix}"


def place_of(code: str) -> str:
    """The environment that a code is started from; empty where it is not known."""
    return code.partition("@")[2]
