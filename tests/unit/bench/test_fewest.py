from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from bench.fewest import Fewest


@given(st.integers(1, 6), st.lists(st.booleans(), max_size=60), st.randoms(use_true_random=False))
def test_the_next_run_goes_to_an_agent_that_has_the_fewest(
    agents: int, steps: list[bool], chance: random.Random
) -> None:
    fewest, runs = Fewest(agents, chance), Counter(dict.fromkeys(range(agents), 0))
    for take in steps:
        busy = [agent for agent, count in runs.items() if count]
        if take or not busy:
            agent = fewest.take()
            assert runs[agent] == min(runs.values())
            runs[agent] += 1
        else:
            agent = chance.choice(busy)
            fewest.over(agent)
            runs[agent] -= 1


def test_where_several_have_as_few_each_has_the_same_chance() -> None:
    chance = random.Random(1)
    first = Counter(Fewest(4, chance).take() for _ in range(4000))
    assert set(first) == {0, 1, 2, 3}
    assert min(first.values()) > 800
