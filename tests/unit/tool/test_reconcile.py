"""What a hook's answer comes to, over a journal in memory."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from meshkit.errors import ResourceExhaustedError
from services.tool.domain import CallState, Outcome
from services.tool.reconcile import Finding, Look, Reconciler
from services.tool.registry import Effect, Reconciled, Registry, Tool, ToolContext, ToolError
from services.tool.results import INLINE_BYTES
from tests.unit.tool.fakes import FakeJournal, FakeResults, call

Answer = Callable[[ToolContext], Any]
# Long enough for any try to have ended.
QUIET = 3600.0


class Ledger:
    """A tool whose hook answers what the test says; its function must never be run here."""

    def __init__(self, *answers: Any, timeout: float = 5.0) -> None:
        self.answers = list(answers)
        self.contexts: list[ToolContext] = []
        self.asked = asyncio.Event()
        self.tool = Tool(
            name="lever",
            description="d",
            input_schema={"type": "object", "properties": {"n": {"type": "integer"}}},
            function=self.act,
            effect=Effect.NON_IDEMPOTENT,
            reconcile=self.reconcile,
            reconcile_timeout=timeout,
        )

    async def act(self, arguments: Mapping[str, Any], context: ToolContext) -> None:
        raise AssertionError("a look never acts")

    async def reconcile(self, arguments: Mapping[str, Any], context: ToolContext) -> Any:
        self.contexts.append(context)
        self.asked.set()
        answer = self.answers.pop(0)
        if isinstance(answer, asyncio.Event):
            await answer.wait()
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def journal() -> FakeJournal:
    journal = FakeJournal()
    journal.intend("run:1:0", Effect.NON_IDEMPOTENT)
    row = journal.rows["run:1:0"]
    row.running, row.entry = True, replace(row.entry, state=CallState.UNKNOWN, tries=1)
    return journal


def reconciler(journal: FakeJournal, ledger: Ledger, **more: Any) -> Reconciler:
    return Reconciler(Registry([ledger.tool]), journal, more.pop("results", None), **more)


async def test_a_result_that_is_found_is_the_calls_outcome(journal: FakeJournal) -> None:
    ledger = Ledger({"refunded": 7})
    look = await reconciler(journal, ledger).look(call(arguments='{"n": 1}'), QUIET)
    assert look == Look(Finding.SETTLED, Outcome(CallState.COMPLETED, '{"refunded": 7}'))
    assert journal.rows["run:1:0"].entry.state is CallState.COMPLETED
    assert ledger.contexts[0].idempotency_key == "key-run:1:0"
    assert ledger.contexts[0].user == "ann"


async def test_a_failure_that_is_found_is_the_calls_outcome(journal: FakeJournal) -> None:
    look = await reconciler(journal, Ledger(ToolError("the card was refused"))).look(call(), QUIET)
    assert look.outcome is not None
    assert (look.outcome.state, look.outcome.content) == (CallState.FAILED, "the card was refused")


async def test_not_done_lets_the_call_run_again_once_all_is_quiet(journal: FakeJournal) -> None:
    row = journal.rows["run:1:0"]
    row.entry = replace(row.entry, quiet_in=7.5)
    hooks = reconciler(journal, Ledger(Reconciled.NOT_DONE, Reconciled.NOT_DONE))
    assert await hooks.look(call(), QUIET) == Look(Finding.ASK_AGAIN, after=7.5)
    assert row.entry.state is CallState.UNKNOWN
    row.entry = replace(row.entry, quiet_in=0.0)
    assert await hooks.look(call(), QUIET) == Look(Finding.NOT_DONE)
    assert row.entry.state is None


async def test_a_journal_whose_clock_went_forward_lets_nothing_run_again_too_early(
    journal: FakeJournal,
) -> None:
    hooks = reconciler(journal, Ledger(*[Reconciled.NOT_DONE] * 3))
    early = await hooks.look(call(), 0.0)
    assert early.finding is Finding.ASK_AGAIN
    assert (await hooks.look(call(), early.after - 0.001)).finding is Finding.ASK_AGAIN
    assert journal.rows["run:1:0"].entry.state is CallState.UNKNOWN
    assert (await hooks.look(call(), early.after)).finding is Finding.NOT_DONE


async def test_a_result_need_not_wait_until_all_is_quiet(journal: FakeJournal) -> None:
    row = journal.rows["run:1:0"]
    row.entry = replace(row.entry, quiet_in=3600.0)
    assert (await reconciler(journal, Ledger("done")).look(call(), QUIET)).finding is Finding.SETTLED


async def test_what_cannot_be_told_is_left_as_it_is(journal: FakeJournal) -> None:
    look = await reconciler(journal, Ledger(Reconciled.CANNOT_TELL)).look(call(), QUIET)
    assert look.finding is Finding.CANNOT_TELL
    assert journal.rows["run:1:0"].entry.state is CallState.UNKNOWN


async def test_an_outside_that_is_away_is_asked_again(journal: FakeJournal) -> None:
    never = asyncio.Event()
    hooks = reconciler(journal, Ledger(ConnectionError("away"), never, object(), "found", timeout=0.05))
    for _ in range(3):
        assert await hooks.look(call(), QUIET) == Look(Finding.ASK_AGAIN)
    assert (await hooks.look(call(), QUIET)).finding is Finding.SETTLED


async def test_a_call_that_was_settled_meanwhile_is_not_looked_up(journal: FakeJournal) -> None:
    row = journal.rows["run:1:0"]
    row.entry = replace(row.entry, state=CallState.COMPLETED, content="late word")
    ledger = Ledger()
    look = await reconciler(journal, ledger).look(call(), QUIET)
    assert look == Look(Finding.SETTLED, Outcome(CallState.COMPLETED, "late word"))
    row.entry, row.running = replace(row.entry, state=None), False
    assert await reconciler(journal, ledger).look(call(), QUIET) == Look(Finding.NOT_DONE)
    row.running = True
    assert (await reconciler(journal, ledger).look(call(), QUIET)).finding is Finding.ASK_AGAIN
    assert ledger.contexts == []


async def test_a_call_that_was_begun_again_during_the_look_keeps_its_state(journal: FakeJournal) -> None:
    gate = asyncio.Event()
    ledger = Ledger(gate)
    row = journal.rows["run:1:0"]
    task = asyncio.create_task(reconciler(journal, ledger).look(call(), QUIET))
    await asyncio.wait_for(ledger.asked.wait(), 5)
    row.entry = replace(row.entry, tries=2)
    gate.set()
    assert (await task).finding is Finding.ASK_AGAIN
    assert row.entry.state is CallState.UNKNOWN


async def test_a_tool_without_a_hook_cannot_tell(journal: FakeJournal) -> None:
    ledger = Ledger()
    bare = replace(ledger.tool, reconcile=None)
    for registry in (Registry([bare]), Registry()):
        look = await Reconciler(registry, journal, None).look(call(), QUIET)
        assert look.finding is Finding.CANNOT_TELL
    assert journal.looks == 0


async def test_a_large_result_goes_to_the_object_store(journal: FakeJournal) -> None:
    results = FakeResults()
    look = await reconciler(journal, Ledger("x" * (INLINE_BYTES + 1)), results=results).look(call(), QUIET)
    assert look.outcome is not None
    assert look.outcome.content_ref == "sha256:1"
    assert [len(data) for data in results.objects] == [INLINE_BYTES + 1]


async def test_looks_are_bounded(journal: FakeJournal) -> None:
    gate = asyncio.Event()
    ledger = Ledger(gate, "x")
    hooks = reconciler(journal, ledger, max_looks=1)
    first = asyncio.create_task(hooks.look(call(), QUIET))
    await asyncio.wait_for(ledger.asked.wait(), 5)
    with pytest.raises(ResourceExhaustedError):
        await hooks.look(call(), QUIET)
    first.cancel()
    await asyncio.wait({first})
    assert (await hooks.look(call(), QUIET)).finding is Finding.SETTLED
