"""The commands `hermesh backup` and `hermesh restore`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from launcher import control
from launcher.common import console, require_running, settings_here, settings_of_mesh
from launcher.embedded.postgres import link_data
from launcher.errors import LaunchError
from launcher.plan import Plan
from launcher.state import State

app = typer.Typer()

NOT_IN_IT = (
    "Not in a backup: API keys in the clear (the keys themselves go on working), settings and other secrets, "
    "tools of your own, logs, and what Redis held."
)


def _say(text: str) -> None:
    typer.echo(text, err=True)


@app.command()
def backup(
    folder: Annotated[Path, typer.Argument(help="A folder that is not there yet.")],
) -> None:
    """Write all that the mesh keeps into a folder, as it is at one moment; the mesh works on meanwhile."""
    from launcher.backup.take import summary, take

    settings, data = settings_of_mesh()
    url = settings.database_url.get_secret_value()
    if not url:
        require_running(data)
        url = Plan(settings, data, State.load(data.state_file).ports).database_url
    # With both named it needs no data folder, and makes none.
    objects = settings.object_store_url or data.objects.as_uri()
    manifest = asyncio.run(take(url, objects, folder.absolute(), _say))
    console.print(f"The backup is in {folder.absolute()}:", highlight=False, soft_wrap=True)
    for line in summary(manifest):
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    console.print(NOT_IN_IT, highlight=False, soft_wrap=True)
    if manifest.missing:
        raise LaunchError("the backup is there, without the results that are missing; see above")


@app.command()
def restore(
    folder: Annotated[Path, typer.Argument(help="What hermesh backup wrote.")],
) -> None:
    """Put a backup into a mesh that is down and has nothing yet; nothing is overwritten."""
    from launcher.backup.archive import Archive
    from launcher.backup.restore import restore as put_back
    from launcher.backup.take import summary

    settings, data = settings_here()
    if control.supervisor_of(data) is not None:
        raise LaunchError(f"a mesh runs in {data.root}; a backup goes into one that is down and empty")
    archive = Archive(folder.absolute())
    manifest = archive.read()
    data.prepare()
    plan = Plan(settings, data, {"mesh": 0, "model": 0})
    asyncio.run(
        put_back(
            archive,
            manifest,
            plan.postgres or plan.database_url,
            plan.object_store_url,
            "" if plan.valkey else plan.redis_url,
            _say,
        )
    )
    if plan.postgres:
        link_data(data.postgres, plan.postgres)
    console.print("Restored; start it with: hermesh up", highlight=False)
    for line in summary(manifest):
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    console.print(NOT_IN_IT, highlight=False, soft_wrap=True)
