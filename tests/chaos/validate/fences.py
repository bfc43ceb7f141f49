"""Fences never decrease (2), and nothing is written under one that is over (3), in PostgreSQL or Redis.

`order` is taken from one sequence for grants and for tool calls, under the lock of the session's lease: so
that it says which of two came first.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from tests.chaos.model.history import Record
from tests.chaos.validate.facts import (
    BEGUN,
    RUNNING,
    TERMINAL,
    Facts,
    Violation,
    grouped,
    same_entry,
    too_early,
)

# What the store itself writes to a run that nobody holds.
_A_WORD = "action.resolved"
_UNHELD = frozenset({_A_WORD, "run.cancelled", "run.failed"})
_REDIS = ("redis", "valkey", "flush")


def check_fences(facts: Facts) -> Iterator[Violation]:
    """Invariant 2: the fences of a session never decrease."""
    for session, grants in facts.grants.items():
        yield from _rising(session, grants)
    for run, row in facts.runs.items():
        claims = facts.claims.get(run, [])
        if len(claims) != row["attempt"]:
            text = f"run {run} was claimed {row['attempt']} times, under {len(claims)} grants"
            yield Violation(2, text, [row, *claims])
    for entries in facts.log.values():
        yield from _entries_rise(entries)
    for session, rows in facts.sessions.items():
        yield from _runs_rise(facts, session, rows)
    for lease in facts["lease_row"]:
        granted = max((grant["fence"] for grant in facts.grants.get(lease["session"], [])), default=0)
        if lease["fence"] != granted:
            text = (
                f"the lease of session {lease['session']} has fence {lease['fence']}, granted was {granted}"
            )
            yield Violation(2, text, [lease])
    yield from _redis_rises(facts)


def _rising(session: str, grants: list[Record]) -> Iterator[Violation]:
    """Each grant adds one, so that a grant which was not recorded shows, too."""
    before: Record | None = None
    for grant in grants:
        fence = before["fence"] if before is not None else 0
        if grant["fence"] != fence + 1:
            text = f"fence {grant['fence']} of session {session} was granted after {fence}"
            yield Violation(2, text, [grant] if before is None else [before, grant])
        if grant["attach"] and (
            before is None
            or before["owner"] is None
            or before["run"] != grant["run"]
            or before["attach"] + 1 != grant["attach"]
        ):
            text = f"fence {grant['fence']} of session {session} re-attaches to what was not held"
            yield Violation(2, text, [grant] if before is None else [before, grant])
        before = grant


def _entries_rise(entries: list[Record]) -> Iterator[Violation]:
    for before, entry in pairwise(entries):
        if entry["fence"] < before["fence"]:
            text = (
                f"run {entry['run']} goes from fence {before['fence']} to {entry['fence']} at {entry['seq']}"
            )
            yield Violation(2, text, [before, entry])
    if entries[0]["seq"] == 1 and entries[0]["fence"]:
        yield Violation(2, f"run {entries[0]['run']} was submitted under a fence", entries[:1])


def _runs_rise(facts: Facts, session: str, rows: list[Record]) -> Iterator[Violation]:
    """Runs that were never claimed may end under any fence while they wait, and are left out."""
    before: Record | None = None
    for row in rows:
        fenced = [entry for entry in facts.log.get(row["run"], []) if entry["fence"]]
        if row["run"] not in facts.claims or not fenced:
            continue
        if before is not None and fenced[0]["fence"] <= before["fence"]:
            text = (
                f"run {row['run']} of session {session} begins under fence {fenced[0]['fence']}, "
                f"the run before it ended under {before['fence']}"
            )
            yield Violation(2, text, [before, fenced[0]])
        before = fenced[-1]


def _redis_rises(facts: Facts) -> Iterator[Violation]:
    """Redis may forget a fence, but only with its data."""
    losses = [
        fault["t"]
        for fault in facts["fault"]
        if any(word in f"{fault['fault']} {fault['target']}".lower() for word in _REDIS)
    ]
    for session, reads in grouped(facts["live_fence"], "session").items():
        for before, read in pairwise(reads):
            if read["fence"] < before["fence"] and not any(t <= read["t"] for t in losses):
                text = f"Redis had fence {before['fence']} of session {session}, and then {read['fence']}"
                yield Violation(2, text, [before, read])


def check_stale_writes(facts: Facts) -> Iterator[Violation]:
    """Invariant 3 in PostgreSQL: no write under a stale fence, or under one that is somebody else's."""
    by_fence = {
        (session, grant["fence"]): grant for session, grants in facts.grants.items() for grant in grants
    }
    grants_of = grouped(facts["grant"], "run")
    for run, entries in facts.log.items():
        yield from _overtaken(entries, grants_of.get(run, []))
        used = {entry["fence"] for entry in entries}
        for taken in grants_of.get(run, []):
            if taken["owner"] is None and taken["fence"] not in used:
                text = f"fence {taken['fence']} was taken from run {run}, and nothing written under it"
                yield Violation(3, text, [taken])
        for entry in entries:
            if entry["fence"]:
                grant = by_fence.get((entry["session"], entry["fence"]))
                yield from _under_a_grant(facts, entry, grant)
            elif entry["seq"] != 1:
                yield Violation(3, f"entry {entry['seq']} of run {run} was written without a lease", [entry])
    for grants in facts.grants.values():
        yield from _places(grants)
    for moves in facts.moves.values():
        for move in moves:
            if move["to"] == BEGUN:
                yield from _begun(facts, move)
    yield from _leases(facts)


