"""What all commands of `hermesh` share: where they print, which settings hold, and the way to the mesh."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from launcher import control, kept
from launcher.errors import LaunchError
from launcher.folder import Folder
from launcher.settings import LauncherSettings
from launcher.state import State
from meshkit.settings import load

if TYPE_CHECKING:
    from launcher.api import Api

# Where nobody watches, a line is a line: tables and paths are not folded to 80 columns.
console = Console(width=None if sys.stdout and sys.stdout.isatty() else 200)
notes = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def settings_here() -> tuple[LauncherSettings, Folder]:
    """The settings of this shell and, where it says nothing, those that the mesh was told before.

    The environment says them from then on, so that whatever is started reads the same.
    """
    folder = Folder(load(LauncherSettings).folder)
    kept.fill(os.environ, kept.Kept.load(folder))
    return load(LauncherSettings), folder


def settings_of_mesh() -> tuple[LauncherSettings, Folder]:
    """The settings that the running mesh was started with, whatever this shell says; without one, as here."""
    settings, folder = settings_here()
    before = kept.Kept.load(folder)
    # Until a first start has succeeded, or while it is under way, nothing of it is kept.
    if control.supervisor_of(folder) is None or State.load(folder.state_file).settings != before.fingerprint:
        return settings, folder
    kept.replace(os.environ, before)
    return load(LauncherSettings), folder


def require_running(folder: Folder) -> None:
    """Raises LaunchError, which says how to start one, when no mesh runs."""
    if control.supervisor_of(folder) is None:
        raise LaunchError(f"no mesh runs in {folder.root}; start it with: hermesh up")


def api_of(folder: Folder, settings: LauncherSettings) -> Api:
    """A client of the running mesh."""
    require_running(folder)
    # Only what talks to the mesh pays for an HTTP client.
    from launcher.api import Api

    key = settings.api_key.get_secret_value()
    if not key:
        if not folder.api_key_file.exists():
            raise LaunchError("the mesh was started with a key of yours; set HERMESH_API_KEY to it here too")
        key = folder.secret("api-key")
    return Api(http_url(folder, settings), key)


def http_url(folder: Folder, settings: LauncherSettings) -> str:
    """Where the running mesh serves HTTP."""
    address = State.load(folder.state_file).addresses.get("http", f"127.0.0.1:{settings.http_port}")
    return f"http://{address}"


def grpc_address(folder: Folder, settings: LauncherSettings) -> str:
    """Where the running mesh serves gRPC."""
    return State.load(folder.state_file).addresses.get("grpc", f"127.0.0.1:{settings.grpc_port}")
