import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from uuid import UUID

import pytest

from meshkit.errors import (
    AbortedError,
    HermeshError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
)
from meshkit.tasks import TaskOwner
from services.tool import execution as execution_module
from services.tool.domain import CallRequest, CallState, Outcome
from services.tool.execution import Executor, Progress
from services.tool.registry import Effect, OutcomeUnknownError, Registry, ToolError
from services.tool.results import INLINE_BYTES, PREVIEW_BYTES
from tests.unit.tool.fakes import FakeJournal, FakeResults, Lever, call

DEADLINE = 5.0


@pytest.fixture
def journal() -> FakeJournal:
    journal = FakeJournal()
    journal.intend("run:1:0")
    return journal


@pytest.fixture
async def owner() -> AsyncIterator[TaskOwner]:
    async with TaskOwner("test") as owner:
        yield owner


@pytest.fixture(autouse=True)
def quick_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution_module, "STOP_SECONDS", 0.05)


def executor(journal: FakeJournal, owner: TaskOwner, *levers: Lever, **more: object) -> Executor:
    registry = Registry(lever.tool for lever in levers)
    return Executor(registry, journal, more.pop("results", FakeResults()), owner, **more)  # type: ignore[arg-type]


async def updates(executor: Executor, request: CallRequest) -> list[Progress | Outcome]:
    async with asyncio.timeout(DEADLINE):
        return [update async for update in executor.run(request)]


async def outcome(executor: Executor, request: CallRequest) -> Outcome:
    last = (await updates(executor, request))[-1]
    assert isinstance(last, Outcome)
    return last


async def test_a_call_is_begun_acted_and_completed_in_this_order(
    journal: FakeJournal, owner: TaskOwner
) -> None:
    lever = Lever()
    got = await updates(executor(journal, owner, lever), call(arguments='{"n": 3}'))
    assert got == [Progress("started"), Outcome(CallState.COMPLETED, "done")]
    assert lever.calls == [{"n": 3}]
    assert lever.contexts[0].idempotency_key == "key-run:1:0"
    assert lever.contexts[0].user == "ann"
    assert journal.completes == [Outcome(CallState.COMPLETED, "done")]


async def test_a_finished_call_is_answered_from_the_journal(journal: FakeJournal, owner: TaskOwner) -> None:
    lever = Lever()
    runner = executor(journal, owner, lever)
    await outcome(runner, call())
    journal.fence = 7
    again = await outcome(runner, call(fence=7))
    assert again == Outcome(CallState.COMPLETED, "done", reused=True)
    assert len(lever.calls) == 1


async def test_a_call_that_may_have_run_is_not_run_again(journal: FakeJournal, owner: TaskOwner) -> None:
    lever = Lever(Effect.NON_IDEMPOTENT)
    journal.intend("run:1:0", Effect.NON_IDEMPOTENT)
    journal.rows["run:1:0"].running = True
    got = await outcome(executor(journal, owner, lever), call())
    assert (got.state, got.reason) == (CallState.UNKNOWN, "TOOL_CALL_UNKNOWN")
    assert lever.calls == []
    assert journal.completes == []


async def test_an_old_fence_does_not_act(journal: FakeJournal, owner: TaskOwner) -> None:
    lever = Lever()
    journal.fence = 2
    with pytest.raises(AbortedError) as caught:
        await updates(executor(journal, owner, lever), call(fence=1))
    assert caught.value.reason == "FENCE_STALE"
    assert lever.calls == []


async def test_without_the_journals_word_nothing_acts(journal: FakeJournal, owner: TaskOwner) -> None:
    lever = Lever()
    journal.begin_errors = [UnavailableError("DATABASE_UNAVAILABLE", "away")]
    runner = executor(journal, owner, lever)
    with pytest.raises(UnavailableError):
        await updates(runner, call())
    assert lever.calls == []
    assert (await outcome(runner, call())).state is CallState.COMPLETED


