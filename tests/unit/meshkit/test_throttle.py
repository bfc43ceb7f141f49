from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshkit.throttle import Throttle, client_of


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@given(
    st.lists(st.tuples(st.floats(0, 3), st.sampled_from(["10.0.0.1", "10.0.0.2"])), max_size=60),
    st.integers(1, 5),
    st.floats(0.1, 10),
)
def test_no_address_does_it_more_often_than_burst_and_rate_allow(
    steps: list[tuple[float, str]], burst: int, rate: float
) -> None:
    clock = Clock()
    throttle = Throttle(rate, burst, clock=clock)
    done: dict[str, list[float]] = {}
    for pause, address in steps:
        clock.now += pause
        if throttle.wait(address) == 0:
            throttle.take(address)
            done.setdefault(address, []).append(clock.now)
    for times in done.values():
        for first in range(len(times)):
            for last in range(first, len(times)):
                allowed = burst + rate * (times[last] - times[first]) + 1e-6
                assert last - first + 1 <= allowed


@given(st.integers(1, 5), st.floats(0.1, 10), st.integers(0, 20))
def test_who_waits_as_told_may(burst: int, rate: float, times: int) -> None:
    clock = Clock()
    throttle = Throttle(rate, burst, clock=clock)
    for _ in range(times):
        throttle.take("10.0.0.1")
    clock.now += throttle.wait("10.0.0.1") + 1e-6
    assert throttle.wait("10.0.0.1") == 0


def test_the_table_of_addresses_is_bounded() -> None:
    throttle = Throttle(1, 1, max_addresses=100, clock=Clock())
    for number in range(10_000):
        throttle.take(f"10.0.{number // 256}.{number % 256}")
    assert len(throttle) == 100
    assert throttle.wait("10.0.39.15") > 0


@pytest.mark.parametrize(
    ("address", "client"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
        ("unknown", "unknown"),
    ],
)
def test_a_client_is_an_address_or_a_subscribers_network(address: str, client: str) -> None:
    assert client_of(address) == client
