"""Installs each peer from PyPI into an environment of its own, at the versions its requirements.txt pins."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from bench.facts import ROOT

FOLDER = Path(__file__).resolve().parent
ENVIRONMENTS = ROOT / "build" / "peers"
UV = Path(sys.executable).parent / "uv"
# What the peers ask for; the bench's own Python may be older. Not all of them have wheels for later ones.
PYTHONS = ((3, 12), (3, 13))
INSTALL_SECONDS = 1800


class InstallError(Exception):
    """A peer cannot be installed here; the message says why."""


def install(name: str) -> Path:
    """Makes a peer's environment unless it is there as its files say, and returns its folder of programs.

    `requirements.txt` is installed whole; of what `data.txt` lists only the package itself, for a file in it.

    Raises:
        InstallError: There is no Python for it, or the package index is not reachable.
    """
    return make_environment(FOLDER / name, ENVIRONMENTS / name, find_python)


def make_environment(pins: Path, target: Path, python: Callable[[], str]) -> Path:
    """Installs what a folder's `requirements.txt` pins, unless it is there; returns its folder of programs.

    Args:
        pins: The folder; its name is the environment's in messages.
        target: Where the environment is made.
        python: Says which Python it is made with.

    Raises:
        InstallError: It cannot be installed.
    """
    wanted = [pins / file for file in ("requirements.txt", "data.txt")]
    files = [file for file in wanted if file.exists()]
    mark = hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()
    environment = target / "venv"
    done = target / "installed"
    if done.exists() and done.read_text() == mark:
        return environment / "bin"
    target.mkdir(parents=True, exist_ok=True)
    _uv(pins.name, "venv", "--clear", "--python", python(), str(environment))
    into = ("--python", str(environment / "bin" / "python"))
    _uv(pins.name, "pip", "install", *into, "-r", str(files[0]))
    for data in files[1:]:
        _uv(pins.name, "pip", "install", *into, "--no-deps", "-r", str(data))
    done.write_text(mark)
    return environment / "bin"


def find_python() -> str:
    """Returns a Python that peers run on: $BENCH_PYTHON, this one, one on the path, or one of pyenv's.

    Raises:
        InstallError: There is none.
    """
    wanted = [f"python{major}.{minor}" for major, minor in PYTHONS]
    candidates = [os.environ.get("BENCH_PYTHON", ""), sys.executable]
    candidates += [shutil.which(name) or "" for name in wanted]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates += [str(path) for name in wanted for path in sorted(pyenv.glob(f"*/bin/{name}"))]
    for candidate in candidates:
        if candidate and _version_of(candidate) in PYTHONS:
            return candidate
    raise InstallError(f"the peers need {' or '.join(wanted)}, and there is none: BENCH_PYTHON may name it")


def python_of(programs: Path) -> str:
    """Returns the whole version of the Python of an environment, by the folder of its programs."""
    code = "import platform; print(platform.python_version())"
    done = subprocess.run([programs / "python", "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _version_of(python: str) -> tuple[int, ...]:
    code = "import sys; print(*sys.version_info[:2])"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=20, check=False)
    except OSError:
        return ()
    return tuple(int(word) for word in done.stdout.split()) if done.returncode == 0 else ()


def versions(name: str, packages: tuple[str, ...]) -> dict[str, str]:
    """Returns the pinned versions of packages, as `requirements.txt` has them."""
    pins = dict(
        line.split(";")[0].strip().split("==")
        for line in (FOLDER / name / "requirements.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    )
    return {package: pins[package] for package in packages}


def _uv(name: str, *arguments: str) -> None:
    environment = os.environ | {"UV_PYTHON_DOWNLOADS": "never"}
    if Path("/etc/ssl/certs/ca-certificates.crt").exists():
        environment.setdefault("UV_SYSTEM_CERTS", "1")
    done = subprocess.run(
        [str(UV), "--quiet", *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=INSTALL_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        raise InstallError(f"{name} cannot be installed (uv {arguments[0]}): {done.stderr.strip()[-800:]}")
