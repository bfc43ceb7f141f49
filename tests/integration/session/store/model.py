"""What the store promises about one session, as plain Python: the state machine's oracle."""

from __future__ import annotations

from dataclasses import dataclass, field
from uuid import UUID

from services.session.domain import AppendOutcome, ClaimOutcome, ConcurrencyPolicy, RunStatus
from services.session.store.postgres_runs import MAX_IDLE_CLAIMS

PREAMBLE = {"run.created", "run.started", "step.started", "attempt.reset"}
TEXT = {"text.delta", "reasoning.delta"}


@dataclass
class ModelRun:
    """A run: its log as event types, beside the fences they were written under."""

    run_id: UUID
    text: str
    status: RunStatus = RunStatus.QUEUED
    log: list[str] = field(default_factory=lambda: ["run.created"])
    fences: list[int] = field(default_factory=lambda: [0])
    attempt: int = 0
    idle: int = 0
    claim_seq: int = 1
    cancel: bool = False
    rollback: bool = False
    late: bool = False
    # Whether its input is in the conversation, or was dropped.
    joined: bool = False
    parked_on: str = ""

    @property
    def open(self) -> bool:
        return not self.status.terminal

    @property
    def next_seq(self) -> int:
        return len(self.log) + 1

    @property
    def clock_runs(self) -> bool:
        return self.attempt > 0 and self.status is not RunStatus.REQUIRES_ACTION


@dataclass
class Handle:
    """A grant that somebody holds, or believes to hold."""

    run: ModelRun
    fence: int
    owner: str


