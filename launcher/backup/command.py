"""The commands `hermesh backup` and `hermesh restore`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher import control
from launcher.common import console, require_running, settings_here, settings_of_mesh
from launcher.embedded import wal
from launcher.embedded.postgres import Postgres, link_data
from launcher.errors import LaunchError
from launcher.plan import Plan
from launcher.state import State

if TYPE_CHECKING:
    from launcher.backup.archive import Archive, Manifest
    from launcher.backup.recover import Until

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
    base: Annotated[
        bool,
        typer.Option(
            "--base",
            help="Of the embedded PostgreSQL, with HERMESH_WAL_ARCHIVE: one from which restore --until "
            "reaches every later moment.",
        ),
    ] = False,
) -> None:
    """Write all that the mesh keeps into a folder, as it is at one moment; the mesh works on meanwhile."""
    from launcher.backup.take import summary, take

    settings, data = settings_of_mesh()
    url = settings.database_url.get_secret_value()
    postgres: Postgres | None = None
    if not url:
        require_running(data)
        plan = Plan(settings, data, State.load(data.state_file).ports)
        url, postgres = plan.database_url, plan.postgres
    segments = _segments_of(postgres) if base else None
    # With both named it needs no data folder, and makes none.
    objects = settings.object_store_url or data.objects.as_uri()
    manifest = asyncio.run(take(url, objects, folder.absolute(), _say, segments))
    console.print(f"The backup is in {folder.absolute()}:", highlight=False, soft_wrap=True)
    for line in summary(manifest):
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    console.print(NOT_IN_IT, highlight=False, soft_wrap=True)
    if manifest.base:
        console.print(
            f"Later moments need {manifest.base.wal_archive}, too.", highlight=False, soft_wrap=True
        )
        if postgres and (why := asyncio.run(postgres.archive_trouble())):
            raise LaunchError(f"the backup is there, but {why}")
    if manifest.missing:
        raise LaunchError("the backup is there, without the results that are missing; see above")


def _segments_of(postgres: Postgres | None) -> Path:
    """Where the write-ahead log of a mesh's database is archived."""
    if postgres is None:
        raise LaunchError(
            "--base is for the embedded PostgreSQL; the base backups of one of your own are made by its tools"
        )
    if (segments := postgres.segments) is None:
        raise LaunchError(
            "this mesh archives no write-ahead log, which --base needs: set HERMESH_WAL_ARCHIVE to a folder "
            "on another disk, hermesh down, hermesh up; or take a backup without --base"
        )
    return segments


@app.command()
def restore(
    folder: Annotated[Path, typer.Argument(help="What hermesh backup wrote.")],
    until: Annotated[
        str,
        typer.Option(
            help="Of a base backup: a moment such as 2026-11-30T12:00:00Z, or latest. What was committed by "
            "then is restored. Without it, the backup as it is.",
        ),
    ] = "",
    archive: Annotated[
        Path | None,
        typer.Option(help="Where the backup's archived write-ahead log is now, if it was moved."),
    ] = None,
) -> None:
    """Put a backup into a mesh that is down and has nothing yet; nothing is overwritten."""
    from launcher.backup.archive import Archive
    from launcher.backup.recover import parse_until
    from launcher.backup.take import summary

    to = parse_until(until) if until else "backup"
    settings, data = settings_here()
    if control.supervisor_of(data) is not None:
        raise LaunchError(f"a mesh runs in {data.root}; a backup goes into one that is down and empty")
    found = Archive(folder.absolute())
    manifest = found.read()
    data.prepare()
    plan = Plan(settings, data, {"mesh": 0, "model": 0})
    if manifest.base is None:
        if until:
            raise LaunchError(
                f"{found.root} is a dump, of {manifest.taken_at} alone; --until needs a backup that was "
                "taken with --base"
            )
        asyncio.run(_put_back(found, manifest, plan))
    else:
        segments = archive.absolute() if archive else Path(manifest.base.wal_archive)
        manifest = asyncio.run(_recover(found, manifest, plan, to, segments))
    if plan.postgres:
        link_data(data.postgres, plan.postgres)
    console.print("Restored; start it with: hermesh up", highlight=False)
    for line in summary(manifest):
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    console.print(NOT_IN_IT, highlight=False, soft_wrap=True)
    if plan.postgres and plan.postgres.archive:
        console.print(
            "It archives into a folder of its own, which needs a new base backup: hermesh backup --base",
            highlight=False,
        )


async def _put_back(archive: Archive, manifest: Manifest, plan: Plan) -> None:
    from launcher.backup.restore import restore as put_back

    await put_back(
        archive,
        manifest,
        plan.postgres or plan.database_url,
        plan.object_store_url,
        "" if plan.valkey else plan.redis_url,
        _say,
    )


async def _recover(
    archive: Archive, manifest: Manifest, plan: Plan, until: Until, segments: Path
) -> Manifest:
    from launcher.backup.recover import recover

    if plan.postgres is None:
        raise LaunchError(
            f"{archive.root} is a base backup of an embedded PostgreSQL and goes into one: unset "
            "HERMESH_DATABASE_URL"
        )
    redis_url = "" if plan.valkey else plan.redis_url
    return await recover(
        archive, manifest, plan.postgres, until, segments, plan.object_store_url, redis_url, _say
    )


@app.command("prune-wal")
def prune_wal(
    oldest: Annotated[Path, typer.Argument(help="The oldest base backup that is kept.")],
    archive: Annotated[
        Path | None,
        typer.Option(help="Where the backup's archived write-ahead log is now, if it was moved."),
    ] = None,
) -> None:
    """Remove the archived write-ahead log that neither this base backup nor a later one needs."""
    from launcher.backup.archive import Archive
    from launcher.backup.programs import clean_archive

    found = Archive(oldest.absolute())
    base = found.read().base
    if base is None:
        raise LaunchError(f"{found.root} is a dump: no write-ahead log is kept for it")
    segments = archive.absolute() if archive else Path(base.wal_archive)
    try:
        before = wal.segments(segments)
        if base.wal_from not in before:
            raise LaunchError(
                f"{segments} does not have {base.wal_from}, with which {found.root} begins: is it the "
                "archive of this backup? Nothing was removed"
            )
        asyncio.run(clean_archive(segments, base.wal_from))
        after = wal.segments(segments)
    except OSError as error:
        raise LaunchError(f"{segments} cannot be read: {error.strerror}") from error
    console.print(
        f"Removed {len(before) - len(after)} segments from {segments}; {len(after)} are left.",
        highlight=False,
        soft_wrap=True,
    )
