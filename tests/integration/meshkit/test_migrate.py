from __future__ import annotations

import asyncio
from pathlib import Path

import asyncpg
import pytest

from meshkit.errors import StartupError
from meshkit.migrate import migrate, open_migrated, pending


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "0001_pre_start.sql").write_text("CREATE TABLE a (id int);\nINSERT INTO a VALUES (1);\n")
    (tmp_path / "0002_post_more.sql").write_text("CREATE TABLE b (id int);\n")
    return tmp_path


async def fetch(database: str, query: str) -> list[asyncpg.Record]:
    connection = await asyncpg.connect(database)
    try:
        return await connection.fetch(query)
    finally:
        await connection.close()


async def test_each_migration_is_applied_once_in_order(empty_database: str, folder: Path) -> None:
    assert await pending(empty_database, folder) == ["0001_pre_start.sql", "0002_post_more.sql"]
    assert await migrate(empty_database, folder) == ["0001_pre_start.sql", "0002_post_more.sql"]
    assert await migrate(empty_database, folder) == []
    assert await pending(empty_database, folder) == []
    (folder / "0003_pre_third.sql").write_text("ALTER TABLE b ADD COLUMN c text;")
    assert await pending(empty_database, folder) == ["0003_pre_third.sql"]
    assert await migrate(empty_database, str(folder)) == ["0003_pre_third.sql"]
    rows = await fetch(empty_database, "SELECT version, name FROM hermesh_migration ORDER BY version")
    assert [row["version"] for row in rows] == [1, 2, 3]


async def test_many_migrators_at_once_apply_each_migration_once(empty_database: str, folder: Path) -> None:
    results = await asyncio.gather(*(migrate(empty_database, folder) for _ in range(6)))
    applied = [name for result in results for name in result]
    assert sorted(applied) == ["0001_pre_start.sql", "0002_post_more.sql"]
    assert [row["id"] for row in await fetch(empty_database, "SELECT id FROM a")] == [1]


async def test_a_changed_migration_is_refused(empty_database: str, folder: Path) -> None:
    await migrate(empty_database, folder)
    (folder / "0001_pre_start.sql").write_text("CREATE TABLE other (id int);")
    with pytest.raises(StartupError, match=r"0001_pre_start\.sql was changed after it was applied"):
        await migrate(empty_database, folder)
    with pytest.raises(StartupError, match="was changed"):
        await pending(empty_database, folder)


async def test_a_newer_database_is_refused(empty_database: str, folder: Path) -> None:
    await migrate(empty_database, folder)
    (folder / "0002_post_more.sql").unlink()
    with pytest.raises(StartupError, match="does not know"):
        await migrate(empty_database, folder)


async def test_a_failed_migration_is_undone_and_those_before_stay(empty_database: str, folder: Path) -> None:
    (folder / "0002_post_more.sql").write_text("CREATE TABLE b (id int);\nSELECT * FROM nowhere;\n")
    with pytest.raises(StartupError, match=r"0002_post_more\.sql failed and was undone.*nowhere") as error:
        await migrate(empty_database, folder)
    assert "\n" not in str(error.value)
    rows = await fetch(empty_database, "SELECT name FROM hermesh_migration")
    assert [row["name"] for row in rows] == ["0001_pre_start.sql"]
    assert (await fetch(empty_database, "SELECT to_regclass('b') IS NULL AS absent"))[0]["absent"]
    (folder / "0002_post_more.sql").write_text("CREATE TABLE b (id int);\n")
    assert await migrate(empty_database, folder) == ["0002_post_more.sql"]


async def test_services_keep_apart_in_schemas_of_one_database(empty_database: str, folder: Path) -> None:
    assert len(await migrate(empty_database, folder)) == 2
    assert await pending(empty_database, folder, schema="memory") == [
        "0001_pre_start.sql",
        "0002_post_more.sql",
    ]
    assert len(await migrate(empty_database, folder, schema="memory")) == 2
    assert await pending(empty_database, folder, schema="memory") == []
    rows = await fetch(empty_database, "SELECT schemaname FROM pg_tables WHERE tablename = 'a' ORDER BY 1")
    assert [row["schemaname"] for row in rows] == ["memory", "public"]
    with pytest.raises(ValueError, match="not a schema's name"):
        await migrate(empty_database, folder, schema="a; DROP TABLE b")


async def test_before_a_rollout_only_what_the_version_before_survives_is_applied(
    empty_database: str, folder: Path
) -> None:
    assert await migrate(empty_database, folder, before_rollout=True) == ["0001_pre_start.sql"]
    # A replica of the new version serves meanwhile.
    pool = await open_migrated(empty_database, folder, service="x", schema="")
    await pool.shut()
    (folder / "0003_pre_third.sql").write_text("ALTER TABLE b ADD COLUMN c text;")
    with pytest.raises(
        StartupError, match=r"0002_post_more\.sql of a release in between.*0003_pre_third"
    ) as told:
        await migrate(empty_database, folder, before_rollout=True)
    assert "\n" not in str(told.value)
    with pytest.raises(StartupError, match=r"0003_pre_third\.sql not applied"):
        await open_migrated(empty_database, folder, service="x", schema="")
    assert await migrate(empty_database, folder) == ["0002_post_more.sql", "0003_pre_third.sql"]
    assert await migrate(empty_database, folder, before_rollout=True) == []
