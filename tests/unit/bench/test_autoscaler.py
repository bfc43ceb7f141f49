"""The autoscaler of the bench decides as Kubernetes' does."""

from __future__ import annotations

from itertools import pairwise

import pytest
import yaml

from bench.autoscaler import CPU, Autoscaler, Policy, Rules, Spec, proposal
from bench.hpa import METRIC, SCALERS, Moment, Outcome, Profile, agents_spec, arrivals

UP = Rules(0, [Policy("Percent", 100, 15), Policy("Pods", 4, 15)], most=True)
DOWN = Rules(300, [Policy("Pods", 1, 60)], most=True)


def spec(**more: object) -> Spec:
    return Spec(**({"least": 2, "most": 20, "targets": {METRIC: 50.0}, "up": UP, "down": DOWN} | more))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("samples", "asked"),
    [
        ([50, 50], 2),
        # Within a tenth of the target nothing happens.
        ([55, 55], 2),
        ([45, 45], 2),
        ([56, 56], 3),
        ([100, 100], 4),
        ([40, 40], 2),
        ([10, 10, 10], 1),
        ([0, 0], 0),
        # What sums up exactly is no fraction more.
        ([150, 0, 0], 3),
    ],
)
def test_replicas_bring_the_average_to_its_target(samples: list[float], asked: int) -> None:
    assert proposal(samples, 50, len(samples), absent=50) == asked


@pytest.mark.parametrize(
    ("samples", "asked"),
    [
        # More are needed, and the silent ones take their part: 200 on four is the target.
        ([100, 100, None, None], 4),
        ([200, 200, None, None], 8),
        # Fewer are needed, and the silent ones are taken for busy.
        ([10, 10, None, None], 3),
        ([None, None], 2),
    ],
)
def test_pods_without_a_sample_damp_the_step(samples: list[float | None], asked: int) -> None:
    assert proposal(samples, 50, len(samples), absent=50) == asked


def test_the_most_that_any_metric_asks_for_counts() -> None:
    scaler = Autoscaler(spec(targets={METRIC: 50.0, CPU: 70.0}))
    decision = scaler.decide(0, 2, {METRIC: [10, 10], CPU: [140, 140]})
    assert decision.by_metric == {METRIC: 1, CPU: 4}
    assert decision.replicas == 4


def test_it_goes_up_at_once_by_what_its_policies_allow() -> None:
    scaler = Autoscaler(spec())
    assert scaler.decide(0, 2, {METRIC: [500, 500]}).replicas == 6
    # Not again within their period, whichever is more: double, or four more.
    assert scaler.decide(10, 6, {METRIC: [166] * 6}).replicas == 6
    assert scaler.decide(16, 6, {METRIC: [166] * 6}).replicas == 12
    assert scaler.decide(40, 12, {METRIC: [500] * 12}).replicas == 20


def test_it_goes_down_one_a_minute_and_only_after_five_quiet_minutes() -> None:
    scaler = Autoscaler(spec())
    assert scaler.decide(0, 8, {METRIC: [50] * 8}).replicas == 8
    now, replicas, changes = 15.0, 8, []
    while replicas > 2:
        found = scaler.decide(now, replicas, {METRIC: [5] * replicas}).replicas
        if found != replicas:
            changes.append((now, found))
        replicas = found
        now += 15
    assert changes[0] == (300.0, 7)
    assert [later - before for (before, _), (later, _) in pairwise(changes)] == [60.0] * 5


def test_a_short_lull_takes_nobody_away() -> None:
    scaler = Autoscaler(spec())
    for number in range(80):
        sessions = 50 if number % 10 else 5
        assert scaler.decide(number * 15, 8, {METRIC: [sessions] * 8}).replicas == 8


def test_the_bounds_hold() -> None:
    scaler = Autoscaler(spec(down=Rules(0, [Policy("Percent", 100, 15)], most=True)))
    assert scaler.decide(0, 20, {METRIC: [500] * 20}).replicas == 20
    assert scaler.decide(15, 20, {METRIC: [0] * 20}).replicas == 2


def test_it_reads_the_object_that_the_chart_renders() -> None:
    found = agents_spec()
    assert found == spec(targets={CPU: 70, METRIC: 50.0})
    assert len(list(yaml.safe_load_all(SCALERS.read_text()))) == 3


def test_arrivals_follow_their_profile() -> None:
    profile = Profile(least=20, peak=200, rise=60, high=120, fall=60, tail=120)
    assert profile.at(0) == 20
    assert 100 < profile.at(60) < 130
    assert profile.at(1e9) == 20
    found = arrivals(profile, 6, 1)
    assert found == sorted(found) == arrivals(profile, 6, 1)
    assert found[-1][0] < profile.seconds / 6
    busy = [at for at, _ in found if 120 <= at * 6 < 180]
    calm = [at for at, _ in found if at * 6 >= profile.seconds - 60]
    assert len(busy) > 4 * len(calm)


def test_up_and_then_down_is_one_change_of_direction() -> None:
    def outcome(*replicas: int) -> Outcome:
        moments = [Moment(0, 0, 0, before, before, {}, after) for before, after in pairwise(replicas)]
        return Outcome({}, 1, 50, moments, 0, 0, 0, 0, 0)

    assert outcome(2, 4, 8, 8, 7, 6, 2).turns == 1
    assert outcome(2, 4, 3, 4).turns == 2
    assert outcome(2, 2).turns == 0
