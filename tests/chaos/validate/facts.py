"""What the checks look things up in: a history's records by what they speak of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tests.chaos.model.history import History, Record

# RunStatus
QUEUED, RUNNING, REQUIRES_ACTION, COMPLETED, FAILED, CANCELLED = range(1, 7)
# ToolCallState; a call that is being made comes from MADE.
MADE, INTENT, BEGUN, DONE, NOT_DONE, UNKNOWN = range(6)
# EffectClass
PURE, IDEMPOTENT, NON_IDEMPOTENT = range(1, 4)

TERMINAL = {"run.completed": COMPLETED, "run.failed": FAILED, "run.cancelled": CANCELLED}
EFFECTS = {"pure": PURE, "idempotent": IDEMPOTENT, "non_idempotent": NON_IDEMPOTENT}

# A trigger's time is that of its statement, a little before the commit that makes it true; whatever lies
# closer together than this (seconds) counts as at once.
SLACK = 0.1
# Times are written with microseconds; what differs by less than this (seconds) is as good as equal.
PRECISION = 0.001
# The status of a word that was given and is not answered yet.
ASKED = "asked"

_LATER_MAY_HELP = frozenset({408, 429, 499})
_FOR_GOOD = frozenset({"INVALID_ARGUMENT", "NOT_FOUND", "PERMISSION_DENIED", "FAILED_PRECONDITION"})
_SERVER_FAILED = frozenset({"UNKNOWN", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})


@dataclass(frozen=True)
class Violation:
    """An invariant that does not hold.

    Attributes:
        invariant: its number, 1 to 11.
        text: what is wrong, for a person.
        records: the records that show it.
    """

    invariant: int
    text: str
    records: list[Record]

    def __str__(self) -> str:
        return f"({self.invariant}) {self.text}"

    def as_json(self) -> dict[str, Any]:
        """Returns what a verdict keeps of it."""
        return {"invariant": self.invariant, "text": self.text, "records": self.records}


def for_good(status: int | str | None) -> bool:
    """Whether a status (HTTP's, or the name of gRPC's) says no and means it."""
    if isinstance(status, str):
        return status in _FOR_GOOD
    return status is not None and 400 <= status < 500 and status not in _LATER_MAY_HELP


def taken(status: int | str | None) -> bool:
    """Whether a wish was acknowledged: by HTTP's status, or `accepted` where only that is known."""
    return status == "accepted" or (isinstance(status, int) and 200 <= status < 300)


def server_failed(status: int | str | None) -> bool:
    """Whether a status (HTTP's, or the name of gRPC's) puts the blame on the mesh."""
    if isinstance(status, str):
        return status in _SERVER_FAILED
    return status is not None and status >= 500


def same_entry(logged: Record, seen: Record) -> bool:
    """Whether what was seen of an entry is what the log has; in Redis a large one has no data."""
    return bool(logged["type"] == seen["type"] and seen["digest"] in ("", logged["digest"]))


def too_early(logged: Record, seen: Record) -> bool:
    """Whether an entry was seen before it was committed, where it is known when that was."""
    committed = logged.get("committed")
    return committed is not None and seen["t"] < committed - PRECISION


def grouped(records: Iterable[Record], *names: str) -> dict[Any, list[Record]]:
    """Returns records by the value of a field, or by the values of several."""
    found: dict[Any, list[Record]] = defaultdict(list)
    if len(names) == 1:
        (name,) = names
        for record in records:
            found[record[name]].append(record)
    else:
        for record in records:
            found[tuple(record[name] for name in names)].append(record)
    return dict(found)


