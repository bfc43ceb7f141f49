"""Random histories of one session on real PostgreSQL, against a model of what the store promises."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from meshkit.errors import FailedPreconditionError
from meshkit.ids import uuid7
from meshkit.postgres import open_pool
from services.session.domain import (
    AppendOutcome,
    ClaimOutcome,
    ConcurrencyPolicy,
    Grant,
    LeaseRef,
    NewMessage,
    RunStatus,
    TenantChange,
)
from services.session.store.postgres import PostgresStore
from tests.integration.session.store.kit import Kit, event, intent
from tests.integration.session.store.model import Handle, Model, ModelRun

T = TypeVar("T")
TENANT = "machine"
OWNERS = st.sampled_from(["a", "b"])
# Where a writer writes relative to the log's end: mostly right, at times again or too far.
SHIFTS = st.sampled_from([0, 0, 0, 0, -1, 1])
# Mostly those that queue.
POLICIES = st.sampled_from([ConcurrencyPolicy.ENQUEUE] * 3 + list(ConcurrencyPolicy))
KINDS = st.lists(st.sampled_from(["text.delta", "run.started", "step.started"]), min_size=1, max_size=3)
ENDS = {
    RunStatus.COMPLETED: "run.completed",
    RunStatus.FAILED: "run.failed",
    RunStatus.CANCELLED: "run.cancelled",
    RunStatus.REQUIRES_ACTION: "action.required",
}

# Every step is compared with what is stored: seconds for these, and minutes for the hundreds that a change of
# the store deserves.
EXAMPLES = int(os.environ.get("HERMESH_TEST_EXAMPLES", "8"))


def machine(run: Callable[[Awaitable[Any]], Any], kit: Kit) -> type[RuleBasedStateMachine]:
    """Makes the state machine over a store; `run` runs a coroutine to its end."""

    class StoreMachine(RuleBasedStateMachine):
        runs = Bundle("runs")
        handles = Bundle("handles")

        @initialize()
        def begin(self) -> None:
            self.model = Model()
            self.session_id = run(kit.session()).session_id
            self.fences: list[int] = []
            self.count = 0
            # The grant that is good now, if one is: without it most random writes would be stale ones.
            self.current: Handle | None = None
            self.former: Handle | None = None
            self.default(ConcurrencyPolicy.ENQUEUE)

        def text(self) -> str:
            self.count += 1
            return f"t{self.count}"

        def grant(self, handle: Handle) -> Grant:
            return Grant(self.session_id, handle.run.run_id, handle.fence, 0, 0, 0)

        @rule(policy=st.sampled_from([policy for policy in ConcurrencyPolicy if policy]))
        def default(self, policy: ConcurrencyPolicy) -> None:
            assert run(kit.store.set_tenant(TENANT, TenantChange(policy))) is not None
            self.model.default = policy

        @rule(target=runs, policy=POLICIES)
        def submit(self, policy: ConcurrencyPolicy) -> Any:
            text = self.text()
            try:
                submitted = run(kit.submit(self.session_id, text, policy=policy))
            except FailedPreconditionError:
                assert self.model.submit(uuid7(), text, policy) is None
                return multiple()
            made = self.model.submit(submitted.run.run_id, text, policy)
            assert made is not None
            assert submitted.run.ordinal == len(self.model.runs)
            return made

        @rule(target=handles, owner=OWNERS, policy=POLICIES)
        def submit_and_claim(self, owner: str, policy: ConcurrencyPolicy) -> Any:
            text = self.text()
            try:
                submitted = run(kit.submit(self.session_id, text, owner=owner, policy=policy))
            except FailedPreconditionError:
                assert self.model.submit(uuid7(), text, policy) is None
                return multiple()
            made = self.model.submit(submitted.run.run_id, text, policy)
            assert made is not None
            outcome = self.model.claim(made, owner)
            if submitted.claim is None:
                assert outcome is ClaimOutcome.ALREADY_CLAIMED
                return multiple()
            assert outcome is ClaimOutcome.CLAIMED
            return self.check_claim(made, submitted.claim, owner)

        @rule(target=handles, made=runs, owner=OWNERS)
        def claim(self, made: ModelRun, owner: str) -> Any:
            claim = run(kit.store.claim(made.run_id, owner))
            assert claim.outcome is self.model.claim(made, owner)
            if claim.outcome is not ClaimOutcome.CLAIMED:
                return multiple()
            return self.check_claim(made, claim, owner)

        @rule(target=handles, owner=OWNERS)
        def claim_head(self, owner: str) -> Any:
            head = self.model.head
            return multiple() if head is None else self.claim(head, owner)

        def check_claim(self, made: ModelRun, claim: Any, owner: str) -> Handle:
            assert claim.grant.fence == self.model.fence
            assert claim.grant.next_seq == made.next_seq
            assert [m.content for m in claim.context.messages] == [text for _, text in self.model.messages]
            assert claim.run.attempt == made.attempt
            self.former, self.current = self.current, Handle(made, claim.grant.fence, owner)
            return self.current

        @rule(handle=handles, shift=SHIFTS, kinds=KINDS)
        def append(self, handle: Handle, shift: int, kinds: list[str]) -> None:
            seq = max(1, handle.run.next_seq + shift)
            result = run(kit.append(self.grant(handle), seq, *(event(kind) for kind in kinds)))
            assert result.outcome is self.model.append(handle, seq, kinds, [])
            if result.outcome is not AppendOutcome.FENCED:
                assert result.next_seq == handle.run.next_seq

        @rule(
            handle=handles,
            shift=SHIFTS,
            texts=st.integers(0, 2),
            status=st.none() | st.sampled_from(list(ENDS)),
        )
        def step(self, handle: Handle, shift: int, texts: int, status: RunStatus | None) -> None:
            seq = max(1, handle.run.next_seq + shift)
            kind = ENDS[status] if status else "text.delta"
            words = [self.text() for _ in range(texts)]
            self.count += 1
            asked = intent(handle.run.run_id, self.count, needs_approval=True)
            parks = status is RunStatus.REQUIRES_ACTION
            result = run(
                kit.step(
                    self.grant(handle),
                    seq,
                    event(kind),
                    messages=tuple(NewMessage(uuid7(), "assistant", word) for word in words),
                    intents=(asked,) if parks else (),
                    status=status,
                )
            )
            assert result.outcome is self.model.append(handle, seq, [kind], words, status)
            if parks and result.outcome is AppendOutcome.COMMITTED:
                handle.run.parked_on = asked.call_id

        @rule(target=handles, owner=OWNERS)
        def take(self, owner: str) -> Any:
            self.expire()
            return self.claim_head(owner)

        @rule(shift=SHIFTS, kinds=KINDS)
        def holder_appends(self, shift: int, kinds: list[str]) -> None:
            if self.current is not None:
                self.append(self.current, shift, kinds)

        @rule(texts=st.integers(0, 2))
        def holder_steps(self, texts: int) -> None:
            if self.current is not None:
                self.step(self.current, 0, texts, None)

        @rule(texts=st.integers(0, 1), plain=st.booleans())
        def former_holder_writes(self, texts: int, plain: bool) -> None:
            if self.former is not None and plain:
                self.append(self.former, 0, ["text.delta"])
            elif self.former is not None:
                self.step(self.former, 0, texts, None)

        @rule(texts=st.integers(0, 2), status=st.sampled_from(list(ENDS)))
        def holder_ends(self, texts: int, status: RunStatus) -> None:
            if self.current is not None:
                self.step(self.current, 0, texts, status)

        @rule(handle=handles)
        def send_the_end_again(self, handle: Handle) -> None:
            last = handle.run.log[-1]
            status = {kind: status for status, kind in ENDS.items()}.get(last)
            if status is not None:
                seq = len(handle.run.log)
                result = run(kit.step(self.grant(handle), seq, event(last), status=status))
                assert result.outcome is self.model.append(handle, seq, [last], [], status)
                assert result.outcome is not AppendOutcome.COMMITTED

        @rule()
        def expire(self) -> None:
            run(kit.expire(self.session_id))
            self.model.expired = True

        @rule(target=handles, handle=handles, owner=OWNERS)
        def reattach(self, handle: Handle, owner: str) -> Any:
            grant = run(kit.store.reattach(self.ref(handle), owner))
            assert (grant is not None) == self.model.reattach(handle, owner)
            if grant is None:
                return multiple()
            assert (grant.fence, grant.attach) == (self.model.fence, self.model.attach)
            assert grant.next_seq == handle.run.next_seq
            self.former, self.current = self.current, Handle(handle.run, grant.fence, owner)
            return self.current

        @rule(target=handles, owner=OWNERS)
        def holder_reattaches(self, owner: str) -> Any:
            return multiple() if self.current is None else self.reattach(self.current, owner)

        @rule(handle=handles)
        def renew(self, handle: Handle) -> None:
            renewal = run(kit.store.renew([self.ref(handle)]))
            kept = self.model.holds(handle)
            assert list(renewal.lost) == ([] if kept else [handle.run.run_id])
            assert list(renewal.cancelled) == ([handle.run.run_id] if kept and handle.run.cancel else [])
            if kept:
                self.model.expired = False

        @rule(handle=handles)
        def release(self, handle: Handle) -> None:
            assert run(kit.store.release(self.ref(handle))) == self.model.release(handle)

        @rule(handle=handles)
        def fail(self, handle: Handle) -> None:
            ended = run(kit.store.fail_held(self.ref(handle), "it could not write its end"))
            assert (ended is not None) == self.model.fail(handle)
            assert ended is None or (ended.run_id, ended.status) == (handle.run.run_id, handle.run.status)

        @rule()
        def holder_fails(self) -> None:
            if self.current is not None:
                self.fail(self.current)

        @rule(made=runs)
        def cancel(self, made: ModelRun) -> None:
            _, terminal = run(kit.store.cancel(kit.tenant, made.run_id, "x"))
            assert (terminal is not None) == self.model.cancel(made)

        @rule()
        def resolve(self) -> None:
            head = self.model.head
            if head is None or head.status is not RunStatus.REQUIRES_ACTION:
                return
            word = self.text()
            run(kit.resolve(head.run_id, head.parked_on, content=word))
            self.model.resolve(head)

        @rule(made=runs)
        def run_out_of_time(self, made: ModelRun) -> None:
            run(kit.run_out(made.run_id))
            made.late = True

        @rule()
        def holder_runs_out_of_time(self) -> None:
            if self.current is not None:
                self.run_out_of_time(self.current.run)

        @rule()
        def end_orphans(self) -> None:
            run(kit.store.end_orphans(10_000))
            self.model.end_orphans()

        @rule()
        def sweep(self) -> None:
            run(kit.make_due())
            mine = {made.run_id for made in self.model.runs}
            assert run(kit.due()) & mine == self.model.due()

        def ref(self, handle: Handle) -> Any:
            return LeaseRef(self.session_id, handle.run.run_id, handle.fence)

        @invariant()
        def stored_is_what_the_model_says(self) -> None:
            if not hasattr(self, "model"):
                return
            run(self.compare())

        async def compare(self) -> None:
            model = self.model
            rows = await kit.pool.fetch(
                "SELECT run_id, array_agg(seq ORDER BY seq) seqs, array_agg(type ORDER BY seq) types,"
                " array_agg(fence ORDER BY seq) fences FROM session.event WHERE run_id = ANY($1) GROUP BY 1",
                [made.run_id for made in model.runs],
            )
            logs = {row["run_id"]: row for row in rows}
            runs = await kit.store.runs_from(kit.tenant, self.session_id, 1, 1000)
            assert [r.run_id for r in runs] == [made.run_id for made in model.runs]
            for made, stored in zip(model.runs, runs, strict=True):
                log = logs[made.run_id]
                assert log["seqs"] == list(range(1, len(made.log) + 1))
                assert log["types"] == made.log
                assert log["fences"] == made.fences
                assert (stored.status, stored.last_seq) == (made.status, len(made.log))
            running = await kit.pool.fetch(
                "SELECT run_id FROM session.run"
                " WHERE session_id = $1 AND status < 4 AND deadline IS NOT NULL",
                self.session_id,
            )
            assert {row["run_id"] for row in running} == {
                made.run_id for made in model.runs if made.open and made.clock_runs
            }
            contents = [(m[0], m[2]) for m in await kit.messages(self.session_id)]
            assert contents == [(n, text) for n, (_, text) in enumerate(model.messages, start=1)]
            session = await kit.store.get_session(kit.tenant, self.session_id)
            assert session.message_count == len(model.messages)
            assert session.active_run_id == (model.head.run_id if model.head else None)
            fence = (await kit.store.fences([self.session_id]))[self.session_id]
            assert fence == model.fence >= max(self.fences, default=0)
            self.fences.append(fence)

    return StoreMachine


@pytest.mark.timeout(300)
def test_random_histories_keep_every_promise(database: str) -> None:
    with asyncio.Runner() as runner:
        pool = runner.run(open_pool(database, min_size=1, max_size=2, name="test-machine"))
        try:
            store = PostgresStore(pool)
            tenant = runner.run(store.ensure_key(TENANT, uuid7().hex * 2, "k"))
            made = machine(runner.run, Kit(store, tenant, pool))
            run_state_machine_as_test(
                made,
                settings=settings(
                    max_examples=EXAMPLES,
                    stateful_step_count=50,
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
