"""Taking a backup of a mesh that works meanwhile: nothing stops and nothing waits for it."""

from __future__ import annotations

import asyncio
import hashlib
import re
import shutil
from collections.abc import Callable, Coroutine, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import obstore
from obstore.store import ObjectStore

from launcher.backup.archive import BASE_FORMAT, FORMAT, SCHEMAS, Archive, Base, Manifest, Ref, sha256_of
from launcher.backup.programs import copy_base, dump
from launcher.errors import LaunchError, explain_os_error
from meshkit.objects import CALL_SECONDS, FAILURES, NOT_FOUND, bucket_missing, explain, open_store
from services.tool.results import object_path, paths

# Copies at once: each holds one result in memory.
_COPIES = 4
_ROWS = 1000
_CONNECT_SECONDS = 10.0
_NAMED = 20

_FIRST_SEGMENT = re.compile(r"^START WAL LOCATION: \S+ \(file ([0-9A-F]{24})\)", re.MULTILINE)
_SNAPSHOT = "SELECT pg_export_snapshot() AS snapshot, clock_timestamp() AS taken_at"
_MIGRATED = "SELECT name FROM {schema}.hermesh_migration ORDER BY version"
_COUNT = "SELECT count(*) FROM {schema}.{table}"
_REFS = (
    "SELECT DISTINCT tenant_id, session_id, content_ref FROM session.tool_call WHERE content_ref <> ''"
    " ORDER BY tenant_id, session_id, content_ref"
)

Say = Callable[[str], None]


async def take(
    database_url: str, object_url: str, target: Path, say: Say, wal_archive: Path | None = None
) -> Manifest:
    """Writes a backup.

    The database is read in one snapshot. The objects follow: each was stored before the database said so, and
    outlives the deletion of its session by HERMESH_RESULT_GRACE_SECONDS, so those of the snapshot are there.

    Args:
        database_url: PostgreSQL.
        object_url: The object store; empty where there is none.
        target: The folder to make; it has all of the backup, or is not there.
        say: Told of each step.
        wal_archive: Where the database's write-ahead log is archived: a base backup is then taken, from which
            every later moment can be restored. None takes a dump.

    Raises:
        LaunchError: It cannot be taken; nothing is left at `target`.
    """
    partial = _partial(target)
    archive = Archive(partial)
    try:
        partial.mkdir(mode=0o700, parents=True)
        try:
            manifest = await _write(archive, database_url, object_url, say, wal_archive)
            archive.write(manifest)
            partial.rename(target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        raise explain_os_error(error, f"write the backup to {target}") from error
    return manifest


def _partial(target: Path) -> Path:
    """Where the backup is until it is whole."""
    if target.exists():
        raise LaunchError(f"{target} is there already; nothing is overwritten: name another folder")
    partial = target.with_name(f"{target.name}.partial")
    if partial.exists():
        raise LaunchError(f"{partial} is there already, of a backup that did not end: remove it first")
    return partial


async def _write(
    archive: Archive, database_url: str, object_url: str, say: Say, wal_archive: Path | None
) -> Manifest:
    base = None
    if wal_archive is not None:
        say("copying the database's files")
        await copy_base(database_url, archive.base)
        base = _base(archive, wal_archive, object_url)
    say("reading the database")
    try:
        connection = await asyncpg.connect(database_url, timeout=_CONNECT_SECONDS)
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError, ValueError) as error:
        raise LaunchError(
            f"PostgreSQL cannot be reached ({type(error).__name__}); does the mesh run? See hermesh status"
        ) from error
    try:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            head = await connection.fetchrow(_SNAPSHOT)
            assert head is not None
            migrations, rows = await described(connection)
            if base is None:
                await dump(database_url, head["snapshot"], tuple(SCHEMAS), archive.dump)
            await write_refs(connection, archive.refs)
        server = connection.get_server_version()
    except asyncpg.PostgresError as error:
        raise LaunchError(f"the database cannot be read: {' '.join(str(error).split())}") from error
    finally:
        connection.terminate()
    say("copying large results")
    copied, size, missing = await _copy_all(archive, object_url)
    return Manifest(
        taken_at=head["taken_at"].isoformat(),
        hermesh=version("hermesh"),
        postgresql=f"{server.major}.{server.minor}",
        migrations=migrations,
        rows=rows,
        dump_sha256="" if base else await asyncio.to_thread(sha256_of, archive.dump),
        objects=copied,
        object_bytes=size,
        missing=missing,
        format=BASE_FORMAT if base else FORMAT,
        base=base,
    )


