"""A mesh is brought back to a moment: exactly what was there then is there, and nothing that came after."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from bench.mesh import Mesh, wait_until
from tests.e2e.client import http, new_session
from tests.e2e.database import SWITCH, asked
from tests.e2e.large_tool import LINE
from tests.e2e.test_backup import LINES, REPLICAS, SETTINGS, empty_mesh, refused, said, seen

# It starts and fills meshes.
pytestmark = [pytest.mark.deploy_long, pytest.mark.timeout(600)]

SECONDS = 300
LARGE = f'[[tool=long_answer {{"lines": {LINES}}}]]'
_ARCHIVED = "SELECT last_archived_wal >= '{name}' FROM pg_stat_archiver"


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("the archive's")


@pytest.fixture(scope="module")
def source(archive: Path) -> Iterator[Mesh]:
    with Mesh(replicas=REPLICAS, settings=SETTINGS | {"HERMESH_WAL_ARCHIVE": str(archive)}) as mesh:
        yield mesh


async def all_archived(mesh: Mesh) -> None:
    """Returns once all that is committed now is in the archive, which else takes up to a minute."""
    [name, _] = await asked(mesh, "SELECT pg_walfile_name(pg_current_wal_lsn())", SWITCH)
    async with asyncio.timeout(60):
        while not (await asked(mesh, _ARCHIVED.format(name=name)))[0]:  # noqa: ASYNC110 - it has no event
            await asyncio.sleep(0.1)


async def moment(mesh: Mesh) -> str:
    """Now, by PostgreSQL's clock, as `--until` takes it."""
    [now] = await asked(mesh, "SELECT clock_timestamp()")
    return str(now.astimezone(UTC).isoformat())


def status(mesh: Mesh, service: str) -> dict[str, Any]:
    rows = json.loads(mesh.command("status", "--json"))
    return next(row for row in rows if row["service"] == service)


async def titles(mesh: Mesh, key: str) -> set[str]:
    async with http(mesh, Authorization=f"Bearer {key}") as client:
        return {session["title"] for session in (await client.get("/v1/sessions")).json()["sessions"]}


async def content(mesh: Mesh, key: str, run: str) -> str:
    async with http(mesh, Authorization=f"Bearer {key}") as client:
        return (await client.get(f"/v1/runs/{run}/tool-calls/{run}:1:0/content")).text