@pytest.mark.parametrize(
    ("name", "arguments", "reason", "text"),
    [
        ("nothing", "{}", "TOOL_NOT_FOUND", "no tool named 'nothing'"),
        ("lever", '{"n": "x"}', "TOOL_ARGUMENTS_INVALID", 'n: "x" is not of type "integer"'),
        ("lever", '{"m": 1}', "TOOL_ARGUMENTS_INVALID", "'m' was unexpected"),
        ("lever", "[1]", "TOOL_ARGUMENTS_INVALID", "must be a JSON object"),
        ("lever", '{"n": NaN}', "TOOL_ARGUMENTS_INVALID", "not valid JSON"),
        ("lever", '{"n": 1', "TOOL_ARGUMENTS_INVALID", "not valid JSON"),
        ("lever", "[" * 200_000, "TOOL_ARGUMENTS_INVALID", "nested too deeply"),
        ("lever", '{"n": "' + "x" * 1_100_000 + '"}', "TOOL_ARGUMENTS_INVALID", "larger than"),
        ("lever", '{"n": "\\ud800"}', "TOOL_ARGUMENTS_INVALID", "not valid JSON"),
    ],
)
async def test_a_call_that_cannot_be_made_is_a_result_for_the_model(
    journal: FakeJournal, owner: TaskOwner, name: str, arguments: str, reason: str, text: str
) -> None:
    lever = Lever()
    got = await outcome(executor(journal, owner, lever), call(name=name, arguments=arguments))
    assert (got.state, got.reason) == (CallState.FAILED, reason)
    assert text in got.content
    assert len(got.content) < 1500
    assert lever.calls == []
    assert journal.completes == [got]


@pytest.mark.parametrize(
    ("effect", "expected"),
    [
        (Effect.PURE, CallState.FAILED),
        (Effect.IDEMPOTENT, CallState.FAILED),
        (Effect.NON_IDEMPOTENT, CallState.UNKNOWN),
    ],
)
async def test_a_call_gets_no_more_time_than_its_run_has_left(
    journal: FakeJournal, owner: TaskOwner, effect: Effect, expected: CallState
) -> None:
    journal.intend("run:1:0", effect)
    lever = Lever(effect, timeout=60)
    lever.wait = True
    request = replace(call(), ends_at=time.monotonic() + 0.05)
    got = await outcome(executor(journal, owner, lever), request)
    assert (got.state, got.reason) == (expected, "TOOL_TIMEOUT")
    assert got.content.startswith("The run's time limit was reached before the tool had finished.")
    assert journal.completes == [got]


async def test_a_call_of_a_run_whose_time_is_up_does_not_act(journal: FakeJournal, owner: TaskOwner) -> None:
    journal.intend("run:1:0", Effect.NON_IDEMPOTENT)
    lever = Lever(Effect.NON_IDEMPOTENT)
    got = await outcome(executor(journal, owner, lever), replace(call(), ends_at=time.monotonic()))
    # Nothing was done, and that is known.
    assert (got.state, got.reason) == (CallState.FAILED, "TOOL_TIMEOUT")
    assert not lever.calls


async def test_a_run_with_time_left_leaves_a_tool_its_own_limit(
    journal: FakeJournal, owner: TaskOwner
) -> None:
    lever = Lever(timeout=0.05)
    lever.wait = True
    request = replace(call(), ends_at=time.monotonic() + 60)
    got = await outcome(executor(journal, owner, lever), request)
    assert (got.reason, got.content) == ("TOOL_TIMEOUT", "The tool did not finish within 0.05 seconds.")


@pytest.mark.parametrize("effect", [Effect.PURE, Effect.IDEMPOTENT, Effect.NON_IDEMPOTENT])
async def test_a_timeout_is_a_failure_only_where_nothing_can_have_happened(
    journal: FakeJournal, owner: TaskOwner, effect: Effect
) -> None:
    lever = Lever(effect, timeout=0.05)
    lever.wait = True
    got = await outcome(executor(journal, owner, lever), call())
    expected = CallState.UNKNOWN if effect is Effect.NON_IDEMPOTENT else CallState.FAILED
    assert (got.state, got.reason) == (expected, "TOOL_TIMEOUT")
    assert journal.completes == [got]


