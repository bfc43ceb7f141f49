"""PostgreSQL's own programs for backups. Passwords reach them where nobody else can read them."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from launcher.embedded.postgres import BIN
from launcher.errors import LaunchError, explain_output

_LAST = 2000
# What pg_dump of 17 and later has in a script, and what servers before that do not know.
_UNKNOWN_SETTING = b"SET transaction_timeout = 0;\n"
_OLD_SERVER = 170_000
_LINE_LIMIT = 64 * 1024 * 1024


def program(name: str) -> str:
    """Where one of PostgreSQL's programs is: beside the embedded server, or on the PATH."""
    found = BIN / name
    path = str(found) if found.exists() else shutil.which(name)
    if path is None:
        raise LaunchError(f"{name} is not installed; apt-get install postgresql-client")
    return path


def environment(url: str) -> tuple[str, dict[str, str]]:
    """The database's URL without its password, and an environment that has it."""
    parts = urlsplit(url)
    credentials, at, place = parts.netloc.rpartition("@")
    user, colon, password = credentials.partition(":")
    bare = urlunsplit(parts._replace(netloc=f"{user}{at}{place}"))
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HERMESH_")}
    return bare, inherited | ({"PGPASSWORD": unquote(password)} if colon else {})


async def dump(url: str, snapshot: str, schemas: Sequence[str], target: Path) -> None:
    """Writes schemas of a database, as a snapshot of it is, into a file of pg_dump's custom format.

    Raises:
        LaunchError: pg_dump failed; the line has its own last words.
    """
    bare, variables = environment(url)
    command = [
        *(program("pg_dump"), f"--dbname={bare}", "--format=custom", f"--file={target}"),
        *(f"--snapshot={snapshot}", "--no-owner", "--no-privileges", "--no-password"),
        *(f"--schema={schema}" for schema in schemas),
    ]
    process = await asyncio.create_subprocess_exec(*command, env=variables, stderr=asyncio.subprocess.PIPE)
    await _end(process, "pg_dump")


async def copy_base(url: str, target: Path) -> None:
    """Copies the files of a running server, with the write-ahead log that makes them whole, and checks them.

    Raises:
        LaunchError: pg_basebackup or pg_verifybackup failed; the line has its own last words.
    """
    bare, variables = environment(url)
    command = [
        *(program("pg_basebackup"), f"--dbname={bare}", f"--pgdata={target}", "--wal-method=stream"),
        *("--checkpoint=fast", "--label=hermesh", "--no-password"),
    ]
    process = await asyncio.create_subprocess_exec(*command, env=variables, stderr=asyncio.subprocess.PIPE)
    await _end(process, "pg_basebackup")
    await verify_base(target)


async def verify_base(target: Path) -> None:
    """Checks every file of a base backup, and that its write-ahead log can be read. Raises LaunchError."""
    process = await asyncio.create_subprocess_exec(
        *(program("pg_verifybackup"), "--quiet", str(target)),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    await _end(process, "pg_verifybackup")


async def clean_archive(folder: Path, first_kept: str) -> None:
    """Removes the archived segments before one. Raises LaunchError."""
    process = await asyncio.create_subprocess_exec(
        *(program("pg_archivecleanup"), "-x", ".gz", str(folder), first_kept), stderr=asyncio.subprocess.PIPE
    )
    await _end(process, "pg_archivecleanup")


async def load(url: str, server: int, source: Path) -> None:
    """Loads a dump in one transaction: all of it is there afterwards, or nothing.

    Args:
        url: The database.
        server: The server's version as a number, such as 150004.
        source: What `dump` wrote.

    Raises:
        LaunchError: A program failed; the line has its own last words.
    """
    bare, variables = environment(url)
    reading = await asyncio.create_subprocess_exec(
        *(program("pg_restore"), "--no-owner", "--no-privileges", "--file=-", str(source)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=_LINE_LIMIT,
    )
    writing = await asyncio.create_subprocess_exec(
        *(program("psql"), f"--dbname={bare}", "--no-psqlrc", "--no-password", "--quiet"),
        *("--single-transaction", "--set=ON_ERROR_STOP=1", "--output=/dev/null"),
        env=variables,
        stdin=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert reading.stdout is not None
    assert writing.stdin is not None
    errors = asyncio.gather(_said(reading), _said(writing))
    try:
        async for line in reading.stdout:
            if server < _OLD_SERVER and line == _UNKNOWN_SETTING:
                continue
            writing.stdin.write(line)
            await writing.stdin.drain()
        # Only a whole script is committed.
        if await reading.wait() != 0:
            writing.kill()
    except (BrokenPipeError, ConnectionResetError):
        # It has ended; its own words say why.
        reading.kill()
    finally:
        writing.stdin.close()
    codes = await reading.wait(), await writing.wait()
    read_said, write_said = await errors
    if codes[1] != 0 or codes[0] != 0:
        name, said = ("psql", write_said) if write_said.strip() else ("pg_restore", read_said)
        raise LaunchError(_failed(name, said))


async def _end(process: asyncio.subprocess.Process, name: str) -> None:
    said = await _said(process)
    if await process.wait() != 0:
        raise LaunchError(_failed(name, said))


async def _said(process: asyncio.subprocess.Process) -> str:
    assert process.stderr is not None
    said = b""
    while piece := await process.stderr.read(_LAST):
        said = (said + piece)[-_LAST:]
    return said.decode("utf-8", "replace")


def _failed(name: str, said: str) -> str:
    lines = said.splitlines()
    telling = [line for line in lines if re.search(r"error|ERROR|FATAL|failed", line)] or lines
    why = telling[0].strip() if telling else "it said nothing"
    return explain_output(name, said) or f"{name} failed: {why}"
