"""What Kubernetes' horizontal pod autoscaler decides (autoscaling/v2), a pure function of metrics and time.

Written after its documentation and the behaviour of its controller: for each metric the replicas that would
bring the average to its target, not one within the tolerance; pods without a sample count so that they damp
the step; the most that any metric asks for; then the stabilisation windows, and what the policies allow in
their periods. Times are seconds of any clock that only goes forward.

Left out: readiness delays of CPU samples after a pod's start (`cpuInitializationPeriod`), metrics that cannot
be read at all, and `selectPolicy: Disabled`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# Of the controller: how often it looks, and how far from a target it does nothing.
SYNC_SECONDS = 15.0
TOLERANCE = 0.1
CPU = "cpu"


@dataclass(frozen=True, slots=True)
class Policy:
    """How much may change in a period: so many pods, or so many percent."""

    kind: str
    value: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Rules:
    """One direction of `behavior`."""

    window: float
    policies: Sequence[Policy]
    most: bool

    @classmethod
    def read(cls, found: Mapping[str, Any]) -> Rules:
        """Reads `scaleUp` or `scaleDown`, in which everything stands."""
        policies = [Policy(one["type"], one["value"], one["periodSeconds"]) for one in found["policies"]]
        return cls(found["stabilizationWindowSeconds"], policies, found.get("selectPolicy", "Max") == "Max")


@dataclass(frozen=True, slots=True)
class Spec:
    """What is asked of the autoscaler.

    Attributes:
        least, most: replicas.
        targets: the average a pod of each metric; of the CPU, percent of what it requests.
        up, down: `behavior`.
    """

    least: int
    most: int
    targets: Mapping[str, float]
    up: Rules
    down: Rules

    @classmethod
    def read(cls, scaler: Mapping[str, Any]) -> Spec:
        """Reads the `spec` of a HorizontalPodAutoscaler."""
        targets: dict[str, float] = {}
        for metric in scaler["metrics"]:
            if metric["type"] == "Resource":
                targets[metric["resource"]["name"]] = metric["resource"]["target"]["averageUtilization"]
            else:
                pods = metric["pods"]
                targets[pods["metric"]["name"]] = float(pods["target"]["averageValue"])
        up, down = (Rules.read(scaler["behavior"][way]) for way in ("scaleUp", "scaleDown"))
        return cls(scaler["minReplicas"], scaler["maxReplicas"], targets, up, down)


@dataclass(frozen=True, slots=True)
class Decision:
    """What one look came to.

    Attributes:
        by_metric: the replicas that each metric asks for.
        wanted: the most of them, within the bounds.
        replicas: what is set, after windows and policies.
    """

    by_metric: Mapping[str, int]
    wanted: int
    replicas: int


def proposal(
    samples: Sequence[float | None],
    target: float,
    current: int,
    *,
    absent: float,
    tolerance: float = TOLERANCE,
) -> int:
    """Returns the replicas that one metric asks for.

    Args:
        samples: One for each pod; None where there is none yet.
        target: The average that is wanted.
        current: Replicas now.
        absent: What a pod without a sample counts as when fewer replicas seem enough.
        tolerance: Of the ratio of average and target.
    """

    def near(ratio: float) -> bool:
        return 1 - tolerance <= ratio <= 1 + tolerance

    known = [sample for sample in samples if sample is not None]
    if not known:
        return current
    ratio = sum(known) / len(known) / target
    if len(known) == len(samples):
        return current if near(ratio) else math.ceil(ratio * len(known) - 1e-9)
    # Whoever says nothing yet is taken for idle when more are asked for, and for busy when fewer are.
    filled = [(absent if ratio < 1 else 0.0) if sample is None else sample for sample in samples]
    again = sum(filled) / len(filled) / target
    if near(again) or (ratio < 1) != (again < 1):
        return current
    asked = math.ceil(again * len(filled) - 1e-9)
    return current if (again < 1) != (asked < current) else asked


@dataclass(slots=True)
class Autoscaler:
    """One HorizontalPodAutoscaler with what it remembers."""

    spec: Spec
    _recommended: list[tuple[float, int]] = field(default_factory=list)
    _changes: list[tuple[float, int]] = field(default_factory=list)

    def decide(self, now: float, current: int, samples: Mapping[str, Sequence[float | None]]) -> Decision:
        """Looks once.

        Args:
            now: The time.
            current: Replicas that are set.
            samples: Of each metric one for each of them; of the CPU in percent of the request.
        """
        asked = {
            name: proposal(
                samples[name],
                target,
                current,
                absent=max(100.0, target) if name == CPU else target,
            )
            for name, target in self.spec.targets.items()
        }
        # The bounds come last, so that windows remember what was asked for.
        wanted = max(asked.values())
        replicas = self._allowed(now, current, self._stabilised(now, current, wanted))
        if replicas != current:
            self._changes.append((now, replicas - current))
        return Decision(asked, min(self.spec.most, max(self.spec.least, wanted)), replicas)

    def _stabilised(self, now: float, current: int, wanted: int) -> int:
        """The least of what was asked for lately before going up, the most of it before going down."""
        if not self._recommended:
            # Before the first look what was there was right.
            self._recommended.append((now, current))
        low, high = (
            [number for at, number in self._recommended if at > now - rules.window]
            for rules in (self.spec.up, self.spec.down)
        )
        self._recommended.append((now, wanted))
        longest = max(self.spec.up.window, self.spec.down.window)
        self._recommended = [one for one in self._recommended if one[0] > now - longest]
        return min(max(current, min([*low, wanted])), max([*high, wanted]))

    def _allowed(self, now: float, current: int, wanted: int) -> int:
        if wanted > current:
            limit = max(current, self._limit(now, current, self.spec.up, 1))
            return min(wanted, limit, self.spec.most)
        if wanted < current:
            limit = min(current, self._limit(now, current, self.spec.down, -1))
            return max(wanted, limit, self.spec.least)
        return min(self.spec.most, max(self.spec.least, current))

    def _limit(self, now: float, current: int, rules: Rules, way: int) -> int:
        """How far it may go from where its policies' periods began."""
        limits = []
        for policy in rules.policies:
            start = current - sum(change for at, change in self._changes if at > now - policy.seconds)
            if policy.kind == "Pods":
                limits.append(start + way * policy.value)
            else:
                share = start * (1 + way * policy.value / 100)
                limits.append(math.ceil(share - 1e-9) if way > 0 else math.floor(share + 1e-9))
        farthest = max if (way > 0) == rules.most else min
        return farthest(limits)