async def test_the_journals_stricter_effect_counts(journal: FakeJournal, owner: TaskOwner) -> None:
    journal.intend("run:1:0", Effect.NON_IDEMPOTENT)
    lever = Lever(Effect.PURE, timeout=0.05)
    lever.wait = True
    assert (await outcome(executor(journal, owner, lever), call())).state is CallState.UNKNOWN


async def test_a_tool_that_ignores_its_end_does_not_hold_the_call_but_keeps_its_place(
    journal: FakeJournal, owner: TaskOwner
) -> None:
    lever = Lever(timeout=0.05)
    lever.wait = lever.stubborn = True
    runner = executor(journal, owner, lever, max_calls=1)
    assert (await outcome(runner, call())).reason == "TOOL_TIMEOUT"
    journal.intend("run:1:1")
    with pytest.raises(ResourceExhaustedError):
        await updates(runner, call("run:1:1"))
    lever.wait = False
    lever.release.set()
    assert await owner.wait_idle(DEADLINE)
    assert (await outcome(runner, call("run:1:1"))).state is CallState.COMPLETED


@pytest.mark.parametrize(
    ("effect", "error", "state", "reason"),
    [
        (Effect.PURE, ToolError("no such order"), CallState.FAILED, "TOOL_FAILED"),
        (
            Effect.NON_IDEMPOTENT,
            ToolError("refused", reason="ADDRESS_REFUSED"),
            CallState.FAILED,
            "ADDRESS_REFUSED",
        ),
        (Effect.PURE, ValueError("secret detail"), CallState.FAILED, "TOOL_FAILED"),
        (Effect.NON_IDEMPOTENT, ValueError("secret detail"), CallState.UNKNOWN, "TOOL_FAILED"),
        (Effect.NON_IDEMPOTENT, OutcomeUnknownError("sent"), CallState.UNKNOWN, "TOOL_FAILED"),
        (Effect.IDEMPOTENT, OutcomeUnknownError("sent"), CallState.FAILED, "TOOL_FAILED"),
    ],
)
async def test_a_tools_failure_tells_the_model_and_leaks_nothing(
    journal: FakeJournal, owner: TaskOwner, effect: Effect, error: Exception, state: CallState, reason: str
) -> None:
    lever = Lever(effect)
    lever.error = error
    got = await outcome(executor(journal, owner, lever), call())
    assert (got.state, got.reason) == (state, reason)
    assert "secret" not in got.content
    assert journal.completes == [got]


async def test_a_caller_that_leaves_ends_nothing(journal: FakeJournal, owner: TaskOwner) -> None:
    lever = Lever(Effect.NON_IDEMPOTENT)
    lever.wait = True
    runner = executor(journal, owner, lever)
    stream = runner.run(call())
    assert await anext(stream) == Progress("started")
    await stream.aclose()
    lever.release.set()
    assert await owner.wait_idle(DEADLINE)
    assert journal.completes == [Outcome(CallState.COMPLETED, "done")]


async def test_a_second_caller_joins_the_call_that_runs(journal: FakeJournal, owner: TaskOwner) -> None:
    lever = Lever(Effect.NON_IDEMPOTENT)
    lever.wait = True
    runner = executor(journal, owner, lever)
    async with asyncio.TaskGroup() as group:
        first = group.create_task(updates(runner, call()))
        await asyncio.wait_for(lever.started.wait(), DEADLINE)
        second = group.create_task(updates(runner, call(fence=2)))
        await asyncio.sleep(0)
        lever.release.set()
    assert first.result() == second.result() == [Progress("started"), Outcome(CallState.COMPLETED, "done")]
    assert len(lever.calls) == len(journal.begins) == 1


async def test_a_caller_with_the_new_fence_is_not_refused_with_the_old_one(
    journal: FakeJournal, owner: TaskOwner
) -> None:
    lever = Lever()
    journal.fence = 2
    journal.begin_gate = asyncio.Event()
    runner = executor(journal, owner, lever)
    async with asyncio.TaskGroup() as group:
        old = group.create_task(_reason(updates(runner, call(fence=1))))
        new = group.create_task(outcome(runner, call(fence=2)))
        await asyncio.sleep(0)
        journal.begin_gate.set()
    assert old.result() == "FENCE_STALE"
    assert new.result().state is CallState.COMPLETED
    assert len(lever.calls) == 1


