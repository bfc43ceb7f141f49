"""Each client's stream is a gap-free, duplicate-free prefix of the log (6), and errors stay away (10).

A stream that follows one run knows it when it is opened. One that was opened without a run, or as a
WebSocket, follows a session: run after run, each to its end. A client that follows a session may also write
down each run's part as a stream of its own, opened with that session's name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.chaos.model.history import Record
from tests.chaos.validate.facts import TERMINAL, Facts, Violation, same_entry, server_failed, too_early

# For so many seconds a fault explains what a client meets, counted from when it was undone if it was.
AFTERMATH = 5.0
# A crash at a point in the code is noted once the process is seen to be gone; clients may meet it sooner.
NOTICED = 2.0
# How long a replica that was told to stop may take to be gone, where nobody wrote down when it was.
STOPS_WITHIN = 10.0
_DRAIN = "drain"


@dataclass
class _Stream:
    """What a client knows of a stream."""

    opened: Record
    run: str | None
    cursor: int | None
    closed: bool = False
    last: Record | None = None

    @property
    def follows_session(self) -> bool:
        return self.opened["run"] is None or self.opened["via"] == "ws"


@dataclass
class _Client:
    """A client's streams, and how far it has each run."""

    streams: dict[str, _Stream] = field(default_factory=dict)
    have: dict[str, int] = field(default_factory=dict)
    followed: dict[str, _Stream] = field(default_factory=dict)


def check_streams(facts: Facts) -> Iterator[Violation]:
    """Invariant 6, stream by stream and over all streams of a client."""
    clients: dict[str, _Client] = {}
    for record in facts.history.records:
        kind = record["kind"]
        if kind not in ("open", "event", "closed"):
            continue
        client = clients.setdefault(record["client"], _Client())
        stream = client.streams.get(record["stream"])
        if kind == "open":
            yield from _opened(facts, client, record)
        elif stream is None or stream.closed:
            yield Violation(6, f"{kind} on stream {record['stream']}, which is not open", [record])
        elif kind == "event":
            yield from _received(facts, client, stream, record)
        else:
            stream.closed = True
            yield from _closed(facts, stream, record)
    if facts["end"]:
        for client in clients.values():
            for stream in client.streams.values():
                yield from _left_open(facts, stream)
    yield from _terminals(facts)


def _opened(facts: Facts, client: _Client, record: Record) -> Iterator[Violation]:
    run, after = record["run"], record["after"]
    if record["stream"] in client.streams:
        yield Violation(6, f"stream {record['stream']} was opened twice", [record])
    if run is not None:
        # Wherever a client begins is its own choice; from there on it must not be led past anything.
        have = client.have.setdefault(run, after or 0)
        if (after or 0) > have:
            text = f"{record['client']} goes on after {after} of run {run}, and had got as far as {have}"
            yield Violation(6, text, [record])
    # A session is followed from its cursor, from its beginning (0), or from wherever it stands (none).
    cursor = after if run is None and record["via"] == "ws" else after or 0
    stream = client.streams[record["stream"]] = _Stream(record, run, cursor)
    if record.get("session") is not None:
        before = client.followed.get(record["session"])
        if before is not None and before.run != run and not _follows(facts, before, run):
            text = f"{record['client']} goes from run {before.run} of its session to {run} out of order"
            yield Violation(6, text, [before.last or before.opened, record])
        client.followed[record["session"]] = stream


def _received(facts: Facts, client: _Client, stream: _Stream, event: Record) -> Iterator[Violation]:
    run, seq = event["run"], event["seq"]
    where = f"stream {event['stream']}"
    if stream.run is None:
        stream.run = run
        if stream.cursor is None:
            stream.cursor = seq - 1
    elif run != stream.run:
        yield from _next_run(facts, stream, event)
        stream.run, stream.cursor = run, 0
    cursor = stream.cursor or 0
    evidence = [event] if stream.last is None else [stream.last, event]
    if seq <= cursor:
        yield Violation(6, f"{where} has {seq} of run {run} again after {cursor}", evidence)
    elif seq > cursor + 1:
        yield Violation(6, f"{where} has a gap in run {run}: {seq} after {cursor}", evidence)
    logged = facts.entries.get((run, seq))
    if logged is None:
        yield Violation(6, f"{where} has {seq} of run {run}, which is not in the log", [event])
    elif not same_entry(logged, event):
        yield Violation(6, f"{where} has another {seq} of run {run} than the log", [logged, event])
    elif too_early(logged, event):
        yield Violation(6, f"{where} had {seq} of run {run} before it was committed", [logged, event])
    stream.last = event
    stream.cursor = max(cursor, seq)
    # What a client got in a row counts; after a gap, which was reported, it goes on from there.
    client.have[run] = max(client.have.get(run, 0), seq)


def _next_run(facts: Facts, stream: _Stream, event: Record) -> Iterator[Violation]:
    evidence = [event] if stream.last is None else [stream.last, event]
    if not stream.follows_session:
        text = f"stream {event['stream']} of run {stream.run} has an event of run {event['run']}"
        yield Violation(6, text, evidence)
    elif not _follows(facts, stream, event["run"]):
        text = f"stream {event['stream']} goes from run {stream.run} to {event['run']} out of order"
        yield Violation(6, text, evidence)