def _base(archive: Archive, wal_archive: Path, object_url: str) -> Base:
    found = _FIRST_SEGMENT.search((archive.base / "backup_label").read_text())
    if found is None:
        raise LaunchError(f"pg_basebackup left no backup_label that can be read in {archive.base}")
    size = sum(path.stat().st_size for path in archive.base.rglob("*") if path.is_file())
    return Base(str(wal_archive), found[1], without_credentials(object_url), size)


def without_credentials(url: str) -> str:
    """A URL as it may be kept: a store's keys are not in it."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


async def write_refs(connection: asyncpg.Connection[asyncpg.Record], path: Path) -> None:
    """Lists the large results that a database refers to; within a transaction."""
    with path.open("w") as file:
        async for row in connection.cursor(_REFS, prefetch=_ROWS):
            file.write(Ref(row["tenant_id"], row["session_id"], row["content_ref"]).line())


async def described(
    connection: asyncpg.Connection[asyncpg.Record],
) -> tuple[dict[str, list[str]], dict[str, int]]:
    """The migrations that a database has, by schema, and how many rows are in which table.

    Raises:
        LaunchError: It is no mesh's.
    """
    migrations, rows = {}, {}
    for schema, tables in SCHEMAS.items():
        try:
            found = await connection.fetch(_MIGRATED.format(schema=schema))
        except asyncpg.UndefinedTableError as error:
            raise LaunchError(
                f"the database has no tables of the {schema} service: is it the mesh's? See hermesh status"
            ) from error
        migrations[schema] = [row["name"] for row in found]
        for table in tables:
            count = await connection.fetchval(_COUNT.format(schema=schema, table=table), timeout=None)
            rows[f"{schema}.{table}"] = count
    return migrations, rows


async def _copy_all(archive: Archive, url: str) -> tuple[int, int, list[str]]:
    """Copies what is listed; returns how many objects, their bytes, and the paths of missing ones."""
    archive.objects.mkdir()
    refs = archive.listed()
    copied, size, missing = 0, 0, list[str]()
    store = open_store(url) if url else None

    async def work(refs: Iterator[Ref]) -> None:
        nonlocal copied, size
        for ref in refs:
            path = object_path(ref.tenant_id, ref.session_id, ref.ref)
            data = None if store is None else await read_object(store, url, ref)
            if data is None:
                missing.append(path)
                continue
            await asyncio.to_thread(_keep, archive.objects / path, data)
            copied += 1
            size += len(data)

    # One list for all: an iterator gives each of its items to one of them.
    await in_parallel([work(refs) for _ in range(_COPIES)])
    return copied, size, sorted(missing)


async def in_parallel(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Does all of it side by side; the first failure ends the rest, and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            for work in works:
                group.create_task(work)
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from failed


async def read_object(store: ObjectStore, url: str, ref: Ref) -> bytes | None:
    """An object's bytes; None where it is not there, or is not what it should be. Raises LaunchError."""
    for path in paths(ref.tenant_id, ref.session_id, ref.ref):
        try:
            async with asyncio.timeout(3 * CALL_SECONDS):
                data = bytes(await (await obstore.get_async(store, path)).bytes_async())
        except FAILURES as error:
            if isinstance(error, NOT_FOUND) and not bucket_missing(error):
                continue
            raise LaunchError(f"a large result cannot be read: {explain(error, url)}") from error
        if hashlib.sha256(data).hexdigest() == ref.sha256:
            return data
    return None


def _keep(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def summary(manifest: Manifest) -> list[str]:
    """What a person is told of a backup."""
    rows = manifest.rows
    size = f"{manifest.objects} large results ({manifest.object_bytes} bytes)"
    size += f", {manifest.base.bytes >> 20} MiB of the database's files" if manifest.base else ""
    kept = (
        f"{rows['session.session']} sessions, {rows['session.run']} runs, {rows['session.event']} events, "
        f"{rows['memory.item']} memories, {size}, as of {manifest.taken_at}"
    )
    if not manifest.missing:
        return [kept]
    named = ", ".join(manifest.missing[:_NAMED])
    number = len(manifest.missing)
    return [kept, f"{number} large results are missing in the object store, or damaged there: {named}"]
