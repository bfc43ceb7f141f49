"""What `bench.scale` measures, as data, and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import orjson

from bench.calibration import Sample, calibrate, reply_seconds
from bench.costs import Costs

AGENTS = (1, 2, 4, 8, 16)
SLOTS = 8
TOKENS = 20
RATE = 20.0
MODEL_SECONDS = reply_seconds(TOKENS, RATE)
VERSION = 3
_ONE_THREAD = ("gateway", "envoy", "valkey", "model", "generator")


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement of (a).

    Attributes:
        agents: replicas.
        clients: that asked at once.
        asks: of each.
        rate: runs a second.
        p50, p99: seconds of a run.
        cores: CPU seconds a second of each kind of process, the model and the generator among them.
        others: the same of everything else on the machine.
        commits, commands: of the stores, a run.
    """

    agents: int
    clients: int
    asks: int
    rate: float
    p50: float
    p99: float
    cores: Mapping[str, float]
    others: float
    commits: float
    commands: float

    def used(self, machine_cores: int) -> dict[str, float]:
        """Which share of each resource was used."""
        shares = {
            "agents' slots": self.rate * MODEL_SECONDS / (self.agents * SLOTS),
            "the machine's cores": (sum(self.cores.values()) + self.others) / machine_cores,
        }
        for kind in _ONE_THREAD:
            shares[f"{kind}'s one thread"] = self.cores.get(kind, 0.0)
        return shares

    def fullest(self, machine_cores: int) -> str:
        """Names the resource that was fullest, with its share."""
        shares = self.used(machine_cores)
        name = max(shares, key=lambda one: shares[one])
        return f"{name} ({shares[name]:.0%})"


@dataclass(frozen=True, slots=True)
class Measured:
    """Everything that was measured in one go.

    Attributes:
        facts: of the machine.
        samples: what costs are found from.
        idle, commit_rate: see `bench.costs.Costs`.
        alone: seconds of a run, the median, when nothing else runs.
        points: what (a) came to.
    """

    facts: Mapping[str, Any]
    samples: Sequence[Sample]
    idle: Mapping[str, float]
    commit_rate: float
    alone: float
    points: Sequence[Point]


def encode(measured: Measured) -> bytes:
    """Returns it as JSON."""
    found = {
        "version": VERSION,
        "facts": dict(measured.facts),
        "samples": [asdict(sample) for sample in measured.samples],
        "idle": dict(measured.idle),
        "commit_rate": measured.commit_rate,
        "alone": measured.alone,
        "points": [asdict(point) for point in measured.points],
    }
    return orjson.dumps(found, option=orjson.OPT_INDENT_2) + b"\n"


def decode(data: bytes) -> Measured:
    """Reads what `encode` wrote. Raises ValueError when it is something else."""
    found = orjson.loads(data)
    if found.get("version") != VERSION:
        raise ValueError(f"the results have version {found.get('version')!r}, not {VERSION}")
    return Measured(
        found["facts"],
        [Sample(**sample) for sample in found["samples"]],
        found["idle"],
        found["commit_rate"],
        found["alone"],
        [Point(**point) for point in found["points"]],
    )


def costs_of(measured: Measured) -> Costs:
    """Finds the costs that it says."""
    # The first sample has the fewest tokens: what it works is nearly all on a run's way.
    hop = max(0.0, measured.alone - MODEL_SECONDS - sum(measured.samples[0].cpu.values()))
    return calibrate(measured.samples, measured.idle, measured.commit_rate, hop, measured.facts["cores"])