async def _reason(awaitable: object) -> str:
    try:
        await awaitable  # type: ignore[misc]
    except HermeshError as error:
        return error.reason
    return ""


async def test_an_outcome_is_recorded_again_until_the_journal_is_back(
    journal: FakeJournal, owner: TaskOwner
) -> None:
    lever = Lever(Effect.NON_IDEMPOTENT)
    journal.complete_errors = [UnavailableError(), UnavailableError("DATABASE_UNAVAILABLE", "away")]
    got = await outcome(executor(journal, owner, lever), call())
    assert got.state is CallState.COMPLETED
    assert journal.completes == [got]
    assert len(lever.calls) == 1


async def test_recording_ends_after_its_time(journal: FakeJournal, owner: TaskOwner) -> None:
    lever = Lever()
    journal.complete_errors = [UnavailableError()] * 100
    with pytest.raises(UnavailableError):
        await updates(executor(journal, owner, lever, complete_seconds=0.2), call())
    assert len(lever.calls) == 1


async def test_a_record_that_can_never_be_taken_is_not_tried_again(
    journal: FakeJournal, owner: TaskOwner
) -> None:
    journal.complete_errors = [NotFoundError("TOOL_CALL_NOT_FOUND", "gone"), UnavailableError()]
    with pytest.raises(NotFoundError):
        await updates(executor(journal, owner, Lever()), call())
    assert len(journal.complete_errors) == 1


async def test_a_try_that_was_replaced_does_not_speak_for_the_call(
    journal: FakeJournal, owner: TaskOwner
) -> None:
    lever = Lever()
    lever.wait = True
    stream = executor(journal, owner, lever).run(call())
    await anext(stream)
    journal.fence = 2
    await journal.begin(call(fence=2))
    lever.release.set()
    with pytest.raises(AbortedError) as caught:
        await anext(stream)
    assert caught.value.reason == "FENCE_STALE"
    assert journal.completes == []


async def test_an_unknown_call_becomes_known_when_its_act_ends(
    journal: FakeJournal, owner: TaskOwner
) -> None:
    journal.intend("run:1:0", Effect.NON_IDEMPOTENT)
    lever = Lever(Effect.NON_IDEMPOTENT)
    lever.wait = True
    stream = executor(journal, owner, lever).run(call())
    await anext(stream)
    journal.fence = 2
    elsewhere = executor(journal, owner, Lever(Effect.NON_IDEMPOTENT))
    assert (await outcome(elsewhere, call(fence=2))).state is CallState.UNKNOWN
    lever.release.set()
    assert await anext(stream) == Outcome(CallState.COMPLETED, "done")
    assert journal.rows["run:1:0"].entry.state is CallState.COMPLETED
    await stream.aclose()


async def test_what_somebody_else_settled_before_stays(journal: FakeJournal, owner: TaskOwner) -> None:
    lever = Lever(Effect.NON_IDEMPOTENT)
    lever.wait = True
    runner = executor(journal, owner, lever)
    stream = runner.run(call())
    await anext(stream)
    row = journal.rows["run:1:0"]
    row.entry = type(row.entry)(CallState.FAILED, "a person says it was not done")
    lever.release.set()
    assert await anext(stream) == Outcome(
        CallState.FAILED, "a person says it was not done", reason="TOOL_FAILED", reused=True
    )
    await stream.aclose()


@pytest.mark.parametrize(
    ("effect", "state"), [(Effect.PURE, CallState.FAILED), (Effect.NON_IDEMPOTENT, CallState.UNKNOWN)]
)
async def test_cancel_stops_the_tool_and_says_what_is_known(
    journal: FakeJournal, owner: TaskOwner, effect: Effect, state: CallState
) -> None:
    lever = Lever(effect)
    lever.wait = True
    runner = executor(journal, owner, lever)
    stream = runner.run(call())
    await anext(stream)
    assert not runner.cancel("run:1:0", UUID(int=5))
    assert not runner.cancel("run:9:9", call().tenant_id)
    assert runner.cancel("run:1:0", call().tenant_id)
    got = await anext(stream)
    assert isinstance(got, Outcome)
    assert (got.state, got.reason) == (state, "CANCELLED")
    assert journal.completes == [got]
    await stream.aclose()