class Model:
    """One session: its runs, its lease and its conversation."""

    def __init__(self) -> None:
        self.default = ConcurrencyPolicy.ENQUEUE
        self.runs: list[ModelRun] = []
        self.messages: list[tuple[UUID, str]] = []
        self.fence = 0
        self.attach = 0
        self.leased: ModelRun | None = None
        self.owner: str | None = None
        self.expired = False

    @property
    def live(self) -> bool:
        return self.owner is not None and not self.expired

    @property
    def head(self) -> ModelRun | None:
        return next((run for run in self.runs if run.open), None)

    def held(self, run: ModelRun) -> bool:
        return self.live and self.leased is run

    def submit(self, run_id: UUID, text: str, policy: ConcurrencyPolicy) -> ModelRun | None:
        """Returns the new run; None if it is refused."""
        policy = policy or self.default
        unfinished = [run for run in self.runs if run.open]
        if unfinished and policy is ConcurrencyPolicy.REJECT:
            return None
        if policy in (ConcurrencyPolicy.INTERRUPT, ConcurrencyPolicy.ROLLBACK):
            for run in reversed(unfinished):
                run.cancel = True
                run.rollback |= policy is ConcurrencyPolicy.ROLLBACK
                if not self.held(run):
                    self.end_unheld(run, RunStatus.CANCELLED)
        run = ModelRun(run_id, text)
        self.runs.append(run)
        return run

    def claim(self, run: ModelRun, owner: str) -> ClaimOutcome:
        if not run.open:
            return ClaimOutcome.FINISHED
        if run.status is RunStatus.REQUIRES_ACTION:
            return ClaimOutcome.REQUIRES_ACTION
        again = self.live and self.leased is run and self.owner == owner
        if (self.live and not again) or self.head is not run:
            return ClaimOutcome.ALREADY_CLAIMED
        if self.end_if_due(run):
            return ClaimOutcome.FINISHED
        wrote = set(run.log[run.claim_seq - 1 :])
        if wrote - PREAMBLE - TEXT or (wrote & TEXT and "attempt.reset" not in wrote):
            run.idle = 0
        if run.idle >= MAX_IDLE_CLAIMS and not again:
            self.end_unheld(run, RunStatus.FAILED)
            return ClaimOutcome.FINISHED
        if run.attempt == 0:
            self.messages.append((run.run_id, run.text))
            run.joined = True
        self.taken(run)
        run.status = RunStatus.RUNNING
        run.attempt += 1
        run.idle += not again
        run.claim_seq = run.next_seq
        self.fence += 1
        self.attach = 0
        self.leased, self.owner, self.expired = run, owner, False
        return ClaimOutcome.CLAIMED

    def end_if_due(self, run: ModelRun) -> bool:
        if run.cancel:
            self.end_unheld(run, RunStatus.CANCELLED)
        elif run.late and run.clock_runs:
            self.end_unheld(run, RunStatus.FAILED)
        return not run.open

    def end_orphans(self) -> None:
        if not self.live and self.head is not None and self.head.clock_runs:
            self.end_if_due(self.head)

    def append(
        self,
        handle: Handle,
        first_seq: int,
        kinds: list[str],
        texts: list[str],
        status: RunStatus | None = None,
    ) -> AppendOutcome:
        run = handle.run
        if self.leased is run and self.fence == handle.fence and run.next_seq == first_seq and self.owner:
            run.log += kinds
            run.fences += [handle.fence] * len(kinds)
            self.messages += [(run.run_id, text) for text in texts]
            if status is RunStatus.REQUIRES_ACTION:
                run.status = status
                self.owner = None
                self.parked(run)
                if run.cancel:
                    self.end_unheld(run, RunStatus.CANCELLED)
            elif status is not None:
                self.end(run, status)
            return AppendOutcome.COMMITTED
        if self.leased is run and self.fence == handle.fence and run.next_seq != first_seq:
            return AppendOutcome.GAP
        last = first_seq + len(kinds) - 1
        if not run.open and len(run.log) == last and run.fences[last - 1] == handle.fence:
            return AppendOutcome.GAP
        return AppendOutcome.FENCED

    def reattach(self, handle: Handle, owner: str) -> bool:
        if self.leased is not handle.run or self.owner is None:
            return False
        if handle.fence != self.fence and (self.owner != owner or handle.fence > self.fence):
            return False
        self.fence += 1
        self.attach += 1
        self.owner, self.expired = owner, False
        return True

    def holds(self, handle: Handle) -> bool:
        return self.leased is handle.run and self.fence == handle.fence and self.owner is not None

    def cancel(self, run: ModelRun) -> bool:
        """Returns True if the run is ended here."""
        if not run.open:
            return False
        run.cancel = True
        if self.held(run):
            return False
        self.end_unheld(run, RunStatus.CANCELLED)
        return True

    def release(self, handle: Handle) -> bool:
        if not self.holds(handle):
            return False
        self.owner = None
        handle.run.idle = max(0, handle.run.idle - 1)
        return True

    def fail(self, handle: Handle) -> bool:
        """Returns True if the run was its holder's until now, and is ended here."""
        run = handle.run
        mine = self.leased is run and self.owner is not None and run.status is RunStatus.RUNNING
        if not mine or not self.fence - self.attach <= handle.fence <= self.fence:
            return False
        self.end_unheld(run, RunStatus.CANCELLED if run.cancel else RunStatus.FAILED)
        return True

    def resolve(self, run: ModelRun) -> None:
        self._write_unheld(run, "action.resolved")
        run.status = RunStatus.QUEUED
        run.idle = 0

    def taken(self, run: ModelRun) -> None:
        """What a claim does beside, just before it raises the fence; for models of more."""

    def parked(self, run: ModelRun) -> None:
        """What a step that waits for a person does beside; for models of more."""

    def due(self) -> set[UUID]:
        head = self.head
        if head is None or self.live or head.status is RunStatus.REQUIRES_ACTION:
            return set()
        return {head.run_id}

    def end(self, run: ModelRun, status: RunStatus) -> None:
        run.status = status
        if run.rollback:
            self.messages = [message for message in self.messages if message[0] != run.run_id]
            run.joined = True
        if self.leased is run:
            self.owner = None
        self.join()

    def join(self) -> None:
        """What was accepted is in the conversation at its turn, whatever became of its run."""
        for run in self.runs:
            if run.open:
                return
            if not run.joined:
                self.messages.append((run.run_id, run.text))
                run.joined = True

    def end_unheld(self, run: ModelRun, status: RunStatus) -> None:
        self._write_unheld(run, "run.cancelled" if status is RunStatus.CANCELLED else "run.failed")
        self.end(run, status)

    def _write_unheld(self, run: ModelRun, kind: str) -> None:
        if self.leased is run or self.leased is None or not self.leased.open:
            self.leased, self.owner, self.attach = run, None, 0
            self.fence += 1
        run.log.append(kind)
        run.fences.append(self.fence)
