"""A call that must not act twice does not (4); one that may uses one key (5). The ledger is the witness."""

from __future__ import annotations

from collections.abc import Iterator

from tests.chaos.model.history import Record
from tests.chaos.traffic.tools import TIMEOUT
from tests.chaos.validate.facts import (
    BEGUN,
    COMPLETED,
    DONE,
    IDEMPOTENT,
    INTENT,
    MADE,
    NON_IDEMPOTENT,
    NOT_DONE,
    SLACK,
    UNKNOWN,
    Facts,
    Violation,
    grouped,
    taken,
)

_NAMES = ("made", "intent", "running", "completed", "failed", "unknown")
_ALLOWED = frozenset(
    {
        (MADE, INTENT),
        (INTENT, BEGUN),
        # On a person's word about a call that asked for approval, or a late one of the tool itself.
        (INTENT, DONE),
        (INTENT, NOT_DONE),
        (BEGUN, DONE),
        (BEGUN, NOT_DONE),
        (BEGUN, UNKNOWN),
        (UNKNOWN, DONE),
        (UNKNOWN, NOT_DONE),
        # To run again: a person's word, or a look outside that found nothing done.
        (UNKNOWN, INTENT),
    }
)


def check_calls(facts: Facts) -> Iterator[Violation]:
    """Invariant 4: a side effect is never silently repeated, and the journal tells the truth of it."""
    acting = {act["tool"] for act in facts["act"]}
    for call in sorted({*facts.calls, *facts.moves, *facts.acts}):
        row = facts.calls.get(call)
        if row is None:
            acts = facts.acts.get(call, [])
            if acts and all(act["run"] in facts.deleted_runs for act in acts):
                # Its journal went with its session; `check_deletions` judges when it acted.
                if len(acts) > 1 and facts.effect(call) == NON_IDEMPOTENT and not facts.word(call, "retry"):
                    text = f"call {call} of a session that was deleted acted {len(acts)} times"
                    yield Violation(4, text, acts)
                continue
            records = [*facts.moves.get(call, []), *facts.acts.get(call, [])]
            yield Violation(4, f"call {call} is not in the journal", records)
            continue
        yield from _moves(facts, row)
        yield from _acts_begun(facts, row)
        if facts.effect(call) == NON_IDEMPOTENT:
            yield from _at_most_once(facts, row)
            yield from _not_after_settled(facts, row)
            yield from _not_denied(facts, row)
        yield from _produced(facts, row, acting)
        yield from _kept_word(facts, row)
        run = facts.runs.get(row["run"])
        if run is not None and run["status"] == COMPLETED and row["state"] not in (DONE, NOT_DONE):
            text = f"run {row['run']} is complete, its call {call} is {_NAMES[row['state']]}"
            yield Violation(4, text, [run, row])


def repeated(facts: Facts, call: str) -> int:
    """Returns how many acts of a call are more than it may have.

    Each word of a person that led to another try allows one more.
    """
    if facts.effect(call) != NON_IDEMPOTENT:
        return 0
    return max(0, len(facts.acts.get(call, [])) - 1 - _retries(facts, call))


def _retries(facts: Facts, call: str) -> int:
    again = [move for move in facts.moves.get(call, []) if (move["from"], move["to"]) == (UNKNOWN, INTENT)]
    return min(len(again), len(facts.word(call, "retry")))


def _moves(facts: Facts, row: Record) -> Iterator[Violation]:
    call, state = row["call"], MADE
    moves = facts.moves.get(call, [])
    begun: Record | None = None
    for move in moves:
        step = (move["from"], move["to"])
        if move["from"] != state:
            text = (
                f"call {call} was {_NAMES[state]} and then went from {_NAMES[step[0]]} to {_NAMES[step[1]]}"
            )
            yield Violation(4, text, [move])
        elif step == (BEGUN, BEGUN):
            if facts.effect(call) == NON_IDEMPOTENT and begun is not None and begun["fence"] != move["fence"]:
                yield Violation(4, f"call {call} was begun again while it ran", [begun, move])
        elif step[0] != step[1] and step not in _ALLOWED:
            text = f"call {call} went from {_NAMES[step[0]]} to {_NAMES[step[1]]}"
            yield Violation(4, text, [move])
        if move["to"] == BEGUN:
            begun = move
        state = move["to"]
    if state != row["state"]:
        text = f"call {call} went as far as {_NAMES[state]} and is {_NAMES[row['state']]}"
        yield Violation(4, text, [*moves[-1:], row])


def _begins(facts: Facts, call: str) -> list[Record]:
    return [move for move in facts.moves.get(call, []) if move["to"] == BEGUN]


