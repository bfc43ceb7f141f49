"""Takeovers: which runs moved to another owner, after what, and how long their readers waited.

A takeover is a grant to an owner, not a re-attachment, of a run that an owner had before. A run that waited
for a person in between is none: it was let go of, and its clients waited for that person. That shows in the
grant under which the store wrote the person's word.

Its cause is the last thing that was broken between the former grant and this one and that names the former
owner: its replica, or a point in the code of its service at which a process crashed. Failing that it is the
last thing that was broken in that time, whatever that was; else nothing is known of it (a lease that ran out
under load).

Its time runs from the moment of its cause to the first event of the new owner's at a client: one with a seq
from the grant's `next_seq` on, received by a client that had a stream of the run open when the cause struck
and did not cut it itself in between. The soonest such client counts. So the time holds all there is: that the
death is noticed, the grace, the claim, the prompt of the model, the commit, and where the client's own stream
broke as well, its coming back. Without such a client there is no time: nobody was waiting.

A fault's moment is when it was noted, just before it is done. A crash at a point is armed first and strikes
when a process comes by: its moment is that of its `healed` record, written within 50 ms after it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property

from tests.chaos.model.history import Record
from tests.chaos.validate import Facts

UNKNOWN = "nothing known"
_POINT = "point"


@dataclass(frozen=True)
class Blow:
    """Something that was broken.

    Attributes:
        fault: its kind.
        target: what was hit: a replica, a store, a path, a point in the code.
        detail: how; for a point in the code, what happened there.
        moment: Unix seconds.
    """

    fault: str
    target: str
    detail: str
    moment: float

    @property
    def name(self) -> str:
        """Its kind and the sort of thing that it hit, for tables."""
        if self.fault == _POINT:
            action = self.detail.partition("@")[0].partition(":")[0] or "crash"
            return f"{action} in {self.target.partition('.')[0]}"
        sort, dash, number = self.target.rpartition("-")
        return f"{self.fault} {sort if dash and number.isdigit() else self.target}".strip()

    def names(self, owner: str) -> bool:
        """Whether it hit an owner of leases for certain, as far as a record can tell."""
        replica = owner.partition("~")[0]
        if self.fault == _POINT:
            return self.target.partition(".")[0] == replica.rpartition("-")[0]
        return self.target == replica


@dataclass(frozen=True)
class Takeover:
    """A run that moved.

    Attributes:
        run: the run.
        cause: the name of what was broken.
        seconds: from that to the new owner's first event at a client; None if none was waiting.
    """

    run: str
    cause: str
    seconds: float | None


def blows(facts: Facts) -> list[Blow]:
    """Returns what was broken, by its moment; points that nobody came by are left out."""
    found = []
    missed = {mark["text"].removeprefix("nobody came by ") for mark in facts["mark"]}
    for fault in facts["fault"]:
        moment = fault["t"]
        if fault["fault"] == _POINT:
            if fault["target"] in missed:
                continue
            moment = min(
                (
                    healed["t"]
                    for healed in facts["healed"]
                    if (healed["fault"], healed["target"]) == (_POINT, fault["target"])
                    and healed["t"] >= fault["t"]
                ),
                default=moment,
            )
        found.append(Blow(fault["fault"], fault["target"], fault["detail"], moment))
    return sorted(found, key=lambda blow: blow.moment)


@dataclass
class _Watch:
    """A client's stream of a run; times in Unix seconds."""

    client: str
    begin: float
    end: float = float("inf")
    cut: bool = False


class Takeovers:
    """The takeovers of one history."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts

    def all(self) -> list[Takeover]:
        """Returns them in the order of their grants, session by session."""
        found = []
        for grants in self._facts.grants.values():
            held: dict[str, Record | None] = {}
            for grant in grants:
                before = held.get(grant["run"])
                if grant["owner"] is None:
                    # Its events were the store's own: a person's word, or the run's end.
                    held[grant["run"]] = None
                    continue
                if before is not None and not grant["attach"] and not self._had_waited(grant):
                    found.append(self._takeover(before, grant))
                held[grant["run"]] = grant
        return found

    def _had_waited(self, grant: Record) -> bool:
        """Whether the run had let go of its lease to wait for a person who spoke before it did."""
        entries = self._facts.log.get(grant["run"], [])
        for entry in reversed(entries[: grant["next_seq"] - 1]):
            if entry["type"] != "action.resolved":
                return bool(entry["type"] == "action.required")
        return False

    def _takeover(self, before: Record, grant: Record) -> Takeover:
        blow = self._cause(before, grant)
        if blow is None:
            return Takeover(grant["run"], UNKNOWN, None)
        return Takeover(grant["run"], blow.name, self._seconds(grant, blow.moment))

    @cached_property
    def _blows(self) -> list[Blow]:
        return blows(self._facts)

    def _cause(self, before: Record, grant: Record) -> Blow | None:
        moments = [blow.moment for blow in self._blows]
        between = self._blows[bisect_right(moments, before["t"]) : bisect_right(moments, grant["t"])]
        certain = [blow for blow in between if blow.names(before["owner"])]
        return (certain or between or [None])[-1]

    @cached_property
    def _events(self) -> dict[str, list[Record]]:
        found: dict[str, list[Record]] = defaultdict(list)
        for event in self._facts["event"]:
            found[event["run"]].append(event)
        return dict(found)

    @cached_property
    def _watches(self) -> dict[str, list[_Watch]]:
        runs = {(event["client"], event["stream"]): event["run"] for event in self._facts["event"]}
        streams = {}
        found: dict[str, list[_Watch]] = defaultdict(list)
        for opened in self._facts["open"]:
            key = opened["client"], opened["stream"]
            run = opened["run"] or runs.get(key)
            if run is not None:
                streams[key] = _Watch(opened["client"], opened["t"])
                found[run].append(streams[key])
        for closed in self._facts["closed"]:
            watch = streams.get((closed["client"], closed["stream"]))
            if watch is not None:
                watch.end, watch.cut = closed["t"], closed["reason"] == "cut"
        return dict(found)

    def _seconds(self, grant: Record, moment: float) -> float | None:
        run = grant["run"]
        watches = self._watches.get(run, [])
        waiting = {watch.client for watch in watches if watch.begin <= moment < watch.end}
        for event in sorted(self._events.get(run, []), key=lambda event: event["t"]):
            if event["seq"] < grant["next_seq"] or event["t"] < moment or event["client"] not in waiting:
                continue
            left = any(
                watch.cut and watch.client == event["client"] and moment <= watch.end < event["t"]
                for watch in watches
            )
            if not left:
                return float(event["t"] - moment)
            waiting.discard(event["client"])
        return None
