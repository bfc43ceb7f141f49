"""A point in time: a base backup, and the archived write-ahead log after it, replayed up to a moment.

All of it happens beside the data folder's place: until the database is there, whole and at that moment, there
is none.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal, TypeAlias

import asyncpg

from launcher.backup.archive import Archive, Base, Manifest, Ref, read_refs
from launcher.backup.former import Results
from launcher.backup.programs import verify_base
from launcher.backup.restore import check_folder, check_new, check_redis, start, stop
from launcher.backup.take import Say, described, write_refs
from launcher.embedded import wal
from launcher.embedded.postgres import Postgres
from launcher.errors import LaunchError

# A moment; all that was archived; or the backup as it is, for which no archive is needed.
Until: TypeAlias = "datetime | Literal['latest', 'backup']"

_POLL_SECONDS = 0.1
# Without a word of PostgreSQL's: it says one for each segment of 16 MiB that it replays.
_SILENT_SECONDS = 600.0
_CONNECT_SECONDS = 10.0
_TAIL_BYTES = 64 * 1024
# Only who may enter the socket's folder, which is the owner's, gets there.
_TRUST = "local all postgres trust\n"

_READY = "database system is ready to accept connections"
_TOO_SHORT = "recovery ended before configured recovery target was reached"
_TOO_EARLY = "requested recovery stop point is before consistent recovery point"
_LAST = re.compile(r"last completed transaction was at log time (.+)")
_REDO_DONE = re.compile(r"redo done at ([0-9A-F]+/[0-9A-F]+)")
_FETCHED = re.compile(r'restored log file "([0-9A-F]{24})" from archive')

_SEGMENT = "SELECT substr(pg_walfile_name($1::text::pg_lsn), 9)"
_PASSWORD = "SELECT format('ALTER ROLE postgres PASSWORD %L', $1::text)"  # noqa: S105 - the statement, not one


def parse_until(text: str) -> Until:
    """Reads `--until`: a moment with its time zone, or `latest`. Raises LaunchError."""
    if text == "latest":
        return "latest"
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        found = None
    if found is None or found.tzinfo is None:
        raise LaunchError(
            f"--until {text} is no moment: say it with its time zone, such as 2026-11-30T12:00:00Z or "
            "2026-11-30T13:00:00+01:00, or say latest"
        )
    return found.astimezone(UTC)


async def recover(
    archive: Archive,
    manifest: Manifest,
    database: Postgres,
    until: Until,
    segments: Path,
    object_url: str,
    redis_url: str,
    say: Say,
) -> Manifest:
    """Restores a base backup and what was archived after it, into stores that are empty.

    What was committed at that moment or before it, by PostgreSQL's clock, is there, and nothing else.

    Args:
        archive: The backup.
        manifest: What is in it; its `base` is set.
        database: The embedded PostgreSQL, which does not run and has no data.
        until: To which moment.
        segments: The folder of the backup's database in the archive.
        object_url: The object store: an empty one, or that of the mesh that was.
        redis_url: A Redis of one's own; empty for the embedded one, which keeps nothing.
        say: Told of each step.

    Returns:
        What is there now, as of when, and which results are missing.

    Raises:
        LaunchError: Something is there already, or that moment cannot be reached, or it failed; the database
            then has nothing of it.
    """
    base = manifest.base
    assert base is not None
    await check_new(manifest, archive.root)
    check_moment(manifest, until, segments)
    say("looking whether anything is there")
    if redis_url:
        await check_redis(redis_url)
    check_folder(database)
    say("checking the backup")
    await verify_base(archive.base)
    server = database.beside()
    try:
        say("copying the database's files")
        await asyncio.to_thread(server.copy_from, archive.base)
        if until != "backup":
            say(f"replaying the write-ahead log in {segments}")
        async with replayed(server, manifest, until, segments) as reached:
            say("looking for large results")
            results = Results(archive, base.results, object_url)
            there = await _finish(server, archive, manifest, base, results, reached, segments)
        server.become(database)
    except BaseException:
        # It was not there before, so nothing of anybody's is lost, and the next try finds nothing.
        await asyncio.to_thread(server.remove)
        raise
    return there


@dataclass(frozen=True, slots=True)
class Reached:
    """Where a replay ended.

    Attributes:
        until: What was asked for.
        last: When the last transaction was committed that is there; None where none was replayed.
        redo_done: The last place in the write-ahead log that was replayed.
    """

    until: Until
    last: datetime | None
    redo_done: str


def check_moment(manifest: Manifest, until: Until, segments: Path) -> None:
    """Refuses what cannot be reached, as far as that shows before anything is done."""
    if until == "backup":
        return
    try:
        newest = max((segments / f"{name}.gz").stat().st_mtime for name in wal.segments(segments))
    except (OSError, ValueError):
        raise LaunchError(
            f"there is no archived write-ahead log in {segments}: name the folder where it is now with "
            "--archive; without --until the backup is restored as it is"
        ) from None
    if until == "latest":
        return
    reach = (
        f"with this backup moments from {_after(_taken(manifest))} to about {_before(newest)} can be reached"
    )
    if until < _taken(manifest):
        raise LaunchError(f"{_exact(until)} is before this backup, take an earlier one; {reach}")
    if until > datetime.now(UTC):
        raise LaunchError(
            f"{_exact(until)} is yet to come; {reach}, and --until latest restores all there is"
        )


def _taken(manifest: Manifest) -> datetime:
    return datetime.fromisoformat(manifest.taken_at)


def _exact(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


def _after(moment: datetime) -> str:
    return _exact(moment.replace(microsecond=0) + timedelta(seconds=1))


def _before(moment: datetime | float) -> str:
    if not isinstance(moment, datetime):
        moment = datetime.fromtimestamp(moment, UTC)
    return _exact(moment.replace(microsecond=0))


@asynccontextmanager
async def replayed(
    server: Postgres, manifest: Manifest, until: Until, segments: Path
) -> AsyncIterator[Reached]:
    """Has a server of a base backup's files replay, and serve for the time of the block, to its owner alone.

    Raises:
        LaunchError: That moment cannot be reached.
    """
    log = server.sockets / "restore.log"
    options = {
        "hba_file": str(server.private_file("restore-hba", _TRUST)),
        "archive_mode": "off",
        "log_min_messages": "log",
        "lc_messages": "C",
        "restore_command": wal.fetch_command(segments),
        "recovery_target_timeline": "current",
        "recovery_target_action": "promote",
    }
    if until == "backup":
        options["recovery_target"] = "immediate"
        # The backup has what it needs itself.
        options["restore_command"] = "false"
    elif isinstance(until, datetime):
        options["recovery_target_time"] = f"{until:%Y-%m-%d %H:%M:%S.%f}+00"
    words = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
    process = start([*server.command(), *words], log)
    try:
        said = await _wait_ready(process, log)
        if _READY not in said:
            raise LaunchError(explain(server, manifest, until, segments, said))
        redo = _REDO_DONE.search(said)
        yield Reached(until, _last_of(said), redo[1] if redo else "")
    finally:
        await asyncio.to_thread(stop, process)
        log.unlink(missing_ok=True)
        (server.sockets / "restore-hba").unlink(missing_ok=True)


async def _wait_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    """Returns the end of the log once the server serves, or has ended."""
    size, heard = 0, time.monotonic()
    while True:
        ended = process.poll() is not None
        said, now = await asyncio.to_thread(_tail, log)
        if ended or _READY in said:
            return said
        if now != size:
            size, heard = now, time.monotonic()
        elif time.monotonic() - heard > _SILENT_SECONDS:
            raise LaunchError(f"PostgreSQL replays nothing any more; its last words: {_words(said)}")
        await asyncio.sleep(_POLL_SECONDS)


def _tail(log: Path) -> tuple[str, int]:
    with log.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _TAIL_BYTES))
        return file.read().decode(errors="replace"), size


def _words(said: str) -> str:
    return " ".join(said.split())[-300:]


def _last_of(said: str) -> datetime | None:
    found = _LAST.search(said)
    return datetime.fromisoformat(found[1].strip()) if found else None


def explain(server: Postgres, manifest: Manifest, until: Until, segments: Path, said: str) -> str:
    """Why the server ended in place of serving."""
    if isinstance(until, datetime) and (_TOO_SHORT in said or _TOO_EARLY in said):
        taken, last = _taken(manifest), _last_of(said)
        if last is None or last <= taken:
            return f"{_exact(until)} cannot be reached: nothing that came after the backup is in {segments}"
        fetched = _FETCHED.findall(said)
        later = _later(segments, fetched[-1]) if fetched else []
        lacks = f"; what comes after {fetched[-1]} is missing or damaged there" if later else ""
        return (
            f"{_exact(until)} cannot be reached: the write-ahead log in {segments} ends before it{lacks}; "
            f"moments from {_after(taken)} to {_before(last)} can be reached"
            + ("" if later else ", or --until latest")
        )
    return server.explain(said) or f"PostgreSQL did not come so far: {_words(said)}"


def _later(segments: Path, name: str) -> list[str]:
    """The archived segments of the same timeline that come after one."""
    return [found for found in wal.segments(segments) if found[:8] == name[:8] and found > name]


async def _finish(
    server: Postgres,
    archive: Archive,
    manifest: Manifest,
    base: Base,
    results: Results,
    reached: Reached,
    segments: Path,
) -> Manifest:
    """Checks what is there, makes it the new mesh's own, and brings its large results."""
    refs = server.sockets / "restore-refs"
    try:
        connection = await asyncpg.connect(server.url(), timeout=_CONNECT_SECONDS)
        try:
            if reached.until == "latest":
                await _check_all(connection, manifest, base, reached, segments)
            migrations, rows = await described(connection)
            await check_new(replace(manifest, migrations=migrations), archive.root)
            await connection.execute(await connection.fetchval(_PASSWORD, server.password))
            async with connection.transaction():
                await write_refs(connection, refs)
        finally:
            connection.terminate()

        def listed() -> Iterator[Ref]:
            return read_refs(refs)

        number, size, missing = await results.bring(listed)
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as error:
        raise LaunchError(f"the database cannot be restored: {' '.join(str(error).split())}") from error
    finally:
        refs.unlink(missing_ok=True)
    at = _exact(reached.until) if isinstance(reached.until, datetime) else manifest.taken_at
    if reached.until == "latest" and reached.last is not None:
        at = _exact(reached.last)
    return replace(
        manifest, taken_at=at, rows=rows, objects=number, object_bytes=size, missing=missing, base=None
    )


async def _check_all(
    connection: asyncpg.Connection[asyncpg.Record],
    manifest: Manifest,
    base: Base,
    reached: Reached,
    segments: Path,
) -> None:
    """Raises LaunchError when the archive has more than was replayed: something in between is missing."""
    end = base.wal_from[:8] + await connection.fetchval(_SEGMENT, reached.redo_done)
    later = _later(segments, end)
    if not later:
        return
    last = reached.last
    rest = f"moments to {_before(last)} can be reached" if last else "nothing after the backup can be reached"
    raise LaunchError(
        f"what comes after {end} is missing or damaged in {segments}, which goes on to {later[-1]}; {rest}, "
        f"by --until with one from {_after(_taken(manifest))} on"
    )