def _acts_begun(facts: Facts, row: Record) -> Iterator[Violation]:
    """Nothing acts before the journal has said so, and nothing acts for another run."""
    call = row["call"]
    acts, begins = facts.acts.get(call, []), _begins(facts, call)
    foreign = [act for act in acts if act["run"] != row["run"]]
    if foreign:
        yield Violation(4, f"call {call} acted for another run", [row, *foreign])
    early = [act for act in acts if not begins or act["t"] < begins[0]["t"] - SLACK]
    if early:
        yield Violation(4, f"call {call} acted before it was begun", [*early, *begins[:1]])


def _at_most_once(facts: Facts, row: Record) -> Iterator[Violation]:
    call = row["call"]
    acts = facts.acts.get(call, [])
    more = repeated(facts, call)
    if more:
        text = f"call {call} acted {len(acts)} times, {more} more than it may"
        yield Violation(4, text, [*acts, *facts.word(call, "retry")])
    # A re-run while running is not always a change of state, so that only going to it counts.
    starts = [move for move in _begins(facts, call) if move["from"] != BEGUN]
    if len(acts) > len(starts) > 0:
        text = f"call {call} acted {len(acts)} times and was begun {len(starts)} times"
        yield Violation(4, text, [*starts, *acts])
    blind = [
        move
        for move in facts.moves.get(call, [])
        if (move["from"], move["to"]) == (UNKNOWN, INTENT) and acts and acts[0]["t"] < move["t"] - SLACK
    ]
    words = facts.word(call, "retry")
    if len(blind) > len(words):
        text = f"call {call} had acted and was to run again {len(blind)} times, on {len(words)} words"
        yield Violation(4, text, [*acts, *blind, *words])


def _not_after_settled(facts: Facts, row: Record) -> Iterator[Violation]:
    """A person may speak while a try that was begun still acts: they are told for how long it may."""
    call = row["call"]
    begins = _begins(facts, call)
    for move in facts.moves.get(call, []):
        if move["to"] in (DONE, NOT_DONE):
            acting = begins[-1]["t"] + TIMEOUT if begins and facts.word(call, "completed", "failed") else 0.0
            late = [act for act in facts.acts.get(call, []) if act["t"] > max(move["t"], acting) + SLACK]
            if late:
                text = f"call {call} acted after it was settled as {_NAMES[move['to']]}"
                yield Violation(4, text, [move, *late])


def _not_denied(facts: Facts, row: Record) -> Iterator[Violation]:
    """A model that reads `failed` tries again with a new call: that is a repetition, too."""
    call = row["call"]
    if row["state"] != NOT_DONE or facts.word(call, "failed", "deny"):
        return
    begins = _begins(facts, call)
    done = [act for act in facts.acts.get(call, []) if begins and act["t"] >= begins[-1]["t"]]
    if done:
        yield Violation(4, f"call {call} acted and is told to have failed", [*done, row])


def _produced(facts: Facts, row: Record, acting: set[str]) -> Iterator[Violation]:
    """What is completed was done, or a person said so."""
    call = row["call"]
    acts = row["effect"] != 1 or row["name"] in acting
    if row["state"] == DONE and acts and call not in facts.acts and not facts.word(call, "completed"):
        yield Violation(4, f"call {call} is completed, and nothing acted", [*facts.moves.get(call, []), row])


def _kept_word(facts: Facts, row: Record) -> Iterator[Violation]:
    """A person's word that was taken stays."""
    for decisions, state in ((("completed",), DONE), (("failed", "deny"), NOT_DONE)):
        for word in facts.word(row["call"], *decisions):
            if taken(word["status"]) and row["state"] != state:
                text = f"call {row['call']} was settled as {word['decision']} and is {_NAMES[row['state']]}"
                yield Violation(4, text, [word, row])


def check_idempotency(facts: Facts) -> Iterator[Violation]:
    """Invariant 5: every try of an idempotent call uses one key, and no other call uses it."""
    for call, acts in facts.acts.items():
        if facts.effect(call) != IDEMPOTENT:
            continue
        row = facts.calls.get(call)
        keys = {act["key"] for act in acts} | ({row["key"]} if row is not None else set())
        if len(keys) > 1 or not all(keys):
            names = ", ".join(sorted(str(key) for key in keys))
            text = f"call {call} used {len(keys)} keys ({names}) in place of one"
            yield Violation(5, text, acts if row is None else [*acts, row])
    for key, records in grouped([*facts["act"], *facts["call_row"]], "key").items():
        calls = {record["call"] for record in records}
        if key and len(calls) > 1:
            yield Violation(5, f"key {key} is that of {len(calls)} calls", records)