async def test_a_call_cancelled_before_the_journals_word_does_not_act(
    journal: FakeJournal, owner: TaskOwner
) -> None:
    lever = Lever(Effect.NON_IDEMPOTENT)
    journal.begin_gate = asyncio.Event()
    runner = executor(journal, owner, lever)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(outcome(runner, call()))
        await asyncio.sleep(0)
        assert runner.cancel("run:1:0", call().tenant_id)
        journal.begin_gate.set()
    assert (task.result().state, task.result().reason) == (CallState.FAILED, "CANCELLED")
    assert lever.calls == []


async def test_calls_above_the_limit_are_refused_before_anything_is_done(
    journal: FakeJournal, owner: TaskOwner
) -> None:
    lever = Lever()
    lever.wait = True
    runner = executor(journal, owner, lever, max_calls=1)
    stream = runner.run(call())
    await anext(stream)
    journal.intend("run:1:1")
    with pytest.raises(ResourceExhaustedError) as caught:
        await updates(runner, call("run:1:1"))
    assert caught.value.reason == "OVERLOADED"
    assert caught.value.retry_after_ms
    assert journal.begins == ["run:1:0"]
    await stream.aclose()


async def test_another_tenants_call_is_not_joined(journal: FakeJournal, owner: TaskOwner) -> None:
    lever = Lever()
    lever.wait = True
    runner = executor(journal, owner, lever)
    stream = runner.run(call())
    await anext(stream)
    with pytest.raises(ResourceExhaustedError):
        await updates(runner, call(tenant=UUID(int=7)))
    await stream.aclose()


