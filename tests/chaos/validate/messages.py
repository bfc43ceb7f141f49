"""What was acknowledged is kept, once and in order (1); one Idempotency-Key makes one run (9)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, pairwise

from tests.chaos.model.history import Record
from tests.chaos.validate.facts import COMPLETED, Facts, Violation, for_good, grouped

_KEY_KNOWN = "REQUEST_ID_REUSED"


def check_messages(facts: Facts) -> Iterator[Violation]:
    """Invariant 1: an acknowledged message is in the log exactly once, in order."""
    if facts["submit"] and not facts["accepted"]:
        yield Violation(1, "nothing was acknowledged: this history proves nothing", facts["submit"][:1])
    yield from _acknowledged(facts)
    yield from _refused(facts)
    for run, rows in facts.run_rows.items():
        if len(rows) > 1:
            yield Violation(1, f"run {run} is there {len(rows)} times", rows)
        yield from _beginning(facts, rows[0])
        yield from _input(facts, rows[0])
        yield from _replies(facts, rows[0])
    for session, rows in facts.sessions.items():
        yield from _ordinals(session, rows)
        yield from _as_submitted(facts, rows)
    for session, messages in facts.messages.items():
        yield from _conversation(facts, session, messages)


def _acknowledged(facts: Facts) -> Iterator[Violation]:
    for key, answers in facts.accepted.items():
        for answer in answers:
            row = facts.runs.get(answer["run"])
            if row is None:
                yield Violation(
                    1, f"key {key} was acknowledged and its run {answer['run']} is lost", [answer]
                )
            elif row["session"] != answer["session"]:
                yield Violation(
                    1, f"key {key} was acknowledged in another session than its run's", [answer, row]
                )


def _refused(facts: Facts) -> Iterator[Violation]:
    """A no that does not ask to come again is one: nothing may come of it."""
    refusals = grouped(facts["refused"], "key")
    for row in facts["key_row"]:
        said = refusals.get(row["key"], [])
        if row["key"] in facts.accepted or len(said) != len(facts.submits.get(row["key"], [])):
            continue
        if said and all(_means_no(refusal) for refusal in said):
            yield Violation(
                1, f"key {row['key']} was refused for good and made run {row['run']}", [*said, row]
            )


def _means_no(refusal: Record) -> bool:
    return for_good(refusal["status"]) and not refusal["retryable"] and refusal["reason"] != _KEY_KNOWN


def _beginning(facts: Facts, row: Record) -> Iterator[Violation]:
    run = row["run"]
    created = [entry for entry in facts.log.get(run, []) if entry["type"] == "run.created"]
    if not created:
        yield Violation(1, f"the log of run {run} has no run.created", [row])
    elif len(created) > 1:
        yield Violation(1, f"run {run} was created {len(created)} times", created)
    elif created[0]["seq"] != 1:
        yield Violation(1, f"the log of run {run} does not begin with run.created", created)


def _input(facts: Facts, row: Record) -> Iterator[Violation]:
    """The input's place in the conversation is taken at the first claim, or at its turn if it ended before.

    Only a rollback that came before the claim leaves nothing of it.
    """
    run = row["run"]
    said = [message for message in facts.messages_of.get(run, []) if message["role"] == "user"]
    if len(said) > 1:
        yield Violation(1, f"the input of run {run} is in the conversation {len(said)} times", said)
    if not said and (row["attempt"] or (_had_its_turn(facts, row) and not _dropped(facts, row))):
        yield Violation(1, f"the input of run {run} is not in the conversation", [row])
    submits = [submit for key in facts.keys_of.get(run, []) for submit in facts.submits.get(key, [])]
    for message in said:
        if submits and message["digest"] not in {submit["digest"] for submit in submits}:
            yield Violation(1, f"the input of run {run} is not what was submitted", [*submits, message])


def _had_its_turn(facts: Facts, row: Record) -> bool:
    """Whether a run and all before it have ended."""
    return all(
        other["status"] >= COMPLETED
        for other in facts.sessions[row["session"]]
        if other["ordinal"] <= row["ordinal"]
    )


def _dropped(facts: Facts, row: Record) -> bool:
    return bool(row["cancel_requested"] and facts.came_with(row, "rollback"))


def _replies(facts: Facts, row: Record) -> Iterator[Violation]:
    """An assistant's message and its message.completed are one commit."""
    run = row["run"]
    kept = [message for message in facts.messages_of.get(run, []) if message["role"] == "assistant"]
    told = [entry for entry in facts.log.get(run, []) if entry["type"] == "message.completed"]
    if len(kept) != len(told):
        yield Violation(
            1, f"run {run} told of {len(told)} replies, the conversation has {len(kept)}", [*told, *kept]
        )


