"""The embedded PostgreSQL's write-ahead log, archived into a folder, so that any moment can be restored.

Below the folder that a person names each database has one of its own, so that several data folders, and what
was restored from one, never meet: `<archive>/<name>/<segment>.gz`. The name is kept beside the data.
PostgreSQL hands over each segment once it is full, or a minute after something was written to it. A segment
is compressed, since one that was handed over early is mostly empty: some 70 KiB in place of 16 MiB.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from pathlib import Path
from shlex import quote

# What is lost at most with the disk of the data, and a little: PostgreSQL hands over what is older.
SECONDS = 60
NAME_FILE = "hermesh-archive"
_SEGMENT = re.compile(r"([0-9A-F]{24})\.gz")
_FULL_BYTES = 16 * 1024 * 1024
_SECONDS = 2.0

# PostgreSQL runs it in its data folder, through sh, and keeps the segment until it ends with 0. What is there
# under a name is whole and on the disk, and is never written again: the same bytes are taken as done, others
# are refused. {archive} is made by its owner and never here: where a disk is not mounted, nothing is written
# beneath.
_KEEP = (
    'd=$(cat {name_file}) && p="$PWD/%p" && cd {archive} && '
    '{{ [ -d "$d" ] || {{ mkdir "$d" && sync .; }}; }} && cd "$d" && '
    "rm -f .%f.partial && if [ -e %f.gz ]; then "
    'gzip -dc %f.gz | cmp -s - "$p" || {{ echo "the archive has another %f" >&2; false; }}; else '
    'gzip -1 <"$p" >.%f.partial && sync .%f.partial && ln .%f.partial %f.gz && rm .%f.partial; fi && '
    "sync %f.gz ."
)
_FETCH = "[ -e {archive}/%f.gz ] && gzip -dc <{archive}/%f.gz >%p"

_FACTS = """
SELECT a.last_archived_time, a.last_failed_time > coalesce(a.last_archived_time, '-infinity') AS failing,
       w.waiting, w.waiting * pg_size_bytes(current_setting('wal_segment_size')) AS bytes
FROM pg_stat_archiver a,
     (SELECT count(*) AS waiting FROM pg_ls_archive_statusdir() WHERE name LIKE '%.ready') w
"""


def options(archive: Path) -> dict[str, str]:
    """PostgreSQL's settings that have it archive below a folder."""
    return {
        "archive_mode": "on",
        "archive_command": keep_command(archive),
        "archive_timeout": f"{SECONDS}s",
    }


def keep_command(archive: Path) -> str:
    """What archives a segment: `%p` is its path below the data folder, `%f` its name."""
    return _KEEP.format(archive=_quoted(archive), name_file=NAME_FILE)


def fetch_command(folder: Path) -> str:
    """What brings a segment back from a database's own folder of the archive."""
    return _FETCH.format(archive=_quoted(folder))


def _quoted(path: Path) -> str:
    # A % of the path's own is none of PostgreSQL's placeholders.
    return quote(str(path)).replace("%", "%%")


def make_folder(data: Path, archive: Path, owner: int | None = None) -> Path:
    """Makes a database's own folder in the archive, and its name where it has none yet.

    An archive that is not there, or full, keeps nothing from starting: the folder is then made when the first
    segment is archived.

    Args:
        data: The database's data folder.
        archive: Where the folders are.
        owner: The system user that runs the server, where that is another one.

    Raises:
        OSError: The name cannot be kept beside the data.
    """
    folder = folder_of(data, archive)
    if folder is None:
        name = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{secrets.token_hex(4)}"
        folder = archive / name
        with (data / NAME_FILE).open("w") as file:
            file.write(name + "\n")
            file.flush()
            os.fsync(file.fileno())
    if owner is not None:
        os.chown(data / NAME_FILE, owner, -1)
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if owner is not None:
            os.chown(folder, owner, -1)
    except OSError:
        pass
    return folder


def folder_of(data: Path, archive: Path) -> Path | None:
    """A database's own folder in the archive; None where it never had one."""
    try:
        name = (data / NAME_FILE).read_text().strip()
    except OSError:
        return None
    return archive / name if name else None


def segments(folder: Path) -> list[str]:
    """The names of the segments in it, in their order. Raises OSError."""
    return sorted(found[1] for entry in os.scandir(folder) if (found := _SEGMENT.fullmatch(entry.name)))


def folder_problem(archive: Path) -> str:
    """What is wrong with an archive as far as one can see; empty for nothing."""
    if not archive.is_dir():
        return f"there is no folder {archive}"
    try:
        if shutil.disk_usage(archive).free < _FULL_BYTES:
            return f"no space left in {archive}"
    except OSError as error:
        return f"{archive} cannot be used: {error.strerror}"
    return ""


def examined(archive: Path, folder: Path | None, trouble: str) -> tuple[str, str, str]:
    """What `hermesh doctor` says of it: what was looked at, what was found, and the remedy.

    Args:
        archive: Where the folders are.
        folder: The database's own; None where it never had one.
        trouble: What is wrong with a mesh that runs, as `trouble` says it.
    """
    what = "the write-ahead log's archive"
    if trouble:
        return what, "does not work", trouble
    if problem := folder_problem(archive):
        return what, "does not work", f"{problem}; it has to be there, and the embedded PostgreSQL's to write"
    try:
        entries = list(os.scandir(folder)) if folder else []
        size = sum(entry.stat().st_size for entry in entries)
    except OSError:
        entries, size = [], 0
    bases = [entry.stat().st_mtime for entry in entries if entry.name.endswith(".backup.gz")]
    found = f"{len(entries)} files, {size >> 20} MiB in {folder or archive}"
    if not bases:
        return what, f"{found}; no base backup", "it is of use with one only: hermesh backup --base FOLDER"
    last = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(max(bases)))
    return what, f"{found}; the last base backup was taken at {last}", ""


async def trouble(url: str, archive: Path) -> str:
    """Why the log is not archived now, since when, and how much of it waits; empty where it is."""
    import asyncio

    import asyncpg

    try:
        async with asyncio.timeout(_SECONDS):
            connection = await asyncpg.connect(url)
            try:
                found = await connection.fetchrow(_FACTS)
            finally:
                connection.terminate()
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
        return ""  # that it does not answer is said elsewhere
    if found is None or not found["failing"]:
        return ""
    last = found["last_archived_time"]
    since = f"since {last:%Y-%m-%dT%H:%M:%SZ}" if last else "so far"
    why = folder_problem(archive) or "hermesh logs postgresql says why"
    return (
        f"nothing was archived {since} ({why}); "
        f"{found['waiting']} segments, {found['bytes'] >> 20} MiB, wait here: "
        "docs/runbooks/archive-failing.md"
    )
