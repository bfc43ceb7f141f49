"""Which moments are taken, how what cannot be reached is said, and where large results come from."""

from __future__ import annotations

import hashlib
import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import pytest

from launcher.backup.archive import BASE_FORMAT, Archive, Base, Manifest, Ref
from launcher.backup.former import Results
from launcher.backup.recover import check_moment, explain, parse_until
from launcher.embedded.postgres import Postgres
from launcher.errors import LaunchError
from services.tool.results import object_path

TAKEN = datetime(2026, 11, 30, 12, 0, 0, 250_000, UTC)
SEGMENT = "00000001000000000000000{}"
TENANT, SESSION = UUID(int=1), UUID(int=2)


def manifest(folder: Path) -> Manifest:
    return Manifest(
        taken_at=TAKEN.isoformat(),
        hermesh="1.0",
        postgresql="18.0",
        migrations={},
        rows={},
        dump_sha256="",
        objects=0,
        object_bytes=0,
        format=BASE_FORMAT,
        base=Base(str(folder), SEGMENT.format(2), "file:///none", 1),
    )


@pytest.fixture
def segments(tmp_path: Path) -> Path:
    folder = tmp_path / "wal"
    folder.mkdir()
    for number in (2, 3, 5):
        path = folder / f"{SEGMENT.format(number)}.gz"
        path.touch()
        os.utime(path, (0, datetime(2026, 11, 30, 12, number, tzinfo=UTC).timestamp()))
    return folder


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("2026-11-30T12:00:00Z", datetime(2026, 11, 30, 12, tzinfo=UTC)),
        ("2026-11-30 13:00:00.5+01:00", datetime(2026, 11, 30, 12, 0, 0, 500_000, UTC)),
        ("latest", "latest"),
    ],
)
def test_a_moment_is_read_with_its_time_zone(text: str, meant: datetime | str) -> None:
    assert parse_until(text) == meant


@pytest.mark.parametrize("text", ["2026-11-30T12:00:00", "yesterday", "14:05", "", "backup"])
def test_a_moment_that_could_be_another_one_is_refused(text: str) -> None:
    with pytest.raises(LaunchError, match="say it with its time zone"):
        parse_until(text)


def test_moments_outside_of_what_can_be_reached_are_refused_with_it(segments: Path) -> None:
    reach = "moments from 2026-11-30T12:00:01Z to about 2026-11-30T12:05:00Z can be reached"
    with pytest.raises(LaunchError, match=f"2026-11-30T12:00:00Z is before this backup.* {reach}"):
        check_moment(manifest(segments), TAKEN.replace(microsecond=0), segments)
    with pytest.raises(LaunchError, match=f"is yet to come; .*{reach}"):
        check_moment(manifest(segments), datetime.now(UTC) + timedelta(days=1), segments)
    check_moment(manifest(segments), TAKEN, segments)
    check_moment(manifest(segments), "latest", segments)


def test_without_an_archive_only_the_backup_itself_is_there(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(LaunchError, match="there is no archived write-ahead log in"):
            check_moment(manifest(folder), "latest", folder)
        check_moment(manifest(folder), "backup", folder)


def test_an_archive_that_ends_too_early_or_lacks_a_segment_is_told(segments: Path, tmp_path: Path) -> None:
    server = Postgres(tmp_path, tmp_path, "")
    short = "FATAL:  recovery ended before configured recovery target was reached\n"
    last = "LOG:  last completed transaction was at log time 2026-11-30 12:03:04.567+00\n"
    until = datetime(2026, 11, 30, 12, 30, tzinfo=UTC)

    def said(log: str) -> str:
        return explain(server, manifest(segments), until, segments, log)

    fetched = 'LOG:  restored log file "{}" from archive\n'
    whole = said(fetched.format(SEGMENT.format(5)) + last + short)
    reach = "moments from 2026-11-30T12:00:01Z to 2026-11-30T12:03:04Z can be reached"
    assert whole.startswith("2026-11-30T12:30:00Z cannot be reached: the write-ahead log in")
    assert whole.endswith(f"ends before it; {reach}, or --until latest")
    holed = said(fetched.format(SEGMENT.format(3)) + last + short)
    assert holed.endswith(f"what comes after {SEGMENT.format(3)} is missing or damaged there; {reach}")
    assert "nothing that came after the backup is in" in said(short)
    assert "PostgreSQL did not come so far: FATAL: something else" in said("FATAL:  something else\n")


def test_a_base_backup_is_read_as_it_was_written(tmp_path: Path) -> None:
    archive, written = Archive(tmp_path), manifest(tmp_path)
    archive.write(written)
    assert archive.read() == written
    archive.manifest.write_text(json.dumps({"format": BASE_FORMAT}))
    with pytest.raises(LaunchError, match="is damaged"):
        archive.read()


def stored(root: Path, data: bytes) -> Ref:
    """A large result at its place below a folder."""
    ref = Ref(TENANT, SESSION, f"sha256:{hashlib.sha256(data).hexdigest()}")
    path = root / object_path(TENANT, SESSION, ref.ref)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return ref


async def test_results_come_from_the_backup_or_from_the_store_that_was(tmp_path: Path) -> None:
    was, new = tmp_path / "was", tmp_path / "new"
    archive = Archive(tmp_path / "backup")
    in_backup = stored(archive.objects, b"in the backup")
    in_store = stored(was, b"only in the store")
    nowhere = Ref(TENANT, SESSION, f"sha256:{'0' * 64}")
    refs = [in_backup, in_store, nowhere]
    lost = object_path(TENANT, SESSION, nowhere.ref)
    found = await Results(archive, was.as_uri(), new.as_uri()).bring(lambda: iter(refs))
    assert found == (2, len(b"in the backup" + b"only in the store"), [lost])
    for ref, data in ((in_backup, b"in the backup"), (in_store, b"only in the store")):
        assert (new / object_path(TENANT, SESSION, ref.ref)).read_bytes() == data
    # Once more, as after a try that was broken off; and a store with others' results is left alone.
    await Results(archive, was.as_uri(), new.as_uri()).bring(lambda: iter(refs))
    with pytest.raises(LaunchError, match="has results of another mesh"):
        await Results(archive, was.as_uri(), new.as_uri()).bring(lambda: iter(refs[:1]))


async def test_the_store_of_the_mesh_that_was_can_be_the_new_ones(tmp_path: Path) -> None:
    was = tmp_path / "was"
    archive = Archive(tmp_path / "backup")
    deleted, kept, other = stored(archive.objects, b"deleted"), stored(was, b"kept"), stored(was, b"other")
    found = await Results(archive, was.as_uri(), was.as_uri()).bring(lambda: iter([deleted, kept]))
    assert found == (2, len(b"deleted"), [])
    for ref in (deleted, kept, other):
        assert (was / object_path(TENANT, SESSION, ref.ref)).exists()


async def test_a_store_that_is_gone_is_not_made_anew(tmp_path: Path) -> None:
    was, new = tmp_path / "was", tmp_path / "new"
    ref = Ref(TENANT, SESSION, f"sha256:{'0' * 64}")
    found = await Results(Archive(tmp_path / "backup"), was.as_uri(), new.as_uri()).bring(lambda: iter([ref]))
    assert found == (0, 0, [object_path(TENANT, SESSION, ref.ref)])
    assert not was.exists()
