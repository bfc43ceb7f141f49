"""Finds the costs with which the simulation spends what was measured, from measurements of three shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.costs import Cost, Costs, Equation, fit
from bench.simulated_mesh import Layout, SimulatedMesh, Work

ROUNDS = 8
# The paced model server sends the reason for the end, the usage and `[DONE]` at its pace, too.
LAST_CHUNKS = 3
ASKS = 3
PORTIONS = 60


def reply_seconds(tokens: int, rate: float) -> float:
    """How long the paced model takes for a reply of so many tokens at so many a second."""
    return (tokens + LAST_CHUNKS) / rate


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement that costs are found from.

    Attributes:
        agents, slots, clients: of the mesh, and who asked.
        tokens: of each reply.
        rate: at which the model wrote them, tokens a second.
        replies: a second.
        cpu: CPU seconds a run of each kind of process, without what it does while idle.
        commits: PostgreSQL transactions a run.
        others: cores that others on the machine used.
    """

    agents: int
    slots: int
    clients: int
    tokens: int
    rate: float
    replies: float
    cpu: Mapping[str, float]
    commits: float
    others: float

    @property
    def work(self) -> Work:
        """What each run was."""
        return Work(self.tokens, reply_seconds(self.tokens, self.rate), min(self.tokens, PORTIONS))


def calibrate(
    samples: Sequence[Sample], idle: Mapping[str, float], commit_rate: float, hop: float, cores: int
) -> Costs:
    """Returns the costs.

    How often a process woke up for what was measured nobody counted, and it depends on the costs themselves.
    So they are found in rounds: simulate, count, solve again.

    Args:
        samples: of at least three shapes that differ in their tokens and in their pace.
        idle: see `Costs`.
        commit_rate: see `Costs`.
        hop: see `Costs`.
        cores: of the machine that was measured.
    """
    kinds = {kind: Cost(samples[0].cpu[kind] / 2, 0.0, 0.0) for kind in samples[0].cpu}
    commits = 2.0
    for _ in range(ROUNDS):
        costs = Costs(kinds, idle, commits, commit_rate, hop)
        seen = []
        for sample in samples:
            mesh = SimulatedMesh(Layout(sample.agents, sample.slots, machine_cores=cores), costs, sample.work)
            mesh.background({**idle, "others": sample.others})
            seen.append(mesh.closed(sample.clients, ASKS, 1.0))
        kinds = {
            kind: fit(
                [
                    Equation(1.0, one.wakes.get(kind, 0.0), sample.tokens, sample.cpu[kind])
                    for sample, one in zip(samples, seen, strict=True)
                ]
            )
            for kind in kinds
        }
        # The first sample has the fewest tokens, and so the fewest writes that could hide them.
        commits = max(0.0, commits + samples[0].commits - seen[0].commits)
    return Costs(kinds, idle, commits, commit_rate, hop)
