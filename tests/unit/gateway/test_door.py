"""What is refused at the door."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID, uuid4

import pytest
from prometheus_client import CollectorRegistry

from gateway.door import Door, DoorMetrics
from meshkit.errors import ResourceExhaustedError
from meshkit.identity import Identity, use_identity

FULL = ResourceExhaustedError("OVERLOADED", "full")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@contextmanager
def tenant(tenant_id: UUID) -> Iterator[None]:
    with use_identity(Identity(tenant_id, mesh=False)):
        yield


def make(clock: Clock, max_waiting: int = 64) -> Door:
    return Door(max_waiting, DoorMetrics(CollectorRegistry()), monotonic=clock, rng=random.Random(1))


def flood(door: Door, clock: Clock, *, rate: int, capacity: int, seconds: int) -> int:
    """So many runs a second ask, the mesh takes so many of them; returns how many it was asked about."""
    asked = 0
    for _ in range(seconds):
        room = capacity
        for _ in range(rate):
            clock.now += 1 / rate
            try:
                door.check()
            except ResourceExhaustedError:
                continue
            asked += 1
            if room:
                room -= 1
                door.accepted()
            else:
                door.refused()
    return asked


def ask_until_refused(door: Door) -> None:
    while True:
        door.check()


def test_all_is_let_through_while_all_is_accepted() -> None:
    clock = Clock()
    assert flood(make(clock), clock, rate=300, capacity=300, seconds=10) == 3000


def test_many_that_come_together_are_no_flood() -> None:
    door = make(Clock())
    for _ in range(1000):
        door.check()
    for _ in range(1000):
        door.accepted()


def test_a_flood_asks_the_mesh_for_little_more_than_it_takes_and_for_all_of_that() -> None:
    clock = Clock()
    door = make(clock)
    flood(door, clock, rate=900, capacity=300, seconds=5)
    asked = flood(door, clock, rate=900, capacity=300, seconds=10)
    assert 300 * 10 <= asked <= 2.2 * 300 * 10


def test_after_a_stall_all_that_there_is_room_for_is_accepted_again_in_some_seconds() -> None:
    clock = Clock()
    door = make(clock)
    flood(door, clock, rate=900, capacity=300, seconds=5)
    flood(door, clock, rate=900, capacity=3, seconds=5)
    flood(door, clock, rate=900, capacity=300, seconds=6)
    assert flood(door, clock, rate=900, capacity=300, seconds=2) >= 2 * 300


def test_another_tenant_does_not_pay_for_a_flood() -> None:
    clock = Clock()
    door = make(clock)
    with tenant(uuid4()):
        flood(door, clock, rate=900, capacity=100, seconds=5)
    with tenant(uuid4()):
        for _ in range(50):
            door.check()
            door.accepted()


def test_after_the_flood_the_door_is_open_again() -> None:
    clock = Clock()
    door = make(clock)
    flood(door, clock, rate=900, capacity=0, seconds=5)
    clock.now += 20
    for _ in range(8):
        door.check()


def test_few_wait_the_others_are_told_when_to_come_back_and_each_tenant_has_a_share() -> None:
    clock = Clock()
    door = make(clock, max_waiting=64)
    places = []
    with tenant(uuid4()):
        while True:
            try:
                places.append(door.wait(FULL))
            except ResourceExhaustedError:
                break
    assert len(places) == 57
    with tenant(uuid4()):
        door.wait(FULL).given_up()
    clock.now += 3
    for place in places:
        place.begun()
    flood(door, clock, rate=900, capacity=0, seconds=3)
    with pytest.raises(ResourceExhaustedError) as caught:
        ask_until_refused(door)
    # Who is refused now would have waited about as long as those before.
    assert caught.value.reason == "OVERLOADED"
    assert caught.value.retry_after_ms is not None
    assert 1300 < caught.value.retry_after_ms < 4600


def test_tenants_that_come_no_more_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.door._MAX_TENANTS", 100)
    clock = Clock()
    door = make(clock)
    for _ in range(1000):
        clock.now += 1
        with tenant(uuid4()):
            door.check()
            door.accepted()
    assert len(door._lately) <= 101