async def test_any_moment_after_a_base_backup_comes_back(source: Mesh, archive: Path, tmp_path: Path) -> None:
    backup = tmp_path / "base"
    async with http(source) as client:
        first = await new_session(client, title="Before the backup")
        large_first = await said(client, first, LARGE)
        printed = await asyncio.to_thread(source.command, "backup", "--base", str(backup), seconds=SECONDS)
        assert "1 large results" in printed
        assert f"Later moments need {archive}/" in printed
        after = await new_session(client, title="After the backup")
        run = await said(client, after, "[[tokens=5]]")
        # Its result is in no backup, only in the store.
        large_after = await said(client, after, LARGE)
        doomed = await new_session(client, title="Deleted by somebody")
        run_doomed = await said(client, doomed, "[[tokens=4]]")
        then = {
            session: await seen(client, session, one)
            for session, one in ((first, large_first), (after, run), (doomed, run_doomed))
        }
        await all_archived(source)
        instant = await moment(source)
        # The damage, and what came with it.
        assert (await client.delete(f"/v1/sessions/{doomed}")).is_success
        late_run = await said(client, after, "[[tokens=3]]")
        await all_archived(source)
        late = await new_session(client, title="Too late")
        run_late = await said(client, late, "[[tokens=3]]")
        await all_archived(source)
        # Everything until here is in the archive; this may not be.
        now = {session: await seen(client, session, one) for session, one in ((after, run), (late, run_late))}
    key = source.api_key
    manifest = json.loads((backup / "manifest.json").read_text())
    taken, base = manifest["taken_at"], manifest["base"]

    # Moments that cannot be reached are refused with those that can, in one line, and leave nothing behind.
    with empty_mesh(tmp_path / "wrong", source) as mesh:
        early = refused(mesh, "restore", str(backup), "--until", "2001-01-01T00:00:00Z")
        assert re.search(r"2001-01-01T00:00:00Z is before this backup, take an earlier one; with this", early)
        assert re.search(r"moments from \S+Z to about \S+Z can be reached", early)
        assert "yet to come" in refused(mesh, "restore", str(backup), "--until", "2999-01-01T00:00:00Z")
        assert "say it with its time zone" in refused(
            mesh, "restore", str(backup), "--until", "2026-11-30T12:00:00"
        )
        beyond = refused(mesh, "restore", str(backup), "--until", (await moment(source)))
        found = re.search(r"ends before it; moments from (\S+) to (\S+) can be reached", beyond)
        assert found, beyond
        assert datetime.fromisoformat(taken) < datetime.fromisoformat(found[1])
        assert datetime.fromisoformat(found[2]) <= datetime.fromisoformat(await moment(source))
        lost = refused(mesh, "restore", str(backup), "--until", "latest", "--archive", str(tmp_path))
        assert "there is no archived write-ahead log in" in lost
        assert not (mesh.data_dir / "postgresql").exists()
        assert not (mesh.data_dir / "postgresql.restoring").exists()

    # A segment in the middle is missing: what comes after it is not passed off as all there is.
    own = Path(base["wal_archive"])
    holed = tmp_path / "holed"
    await asyncio.to_thread(shutil.copytree, own, holed)
    segments = names(holed)
    # The backup itself has the first.
    assert segments[-2] > f"{base['wal_from']}.gz"
    (holed / segments[-2]).unlink()
    with empty_mesh(tmp_path / "gap", source) as mesh:
        gap = refused(mesh, "restore", str(backup), "--until", "latest", "--archive", str(holed))
        assert "is missing or damaged in" in gap

    with empty_mesh(tmp_path / "then", source) as mesh:
        mesh.settings = {**mesh.settings, "HERMESH_WAL_ARCHIVE": str(archive)}
        printed = await asyncio.to_thread(
            mesh.command, "restore", str(backup), "--until", instant, seconds=SECONDS
        )
        assert "Restored; start it with: hermesh up" in printed
        assert "needs a new base backup" in printed
        assert "there is a database in" in refused(mesh, "restore", str(backup), "--until", instant)
        await asyncio.to_thread(mesh.command, "up", "--no-reply", "--replicas", REPLICAS, seconds=SECONDS)
        for one in (key, mesh.api_key):
            assert await titles(mesh, one) == {"Before the backup", "After the backup", "Deleted by somebody"}
            async with http(mesh, Authorization=f"Bearer {one}") as client:
                for session, its in ((first, large_first), (after, run), (doomed, run_doomed)):
                    assert await seen(client, session, its) == then[session]
                assert (await client.get(f"/v1/sessions/{late}")).status_code == 404
                assert (await client.get(f"/v1/runs/{late_run}")).status_code == 404
            for its in (large_first, large_after):
                assert await content(mesh, one, its) == LINE * LINES
        # It goes on, archives beside the first one's log, and can be backed up and restored itself.
        async with http(mesh) as client:
            await said(client, await new_session(client, title="Life goes on"), "[[tokens=3]]")
        second = tmp_path / "second"
        await asyncio.to_thread(mesh.command, "backup", "--base", str(second), seconds=SECONDS)
        assert json.loads((second / "manifest.json").read_text())["base"]["wal_archive"] != str(own)
        async with http(mesh) as client:
            await said(client, await new_session(client, title="And on"), "[[tokens=3]]")
        await all_archived(mesh)
        with empty_mesh(tmp_path / "again", source) as other:
            await asyncio.to_thread(
                other.command, "restore", str(second), "--until", "latest", seconds=SECONDS
            )
            await asyncio.to_thread(
                other.command, "up", "--no-reply", "--replicas", REPLICAS, seconds=SECONDS
            )
            assert {"Life goes on", "And on", "Deleted by somebody"} < await titles(other, key)

    # The machine is lost: every process is killed, and nobody shuts anything down.
    kill_all(source)
    with empty_mesh(tmp_path / "latest", source) as mesh:
        await asyncio.to_thread(mesh.command, "restore", str(backup), "--until", "latest", seconds=SECONDS)
        await asyncio.to_thread(mesh.command, "up", "--no-reply", "--replicas", REPLICAS, seconds=SECONDS)
        assert await titles(mesh, key) == {"Before the backup", "After the backup", "Too late"}
        async with http(mesh, Authorization=f"Bearer {key}") as client:
            for session, its in ((after, run), (late, run_late)):
                assert await seen(client, session, its) == now[session]
        assert await content(mesh, key, large_after) == LINE * LINES

    # What no backup needs any more goes from the archive, and nothing else.
    with empty_mesh(tmp_path / "bare", source) as mesh:
        before = names(own)
        first_needed = base["wal_from"]
        assert "segments from" in mesh.command("prune-wal", str(backup))
        assert names(own) == [name for name in before if name >= first_needed]
        # And the backup alone is enough for itself.
        await asyncio.to_thread(mesh.command, "restore", str(backup), seconds=SECONDS)
        await asyncio.to_thread(mesh.command, "up", "--no-reply", "--replicas", REPLICAS, seconds=SECONDS)
        assert await titles(mesh, key) == {"Before the backup"}