def _ordinals(session: str, rows: list[Record]) -> Iterator[Violation]:
    if [row["ordinal"] for row in rows] != list(range(1, len(rows) + 1)):
        yield Violation(1, f"the runs of session {session} are not numbered 1 to {len(rows)}", rows)


def _as_submitted(facts: Facts, rows: list[Record]) -> Iterator[Violation]:
    """What was first submitted after another input was acknowledged has its turn after it."""
    moments: list[tuple[float, int, Record, Record]] = []
    for row in rows:
        for key in facts.keys_of.get(row["run"], []):
            # At one time a submission comes first: nothing is claimed of what may have crossed.
            for submit in sorted(facts.submits.get(key, []), key=lambda record: record["t"])[:1]:
                moments.append((submit["t"], 0, row, submit))
            for answer in sorted(facts.accepted.get(key, []), key=lambda record: record["t"])[:1]:
                moments.append((answer["t"], 1, row, answer))
    latest: tuple[Record, Record] | None = None
    for _, is_answer, row, record in sorted(moments, key=lambda moment: moment[:2]):
        if is_answer:
            if latest is None or row["ordinal"] > latest[0]["ordinal"]:
                latest = row, record
        elif latest is not None and row["ordinal"] < latest[0]["ordinal"]:
            before = latest[0]["run"]
            text = f"run {row['run']} was submitted after {before} was acknowledged, and goes before it"
            yield Violation(1, text, [latest[1], record, latest[0], row])


def _conversation(facts: Facts, session: str, messages: list[Record]) -> Iterator[Violation]:
    kept = [message for message in messages if not message["rolled_back"]]
    gone = [message for message in messages if message["rolled_back"]]
    if [message["ordinal"] for message in kept] != list(range(1, len(kept) + 1)):
        yield Violation(1, f"the messages of session {session} are not numbered 1 to {len(kept)}", kept)
    for same in grouped(messages, "message").values():
        if len(same) > 1:
            yield Violation(1, f"message {same[0]['message']} is there {len(same)} times", same)
    known = []
    for message in messages:
        row = facts.runs.get(message["run"])
        if row is None or row["session"] != session:
            yield Violation(1, f"message {message['message']} is of no run of its session", [message])
        elif not message["rolled_back"]:
            known.append((row["ordinal"], message))
    for (before, first), (after, second) in pairwise(known):
        if before > after:
            yield Violation(
                1, f"the messages of session {session} are not in the order of its runs", [first, second]
            )
    for _, of in groupby(known, key=lambda pair: pair[0]):
        messages_of_run = [message for _, message in of]
        said = [message for message in messages_of_run if message["role"] == "user"]
        if said and said[0] is not messages_of_run[0]:
            yield Violation(
                1, f"the input of run {said[0]['run']} comes after its replies", messages_of_run[:2]
            )
    yield from _rolled_back(facts, kept, gone)


def _rolled_back(facts: Facts, kept: list[Record], gone: list[Record]) -> Iterator[Violation]:
    """A run's messages are dropped only by later input that wishes it, once it has ended, and all of them."""
    for run, of in grouped(gone, "run").items():
        rest = [message for message in kept if message["run"] == run]
        if rest:
            yield Violation(1, f"some messages of run {run} were rolled back and others not", [*of, *rest])
        row = facts.runs.get(run)
        if row is None:
            continue
        if row["status"] < COMPLETED:
            yield Violation(1, f"the messages of run {run} were rolled back before it ended", [*of, row])
        if not _dropped(facts, row):
            yield Violation(1, f"the messages of run {run} were rolled back, and nobody wished it", of)


def check_keys(facts: Facts) -> Iterator[Violation]:
    """Invariant 9: one Idempotency-Key gives one response."""
    rows = grouped(facts["key_row"], "key")
    for key, answers in facts.accepted.items():
        runs = {answer["run"] for answer in answers}
        if len(runs) > 1:
            yield Violation(9, f"key {key} was answered with {len(runs)} runs", answers)
        if key not in rows:
            yield Violation(9, f"key {key} was acknowledged, and PostgreSQL does not know it", answers)
        elif not runs & {row["run"] for row in rows[key]}:
            yield Violation(
                9, f"key {key} was answered with another run than it made", [*answers, *rows[key]]
            )
    for key, of in rows.items():
        if len(of) > 1:
            yield Violation(9, f"key {key} made {len(of)} runs", of)
        if key not in facts.submits:
            yield Violation(9, f"key {key} made a run, and nobody submitted it", of)
        for row in of:
            if row["run"] not in facts.runs:
                yield Violation(9, f"key {key} stands for run {row['run']}, which is not there", [row])
    for run, row in facts.runs.items():
        keys = facts.keys_of.get(run, [])
        if not keys:
            yield Violation(9, f"run {run} was made by no key", [row])
        elif len(keys) > 1:
            yield Violation(9, f"run {run} was given to {len(keys)} keys: {', '.join(sorted(keys))}", [row])
