"""What a chaos run records: one JSON object a line, appended as it happens and never changed.

Every record has `t` (Unix seconds, one machine's clock), `n` (its place in the file) and `kind`. A digest is
`digest(data)` of an event's `data` or a message's content. Kinds, by who writes them:

harness
    run         seed, plan (a list of texts), replicas: the episode begins
    fault       fault, target, detail: something was broken
    healed      fault, target: it was put right
    mark        text: anything a reader of the history may want to know
    end         settled (bool), seconds: the episode is over, and whether everything came to rest in time
    drain       service, phase ("begin" | "end"): no error may reach a client between the two

clients (every record has `client`)
    session     session, replay: a session was made
    submit      key, session, digest, policy, attempt: input is about to be sent, again if attempt > 1
    accepted    key, session, run, status, duplicate: the input was acknowledged and must not be lost
    refused     key, session, status, reason, retryable: a typed refusal; nothing was accepted yet
    open        stream, via ("sse" | "grpc" | "ws"), run, after, session?: a stream is asked for, from a
                cursor on; session is named by those who follow it run by run
    event       stream, run, seq, type, digest: an event was received
    closed      stream, reason ("terminal" | "reconnect" | "cut" | "broken" | "none left"): the stream is
                over; "cut" was our own doing, "broken" was not
    cancel      run, status: a cancel was asked for and answered
    resolve     run, call, decision, status: a person's word was given and answered
    error       where, detail: what a client must never see (a 500, a malformed answer, an untyped error)
    delete      session, run: a session of this client's alone is about to be deleted; run is its only one
    deleted     session, run: it was answered that it is
    after       session, run, what ("session" | "input" | "run" | "reader"), answer: what was asked of it
                afterwards, and the reason with which that was refused; "found", or "still open" for a
                reader, where it was not

the tool ledger (a process of its own that nothing kills)
    act         tool, effect ("pure" | "idempotent" | "non_idempotent"), call, key, run, pid: the side effect
                happened, before its tool was told so

the service side (PostgreSQL's own triggers, in the transaction that they tell of; one `order` for both)
    grant       order, session, run, fence, attach, next_seq, owner: a lease was taken, re-attached or
                revoked; its `next_seq` is the first seq that may be written under the fence
    call        order, call, run, from, to, fence: a tool call changed its state (0 = it was made)

Redis, read from outside now and then and at the end
    live        session, run, seq, type, digest: an entry of a live stream; the digest of one whose data was
                left out is ""
    live_fence  session, fence

PostgreSQL at the end, one record a row
    log         run, session, seq, type, digest, fence, reason?, call?, committed?: reason is that of a
                run.failed, call that of an action.*, committed when its transaction was
                (pg_xact_commit_timestamp), Unix seconds
    run_row     run, session, ordinal, status (1-6, RunStatus), last_seq, attempt, cancel_requested
    message     session, message, run, ordinal, role, digest, rolled_back
    lease_row   session, run, fence, next_seq, owner (or null)
    call_row    call, run, name, effect (1-3), state (1-5), key, fence
    key_row     key, run: an idempotency key and what it made
    begun       session, call, run: a tool call of a session that was deleted later was begun
    left        session, what, rows: how many rows of a table are of a session that was deleted
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

Record = dict[str, Any]


def digest(data: str) -> str:
    """Returns the short SHA-256 by which texts are compared."""
    return hashlib.sha256(data.encode()).hexdigest()[:16]


class Recorder:
    """Appends records to a file; one process, one event loop."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self._file: IO[str] = path.open("a", buffering=1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, kind: str, **fields: Any) -> None:
        """Appends one record."""
        self.count += 1
        record = {"t": round(time.time(), 6), "n": self.count, "kind": kind} | fields
        self._file.write(json.dumps(record, separators=(",", ":"), ensure_ascii=False) + "\n")


@dataclass
class History:
    """A recorded episode, its records by kind and in the order they were written."""

    records: list[Record]
    by_kind: dict[str, list[Record]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for record in self.records:
            self.by_kind.setdefault(record["kind"], []).append(record)

    def __getitem__(self, kind: str) -> list[Record]:
        return self.by_kind.get(kind, [])

    @classmethod
    def load(cls, *paths: Path) -> Self:
        """Reads one or more files; a last line that was cut off by a crash is left out."""
        return cls([record for path in paths for record in _lines(path)])

    @classmethod
    def of(cls, records: Iterable[Record]) -> Self:
        """Makes a history of records as tests write them, numbering those that have no place."""
        return cls([{"t": float(n), "n": n} | record for n, record in enumerate(records, start=1)])


def _lines(path: Path) -> Iterator[Record]:
    with path.open() as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)
