"""How tests look at a history, change it, and say what the checks must find."""

from __future__ import annotations

from typing import Any

from tests.chaos.model.history import History, Record
from tests.chaos.validate import check
from tests.unit.chaos.world import World


def of(world: World, kind: str, **fields: Any) -> list[Record]:
    """Returns the records of a kind with these fields, to be changed in place."""
    world.history()
    return [
        record
        for record in world.records
        if record["kind"] == kind and all(record[name] == value for name, value in fields.items())
    ]


def drop(world: World, *records: Record) -> None:
    world.records = [record for record in world.records if not any(record is gone for gone in records)]


def found(world: World) -> list[str]:
    return [str(violation) for violation in check(world.history())]


def assert_clean(world: World) -> None:
    assert found(world) == []


def assert_found(world: World, invariant: int, words: str) -> None:
    """Asserts a violation of an invariant whose text holds some words, and that it names records."""
    violations = check(History(world.records))
    hits = [one for one in violations if one.invariant == invariant and words in one.text]
    assert hits, [str(one) for one in violations]
    assert all(one.records for one in hits)
