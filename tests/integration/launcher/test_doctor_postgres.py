"""What doctor finds in real databases."""

from __future__ import annotations

import asyncio

import pytest

from launcher.doctor_postgres import rows
from tests.conftest import create_database
from tests.integration.session.standby import replicated


def by_name(found: list[tuple[str, str, str]]) -> dict[str, tuple[str, str]]:
    return {what: (text, remedy) for what, text, remedy in found}


async def test_a_migrated_database_is_well(database: str) -> None:
    found = by_name(await rows(database))
    assert not [one for one in found.items() if one[1][1]]
    assert found["PostgreSQL"][0].startswith("18")
    assert found["PostgreSQL's user"][0] == "postgres, a superuser; its tables are there"
    assert found["a pooler before PostgreSQL"] == ("none", "")
    assert found["PostgreSQL's clock"][0] == "0.0 s off"


async def test_an_empty_one_lacks_its_tables_and_one_that_is_away_is_one_line(postgres_url: str) -> None:
    empty = await asyncio.to_thread(create_database, postgres_url)
    found = by_name(await rows(empty, prefix="acme_"))
    assert found["PostgreSQL's user"][0].endswith("its tables are not there")
    assert found["pgvector"] == ("not made", "")
    [(what, text, remedy)] = await rows("postgresql://u:secret@127.0.0.1:1/d")
    assert (what, text) == ("PostgreSQL", "cannot be used")
    assert "127.0.0.1:1/d" in remedy
    assert "secret" not in remedy


@pytest.mark.timeout(180)
async def test_a_standby_is_told_from_a_primary() -> None:
    async with replicated() as pair:
        found = by_name(await rows(pair.both, standby_url=pair.standby.url))
        assert found["PostgreSQL's replication"] == ("1 standby, synchronous", "")
        assert found["HERMESH_DATABASE_STANDBY_URL"] == ("a standby", "")
        wrong = by_name(await rows(pair.standby.url, standby_url=pair.url))
        assert "name the primary" in wrong["PostgreSQL's replication"][1]
        assert wrong["HERMESH_DATABASE_STANDBY_URL"] == ("a primary", "it is no standby")
