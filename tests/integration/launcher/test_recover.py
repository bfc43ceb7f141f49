"""A real server's files and its archive, brought to a moment; as root, as another user, as oneself."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from launcher.backup.archive import BASE_FORMAT, Base, Manifest
from launcher.backup.programs import clean_archive, copy_base, verify_base
from launcher.backup.recover import Until, replayed
from launcher.embedded import postgres, wal
from launcher.embedded.postgres import Postgres
from launcher.errors import LaunchError
from tests.integration.launcher.test_postgres import serving

SECONDS = 60
_NOW = "SELECT clock_timestamp()"
_SEEN = "SELECT coalesce(array_agg(n ORDER BY n), '{}') FROM t"
_DONE = "SELECT coalesce(last_archived_wal, '') >= $1 FROM pg_stat_archiver"


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose path is short enough for a socket, and that any user can reach."""
    path = Path(tempfile.mkdtemp(prefix="hm-lr-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(params=["as it is", "another user"])
def server(request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Postgres:
    if request.param == "another user":
        monkeypatch.setattr(postgres, "namespace_works", lambda: False)
        monkeypatch.setattr(postgres, "USER", "nobody")
        monkeypatch.setattr(postgres, "USER_HOME", folder / "home")
    archive = folder / "it's an archive"
    archive.mkdir()
    return Postgres.in_folder(folder / "data", folder, "a password", archive)


class Client:
    """One connection's statements."""

    def __init__(self, server: Postgres) -> None:
        self.url = server.url()

    async def value(self, statement: str, *arguments: object) -> Any:
        connection = await asyncpg.connect(self.url, timeout=SECONDS)
        try:
            return await connection.fetchval(statement, *arguments)
        finally:
            await connection.close()

    async def write(self, number: int) -> datetime:
        """Writes a row, has it archived, and returns a moment at which it was there."""
        await self.value("INSERT INTO t VALUES ($1)", number)
        moment: datetime = await self.value(_NOW)
        segment = await self.value("SELECT pg_walfile_name(pg_current_wal_lsn())")
        await self.value("SELECT pg_switch_wal()")
        async with asyncio.timeout(SECONDS):
            while not await self.value(_DONE, segment):  # noqa: ASYNC110 - it has no event
                await asyncio.sleep(0.02)
        return moment


async def brought_to(
    server: Postgres, base: Path, manifest: Manifest, until: Until, segments: Path
) -> list[int]:
    """The rows that are there then; what was made for it is removed."""
    beside = server.beside()
    beside.copy_from(base)
    try:
        async with replayed(beside, manifest, until, segments):
            return list(await Client(beside).value(_SEEN))
    finally:
        beside.remove()


@asynccontextmanager
async def served(server: Postgres, log: Path) -> AsyncIterator[None]:
    """Serves until the block is left."""
    block = serving(server, log)
    await asyncio.to_thread(block.__enter__)
    try:
        yield
    finally:
        await asyncio.to_thread(block.__exit__, None, None, None)


@pytest.mark.timeout(240)
async def test_a_server_is_brought_to_any_moment_since_its_base_backup(
    server: Postgres, folder: Path
) -> None:
    await asyncio.to_thread(server.prepare)
    base, client = folder / "base", Client(server)
    async with served(server, folder / "log"):
        await client.value("CREATE TABLE t (n int)")
        await client.write(1)
        await copy_base(server.url(), base)
        taken = await client.value(_NOW)
        moments = [await client.write(number) for number in (2, 3, 4)]
        assert await server.archive_trouble() == ""
    segments = server.segments
    assert segments is not None
    names = wal.segments(segments)
    manifest = Manifest(
        *(taken.isoformat(), "", "", {}, {}, "", 0, 0),
        format=BASE_FORMAT,
        base=Base(str(segments), names[1], "", 0),
    )

    async def at(until: Until) -> list[int]:
        return await brought_to(server, base, manifest, until, segments)

    assert await at("backup") == [1]
    assert await at(moments[0]) == [1, 2]
    assert await at(moments[1]) == [1, 2, 3]
    assert await at("latest") == [1, 2, 3, 4]
    with pytest.raises(LaunchError, match=r"ends before it; moments from \S+Z to \S+Z can be reached"):
        await at(moments[2] + timedelta(minutes=1))
    # What was promoted wrote nothing into the archive, and the server that it came from is as it was.
    assert wal.segments(segments) == names
    async with served(server, folder / "log"):
        assert await client.value(_SEEN) == [1, 2, 3, 4]

    names = wal.segments(segments)
    await clean_archive(segments, names[1])
    assert wal.segments(segments) == names[1:]
    (base / "global" / "pg_control").write_bytes(b"x")
    with pytest.raises(LaunchError, match=r"pg_verifybackup failed: .*pg_control"):
        await verify_base(base)
