"""When runs arrive and how long the model takes for each: the same for everything that is compared."""

from __future__ import annotations

import random
from dataclasses import dataclass

TOKENS = 5


@dataclass(frozen=True, slots=True)
class Shape:
    """A heavy-tailed load on agents that have so many slots.

    Attributes:
        agents: replicas.
        slots: runs that each of them works on at once; others wait in it.
        short: seconds of the model for most runs.
        long: seconds of the model for the others.
        long_share: which share of the runs is long.
        load: arrivals as a share of what all slots could do.
        seconds: how long runs arrive.
    """

    agents: int = 4
    slots: int = 2
    short: float = 0.05
    long: float = 1.0
    long_share: float = 0.05
    load: float = 0.7
    seconds: float = 30.0

    @property
    def mean(self) -> float:
        """Mean seconds of the model a run."""
        return self.short * (1 - self.long_share) + self.long * self.long_share

    @property
    def capacity(self) -> float:
        """Runs a second of all slots together, if nothing but the model took time."""
        return self.agents * self.slots / self.mean

    @property
    def rate(self) -> float:
        """Arrivals a second."""
        return self.capacity * self.load


@dataclass(frozen=True, slots=True)
class Arrival:
    """One run: when it arrives, in seconds from the beginning, and the model's seconds for it."""

    at: float
    service: float

    @property
    def prompt(self) -> str:
        """What the scripted model is told."""
        return f"[[tokens={TOKENS} delay={self.service:g}]]"


def arrivals(shape: Shape, seed: int) -> list[Arrival]:
    """Returns a Poisson stream of runs in order; exactly the share of them is long, which ones is random."""
    chance = random.Random(seed)
    count = round(shape.rate * shape.seconds)
    # A Poisson stream of a known number of arrivals is that many uniform times.
    times = sorted(chance.uniform(0, shape.seconds) for _ in range(count))
    long = round(count * shape.long_share)
    services = [shape.long] * long + [shape.short] * (count - long)
    chance.shuffle(services)
    return [Arrival(at, service) for at, service in zip(times, services, strict=True)]
