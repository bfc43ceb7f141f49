"""Whatever a correct mesh does passes, and one thing wrong with it does not, wherever that is."""

from __future__ import annotations

import time
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.chaos.model.history import History, Record
from tests.chaos.validate import check
from tests.examples import examples
from tests.unit.chaos import corruptions
from tests.unit.chaos.episodes import Episode
from tests.unit.chaos.support import assert_clean

SECONDS = 2.0
RECORDS = 100_000


@settings(max_examples=examples(60), deadline=None)
@given(seed=st.integers(0, 2**32), steps=st.integers(1, 80))
def test_whatever_a_correct_mesh_does_passes(seed: int, steps: int) -> None:
    assert_clean(Episode(Random(seed), steps).world)


@settings(max_examples=examples(120), deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(seed=st.integers(0, 2**32), steps=st.integers(20, 80), spoil=st.sampled_from(corruptions.ALL))
def test_one_thing_wrong_is_found(seed: int, steps: int, spoil: corruptions.Corruption) -> None:
    random = Random(seed)
    world = Episode(random, steps).world
    invariant = spoil(world, random)
    if invariant is not None:
        broken = {violation.invariant for violation in check(History(world.records))}
        assert invariant in broken, (spoil.__name__, broken)


@pytest.mark.parametrize("spoil", corruptions.ALL, ids=lambda spoil: spoil.__name__)
def test_each_way_to_spoil_a_history_finds_one_to_spoil(spoil: corruptions.Corruption) -> None:
    """Else it would test nothing."""
    hits = 0
    for seed in range(400):
        random = Random(seed)
        world = Episode(random, 60).world
        invariant = spoil(world, random)
        if invariant is not None:
            assert invariant in {violation.invariant for violation in check(History(world.records))}, seed
            hits += 1
        if hits == 5:
            return
    pytest.fail(f"only {hits} of 400 histories could be spoiled")


def test_a_large_history_is_checked_in_two_seconds() -> None:
    """By the processor's clock: what else runs here does not count."""
    records: list[Record] = []
    seed = 0
    while len(records) < RECORDS:
        world = Episode(Random(seed), 400, sessions=10).world
        records += [renamed(record, seed) for record in world.records if record["kind"] != "end"]
        seed += 1
    records.append({"t": 1e9, "n": 0, "kind": "end", "settled": True, "seconds": 1.0})
    # The machine may be slow for a moment; that it can be this fast is what counts.
    took = []
    for _ in range(3):
        began = time.process_time()
        assert check(History(records)) == []
        took.append(time.process_time() - began)
    assert min(took) < SECONDS


def renamed(record: Record, seed: int) -> Record:
    """One of many histories put together: names must differ, what is first and last may not."""
    names = ("session", "run", "key", "call", "stream", "message")
    return record | {name: f"{seed}/{record[name]}" for name in names if record.get(name) is not None}
