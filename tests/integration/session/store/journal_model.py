"""What the tool journal promises about one session, as plain Python: the journal machine's oracle."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from services.session.domain import (
    ActionDecision,
    AppendOutcome,
    BeginOutcome,
    ClaimOutcome,
    EffectClass,
    RunStatus,
    ToolCallState,
)
from tests.integration.session.store.model import Handle, Model, ModelRun

DONE = (ToolCallState.COMPLETED, ToolCallState.FAILED)
BECOMES = {
    ActionDecision.COMPLETED: ToolCallState.COMPLETED,
    ActionDecision.FAILED: ToolCallState.FAILED,
    ActionDecision.RETRY: ToolCallState.INTENT,
    ActionDecision.APPROVE: ToolCallState.INTENT,
    ActionDecision.DENY: ToolCallState.FAILED,
}

# Words that say what came of a call: said again, they change nothing.
OUTCOMES = (ActionDecision.COMPLETED, ActionDecision.FAILED, ActionDecision.DENY)

# A call as a caller sees it: state, fence, tries, content, and whether it needs approval.
View = tuple[ToolCallState, int, int, str, bool]


@dataclass
class ModelCall:
    """A call. `loud` is whether a try that was begun may still act, `unsaid` whether a person's word about it
    is not in the log yet.
    """

    call_id: str
    run: ModelRun
    effect: EffectClass
    needs_approval: bool
    state: ToolCallState = ToolCallState.INTENT
    fence: int = 0
    tries: int = 0
    content: str = ""
    loud: bool = False
    unsaid: bool = False

    @property
    def once(self) -> bool:
        return self.effect is EffectClass.NON_IDEMPOTENT

    @property
    def waits(self) -> bool:
        return self.state is ToolCallState.UNKNOWN or (
            self.state is ToolCallState.INTENT and self.needs_approval
        )

    @property
    def view(self) -> View:
        return (self.state, self.fence, self.tries, self.content, self.needs_approval)


@dataclass(frozen=True)
class Ticket:
    """A grant that somebody got, by what they know of it. `claim` counts the claims."""

    run_id: UUID
    fence: int
    owner: str
    claim: int


class JournalModel(Model):
    """One session's runs, one at a time, with their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, ModelCall] = {}
        # What was said under which request id: call, decision, content.
        self.words: dict[str, tuple[str, ActionDecision, str]] = {}

    def run(self, run_id: UUID) -> ModelRun:
        return next(run for run in self.runs if run.run_id == run_id)

    def handle(self, ticket: Ticket) -> Handle:
        return Handle(self.run(ticket.run_id), ticket.fence, ticket.owner)

    def of(self, run: ModelRun) -> list[ModelCall]:
        return [call for call in self.calls.values() if call.run is run]

    def intend(self, ticket: Ticket, seq: int, intents: list[tuple[str, EffectClass, bool]]) -> AppendOutcome:
        outcome = self.append(self.handle(ticket), seq, ["step.started"], [])
        if outcome is AppendOutcome.COMMITTED:
            run = self.run(ticket.run_id)
            self.calls.update({name: ModelCall(name, run, *rest) for name, *rest in intents})
        return outcome

    def begin(self, call_id: str, fence: int, loud: bool) -> tuple[BeginOutcome, View]:
        call = self.calls[call_id]
        current = self.owner and self.leased is call.run and self.fence - self.attach <= fence <= self.fence
        if not current:
            outcome = BeginOutcome.FENCED
        elif call.state in DONE:
            outcome = BeginOutcome.DONE
        elif call.state is ToolCallState.UNKNOWN or (call.once and call.state is ToolCallState.RUNNING):
            outcome = BeginOutcome.UNKNOWN
            call.state = ToolCallState.UNKNOWN
        elif call.needs_approval:
            outcome = BeginOutcome.NOT_APPROVED
        elif call.run.cancel:
            outcome = BeginOutcome.DONE
            before = " again. What came of the try before is not known." if call.tries else "."
            call.state, call.content = (
                ToolCallState.FAILED,
                f"The run was cancelled; the call was not begun{before}",
            )
        else:
            outcome = BeginOutcome.GO
            call.state, call.fence, call.tries = ToolCallState.RUNNING, fence, call.tries + 1
            call.loud |= loud
        return outcome, call.view

    def complete(self, call_id: str, fence: int, state: ToolCallState, content: str, tries: int) -> View:
        call = self.calls[call_id]
        if call.fence == fence:
            ran = call.state is ToolCallState.RUNNING and (not call.once or tries in (0, call.tries))
            to_run_again = call.state is ToolCallState.INTENT and 0 < tries == call.tries
            if ran or to_run_again:
                call.state, call.content = state, content
            else:
                self.reconcile(call_id, state, content, tries)
        return call.view

    def reconcile(self, call_id: str, state: ToolCallState, content: str, tries: int) -> View:
        call = self.calls[call_id]
        not_done = state is ToolCallState.INTENT
        counts = (tries == call.tries and not call.loud) if not_done else tries in (0, call.tries)
        if call.state is ToolCallState.UNKNOWN and counts:
            call.state, call.content = state, content
            if call.run.status is RunStatus.REQUIRES_ACTION:
                self._write_unheld(call.run, "action.resolved")
                self.requeue(call.run)
        return call.view

    def resolve_call(self, call_id: str, decision: ActionDecision, content: str, request_id: str) -> Any:
        """Returns the run's status and the call, or the reason why the word is refused."""
        call = self.calls[call_id]
        run = call.run
        approval = call.state is ToolCallState.INTENT and call.needs_approval
        waits = run.status is RunStatus.REQUIRES_ACTION
        state = BECOMES.get(decision, call.state)
        in_doubt = waits and call.state is ToolCallState.UNKNOWN
        if request_id in self.words:
            pass
        elif (approval and run.open) or (in_doubt and decision < ActionDecision.APPROVE):
            abandon = decision is ActionDecision.ABANDON
            call.needs_approval = approval and abandon
            call.state = state
            if state in DONE:
                call.content = content
            call.unsaid = not waits and not abandon
            if waits:
                self._write_unheld(run, "action.resolved")
            if abandon:
                self.cancel(run)
            else:
                self.requeue(run)
        elif decision not in OUTCOMES or call.state is not state or call.content != content:
            return "ACTION_NOT_REQUIRED"
        if request_id:
            self.words[request_id] = (call_id, decision, content)
        return run.status, call.view

    def requeue(self, run: ModelRun) -> None:
        if run.status is RunStatus.REQUIRES_ACTION and not any(call.waits for call in self.of(run)):
            run.status = RunStatus.QUEUED
            run.idle = 0

    def taken(self, run: ModelRun) -> None:
        if run.attempt > 0:
            self.say_resolved(run)
            self.doubt(run)

    def parked(self, run: ModelRun) -> None:
        self.doubt(run)
        self.say_resolved(run)
        if not run.cancel and self.of(run):
            self.requeue(run)

    def end(self, run: ModelRun, status: RunStatus) -> None:
        super().end(run, status)
        self.doubt(run)

    def doubt(self, run: ModelRun) -> None:
        """What was begun and must not run twice may have acted."""
        for call in self.of(run):
            if call.once and call.state is ToolCallState.RUNNING:
                call.state = ToolCallState.UNKNOWN

    def say_resolved(self, run: ModelRun) -> None:
        unsaid = [call for call in self.of(run) if call.unsaid]
        for number, call in enumerate(unsaid):
            call.unsaid = False
            if number == 0:
                self._write_unheld(run, "action.resolved")
            else:
                # All of them are one write.
                run.log.append("action.resolved")
                run.fences.append(self.fence)

    def snapshot(self) -> dict[str, Any]:
        """All of it that can be seen in the tables."""
        return {
            "fence": self.fence,
            "runs": [(run.run_id, run.status, run.log) for run in self.runs],
            "calls": {call.call_id: call.view for call in self.calls.values()},
            "pending": {
                call.call_id
                for call in self.calls.values()
                if call.waits and call.run.status is RunStatus.REQUIRES_ACTION
            },
        }