def _overtaken(entries: list[Record], grants: list[Record]) -> Iterator[Violation]:
    """From a grant's next seq on, nothing older writes."""
    waiting = sorted(grants, key=lambda grant: grant["next_seq"], reverse=True)
    newest: Record | None = None
    for entry in entries:
        while waiting and waiting[-1]["next_seq"] <= entry["seq"]:
            grant = waiting.pop()
            if newest is None or grant["fence"] > newest["fence"]:
                newest = grant
        if newest is not None and entry["fence"] < newest["fence"]:
            text = (
                f"entry {entry['seq']} of run {entry['run']} was written under fence {entry['fence']}, "
                f"though {newest['fence']} was granted from {newest['next_seq']} on"
            )
            yield Violation(3, text, [newest, entry])


def _under_a_grant(facts: Facts, entry: Record, grant: Record | None) -> Iterator[Violation]:
    what = f"entry {entry['seq']} of run {entry['run']}"
    if grant is None:
        yield Violation(
            3, f"{what} was written under fence {entry['fence']}, which nobody was granted", [entry]
        )
    elif grant["run"] != entry["run"]:
        # Only a run that waits for its turn may end while the lease is another's.
        if entry["run"] in facts.claims or entry["type"] not in TERMINAL:
            yield Violation(3, f"{what} was written under the fence of run {grant['run']}", [grant, entry])
    elif grant["owner"] is None:
        if entry["type"] not in _UNHELD:
            yield Violation(3, f"{what} was written though nobody held the lease", [grant, entry])
    elif entry["type"] == _A_WORD:
        yield Violation(3, f"{what} is a person's word, and the run's owner wrote it", [grant, entry])
    elif entry["seq"] < grant["next_seq"]:
        text = f"{what} was written again: its fence was granted from {grant['next_seq']} on"
        yield Violation(3, text, [grant, entry])


def _places(grants: list[Record]) -> Iterator[Violation]:
    """A run's next seq only grows: else a seq that was written would be written again."""
    latest: dict[str, Record] = {}
    for grant in grants:
        before = latest.get(grant["run"])
        if before is not None and grant["next_seq"] < before["next_seq"]:
            text = f"run {grant['run']} was to go on at {before['next_seq']}, and then at {grant['next_seq']}"
            yield Violation(3, text, [before, grant])
        latest[grant["run"]] = grant


def _begun(facts: Facts, move: Record) -> Iterator[Violation]:
    """A call begins under a fence of the claim that holds the session at that moment."""
    row = facts.runs.get(move["run"])
    grants = facts.grants.get(row["session"], []) if row is not None else []
    current = None
    for grant in grants:
        if grant["order"] > move["order"]:
            break
        current = grant
    if (
        current is None
        or current["owner"] is None
        or current["run"] != move["run"]
        or not current["fence"] - current["attach"] <= move["fence"] <= current["fence"]
    ):
        text = f"call {move['call']} was begun under fence {move['fence']}, which was not the current one"
        yield Violation(3, text, [move] if current is None else [current, move])


def _leases(facts: Facts) -> Iterator[Violation]:
    leases = grouped(facts["lease_row"], "session")
    for session, rows in facts.sessions.items():
        if len(leases.get(session, [])) != 1:
            text = f"session {session} has {len(leases.get(session, []))} leases"
            yield Violation(3, text, leases.get(session, rows[:1]))
    for session, (lease, *_) in leases.items():
        run = lease["run"]
        if session in facts.grants and facts.grants[session][-1]["run"] != run:
            yield Violation(3, f"the lease of session {session} is not the last granted", [lease])
        if run is None:
            continue
        if lease["next_seq"] != facts.last_seq(run) + 1:
            place = lease["next_seq"]
            text = f"the lease of run {run} goes on at {place}, its log ends at {facts.last_seq(run)}"
            yield Violation(3, text, [lease])
        row = facts.runs.get(run)
        if lease["owner"] is not None and (row is None or row["status"] != RUNNING):
            text = f"{lease['owner']} holds the lease of run {run}, which is not running"
            yield Violation(3, text, [lease] if row is None else [lease, row])


def check_live_writes(facts: Facts) -> Iterator[Violation]:
    """Invariant 3 in Redis: its entries are the log's, its fences were granted."""
    for entry in facts["live"]:
        logged = facts.entries.get((entry["run"], entry["seq"]))
        if logged is not None and not same_entry(logged, entry):
            text = f"Redis has another entry {entry['seq']} of run {entry['run']} than the log"
            yield Violation(3, text, [logged, entry])
    leases = {lease["session"]: lease for lease in facts["lease_row"]}
    for read in facts["live_fence"]:
        session, fence = read["session"], read["fence"]
        lease = leases.get(session)
        if lease is None or fence > lease["fence"]:
            text = f"Redis has fence {fence} of session {session}, PostgreSQL none so high"
            yield Violation(3, text, [read] if lease is None else [lease, read])


def check_live_entries(facts: Facts) -> Iterator[Violation]:
    """Invariant 7: what Redis holds is in the log."""
    for entry in facts["live"]:
        logged = facts.entries.get((entry["run"], entry["seq"]))
        if logged is None:
            text = f"Redis has entry {entry['seq']} of run {entry['run']}, the log has not"
            yield Violation(7, text, [entry])
        elif not same_entry(logged, entry) or logged["session"] != entry["session"]:
            text = f"entry {entry['seq']} of run {entry['run']} in Redis is not the log's"
            yield Violation(7, text, [logged, entry])
        elif too_early(logged, entry):
            text = f"entry {entry['seq']} of run {entry['run']} was in Redis before it was committed"
            yield Violation(7, text, [logged, entry])
