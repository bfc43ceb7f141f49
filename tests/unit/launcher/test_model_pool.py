"""Which model backends Envoy can stand before."""

import pytest

from launcher.errors import LaunchError
from launcher.model_pool import ModelPool


def test_agents_choose_for_themselves_unless_told_otherwise() -> None:
    assert ModelPool.of(["http://one:1/v1"], "agent", 9000) is None
    assert ModelPool.of([], "session", 9000) is None


def test_a_pool_has_the_path_of_its_backends() -> None:
    pool = ModelPool.of(["http://one:8000/base/v1/", "http://two/base/v1"], "session", 9000)
    assert pool is not None
    assert pool.url == "http://127.0.0.1:9000/base/v1"
    assert pool.places == [("one", 8000), ("two", 80)]
    assert "RING_HASH" in pool.cluster()
    assert "hash_balance_factor: 125" in pool.cluster()
    assert "port_value: 9000" in pool.listener()


def test_the_backend_with_the_fewest_requests_of_all_is_chosen() -> None:
    pool = ModelPool.of(["http://one:8000/v1", "http://two:8000/v1"], "least_request", 9000)
    assert pool is not None
    assert "selection_method: FULL_SCAN" in pool.cluster()


@pytest.mark.parametrize(
    ("urls", "what"),
    [
        (["https://one/v1"], "http://"),
        (["http://one/v1", "http://two/v2"], "one path"),
    ],
)
def test_what_envoy_cannot_do_is_said(urls: list[str], what: str) -> None:
    with pytest.raises(LaunchError, match=what):
        ModelPool.of(urls, "least_request", 9000)
