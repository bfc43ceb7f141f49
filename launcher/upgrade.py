"""Taking over a mesh that runs and was started by another version's code, as `hermesh up` does."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

from launcher import control, kept
from launcher.code import code_here, place_of
from launcher.errors import LaunchError
from launcher.folder import Folder
from launcher.plan import Plan, fingerprint
from launcher.processes import Identity, end_all
from launcher.settings import LauncherSettings
from launcher.state import State
from meshkit.settings import load

SETUP_SECONDS = 120.0
END_SECONDS = 5.0

Say = Callable[[str], None]


def other(folder: Folder) -> Identity | None:
    """The supervisor of this folder, where one runs with another code than the one that is here."""
    supervisor = control.supervisor_of(folder)
    if supervisor is None or State.load(folder.state_file).code == code_here():
        return None
    return supervisor


def elsewhere(folder: Folder) -> str:
    """The environment from which the running mesh was started, where that is another one than this."""
    place = place_of(State.load(folder.state_file).code)
    return place if place not in ("", place_of(code_here())) else ""


def take_over(folder: Folder, former: Identity, say: Say) -> None:
    """Ends another code's supervisor and nothing else, and starts one of ours in its place.

    The schema is brought up to date before, with the settings that the mesh was started with, which this
    process's environment says from then on.

    Raises:
        LaunchError: The schema or the supervisor could not be made; the mesh works on.
    """
    _take_settings(folder, former)
    # An earlier version is told by its folder only; it may have been this one.
    say("the mesh was started by another version: its schema first, then part by part, while it works")
    plan = Plan(load(LauncherSettings), folder, State.load(folder.state_file).ports)
    try:
        set_up(plan, lambda text: None, rollout=True)
    except LaunchError as error:
        raise LaunchError(f"{error}; nothing was replaced, and the mesh works on as before") from None
    # Nothing milder: told to end, it would end what it keeps.
    end_all([former], grace=END_SECONDS, polite=signal.SIGKILL)
    state = State.load(folder.state_file)
    # Each version has its own way to tell settings from others; these are the same.
    state.settings = fingerprint()
    state.supervisor = {}
    state.save(folder.state_file)
    try:
        control.start_supervisor(folder)
    except LaunchError as error:
        raise LaunchError(
            f"{error}; the mesh works on, and nobody starts again what dies. Mend that, then: hermesh up"
        ) from None


def _take_settings(folder: Folder, former: Identity) -> None:
    """Has this process's environment say what the running mesh was told."""
    found = kept.Kept.load(folder)
    # A version that keeps no settings has them in its environment, as the others do.
    environment = _environment(former)
    told = kept.told(environment) if environment else found.variables
    kept.replace(os.environ, kept.Kept(told, exists=True))


def _environment(process: Identity) -> dict[str, str]:
    try:
        text = Path(f"/proc/{process.pid}/environ").read_bytes()
    except OSError:
        return {}
    if not process.alive:
        return {}
    items = (item.partition(b"=") for item in text.split(b"\0") if b"=" in item)
    return {os.fsdecode(name): os.fsdecode(value) for name, _, value in items}


def set_up(plan: Plan, say: Say, *, rollout: bool = False) -> None:
    """Brings the schema up to date and makes the first tenant, where they are not there yet.

    With `rollout` the version before still works on it, and what it does not survive waits.

    Raises:
        LaunchError: Which of it failed, and why.
    """
    for what, command, environment in plan.setup_commands(rollout=rollout):
        try:
            done = subprocess.run(
                command,
                env=environment,
                cwd="/",
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=SETUP_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise LaunchError(f"{what} took longer than {SETUP_SECONDS:.0f} s and were given up") from None
        if done.returncode != 0:
            said = done.stderr.strip().splitlines()
            why = said[-1].removeprefix("hermesh: ") if said else f"status {done.returncode}"
            raise LaunchError(f"{what} failed: {why}")
        say(f"{what}: done")
    if plan.postgres and not rollout:
        plan.postgres.write_mark(plan.schema_fingerprint())