def names(folder: Path) -> list[str]:
    """The segments in an archive, in their order."""
    return sorted(path.name for path in folder.glob("*.gz") if len(path.name) == 27)


def kill_all(mesh: Mesh) -> None:
    """Ends every process of a mesh by SIGKILL, the supervisor first."""
    state = json.loads((mesh.data_dir / "state.json").read_text())
    pids = [state["supervisor"]["pid"], *(child["pid"] for child in state["children"])]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


async def test_an_archive_that_is_away_or_full_stops_nothing_and_is_told(tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    with Mesh(replicas=REPLICAS, settings=SETTINGS | {"HERMESH_WAL_ARCHIVE": str(archive)}) as mesh:
        # It was not there when the mesh began.
        async with http(mesh) as client:
            session = await new_session(client)
            await said(client, session, "[[tokens=3]]")
            await asked(mesh, SWITCH)
            wait_until(lambda: status(mesh, "postgresql")["health"] == "degraded", 30, "it is told")
            why = status(mesh, "postgresql")["reason"]
            assert f"nothing was archived so far (there is no folder {archive})" in why
            assert re.search(r"\d+ segments, \d+ MiB, wait here", why)
            assert "wal_archive" in status(mesh, "session")["reason"]
            assert f"there is no folder {archive}" in refused(mesh, "doctor")
            await said(client, session, "[[tokens=3]]")
            archive.mkdir()
            wait_until(lambda: status(mesh, "postgresql")["health"] == "healthy", 90, "it catches up")
            assert list(archive.glob("*/*.gz"))
            with small_disk(archive) as grow:
                for _ in range(3):
                    await said(client, session, "[[tokens=30]]")
                    await asked(mesh, SWITCH)
                wait_until(lambda: status(mesh, "postgresql")["health"] == "degraded", 60, "it is told")
                assert f"no space left in {archive}" in status(mesh, "postgresql")["reason"]
                await said(client, session, "[[tokens=3]]")
                grow()
                wait_until(lambda: status(mesh, "postgresql")["health"] == "healthy", 90, "it catches up")


@contextmanager
def small_disk(folder: Path) -> Iterator[Callable[[], None]]:
    """Puts a file system with room for 64 KiB over a folder; what it gives makes it larger."""

    def run(*command: str, check: bool = True) -> bool:
        done = subprocess.run(command, capture_output=True, timeout=30, check=check)
        return done.returncode == 0

    if not run("mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "tmpfs", str(folder), check=False):
        pytest.skip("no file system can be mounted here")

    def grow() -> None:
        run("mount", "-o", "remount,size=64m", str(folder))

    try:
        yield grow
    finally:
        # What archives there just now has its working folder in it.
        run("umount", "--lazy", str(folder))