async def test_a_large_result_goes_to_the_object_store(journal: FakeJournal, owner: TaskOwner) -> None:
    lever = Lever()
    lever.result = "ä" * INLINE_BYTES
    results = FakeResults([UnavailableError()])
    got = await outcome(executor(journal, owner, lever, results=results), call())
    assert results.objects == [lever.result.encode()]
    assert got.content_ref == "sha256:1"
    assert got.content.startswith("ä" * (PREVIEW_BYTES // 2) + "\n[the beginning of 131072 bytes")
    assert journal.completes == [got]


@pytest.mark.parametrize(
    ("results", "why"),
    [
        (None, "there is no object store"),
        (FakeResults([UnavailableError()] * 99), "the object store did not take it for 0.1 s"),
    ],
)
async def test_a_large_result_that_cannot_be_stored_is_cut_and_says_so(
    journal: FakeJournal, owner: TaskOwner, results: FakeResults | None, why: str
) -> None:
    lever = Lever()
    lever.result = "x" * (INLINE_BYTES + 1)
    got = await outcome(executor(journal, owner, lever, results=results, complete_seconds=0.1), call())
    assert got.state is CallState.COMPLETED
    assert got.content_ref == ""
    assert len(got.content) == INLINE_BYTES
    note = f"[cut: the beginning of {INLINE_BYTES + 1} bytes; the rest is lost, because {why}]"
    assert got.content.endswith(note)


async def test_those_who_watch_are_told_that_a_result_waits_for_the_object_store(
    journal: FakeJournal, owner: TaskOwner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution_module, "_TELL_AFTER", 0.01)
    monkeypatch.setattr(execution_module, "_TELL_EACH", 0.01)
    lever = Lever()
    lever.result = "x" * (INLINE_BYTES + 1)
    results = FakeResults([UnavailableError()])
    got = await updates(executor(journal, owner, lever, results=results), call())
    told = [one for one in got if one == Progress("the result waits for the store")]
    assert len(told) > 1
    assert isinstance(got[-1], Outcome)
    assert got[-1].content_ref == "sha256:1"
    assert await owner.wait_idle(5)


async def test_those_who_watch_are_told_that_an_outcome_waits_to_be_recorded(
    journal: FakeJournal, owner: TaskOwner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution_module, "_TELL_AFTER", 0.01)
    journal.complete_errors = [UnavailableError()]
    got = await updates(executor(journal, owner, Lever()), call())
    assert Progress("the outcome waits to be recorded") in got
    assert await owner.wait_idle(5)


@pytest.mark.parametrize("how", ["drain", "cancel"])
async def test_a_wait_for_the_object_store_ends_with_a_drain_or_a_cancel_and_the_outcome_is_kept(
    journal: FakeJournal, owner: TaskOwner, how: str
) -> None:
    lever = Lever(Effect.NON_IDEMPOTENT)
    lever.result = "x" * (INLINE_BYTES + 1)
    results = FakeResults([UnavailableError()] * 99)
    runner = executor(journal, owner, lever, results=results)
    running = owner.start(outcome(runner, call()), name="call")
    async with asyncio.timeout(5):
        while len(results.errors) == 99:  # noqa: ASYNC110
            await asyncio.sleep(0)
        if how == "drain":
            await runner.drain(0.0)
        else:
            assert runner.cancel("run:1:0", call().tenant_id)
        got = await running
    assert got.state is CallState.COMPLETED
    assert "the wait for the object store was ended" in got.content
    assert journal.completes == [got]


@pytest.mark.parametrize(
    ("result", "content"),
    [
        (None, ""),
        ({"a": "ö"}, '{"a": "ö"}'),
        (7, "7"),
        ("a\x00b", "ab"),
        ("a\ud800b", "a?b"),
    ],
)
async def test_results_become_text_that_can_be_stored(
    journal: FakeJournal, owner: TaskOwner, result: object, content: str
) -> None:
    lever = Lever()
    lever.result = result
    assert (await outcome(executor(journal, owner, lever), call())).content == content


async def test_a_result_that_is_not_json_is_a_failure(journal: FakeJournal, owner: TaskOwner) -> None:
    lever = Lever()
    lever.result = object()
    assert (await outcome(executor(journal, owner, lever), call())).reason == "TOOL_FAILED"


async def test_a_flood_of_progress_keeps_the_latest(journal: FakeJournal, owner: TaskOwner) -> None:
    lever = Lever()
    runner = executor(journal, owner, lever)
    lever.wait = True
    stream = runner.run(call())
    await anext(stream)
    for number in range(1000):
        lever.contexts[0].progress(f"{number}" + "x" * 5000)
    lever.release.set()
    got = [update async for update in stream]
    texts = [update.text for update in got if isinstance(update, Progress)]
    assert len(texts) <= 64
    assert texts[-1].startswith("999x")
    assert len(texts[-1]) == 2000
    assert isinstance(got[-1], Outcome)


async def test_a_drain_waits_for_calls_under_way(journal: FakeJournal, owner: TaskOwner) -> None:
    lever = Lever(Effect.NON_IDEMPOTENT)
    lever.wait = True
    runner = executor(journal, owner, lever)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(outcome(runner, call()))
        await asyncio.wait_for(lever.started.wait(), DEADLINE)
        draining = group.create_task(runner.drain(DEADLINE))
        await asyncio.sleep(0)
        journal.intend("run:1:1")
        with pytest.raises(UnavailableError):
            await updates(runner, call("run:1:1"))
        lever.release.set()
        await draining
    assert running.result().state is CallState.COMPLETED


@pytest.mark.parametrize("effect", [Effect.PURE, Effect.NON_IDEMPOTENT])
async def test_a_drain_that_runs_out_of_time_leaves_what_may_run_again(
    journal: FakeJournal, owner: TaskOwner, effect: Effect
) -> None:
    lever = Lever(effect)
    lever.wait = True
    runner = executor(journal, owner, lever)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(_reason(updates(runner, call())))
        await asyncio.wait_for(lever.started.wait(), DEADLINE)
        await runner.drain(0.0)
    if effect is Effect.PURE:
        assert running.result() == "SERVICE_UNAVAILABLE"
        assert journal.completes == []
        assert (await outcome(executor(journal, owner, Lever(effect)), call())).state is CallState.COMPLETED
    else:
        assert [done.state for done in journal.completes] == [CallState.UNKNOWN]


class FakeRuns:
    """Runs that are over when the test says so."""

    def __init__(self) -> None:
        self.ended = False
        self.asks: asyncio.Queue[str] = asyncio.Queue()
        self.error: HermeshError | None = None

    async def over(self, request: CallRequest) -> bool:
        self.asks.put_nowait(request.call_id)
        if self.error is not None:
            raise self.error
        return self.ended


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> FakeRuns:
    monkeypatch.setattr(execution_module, "ASK_SECONDS", 0.02)
    return FakeRuns()


@pytest.mark.parametrize("effect", [Effect.IDEMPOTENT, Effect.NON_IDEMPOTENT])
async def test_a_call_stops_when_its_run_is_over_though_nobody_cancels_it(
    journal: FakeJournal, owner: TaskOwner, runs: FakeRuns, effect: Effect
) -> None:
    journal.intend("run:1:0", effect)
    lever = Lever(effect, timeout=60)
    lever.wait = runs.ended = True
    got = await outcome(executor(journal, owner, lever, runs=runs), call())
    expected = CallState.UNKNOWN if effect is Effect.NON_IDEMPOTENT else CallState.FAILED
    assert (got.state, got.reason) == (expected, "CANCELLED")
    assert journal.completes == [got]


async def test_a_call_goes_on_while_its_run_does_and_while_that_cannot_be_said(
    journal: FakeJournal, owner: TaskOwner, runs: FakeRuns
) -> None:
    lever = Lever(timeout=60)
    lever.wait = True
    runner = executor(journal, owner, lever, runs=runs)
    waiting = asyncio.ensure_future(outcome(runner, call()))
    async with asyncio.timeout(DEADLINE):
        for error in (None, None, UnavailableError(), UnavailableError()):
            runs.error = error
            assert await runs.asks.get() == "run:1:0"
        lever.release.set()
        assert (await waiting).state is CallState.COMPLETED


async def test_a_quick_call_asks_nobody_about_its_run(
    journal: FakeJournal, owner: TaskOwner, runs: FakeRuns
) -> None:
    await outcome(executor(journal, owner, Lever(), runs=runs), call())
    assert runs.asks.empty()
    assert journal.acting == [False]


async def test_a_call_whose_run_is_over_and_that_does_not_stop_is_let_go(
    journal: FakeJournal, owner: TaskOwner, runs: FakeRuns
) -> None:
    lever = Lever(Effect.NON_IDEMPOTENT, timeout=60)
    lever.wait = lever.stubborn = runs.ended = True
    got = await outcome(executor(journal, owner, lever, runs=runs), call())
    assert got.state is CallState.UNKNOWN
    # The journal is told that it may still act: its session is not to be deleted yet.
    assert journal.acting == [True]
    lever.release.set()


async def test_the_journal_is_told_for_how_long_a_try_may_act(journal: FakeJournal, owner: TaskOwner) -> None:
    lever = Lever(timeout=3.0)
    runner = executor(journal, owner, lever)
    await outcome(runner, call())
    expected = execution_module.CALL_SECONDS + 3.0 + execution_module.STOP_SECONDS + lever.tool.settle_seconds
    assert journal.reach == [expected]
    journal.intend("run:1:1")
    await outcome(runner, call("run:1:1", arguments="[]"))
    assert journal.reach[1] == 0.0, "what cannot be run does not act"


async def test_a_permission_that_comes_too_late_is_not_used(
    journal: FakeJournal, owner: TaskOwner, monkeypatch: pytest.MonkeyPatch
) -> None:
    lever = Lever(Effect.NON_IDEMPOTENT)
    monkeypatch.setattr(execution_module, "CALL_SECONDS", -1.0)
    got = await outcome(executor(journal, owner, lever), call())
    assert (got.state, got.reason) == (CallState.FAILED, "TOOL_TIMEOUT")
    assert lever.calls == []