@dataclass
class Witness:
    """The rules of DESIGN's journal about the answers that callers got, one after the other. It knows nothing
    of how the store decides, and the model cannot talk it into anything.
    """

    go: Counter[str] = field(default_factory=Counter)
    again: Counter[str] = field(default_factory=Counter)
    over: set[str] = field(default_factory=set)
    unapproved: set[str] = field(default_factory=set)
    claim: int = 0
    holder: bool = False

    def claimed(self, outcome: ClaimOutcome) -> None:
        if outcome is ClaimOutcome.CLAIMED:
            self.claim += 1
            self.holder = True

    def begun(self, call_id: str, once: bool, ticket: Ticket, answer: tuple[BeginOutcome, View]) -> None:
        outcome, view = answer
        if outcome is BeginOutcome.GO:
            assert self.holder, "nobody holds the run"
            assert ticket.claim == self.claim, "a stale fence began a call"
            assert call_id not in self.over, "a call with an outcome was begun again"
            assert call_id not in self.unapproved, "nobody agreed"
            self.go[call_id] += 1
            if once:
                assert self.go[call_id] <= 1 + self.again[call_id], "it may have run and nobody said retry"
        self.saw(call_id, view)

    def saw(self, call_id: str, view: View) -> None:
        """A call's state as an answer had it: an outcome is never taken back."""
        if call_id in self.over:
            assert view[0] in DONE, "an outcome was taken back"
        if view[0] in DONE:
            self.over.add(call_id)

    def allowed(self, call_id: str, doubtful: bool, view: View) -> None:
        """Somebody said that a call may run: a person, or a look at what it did."""
        self.saw(call_id, view)
        if view[0] is ToolCallState.INTENT:
            self.unapproved.discard(call_id)
            self.again[call_id] += doubtful
