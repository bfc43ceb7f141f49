"""Every run ends, or says that it needs action, within the bound (8)."""

from __future__ import annotations

from collections.abc import Iterator

from tests.chaos.model.history import Record
from tests.chaos.validate.facts import (
    BEGUN,
    CANCELLED,
    INTENT,
    NON_IDEMPOTENT,
    REQUIRES_ACTION,
    TERMINAL,
    UNKNOWN,
    Facts,
    Violation,
    for_good,
    grouped,
)

# Reasons for which no fault is an excuse.
_BUGS = frozenset({"INTERNAL", "DATA_CORRUPT", "UNIMPLEMENTED"})


def check_runs(facts: Facts) -> Iterator[Violation]:
    """Invariant 8, with the state that PostgreSQL has of each run."""
    yield from _end(facts)
    for run, entries in facts.log.items():
        yield from _whole(facts, run, entries)
    calls = grouped(facts["call_row"], "run")
    cancels = grouped(facts["cancel"], "run")
    for run, row in facts.runs.items():
        if row["status"] < REQUIRES_ACTION:
            text = f"run {run} is {'running' if row['status'] == 2 else 'queued'} at the end"
            yield Violation(8, text, [row])
            continue
        if row["last_seq"] != facts.last_seq(run):
            text = f"run {run} is said to end at {row['last_seq']}, its log ends at {facts.last_seq(run)}"
            yield Violation(8, text, [row, *facts.log.get(run, [])[-1:]])
        if row["status"] == REQUIRES_ACTION:
            yield from _waits(facts, row, calls.get(run, []))
        else:
            yield from _ended(facts, row)
        if row["status"] == CANCELLED:
            yield from _wished(facts, row, cancels.get(run, []), calls.get(run, []))


def _end(facts: Facts) -> Iterator[Violation]:
    ends = facts["end"]
    if len(ends) != 1:
        yield Violation(8, f"the episode ended {len(ends)} times", ends or facts.history.records[-1:])
    for end in ends:
        if not end["settled"]:
            yield Violation(8, f"not everything came to rest within {end['seconds']} s", [end])


def _whole(facts: Facts, run: str, entries: list[Record]) -> Iterator[Violation]:
    row = facts.runs.get(run)
    if row is None:
        yield Violation(8, f"the log knows run {run}, of which there is no row", entries[:1])
    else:
        foreign = [entry for entry in entries if entry["session"] != row["session"]]
        if foreign:
            yield Violation(8, f"entries of run {run} are of another session", [row, *foreign])
    expected = 1
    for entry in entries:
        if entry["seq"] != expected:
            text = f"the log of run {run} has {entry['seq']} where {expected} was to come"
            yield Violation(8, text, [entry])
        expected = entry["seq"] + 1


def _waits(facts: Facts, row: Record, calls: list[Record]) -> Iterator[Violation]:
    """Whoever waits for a person says for what, has nothing under way, and is not to be cancelled."""
    run = row["run"]
    if not any(call["state"] in (INTENT, UNKNOWN) for call in calls):
        yield Violation(8, f"run {run} waits for a person, and no call of it does", [row, *calls])
    for call in calls:
        # One that may run again does so when the run goes on.
        if call["state"] == BEGUN and facts.effect(call["call"]) == NON_IDEMPOTENT:
            yield Violation(8, f"run {run} waits for a person while {call['call']} is under way", [row, call])
    unasked = _unasked(facts.log.get(run, []), [call for call in calls if call["state"] in (INTENT, UNKNOWN)])
    if unasked:
        yield Violation(8, f"run {run} waits for a person and does not say so", [row, *unasked])
    if row["cancel_requested"]:
        yield Violation(8, f"run {run} waits for a person although it was cancelled", [row])


def _unasked(entries: list[Record], calls: list[Record]) -> list[Record]:
    """Returns calls that wait although nobody was asked about them since they were decided last.

    A run may ask about a call long before it waits, and wait for the rest once one is decided. An intent that
    needs no approval cannot be told from one that does: it is enough that somebody was asked about one call.
    Where entries do not say which call they are about, more questions than answers must be there.
    """
    asked: dict[str | None, bool] = {}
    balance = 0
    for entry in entries:
        if entry["type"] in ("action.required", "action.resolved"):
            asked[entry.get("call")] = entry["type"] == "action.required"
            balance += 1 if entry["type"] == "action.required" else -1
    if None in asked or not asked:
        return [] if balance > 0 else calls
    unasked = [call for call in calls if not asked.get(call["call"])]
    unknown = [call for call in unasked if call["state"] == UNKNOWN]
    return unknown or (calls if len(unasked) == len(calls) else [])


def _ended(facts: Facts, row: Record) -> Iterator[Violation]:
    run = row["run"]
    last = facts.log[run][-1] if run in facts.log else None
    if last is None or TERMINAL.get(last["type"]) != row["status"]:
        text = f"run {run} has status {row['status']}, its log ends with {last and last['type']}"
        yield Violation(8, text, [row] if last is None else [row, last])
    if last is not None and last.get("reason") in _BUGS:
        yield Violation(8, f"run {run} failed for the reason {last['reason']}", [row, last])


def _wished(facts: Facts, row: Record, cancels: list[Record], calls: list[Record]) -> Iterator[Violation]:
    """No run is cancelled by itself: somebody asked, gave up a call of it, or sent input that interrupts."""
    run = row["run"]
    if not row["cancel_requested"]:
        yield Violation(8, f"run {run} was cancelled, and no cancel is noted", [row])
    asked = any(not for_good(cancel["status"]) for cancel in cancels)
    abandoned = any(facts.word(call["call"], "abandon") for call in calls)
    if not (asked or abandoned or facts.came_with(row, "interrupt", "rollback")):
        yield Violation(8, f"run {run} was cancelled, and nobody asked for it", [row])
