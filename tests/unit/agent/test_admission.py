"""Which runs an agent takes."""

import pytest

from meshkit.errors import ResourceExhaustedError
from services.agent.runs.admission import FLOOR, AdaptiveLimit, Admission


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def period(limit, clock, seconds, active, samples=10):
    """One period in which so many runs took so long to be accepted."""
    clock.now += 1.0
    for second in seconds if isinstance(seconds, list) else [seconds] * samples:
        limit.accepted(second, active)


def test_the_limit_falls_with_what_runs_and_grows_again():
    clock = Clock()
    limit = AdaptiveLimit(256, 0.25, clock)
    period(limit, clock, 0.4, 200)
    assert limit.value == 160
    period(limit, clock, 0.4, 160)
    assert limit.value == 128
    for _ in range(20):
        period(limit, clock, 0.01, 100)
    assert limit.value == 256


def test_one_fast_run_says_that_it_is_not_too_many():
    clock = Clock()
    limit = AdaptiveLimit(256, 0.25, clock)
    period(limit, clock, [2.0, 2.0, 0.1, 2.0, 2.0], 200)
    assert limit.value == 256


def test_few_runs_are_no_overload_however_slow():
    clock = Clock()
    limit = AdaptiveLimit(256, 0.25, clock)
    for _ in range(20):
        period(limit, clock, 5.0, 3)
    assert limit.value == FLOOR
    small = AdaptiveLimit(4, 0.25, clock)
    period(small, clock, 5.0, 4)
    assert small.value == 4


def test_too_few_runs_tell_nothing_and_without_a_target_none_does():
    clock = Clock()
    limit = AdaptiveLimit(256, 0.25, clock)
    period(limit, clock, 9.0, 200, samples=3)
    assert limit.value == 256
    fixed = AdaptiveLimit(256, 0, clock)
    period(fixed, clock, 9.0, 200)
    assert fixed.value == 256


def fill(admission, tenant_id):
    """Take places until there are no more for this tenant; return how many it got."""
    taken = 0
    while True:
        try:
            with admission.place(tenant_id):
                admission.take(tenant_id or "")
        except ResourceExhaustedError:
            return taken
        taken += 1


def test_a_flood_leaves_places_for_others_and_new_runs_leave_some_for_those_accepted_before():
    admission = Admission(256, 0, Clock())
    assert fill(admission, "flood") == 200
    assert 10 <= fill(admission, "polite") <= 24
    for number in range(30):
        fill(admission, f"other {number}")
    assert admission.used == 224
    assert fill(admission, None) == 32
    assert admission.used == 256
    with pytest.raises(ResourceExhaustedError) as caught, admission.place(None):
        pass
    assert caught.value.reason == "OVERLOADED"
    assert 200 <= caught.value.retry_after_ms <= 1000
    admission.give("flood")
    with admission.place(None):
        pass
    assert admission.used == 255
