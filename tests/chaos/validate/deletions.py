"""Of a deleted session nothing comes back (11): no row, no answer, no act."""

from __future__ import annotations

from collections.abc import Iterator

from tests.chaos.model.history import Record
from tests.chaos.traffic.tools import TIMEOUT
from tests.chaos.validate.facts import SLACK, Facts, Violation

# What keeps a tool, or its outside, from hearing and being heard, and what makes a call look older.
_HOLDS = frozenset({"freeze", "pause", "network", "lost", "clock"})
_NO_SUCH = frozenset({"SESSION_NOT_FOUND", "RUN_NOT_FOUND"})


def check_deletions(facts: Facts) -> Iterator[Violation]:
    """Invariant 11: what was deleted stays deleted."""
    for answer in facts["after"]:
        if answer["answer"] not in _NO_SUCH:
            text = f"session {answer['session']} was deleted, and its {answer['what']}: {answer['answer']}"
            yield Violation(11, text, [answer])
    for left in facts["left"]:
        text = f"of {left['session']}, which was deleted, {left['rows']} rows of {left['what']} are there"
        yield Violation(11, text, [left])
    deleted = {record["run"]: record for record in facts["deleted"]}
    for begun in facts["begun"]:
        end = deleted.get(begun["run"])
        if end is not None and begun["t"] > end["t"] + SLACK:
            yield Violation(11, f"call {begun['call']} was begun after its session was deleted", [end, begun])
    for acts in facts.acts.values():
        for act in acts:
            end = deleted.get(act["run"])
            if end is not None and act["t"] > end["t"] + SLACK and not _held(facts, act):
                after = act["t"] - end["t"]
                text = f"call {act['call']} acted {after:.1f} s after its session was deleted"
                yield Violation(11, text, [end, act])


def _held(facts: Facts, act: Record) -> bool:
    """Whether something held a tool that was about to act, until at most its timeout before it did."""
    for fault in facts["fault"]:
        hangs = fault["fault"] == "point" and "hang" in fault["detail"]
        if (fault["fault"] not in _HOLDS and not hangs) or fault["t"] > act["t"]:
            continue
        healed = [
            healed["t"]
            for healed in facts["healed"]
            if (healed["fault"], healed["target"]) == (fault["fault"], fault["target"])
            and healed["t"] >= fault["t"]
        ]
        if min(healed, default=act["t"]) + TIMEOUT + SLACK >= act["t"]:
            return True
    return False
