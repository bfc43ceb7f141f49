"""The agent with the fewest runs under way, one by chance of several: Envoy's full scan without the scan."""

from __future__ import annotations

import random


class Fewest:
    """Counts runs by agent, for any number of agents in constant time.

    Args:
        agents: how many there are; each is a number from 0 on.
        chance: where chance comes from.
    """

    def __init__(self, agents: int, chance: random.Random) -> None:
        self._chance = chance
        self._runs = [0] * agents
        # Agents by their number of runs; where each stands there; the lowest number that has any.
        self._level: list[list[int]] = [list(range(agents))]
        self._place = list(range(agents))
        self._lowest = 0

    def take(self) -> int:
        """Returns the agent that gets the next run."""
        level = self._level[self._lowest]
        agent = level[self._chance.randrange(len(level))]
        self._move(agent, self._runs[agent] + 1)
        while not self._level[self._lowest]:
            self._lowest += 1
        return agent

    def over(self, agent: int) -> None:
        """One of its runs is over."""
        self._move(agent, self._runs[agent] - 1)
        self._lowest = min(self._lowest, self._runs[agent])

    def _move(self, agent: int, runs: int) -> None:
        level, place = self._level[self._runs[agent]], self._place[agent]
        # The last one takes its place.
        level[place] = level[-1]
        self._place[level[-1]] = place
        level.pop()
        if runs == len(self._level):
            self._level.append([])
        self._place[agent] = len(self._level[runs])
        self._level[runs].append(agent)
        self._runs[agent] = runs
