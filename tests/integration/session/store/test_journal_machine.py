"""Random histories of the tool journal on real PostgreSQL, one after the other and two at a time.

Each answer and each stored row is compared with a model; a witness that knows only the rules listens, too.
"""

from __future__ import annotations

import asyncio
import copy
import os
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from meshkit.errors import FailedPreconditionError
from meshkit.ids import uuid7
from meshkit.postgres import open_pool
from services.session.domain import (
    ActionDecision,
    AppendOutcome,
    ClaimOutcome,
    ConcurrencyPolicy,
    EffectClass,
    Grant,
    LeaseRef,
    RunStatus,
    ToolCall,
    ToolCallState,
)
from services.session.store.postgres import PostgresStore
from tests.integration.session.store.journal_model import DONE, JournalModel, Ticket, View, Witness
from tests.integration.session.store.kit import Kit, event, intent

EXAMPLES = int(os.environ.get("HERMESH_TEST_EXAMPLES", "8"))
# Longer than any test.
LOUD_MS = 3_600_000
# What a step draws from; a failure prints it.
DICE = st.integers(0, 2**64)
# What is done in a run that an agent holds, that waits for a person, that is over: mostly what can succeed.
HELD = {"begin": 6, "complete": 4, "reconcile": 4, "resolve": 3, "claim": 2, "reattach": 1, "release": 1}
HELD |= {"park": 3, "cancel": 0.3}
WAITS = {"begin": 1, "complete": 2, "reconcile": 3, "resolve": 6, "claim": 1, "reattach": 0.5, "cancel": 0.2}
WAITS |= {"park": 0.5, "release": 0.5}
OVER = dict.fromkeys(HELD, 1.0)


@dataclass(frozen=True)
class Op:
    """Something done to the store, the same done to a model, and who has to hear of the answer."""

    name: str
    real: Callable[[], Awaitable[Any]]
    model: Callable[[JournalModel], Any]
    heard: Callable[[Any, JournalModel], None] = lambda answer, before: None


def view(call: ToolCall) -> View:
    return (call.state, call.fence, call.tries, call.content, call.needs_approval)


