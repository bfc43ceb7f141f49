from pathlib import Path

import pytest

from meshkit.errors import StartupError
from meshkit.migrate import migrate, read_migrations


def write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).write_text(f"-- {name}\nSELECT 1;\n")
    return folder


def test_files_come_in_order_with_their_phase(tmp_path: Path) -> None:
    write(tmp_path, "0002_post_drop.sql", "0001_pre_start.sql", "README.md")
    migrations = read_migrations(tmp_path)
    assert [(item.version, item.phase, item.name) for item in migrations] == [
        (1, "pre", "0001_pre_start.sql"),
        (2, "post", "0002_post_drop.sql"),
    ]
    assert len({item.checksum for item in migrations}) == 2


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (("0001_start.sql",), "is not named"),
        (("0001_pre_a.sql", "0003_pre_b.sql"), "should have the number 0002"),
        (("0001_pre_a.sql", "0001_pre_b.sql"), "should have the number 0002"),
        (("0002_pre_a.sql",), "should have the number 0001"),
    ],
)
def test_a_folder_out_of_order_is_refused(tmp_path: Path, names: tuple[str, ...], problem: str) -> None:
    write(tmp_path, *names)
    with pytest.raises(StartupError, match=problem):
        read_migrations(tmp_path)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="no folder of migrations"):
        read_migrations(tmp_path / "absent")


async def test_no_database_is_one_line(tmp_path: Path) -> None:
    write(tmp_path, "0001_pre_a.sql")
    with pytest.raises(StartupError, match="HERMESH_DATABASE_URL"):
        await migrate("postgresql://u:p@127.0.0.1:1/d", tmp_path)
