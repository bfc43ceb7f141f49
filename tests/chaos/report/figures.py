"""The figures of many episodes, counted from their histories and not from what was said of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from tests.chaos.model.history import History, Record
from tests.chaos.report.episodes import Verdict
from tests.chaos.report.takeovers import Takeover, Takeovers, blows
from tests.chaos.validate import Facts
from tests.chaos.validate.facts import CANCELLED, COMPLETED, FAILED, REQUIRES_ACTION
from tests.chaos.validate.fences import check_live_writes, check_stale_writes
from tests.chaos.validate.streams import drains
from tests.chaos.validate.tools import repeated

_ENDS = {
    COMPLETED: "completed",
    FAILED: "failed",
    CANCELLED: "cancelled",
    REQUIRES_ACTION: "waiting for a person",
}
STUCK = "stuck"


@dataclass
class Figures:
    """Sums over episodes.

    Attributes:
        seconds: by (seed, folder), wall clock.
        acknowledged: keys that were answered with a run.
        lost: of those, the ones whose run, its beginning or its input is not there.
        duplicated: of those, the ones that made more than one run, or whose input is there more than once.
        runs: by how they stood at the end.
        reasons: of failed runs, where they are known.
        effects: tool calls by effect class.
        acts: side effects that the ledger saw.
        repeated: acts of non-idempotent calls that were more than allowed.
        stale: writes that no current fence covered, in PostgreSQL or Redis.
        entries: of the log.
        live: entries of Redis that were compared with it.
        reconnects: streams of a run by a client that had one of it before.
        closed: streams by why they ended.
        drains: those under which nothing else was broken, and the others.
        broken: what was broken, by kind and sort of target.
        failed: violations by (seed, folder).
    """

    seconds: dict[tuple[int, str], float] = field(default_factory=dict)
    records: int = 0
    acknowledged: int = 0
    lost: int = 0
    duplicated: int = 0
    runs: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    effects: Counter[int] = field(default_factory=Counter)
    acts: int = 0
    repeated: int = 0
    stale: int = 0
    entries: int = 0
    live: int = 0
    takeovers: list[Takeover] = field(default_factory=list)
    streams: int = 0
    reconnects: int = 0
    events: int = 0
    closed: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    drains: Counter[str] = field(default_factory=Counter)
    broken: Counter[str] = field(default_factory=Counter)
    failed: dict[tuple[int, str], Sequence[dict[str, Any]]] = field(default_factory=dict)

    @classmethod
    def of(cls, verdicts: Iterable[Verdict]) -> Figures:
        """Reads the histories one by one and adds them up."""
        figures = cls()
        for verdict in verdicts:
            figures.add(verdict, verdict.history())
        return figures

    def add(self, verdict: Verdict, history: History) -> None:
        """Adds one episode."""
        facts = Facts(history)
        episode = (verdict.seed, str(verdict.folder))
        self.seconds[episode] = verdict.seconds
        if verdict.violations:
            self.failed[episode] = verdict.violations
        self.records += len(history.records)
        self._messages(facts)
        self._runs(facts)
        self._tools(facts)
        self._clients(facts)
        self.stale += sum(1 for _ in chain(check_stale_writes(facts), check_live_writes(facts)))
        self.entries += len(facts["log"])
        self.live += len(facts["live"])
        self.takeovers += Takeovers(facts).all()
        self.broken.update(blow.name for blow in blows(facts))
        self.drains.update("disturbed" if drain.disturbed else "undisturbed" for drain in drains(facts))

    def _messages(self, facts: Facts) -> None:
        made: dict[str, set[str]] = {}
        for row in facts["key_row"]:
            made.setdefault(row["key"], set()).add(row["run"])
        for key, answers in facts.accepted.items():
            runs = {answer["run"] for answer in answers}
            self.acknowledged += 1
            self.lost += any(_lost(facts, key, run) for run in runs)
            twice = any(len(_inputs(facts, run)) > 1 or _created(facts, run) > 1 for run in runs)
            self.duplicated += twice or len(runs | made.get(key, set())) > 1

    def _runs(self, facts: Facts) -> None:
        for run, row in facts.runs.items():
            self.runs[_ENDS.get(row["status"], STUCK)] += 1
            if row["status"] == FAILED and run in facts.log:
                self.reasons[facts.log[run][-1].get("reason") or "not recorded"] += 1

    def _tools(self, facts: Facts) -> None:
        self.acts += len(facts["act"])
        for call in {*facts.calls, *facts.acts}:
            self.effects[facts.effect(call)] += 1
            self.repeated += repeated(facts, call)

    def _clients(self, facts: Facts) -> None:
        seen: set[tuple[str, str]] = set()
        for opened in facts["open"]:
            self.streams += 1
            key = opened["client"], opened["run"]
            self.reconnects += key in seen
            seen.add(key)
        self.events += len(facts["event"])
        self.closed.update(closed["reason"] for closed in facts["closed"])
        self.refusals.update(refusal["reason"] or "none" for refusal in facts["refused"])

    @property
    def calls(self) -> int:
        """All tool calls."""
        return self.effects.total()

    def as_json(self) -> dict[str, Any]:
        """Returns everything, for programs."""
        return {
            "episodes": len(self.seconds),
            "failed": [
                {"seed": seed, "folder": folder, "violations": list(violations)}
                for (seed, folder), violations in self.failed.items()
            ],
            "seconds": [{"seed": seed, "seconds": seconds} for (seed, _), seconds in self.seconds.items()],
            "records": self.records,
            "messages": {
                "acknowledged": self.acknowledged,
                "lost": self.lost,
                "duplicated": self.duplicated,
            },
            "runs": dict(self.runs),
            "run_failures": dict(self.reasons),
            "tool_calls": self.calls,
            "acts": self.acts,
            "repeated_side_effects": self.repeated,
            "log_entries": self.entries,
            "stale_writes": self.stale,
            "redis_entries_compared": self.live,
            "takeovers": [vars(takeover) for takeover in self.takeovers],
            "streams": {
                "opened": self.streams,
                "reconnects": self.reconnects,
                "events": self.events,
                "closed": dict(self.closed),
            },
            "refusals": dict(self.refusals),
            "drains": dict(self.drains),
            "faults": dict(self.broken),
            "bounds": {
                name: {"n": n, "failures": bad, "bound": bound(n, bad)} for name, n, bad in self.odds()
            },
        }

    def odds(self) -> list[tuple[str, int, int]]:
        """Returns of what there were how many, and how many of them failed."""
        return [
            ("acknowledged message lost or duplicated", self.acknowledged, self.lost + self.duplicated),
            ("run stuck", self.runs.total(), self.runs[STUCK]),
            ("tool call whose side effect was repeated", self.calls, self.repeated),
        ]


def _inputs(facts: Facts, run: str) -> list[Record]:
    return [message for message in facts.messages_of.get(run, []) if message["role"] == "user"]


def _created(facts: Facts, run: str) -> int:
    return sum(entry["type"] == "run.created" for entry in facts.log.get(run, []))


def _lost(facts: Facts, key: str, run: str) -> bool:
    row = facts.runs.get(run)
    if row is None or not _created(facts, run):
        return True
    said = {submit["digest"] for submit in facts.submits.get(key, [])}
    return bool(row["attempt"]) and not any(message["digest"] in said for message in _inputs(facts, run))


def percentile(values: Sequence[float], share: float) -> float:
    """Returns the smallest value that at least this share of the values does not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def bound(n: int, failures: int) -> float | None:
    """Returns below what the rate of failures is with 95 % confidence, by the rule of three.

    None where the rule does not apply: there were failures, or too few cases.
    """
    return 3 / n if not failures and n > 3 else None