class Facts:
    """A history, indexed. Lists keep the order of the file unless another one is named."""

    def __init__(self, history: History) -> None:
        self.history = history

    def __getitem__(self, kind: str) -> list[Record]:
        return self.history[kind]

    # runs

    @cached_property
    def run_rows(self) -> dict[str, list[Record]]:
        """Rows of a run: one, if all is well."""
        return grouped(self["run_row"], "run")

    @cached_property
    def runs(self) -> dict[str, Record]:
        """A run's row."""
        return {run: rows[0] for run, rows in self.run_rows.items()}

    @cached_property
    def sessions(self) -> dict[str, list[Record]]:
        """A session's run rows by ordinal."""
        rows = grouped(self["run_row"], "session")
        return {session: sorted(of, key=lambda row: row["ordinal"]) for session, of in rows.items()}

    @cached_property
    def log(self) -> dict[str, list[Record]]:
        """A run's log entries by seq."""
        entries = grouped(self["log"], "run")
        for of in entries.values():
            of.sort(key=lambda entry: entry["seq"])
        return entries

    @cached_property
    def entries(self) -> dict[tuple[str, int], Record]:
        """The log entry at a run and seq."""
        return {(entry["run"], entry["seq"]): entry for entry in self["log"]}

    def last_seq(self, run: str) -> int:
        """The seq of a run's last log entry, 0 if it has none."""
        return self.log[run][-1]["seq"] if run in self.log else 0

    def over(self, run: str) -> bool:
        """Whether a run's log ends with a terminal event."""
        return run in self.log and self.log[run][-1]["type"] in TERMINAL

    @cached_property
    def deleted_runs(self) -> dict[str, Record]:
        """The answer that a run's session is deleted; a deletion that was never answered is the question."""
        return {record["run"]: record for record in (*self["delete"], *self["deleted"])}

    # leases

    @cached_property
    def grants(self) -> dict[str, list[Record]]:
        """A session's grants in their order."""
        grants = grouped(self["grant"], "session")
        return {session: sorted(of, key=lambda grant: grant["order"]) for session, of in grants.items()}

    @cached_property
    def claims(self) -> dict[str, list[Record]]:
        """The grants by which a run got an owner, re-attachments left out."""
        found: dict[str, list[Record]] = defaultdict(list)
        for of in self.grants.values():
            for grant in of:
                if grant["owner"] is not None and not grant["attach"]:
                    found[grant["run"]].append(grant)
        return dict(found)

    # submissions

    @cached_property
    def submits(self) -> dict[str, list[Record]]:
        """Attempts to submit a key."""
        return grouped(self["submit"], "key")

    @cached_property
    def accepted(self) -> dict[str, list[Record]]:
        """Acknowledgements of a key."""
        return grouped(self["accepted"], "key")

    @cached_property
    def keys_of(self) -> dict[str, list[str]]:
        """The keys that PostgreSQL or an acknowledgement say made a run."""
        found: dict[str, dict[str, None]] = defaultdict(dict)
        for record in (*self["key_row"], *self["accepted"]):
            found[record["run"]][record["key"]] = None
        return {run: list(keys) for run, keys in found.items()}

    def came_with(self, row: Record, *policies: str) -> list[Record]:
        """Returns the submissions with these policies whose runs came to a run's session after it."""
        return [
            submit
            for later in self.sessions[row["session"]]
            if later["ordinal"] > row["ordinal"]
            for key in self.keys_of.get(later["run"], [])
            for submit in self.submits.get(key, [])
            if submit["policy"] in policies
        ]

    @cached_property
    def messages(self) -> dict[str, list[Record]]:
        """A session's messages by ordinal."""
        rows = grouped(self["message"], "session")
        return {session: sorted(of, key=lambda row: row["ordinal"]) for session, of in rows.items()}

    @cached_property
    def messages_of(self) -> dict[str, list[Record]]:
        """A run's messages."""
        return grouped(self["message"], "run")

    # tool calls

    @cached_property
    def calls(self) -> dict[str, Record]:
        """A tool call's row."""
        return {row["call"]: row for row in self["call_row"]}

    @cached_property
    def moves(self) -> dict[str, list[Record]]:
        """A tool call's changes of state in their order."""
        moves = grouped(self["call"], "call")
        return {call: sorted(of, key=lambda move: move["order"]) for call, of in moves.items()}

    @cached_property
    def acts(self) -> dict[str, list[Record]]:
        """A tool call's side effects by time."""
        acts = grouped(self["act"], "call")
        return {call: sorted(of, key=lambda act: act["t"]) for call, of in acts.items()}

    @cached_property
    def words(self) -> dict[str, list[Record]]:
        """What persons said about a tool call: the last record of each word.

        A word is written down when it is given (`asked`) and again when it is answered. It counts unless all
        that is known of it is a refusal: a try before that may have been taken, its answer lost.
        """
        words: list[list[Record]] = []
        for records in grouped(self["resolve"], "call", "client", "decision").values():
            open_word = False
            for record in records:
                if open_word:
                    words[-1].append(record)
                else:
                    words.append([record])
                open_word = record["status"] == ASKED
        return grouped(
            (word[-1] for word in words if not all(for_good(said["status"]) for said in word)), "call"
        )

    def word(self, call: str, *decisions: str) -> list[Record]:
        """What persons said about a tool call, of these decisions."""
        return [word for word in self.words.get(call, []) if word["decision"] in decisions]

    def effect(self, call: str) -> int:
        """A call's effect class: the stricter of what the journal and the ledger say."""
        effects = [EFFECTS[act["effect"]] for act in self.acts.get(call, [])]
        if call in self.calls:
            effects.append(self.calls[call]["effect"])
        return max(effects, default=NON_IDEMPOTENT)