def _follows(facts: Facts, stream: _Stream, run: str | None) -> bool:
    """Whether a session goes on with a run after a stream of the one before."""
    before, after = facts.runs.get(stream.run or ""), facts.runs.get(run or "")
    return (
        before is not None
        and after is not None
        and before["session"] == after["session"]
        and before["ordinal"] + 1 == after["ordinal"]
        and stream.cursor == facts.last_seq(before["run"])
        and facts.over(before["run"])
    )


def _closed(facts: Facts, stream: _Stream, record: Record) -> Iterator[Violation]:
    # Who got something and says that nothing is left stopped waiting; an empty stream is told so.
    if record["reason"] != "terminal" and (record["reason"] != "none left" or stream.last is not None):
        return
    run = stream.run
    evidence = [record] if stream.last is None else [stream.last, record]
    if run is None or stream.cursor != facts.last_seq(run) or not facts.over(run):
        text = f"stream {record['stream']} ended as complete at {stream.cursor} of run {run}, the log did not"
        yield Violation(6, text, evidence)


def _left_open(facts: Facts, stream: _Stream) -> Iterator[Violation]:
    run = stream.run
    if stream.closed or run is None or stream.follows_session:
        return
    missing = facts.last_seq(run) - (stream.cursor or 0)
    if missing > 0:
        text = f"stream {stream.opened['stream']} is open at the end and lacks {missing} events of run {run}"
        yield Violation(6, text, [stream.opened])


def _terminals(facts: Facts) -> Iterator[Violation]:
    for run, entries in facts.log.items():
        ends = [entry for entry in entries if entry["type"] in TERMINAL]
        if len(ends) > 1:
            yield Violation(6, f"run {run} ends {len(ends)} times", ends)
        elif ends and ends[0] is not entries[-1]:
            yield Violation(6, f"run {run} goes on after its end", [ends[0], entries[-1]])


@dataclass(frozen=True)
class Drain:
    """A time in which a service is replaced and no client may notice.

    Attributes:
        begin: the record that begins it.
        what: the service or replica.
        until: Unix seconds.
        disturbed: whether a fault reaches into it, which may explain what a client meets.
    """

    begin: Record
    what: str
    until: float
    disturbed: bool


def drains(facts: Facts) -> list[Drain]:
    """Returns the drains of a history: of a whole service, or of one replica that was told to stop."""
    found: list[tuple[Record, str, float]] = []
    for begin in facts["drain"]:
        if begin["phase"] == "begin":
            ends = [
                end["t"]
                for end in facts["drain"]
                if end["phase"] == "end" and end["service"] == begin["service"] and end["t"] >= begin["t"]
            ]
            found.append((begin, begin["service"], min(ends, default=float("inf"))))
    for fault in facts["fault"]:
        if fault["fault"] == _DRAIN:
            found.append((fault, fault["target"], fault["t"] + STOPS_WITHIN))
    faults = list(_faults(facts))
    return [
        Drain(begin, what, until, any(start <= until and stop >= begin["t"] for start, stop in faults))
        for begin, what, until in found
    ]


def _faults(facts: Facts) -> Iterator[tuple[float, float]]:
    """Yields from when to when a fault explains what clients meet."""
    stopped: dict[str, float] = {}
    for fault in facts["fault"]:
        t = fault["t"]
        if fault["fault"] == _DRAIN:
            # One replica that stops is nothing; two of a service at once may leave nobody to go to.
            service = fault["target"].rpartition("-")[0]
            if t - stopped.get(service, float("-inf")) < STOPS_WITHIN:
                yield t, t + STOPS_WITHIN
            stopped[service] = t
            continue
        healed = [
            healed["t"]
            for healed in facts["healed"]
            if healed["fault"] == fault["fault"] and healed["target"] == fault["target"] and healed["t"] >= t
        ]
        yield t - NOTICED, min(healed, default=t) + AFTERMATH


def check_clients(facts: Facts) -> Iterator[Violation]:
    """Invariant 10: a drain shows clients no error; and what no client must ever see, none does."""
    for error in facts["error"]:
        yield Violation(
            10, f"a client saw what it must never see: {error['where']}: {error['detail']}", [error]
        )
    for refusal in facts["refused"]:
        if not refusal["reason"] or refusal["reason"] in ("INTERNAL", "DATA_CORRUPT"):
            text = f"a client was refused without a reason that it can use: {refusal['reason'] or 'none'}"
            yield Violation(10, text, [refusal])
    first = min((begin for begin, _ in _faults(facts)), default=float("inf"))
    between = drains(facts)
    for record in (*facts["closed"], *facts["refused"]):
        if record["reason"] != "broken" and not server_failed(record.get("status")):
            continue
        within = [drain for drain in between if drain.begin["t"] <= record["t"] <= drain.until]
        drain = next((drain for drain in within if not drain.disturbed), None)
        if drain is not None:
            text = f"{_what(record)} while {drain.what} was drained"
            yield Violation(10, text, [drain.begin, record])
        elif record["t"] < first:
            yield Violation(10, f"{_what(record)} before anything was broken", [record])


def _what(record: Record) -> str:
    if record["kind"] == "closed":
        return f"stream {record['stream']} of {record['client']} broke"
    return f"{record['client']} was refused ({record['reason']})"
