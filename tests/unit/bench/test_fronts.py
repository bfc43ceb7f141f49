from pathlib import Path

from bench.fronts import FRONTS, Front


def test_a_front_balances_over_every_agent_by_its_policy() -> None:
    agents = ["127.0.0.1:1001", "127.0.0.1:1002"]
    for front in FRONTS:
        text = front.configuration(Path("/nowhere"), 999, agents)
        assert all(agent in text for agent in agents)
        assert front.policy in text
        assert "127.0.0.1:999" in text


def test_each_front_has_a_name_of_its_own() -> None:
    assert len({front.name for front in FRONTS}) == len(FRONTS)
    assert Front("nginx", "").name == "nginx round robin"
