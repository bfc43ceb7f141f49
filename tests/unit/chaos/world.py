"""A tiny model of the mesh and its clients that writes the history they would leave behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from tests.chaos.model.history import History, Record, digest

EFFECTS = {"pure": 1, "idempotent": 2, "non_idempotent": 3}
ENDS = {"run.completed": 4, "run.failed": 5, "run.cancelled": 6}
SETTLED = {"completed": 3, "failed": 4}


@dataclass
class Call:
    name: str
    run: Run
    effect: str
    state: int = 0
    fence: int = 0
    needs_approval: bool = False
    asked: bool = False

    @property
    def waits(self) -> bool:
        return self.state == 5 or (self.state == 1 and self.needs_approval)


@dataclass
class Run:
    name: str
    session: Session
    ordinal: int
    key: str
    policy: str
    text: str
    status: int = 1
    attempt: int = 0
    cancel_requested: bool = False
    rollback: bool = False
    joined: bool = False
    log: list[Record] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    @property
    def last_seq(self) -> int:
        return len(self.log)

    @property
    def over(self) -> bool:
        return self.status >= 4

    @property
    def waiting(self) -> list[Call]:
        return [call for call in self.calls if call.waits]


@dataclass
class Session:
    name: str
    runs: list[Run] = field(default_factory=list)
    messages: list[Record] = field(default_factory=list)
    fence: int = 0
    attach: int = 0
    next_seq: int = 1
    owner: str | None = None
    run: Run | None = None

    @property
    def active(self) -> Run | None:
        return next((run for run in self.runs if not run.over), None)


@dataclass
class Stream:
    name: str
    client: str
    run: Run | None
    cursor: int
    session: Session | None = None


class World:
    """Each method does one thing to the mesh and writes the records that it leaves."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.sessions: list[Session] = []
        self.runs: list[Run] = []
        self.cursors: dict[tuple[str, str], int] = {}
        self.now = 1000.0
        self._order = count(1)
        self._names = count(1)

    def note(self, kind: str, **fields: Any) -> Record:
        self.now = round(self.now + 0.25, 6)
        record = {"t": self.now, "n": len(self.records) + 1, "kind": kind} | fields
        self.records.append(record)
        return record

    def name(self, kind: str) -> str:
        return f"{kind}-{next(self._names)}"

    # input

    def session(self, client: str = "ada") -> Session:
        session = Session(self.name("session"))
        self.sessions.append(session)
        self.note("session", client=client, session=session.name, replay=False)
        return session

    def submit(
        self, session: Session, client: str = "ada", *, policy: str = "enqueue", answered: bool = True
    ) -> Run:
        """Accepts input; the answer may get lost."""
        key, text = self.name("key"), self.name("text")
        self._submit(client, session, key, text, policy, 1)
        if policy in ("interrupt", "rollback"):
            for other in [run for run in reversed(session.runs) if not run.over]:
                other.cancel_requested = True
                other.rollback = other.rollback or policy == "rollback"
                if session.run is not other or session.owner is None:
                    self.unheld(other, "run.cancelled")
        run = Run(self.name("run"), session, len(session.runs) + 1, key, policy, text)
        session.runs.append(run)
        self.runs.append(run)
        self._log(run, "run.created", 0)
        if answered:
            self.accept(run, client)
        return run

    def accept(self, run: Run, client: str = "ada", *, duplicate: bool = False) -> None:
        self.note(
            "accepted",
            client=client,
            key=run.key,
            session=run.session.name,
            run=run.name,
            status=202,
            duplicate=duplicate,
        )

    def again(self, run: Run, client: str = "ada") -> None:
        """The same input with the same key."""
        self._submit(client, run.session, run.key, run.text, run.policy, 2)
        self.accept(run, client, duplicate=True)

    def lose(self, session: Session, client: str = "ada") -> None:
        """A submission that was cut off before it was accepted: only the client knows of it."""
        self._submit(client, session, self.name("key"), self.name("text"), "enqueue", 1)

    def refuse(
        self, session: Session, client: str = "ada", *, status: int = 503, reason: str = "SERVICE_UNAVAILABLE"
    ) -> str:
        key = self.name("key")
        self._submit(client, session, key, self.name("text"), "enqueue", 1)
        self.note(
            "refused",
            client=client,
            key=key,
            session=session.name,
            status=status,
            reason=reason,
            retryable=status >= 500,
        )
        return key

    def _submit(self, client: str, session: Session, key: str, text: str, policy: str, attempt: int) -> None:
        self.note(
            "submit",
            client=client,
            key=key,
            session=session.name,
            digest=digest(text),
            policy=policy,
            attempt=attempt,
        )

    # leases and the log

    def claim(self, run: Run, owner: str = "agent-1") -> None:
        """Takes the lease; the input joins the conversation at the first time."""
        session = run.session
        assert session.active is run
        assert run.status < 3
        session.run, session.owner, session.attach = run, owner, 0
        session.fence += 1
        session.next_seq = run.last_seq + 1
        self._grant(session)
        if not run.attempt:
            self._join(run)
        run.attempt += 1
        run.status = 2
        for call in run.calls:
            if call.state == 2 and call.effect == "non_idempotent" and run.attempt > 1:
                self.move(call, 5)
        self.append(run, "run.started")

    def reattach(self, run: Run) -> None:
        session = run.session
        assert session.run is run
        assert session.owner is not None
        session.fence += 1
        session.attach += 1
        self._grant(session)

    def append(self, run: Run, *types: str, call: str | None = None) -> None:
        for kind in types:
            assert run.session.run is run
            self._log(run, kind, run.session.fence, call)
            run.session.next_seq += 1

    def reply(self, run: Run, text: str | None = None) -> None:
        self.append(run, "step.started", "text.delta", "message.completed")
        self._message(run, "assistant", text or f"reply to {run.text}")

    def finish(self, run: Run, kind: str = "run.completed") -> None:
        """Ends a run that is held."""
        if kind == "run.completed":
            self.reply(run)
            self.append(run, "usage")
        self.append(run, kind)
        self._over(run, ENDS[kind])

    def whole(self, run: Run, owner: str = "agent-1") -> Run:
        """Runs from the claim to the end, without incident."""
        self.claim(run, owner)
        self.finish(run)
        return run

    def cancel(self, run: Run, client: str = "ada") -> None:
        self.note("cancel", client=client, run=run.name, status=202)
        if run.over:
            return
        run.cancel_requested = True
        if run.session.run is run and run.session.owner is not None:
            self.finish(run, "run.cancelled")
        else:
            self.unheld(run, "run.cancelled")

    def _over(self, run: Run, status: int) -> None:
        run.status = status
        session = run.session
        if session.run is run:
            session.owner = None
        if run.rollback:
            kept = [one for one in session.messages if one["run"] != run.name and not one["rolled_back"]]
            for one in session.messages:
                one["rolled_back"] = one["rolled_back"] or one["run"] == run.name
            assert [one["ordinal"] for one in kept] == list(range(1, len(kept) + 1))
            run.joined = True
        for ended in session.runs:
            if not ended.over:
                break
            if not ended.joined:
                self._join(ended)

    def _join(self, run: Run) -> None:
        self._message(run, "user", run.text)
        run.joined = True

    def unheld(self, run: Run, *types: str, call: str | None = None) -> None:
        session = run.session
        if session.run in (None, run) or session.run.over:
            session.run, session.owner, session.attach = run, None, 0
            session.fence += 1
            session.next_seq = run.last_seq + 1 + len(types)
            self._grant(session)
        for kind in types:
            self._log(run, kind, session.fence, call if kind.startswith("action.") else None)
            if kind in ENDS:
                self._over(run, ENDS[kind])

    def _grant(self, session: Session) -> None:
        assert session.run is not None
        self.note(
            "grant",
            order=next(self._order),
            session=session.name,
            run=session.run.name,
            fence=session.fence,
            attach=session.attach,
            next_seq=session.next_seq,
            owner=session.owner,
        )

    def _log(self, run: Run, kind: str, fence: int, call: str | None = None) -> None:
        seq = run.last_seq + 1
        run.log.append(
            ({"call": call} if call is not None else {})
            | {
                "run": run.name,
                "session": run.session.name,
                "seq": seq,
                "type": kind,
                "digest": digest(f"{run.name} {seq} {kind}"),
                "fence": fence,
            }
        )

    def _message(self, run: Run, role: str, text: str) -> None:
        session = run.session
        kept = sum(not one["rolled_back"] for one in session.messages)
        session.messages.append(
            {
                "session": session.name,
                "message": self.name("message"),
                "run": run.name,
                "ordinal": kept + 1,
                "role": role,
                "digest": digest(text),
                "rolled_back": False,
            }
        )

    # tools

    def call(self, run: Run, effect: str = "non_idempotent", *, approval: bool = False) -> Call:
        """The model asks for a call."""
        self.append(run, "step.started", "message.completed", "tool.call")
        self._message(run, "assistant", "")
        call = Call(f"{run.name}:{len(run.calls) + 1}:0", run, effect, needs_approval=approval)
        run.calls.append(call)
        self.move(call, 1)
        return call

    def move(self, call: Call, state: int) -> None:
        fields = {"from": call.state, "to": state}
        call.state = state
        self.note(
            "call",
            order=next(self._order),
            call=call.name,
            run=call.run.name,
            fence=call.fence,
            **fields,
        )

    def begin(self, call: Call) -> None:
        call.fence = call.run.session.fence
        self.move(call, 2)

    def act(self, call: Call) -> None:
        self.note(
            "act",
            tool=f"{call.effect}_tool",
            effect=call.effect,
            call=call.name,
            key=f"idem-{call.name}",
            run=call.run.name,
            pid=4711,
        )

    def complete(self, call: Call, state: int = 3) -> None:
        self.move(call, state)
        self.append(call.run, "tool.result")
        self._message(call.run, "tool", "")

    def tool(self, run: Run, effect: str = "non_idempotent") -> Call:
        """A call from its intent to its result, without incident."""
        call = self.call(run, effect)
        self.begin(call)
        self.act(call)
        self.complete(call)
        return call

    def ask(self, call: Call) -> None:
        """A person is asked, while the run goes on or because it does not."""
        self.append(call.run, "action.required", call=call.name)
        call.asked = True

    def park(self, run: Run) -> None:
        """The run waits for a person."""
        for call in run.calls:
            if call.state == 2:
                self.move(call, 5)
        assert run.waiting
        for call in run.waiting:
            if not call.asked:
                self.ask(call)
        run.status = 3
        run.session.owner = None

    def resolve(self, call: Call, decision: str, client: str = "ada", *, status: int | None = 200) -> None:
        run = call.run
        assert run.status == 3
        self.note("resolve", client=client, run=run.name, call=call.name, decision=decision, status=status)
        call.needs_approval = call.asked = False
        if decision in SETTLED:
            self.move(call, SETTLED[decision])
        elif decision == "retry" and call.state == 5:
            self.move(call, 1)
        if decision == "abandon":
            run.cancel_requested = True
            self.unheld(run, "action.resolved", "run.cancelled", call=call.name)
            return
        self.unheld(run, "action.resolved", call=call.name)
        if not run.waiting:
            run.status = 1

    # watching

    def open(
        self, run: Run | None, client: str = "ada", *, after: int | None = None, via: str = "sse"
    ) -> Stream:
        if after is None and run is not None:
            after = self.cursors.get((client, run.name), 0)
        stream = Stream(self.name("stream"), client, run, after or 0)
        self.note(
            "open",
            client=client,
            stream=stream.name,
            via=via,
            run=run.name if run is not None else None,
            after=after,
        )
        return stream

    def receive(self, stream: Stream, most: int = 1_000_000) -> None:
        run = stream.run
        assert run is not None
        for entry in run.log[stream.cursor : stream.cursor + most]:
            self.note(
                "event",
                client=stream.client,
                stream=stream.name,
                run=run.name,
                seq=entry["seq"],
                type=entry["type"],
                digest=entry["digest"],
            )
            stream.cursor = entry["seq"]
        key = stream.client, run.name
        self.cursors[key] = max(self.cursors.get(key, 0), stream.cursor)

    def close(self, stream: Stream, reason: str = "terminal") -> None:
        self.note("closed", client=stream.client, stream=stream.name, reason=reason)

    def watch(self, run: Run, client: str = "ada") -> Stream:
        """Reads a finished run from its beginning to its end."""
        stream = self.open(run, client, after=0)
        self.receive(stream)
        self.close(stream)
        return stream

    # what is broken, and what is seen from outside

    def fault(self, fault: str = "kill", target: str = "agent-1", detail: str = "") -> None:
        self.note("fault", fault=fault, target=target, detail=detail)

    def healed(self, fault: str = "kill", target: str = "agent-1") -> None:
        self.note("healed", fault=fault, target=target)

    @contextmanager
    def drain(self, service: str = "agent") -> Iterator[None]:
        self.note("drain", service=service, phase="begin")
        yield
        self.note("drain", service=service, phase="end")

    def live(self, run: Run, first: int = 1) -> None:
        """Redis is read."""
        for entry in run.log[first - 1 :]:
            self.note("live", **{key: value for key, value in entry.items() if key not in ("fence", "call")})
        self.note("live_fence", session=run.session.name, fence=run.session.fence)

    def end(self) -> None:
        """The episode is over, and PostgreSQL is read."""
        self.note("end", settled=True, seconds=12.5)
        for run in self.runs:
            for entry in run.log:
                self.note("log", **entry)
            self.note(
                "run_row",
                run=run.name,
                session=run.session.name,
                ordinal=run.ordinal,
                status=run.status,
                last_seq=run.last_seq,
                attempt=run.attempt,
                cancel_requested=run.cancel_requested,
            )
            self.note("key_row", key=run.key, run=run.name)
            for call in run.calls:
                self.note(
                    "call_row",
                    call=call.name,
                    run=run.name,
                    name=f"{call.effect}_tool",
                    effect=EFFECTS[call.effect],
                    state=call.state,
                    key=f"idem-{call.name}",
                    fence=call.fence,
                )
        for session in self.sessions:
            for message in session.messages:
                self.note("message", **message)
            self.note(
                "lease_row",
                session=session.name,
                run=session.run.name if session.run is not None else None,
                fence=session.fence,
                next_seq=session.next_seq,
                owner=session.owner,
            )

    def history(self) -> History:
        if not any(record["kind"] == "end" for record in self.records):
            self.end()
        return History(self.records)