def machine(run: Callable[[Awaitable[Any]], Any], kit: Kit) -> type[RuleBasedStateMachine]:
    """Makes the state machine over a store; `run` runs a coroutine to its end."""

    class JournalMachine(RuleBasedStateMachine):
        @initialize()
        def begin(self) -> None:
            self.model = JournalModel()
            self.witness = Witness()
            self.session_id = run(kit.session()).session_id
            self.count = 0
            self.tickets: list[Ticket] = []
            # Every GO that was given: call, fence, try.
            self.tries: list[tuple[str, int, int]] = []
            self.next_run()

        def text(self) -> str:
            self.count += 1
            return f"t{self.count}"

        # what there is to do

        def make(self, rng: random.Random) -> Op | None:
            status = self.model.runs[-1].status
            weights = OVER if status.terminal else WAITS if status is RunStatus.REQUIRES_ACTION else HELD
            # The rarest histories are those of calls that were begun more than once.
            if any(call.state is ToolCallState.UNKNOWN for call in self.model.of(self.model.runs[-1])):
                weights = weights | {"reconcile": 10}
            elif self.late_tries():
                weights = weights | {"complete": 8}
            (kind,) = rng.choices(list(weights), list(weights.values()))
            made: Op | None = getattr(self, f"op_{kind}")(rng)
            return made

        def call(self, rng: random.Random, *states: ToolCallState) -> str:
            """Any call, but mostly one of this run's in one of these states."""
            mine = [call.call_id for call in self.model.of(self.model.runs[-1]) if call.state in states]
            if mine and rng.random() < 0.8:
                return rng.choice(mine)
            return rng.choice(list(self.model.calls)[-5:]) if self.model.calls else ""

        def late_tries(self) -> list[tuple[str, int, int]]:
            """Tries of calls that are running again since."""
            calls = self.model.calls
            return [
                (name, fence, tries)
                for name, fence, tries in self.tries
                if calls[name].state is ToolCallState.RUNNING and tries < calls[name].tries
            ]

        def ticket(self, rng: random.Random) -> Ticket:
            """A grant of this run: mostly the last one."""
            return self.tickets[-1] if rng.random() < 0.75 else rng.choice(self.tickets)

        def op_begin(self, rng: random.Random) -> Op | None:
            states = rng.choices(
                [(ToolCallState.INTENT,), (ToolCallState.RUNNING,), DONE], weights=[5, 2, 1]
            )[0]
            name = self.call(rng, *states)
            ticket, loud = self.ticket(rng), rng.random() < 0.3
            if not name:
                return None
            # At times a fence that nobody was given yet.
            fence = ticket.fence + (rng.random() < 0.1)
            session, once = self.session_id, self.model.calls[name].once

            async def real() -> Any:
                outcome, call = await kit.store.begin(name, session, fence, LOUD_MS if loud else 0)
                return outcome, view(call)

            def heard(answer: Any, before: JournalModel) -> None:
                mine = next((one for one in self.tickets if one.fence == fence), None)
                never = Ticket(ticket.run_id, fence, "", claim=-1)
                self.witness.begun(name, once, mine or never, answer)
                if answer[0].name == "GO":
                    self.tries.append((name, fence, answer[1][2]))

            return Op(f"begin {name} {fence}", real, lambda m: m.begin(name, fence, loud), heard)

        def op_complete(self, rng: random.Random) -> Op | None:
            if not self.tries:
                return None
            # Mostly a try of late; at times one of a call that was begun again since.
            late = self.late_tries()
            name, fence, tries = rng.choice(late[-4:] if late and rng.random() < 0.5 else self.tries[-4:])
            told = tries if rng.random() < 0.7 else 0
            state, content = rng.choice(DONE), self.text()

            async def real() -> Any:
                return view(await kit.store.complete(name, fence, state, content, "", told))

            return Op(
                f"complete {name} {fence} try {told}: {state.name}",
                real,
                lambda m: m.complete(name, fence, state, content, told),
                lambda answer, before: self.witness.saw(name, answer),
            )

        def op_reconcile(self, rng: random.Random) -> Op | None:
            name = self.call(rng, ToolCallState.UNKNOWN)
            if not name:
                return None
            known = self.model.calls[name].tries
            tries = rng.choice([known, known, known, max(0, known - 1), max(0, known - 1), 0])
            state, content = rng.choice([*DONE, ToolCallState.INTENT, ToolCallState.INTENT]), self.text()

            async def real() -> Any:
                return view(await kit.store.reconcile(name, state, content, "", tries))

            def heard(answer: Any, before: JournalModel) -> None:
                was = before.calls[name].state
                if was is ToolCallState.UNKNOWN and state is ToolCallState.INTENT:
                    self.witness.allowed(name, not before.calls[name].loud, answer)
                else:
                    self.witness.saw(name, answer)

            return Op(
                f"reconcile {name} try {tries}: {state.name}",
                real,
                lambda m: m.reconcile(name, state, content, tries),
                heard,
            )

        def op_resolve(self, rng: random.Random) -> Op | None:
            name = self.call(rng, ToolCallState.UNKNOWN, ToolCallState.INTENT)
            if not name:
                return None
            content, request_id = rng.choice(["word 1", "word 2"]), ""
            decision = rng.choices(list(ActionDecision), weights=[2, 2, 4, 0.5, 3, 1])[0]
            drawn = rng.random()
            if drawn < 0.4:
                request_id = f"{self.session_id}-{self.text()}"
            elif drawn < 0.6 and self.model.words:
                # The very same word again, of whatever time.
                request_id, (name, decision, content) = rng.choice(list(self.model.words.items()))
            run_id = self.model.calls[name].run.run_id

            async def real() -> Any:
                try:
                    ended, call = await kit.resolve(run_id, name, decision, content, request_id=request_id)
                except FailedPreconditionError as error:
                    return error.reason
                return ended.status, view(call)

            def heard(answer: Any, before: JournalModel) -> None:
                if isinstance(answer, str) or request_id in before.words:
                    return
                doubtful = before.calls[name].state is ToolCallState.UNKNOWN
                if decision in (ActionDecision.RETRY, ActionDecision.APPROVE):
                    self.witness.allowed(name, doubtful, answer[1])
                else:
                    self.witness.saw(name, answer[1])

            return Op(
                f"resolve {name} {decision.name} {request_id}",
                real,
                lambda m: m.resolve_call(name, decision, content, request_id),
                heard,
            )

        def op_claim(self, rng: random.Random) -> Op:
            run_id, owner = self.model.runs[-1].run_id, rng.choice("ab")

            async def real() -> Any:
                claim = await kit.store.claim(run_id, owner)
                if claim.grant is None or claim.context is None:
                    return claim.outcome, None
                grant = claim.grant
                calls = [view(call) for call in claim.context.tool_calls]
                return claim.outcome, (grant.fence, grant.attach, grant.next_seq, calls)

            def model(m: JournalModel) -> Any:
                made = m.run(run_id)
                outcome = m.claim(made, owner)
                if outcome is not ClaimOutcome.CLAIMED:
                    return outcome, None
                return outcome, (m.fence, m.attach, made.next_seq, [call.view for call in m.of(made)])

            def heard(answer: Any, before: JournalModel) -> None:
                self.witness.claimed(answer[0])
                if answer[1] is not None:
                    self.tickets.append(Ticket(run_id, answer[1][0], owner, self.witness.claim))

            return Op(f"claim {owner}", real, model, heard)

        def op_reattach(self, rng: random.Random) -> Op:
            ticket = self.ticket(rng)
            reference = LeaseRef(self.session_id, ticket.run_id, ticket.fence)

            async def real() -> Any:
                grant = await kit.store.reattach(reference, ticket.owner)
                return None if grant is None else (grant.fence, grant.attach)

            def model(m: JournalModel) -> Any:
                return (m.fence, m.attach) if m.reattach(m.handle(ticket), ticket.owner) else None

            def heard(answer: Any, before: JournalModel) -> None:
                if answer is not None:
                    # It may have been granted the run anew since, without having heard of it.
                    self.tickets.append(Ticket(ticket.run_id, answer[0], ticket.owner, self.witness.claim))

            return Op(f"reattach {ticket.fence}", real, model, heard)

        def op_release(self, rng: random.Random) -> Op:
            ticket = self.ticket(rng)

            async def real() -> Any:
                return await kit.store.release(LeaseRef(self.session_id, ticket.run_id, ticket.fence))

            def heard(answer: Any, before: JournalModel) -> None:
                if answer:
                    self.witness.holder = False

            return Op(f"release {ticket.fence}", real, lambda m: m.release(m.handle(ticket)), heard)

        def op_cancel(self, rng: random.Random) -> Op:
            run_id = self.model.runs[-1].run_id

            async def real() -> Any:
                _, terminal = await kit.store.cancel(kit.tenant, run_id, "x")
                return terminal is not None

            return Op("cancel", real, lambda m: m.cancel(m.run(run_id)))

        def op_park(self, rng: random.Random) -> Op:
            return self.step(self.ticket(rng), "action.required", RunStatus.REQUIRES_ACTION)

        def step(self, ticket: Ticket, kind: str, status: RunStatus) -> Op:
            seq = self.model.run(ticket.run_id).next_seq
            grant = Grant(self.session_id, ticket.run_id, ticket.fence, 0, 0, 0)

            async def real() -> Any:
                while True:
                    result = await kit.step(grant, seq, event(kind, "{}"), status=status)
                    # What stood in the way was over when it looked; a writer sends it again.
                    if result.outcome is not AppendOutcome.RETRY:
                        return result.outcome

            def heard(answer: Any, before: JournalModel) -> None:
                if answer is AppendOutcome.COMMITTED:
                    self.witness.holder = False

            return Op(
                f"{kind} {ticket.fence}",
                real,
                lambda m: m.append(m.handle(ticket), seq, [kind], [], status),
                heard,
            )

        # rules

        @rule(dice=DICE)
        def one(self, dice: int) -> None:
            rng = random.Random(dice)
            self.go_on(rng)
            self.do(self.make(rng))

        @rule(dice=DICE)
        def two_at_once(self, dice: int) -> None:
            rng = random.Random(dice)
            self.go_on(rng)
            pair = [op for op in (self.make(rng), self.make(rng)) if op is not None]
            if len(pair) < 2:
                return

            async def both() -> list[Any]:
                return await asyncio.gather(*(op.real() for op in pair))

            answers = dict(zip(pair, run(both()), strict=True))
            stored = run(self.stored())
            for order in (pair, pair[::-1]):
                trial = copy.deepcopy(self.model)
                if all(op.model(trial) == answers[op] for op in order) and trial.snapshot() == stored:
                    break
            else:
                raise AssertionError(f"in no order: {[(op.name, answers[op]) for op in pair]}, {stored}")
            for op in order:
                before = copy.deepcopy(self.model)
                op.model(self.model)
                op.heard(answers[op], before)

        def do(self, op: Op | None) -> None:
            if op is None:
                return
            answer = run(op.real())
            before = copy.deepcopy(self.model)
            assert answer == op.model(self.model), op.name
            op.heard(answer, before)

        def go_on(self, rng: random.Random) -> None:
            """Sees to it that mostly there is something to do: a run, its holder, calls. Time passes, too."""
            made = self.model.runs[-1]
            if not made.open and rng.random() < 0.8:
                self.next_run()
            elif made.status is RunStatus.QUEUED and rng.random() < 0.7:
                self.do(self.op_claim(rng))
            elif self.model.live and rng.random() < 0.15:
                self.expire()
            if self.model.owner:
                mine = self.model.of(self.model.runs[-1])
                fresh = [call for call in mine if call.state is ToolCallState.INTENT]
                if len(mine) > 4 and rng.random() < 0.1:
                    self.do(self.step(self.tickets[-1], "run.completed", RunStatus.COMPLETED))
                elif not fresh and rng.random() < (0.3 if mine else 1):
                    self.intend(rng)
            if rng.random() < 0.1:
                self.hush()

        def intend(self, rng: random.Random) -> None:
            ticket = self.tickets[-1]
            seq = self.model.run(ticket.run_id).next_seq
            made = []
            for _ in range(rng.randint(1, 2)):
                self.count += 1
                (effect,) = rng.choices(list(EffectClass), weights=[1, 2, 4])
                approval = rng.random() < 0.3
                made.append(intent(ticket.run_id, self.count, effect, needs_approval=approval))
            grant = Grant(self.session_id, ticket.run_id, ticket.fence, 0, 0, 0)
            result = run(kit.step(grant, seq, event("step.started", "{}"), intents=tuple(made)))
            intents = [(one.call_id, one.effect, one.needs_approval) for one in made]
            assert result.outcome is self.model.intend(ticket, seq, intents)
            self.witness.unapproved |= {one.call_id for one in made if one.needs_approval}

        def expire(self) -> None:
            run(kit.expire(self.session_id))
            self.model.expired = True

        def hush(self) -> None:
            """No try can act any more."""
            run(
                kit.pool.execute(
                    "UPDATE session.tool_call SET quiet_at = clock_timestamp() - interval '1 ms'"
                    " WHERE session_id = $1 AND quiet_at IS NOT NULL",
                    self.session_id,
                )
            )
            for call in self.model.calls.values():
                call.loud = False

        def next_run(self) -> None:
            text = self.text()
            submitted = run(kit.submit(self.session_id, text, owner="a"))
            made = self.model.submit(submitted.run.run_id, text, ConcurrencyPolicy.ENQUEUE)
            assert made is not None
            assert self.model.claim(made, "a") is ClaimOutcome.CLAIMED
            assert submitted.claim is not None
            assert submitted.claim.grant is not None
            assert submitted.claim.grant.fence == self.model.fence
            self.witness.claimed(ClaimOutcome.CLAIMED)
            self.tickets = [Ticket(made.run_id, self.model.fence, "a", self.witness.claim)]

        async def stored(self) -> dict[str, Any]:
            runs = await kit.store.runs_from(kit.tenant, self.session_id, 1, 1000)
            calls = [call for one in runs for call in await kit.calls(one.run_id)]
            mine = {one.run_id for one in runs}
            pending = await kit.store.pending_actions(kit.tenant, page_size=1000, page_token="")
            return {
                "fence": (await kit.store.fences([self.session_id]))[self.session_id],
                "runs": [(one.run_id, one.status, await kit.types(one.run_id)) for one in runs],
                "calls": {call.call_id: view(call) for call in calls},
                "pending": {one.call.call_id for one in pending.items if one.call.run_id in mine},
            }

        @invariant()
        def stored_is_what_the_model_says(self) -> None:
            if not hasattr(self, "model"):
                return
            stored = run(self.stored())
            assert stored == self.model.snapshot()
            for run_id, status, _ in stored["runs"]:
                if status is RunStatus.REQUIRES_ACTION and self.model.of(self.model.run(run_id)):
                    assert stored["pending"], "a run waits for a person, and for nothing"

    return JournalMachine


@pytest.mark.timeout(300)
def test_random_histories_of_calls_keep_every_promise(database: str) -> None:
    with asyncio.Runner() as runner:
        pool = runner.run(open_pool(database, min_size=2, max_size=2, name="test-journal-machine"))
        try:
            store = PostgresStore(pool)
            tenant = runner.run(store.ensure_key("journal-machine", uuid7().hex * 2, "k"))
            run_state_machine_as_test(
                machine(runner.run, Kit(store, tenant, pool)),
                settings=settings(
                    max_examples=EXAMPLES,
                    stateful_step_count=60,
                    deadline=None,
                    database=None,
                    derandomize=True,
                    # A failure prints its whole history; making it smaller would take minutes.
                    phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck),
                ),
            )
        finally:
            runner.run(pool.close())
