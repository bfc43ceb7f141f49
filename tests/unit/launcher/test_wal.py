"""Segments are archived whole, once, and never over another one; by the very command that PostgreSQL runs."""

from __future__ import annotations

import gzip
import os
import resource
import subprocess
from pathlib import Path

import pytest

from launcher.embedded import wal

NAME = "00000001000000000000000A"
# What a path may have that sh, or PostgreSQL's placeholders, would take for something else.
ODD = 'it\'s 100%f "odd" $HOME'


def sh(command: str, cwd: Path, *, file_bytes: int | None = None) -> int:
    """Runs a command as PostgreSQL does, placeholders filled in; `file_bytes` bounds what it writes."""
    text = command.replace("%%", "\0").replace("%p", f"pg_wal/{NAME}").replace("%f", NAME).replace("\0", "%")

    def bound() -> None:
        if file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

    return subprocess.run(["sh", "-c", text], cwd=cwd, timeout=30, check=False, preexec_fn=bound).returncode


@pytest.fixture
def data(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    (data / "pg_wal").mkdir(parents=True)
    (data / "pg_wal" / NAME).write_bytes(os.urandom(200_000))
    return data


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    folder = tmp_path / ODD
    folder.mkdir()
    return folder


def test_a_segment_is_archived_and_comes_back(data: Path, archive: Path) -> None:
    folder = wal.make_folder(data, archive)
    assert sh(wal.keep_command(archive), data) == 0
    assert wal.segments(folder) == [NAME]
    assert [entry.name for entry in folder.iterdir()] == [f"{NAME}.gz"]
    before = (data / "pg_wal" / NAME).read_bytes()
    (data / "pg_wal" / NAME).unlink()
    assert sh(wal.fetch_command(folder), data) == 0
    assert (data / "pg_wal" / NAME).read_bytes() == before


def test_what_was_archived_before_is_done_and_another_of_its_name_is_refused(
    data: Path, archive: Path
) -> None:
    folder = wal.make_folder(data, archive)
    # What a try that was cut off left is no obstacle.
    (folder / f".{NAME}.partial").write_bytes(b"half")
    for _ in range(2):
        assert sh(wal.keep_command(archive), data) == 0
    kept = (folder / f"{NAME}.gz").read_bytes()
    (data / "pg_wal" / NAME).write_bytes(b"another")
    assert sh(wal.keep_command(archive), data) != 0
    assert (folder / f"{NAME}.gz").read_bytes() == kept


def test_a_full_disk_leaves_nothing_that_looks_whole(data: Path, archive: Path) -> None:
    folder = wal.make_folder(data, archive)
    assert sh(wal.keep_command(archive), data, file_bytes=10_000) != 0
    assert wal.segments(folder) == []
    assert sh(wal.keep_command(archive), data) == 0
    assert gzip.decompress((folder / f"{NAME}.gz").read_bytes()) == (data / "pg_wal" / NAME).read_bytes()


def test_an_archive_that_is_not_there_is_not_made(data: Path, tmp_path: Path) -> None:
    away = tmp_path / "away"
    folder = wal.make_folder(data, away)
    assert sh(wal.keep_command(away), data) != 0
    assert not away.exists()
    assert wal.folder_problem(away) == f"there is no folder {away}"
    # Once it is there, the database's own folder is made in it.
    away.mkdir()
    assert sh(wal.keep_command(away), data) == 0
    assert wal.segments(folder) == [NAME]


def test_each_database_has_a_folder_of_its_own_and_keeps_it(tmp_path: Path, archive: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for data in (one, other):
        data.mkdir()
    assert wal.folder_of(one, archive) is None
    folder = wal.make_folder(one, archive)
    assert wal.make_folder(one, archive) == wal.folder_of(one, archive) == folder
    assert wal.make_folder(other, archive) != folder


def test_what_is_not_there_cannot_be_brought_back(data: Path, archive: Path) -> None:
    folder = wal.make_folder(data, archive)
    (data / "pg_wal" / NAME).unlink()
    assert sh(wal.fetch_command(folder), data) != 0
    assert not (data / "pg_wal" / NAME).exists()
