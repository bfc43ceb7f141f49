"""A run always ends: by its own last write, and where that cannot be, by the store."""

import asyncio
from functools import partial

import pytest
from prometheus_client import REGISTRY

from hermesh.session.v1.resources_pb2 import RUN_STATUS_COMPLETED, RUN_STATUS_FAILED
from meshkit.errors import InternalError, UnavailableError
from services.agent.model.backends import Backends, Retry
from services.agent.model.errors import ModelTruncatedError, ModelUnavailableError
from services.agent.model.port import Finished, TextDelta, ToolCallDelta, Usage
from services.agent.runs.journal import RunJournal
from services.agent.runs.subscription import Subscription
from services.agent.runs.writer import RunWriter
from tests.unit.agent.fakes import FakeModel

HELLO = [[TextDelta("Hel")], [TextDelta("lo")], [Usage(3, 2, 1), Finished("stop")]]


def broken(*args, **kwargs):
    raise ValueError("it does not fit")


async def test_a_run_whose_end_cannot_be_written_is_ended_by_the_store(make_bench, monkeypatch):
    monkeypatch.setattr(RunJournal, "completed", broken)
    monkeypatch.setattr(RunJournal, "failed", broken)
    bench = make_bench(FakeModel(HELLO))
    claim, subscription = bench.store.new_claim("hi"), Subscription()
    active = bench.supervisor.begin(claim, subscription)
    await asyncio.wait_for(active.done.wait(), 30)
    run = bench.store.runs[claim.run.run_id]
    assert bench.store.failed == [(run.run_id, False)]
    assert active.outcome == "failed"
    assert run.types()[-1] == "run.failed"
    # Its callers were not told by this replica: they are sent to where the end is.
    while await subscription.next():
        pass
    assert subscription.reconnect == "moved"
    assert len(bench.model.requests) == 1


async def test_a_run_all_of_whose_events_are_refused_is_ended_by_the_store(make_bench):
    bench = make_bench(FakeModel(HELLO))
    bench.store.script = ["invalid"] * 20
    run = await bench.finish(bench.store.new_claim("hi"), timeout=30)
    assert bench.store.failed == [(run.run_id, True)]
    assert bench.outcome == "failed"
    assert run.status == RUN_STATUS_FAILED


async def test_a_cancel_that_cannot_be_written_ends_the_run_all_the_same(make_bench, monkeypatch):
    monkeypatch.setattr(RunJournal, "cancelled", broken)
    bench = make_bench(FakeModel([[TextDelta("a")], asyncio.Event()]))
    claim = bench.store.new_claim("hi")
    active = bench.supervisor.begin(claim)
    await bench.store.until(lambda: "text.delta" in bench.store.runs[claim.run.run_id].types())
    bench.supervisor.cancel(claim.run.run_id)
    await asyncio.wait_for(active.done.wait(), 30)
    assert bench.store.failed == [(claim.run.run_id, False)]


async def test_a_claimed_run_that_cannot_be_read_is_ended_by_the_store(make_bench):
    bench = make_bench(FakeModel(HELLO))
    run_id = bench.store.new_claim("hi").run.run_id
    row = bench.store.runs[run_id]
    row.events[0].data = "[]"
    with pytest.raises(InternalError):
        await bench.supervisor.execute(run_id)
    await bench.tasks.wait_idle(30)
    assert bench.store.failed == [(run_id, False)]
    assert row.status == RUN_STATUS_FAILED
    assert bench.supervisor.active == 0


async def test_a_store_that_does_not_answer_leaves_the_run_to_a_takeover(make_bench, monkeypatch):
    monkeypatch.setattr(RunJournal, "completed", broken)
    monkeypatch.setattr(RunJournal, "failed", broken)
    bench = make_bench(FakeModel(HELLO))

    async def away(*args, **kwargs):
        raise UnavailableError()

    monkeypatch.setattr(bench.store, "fail", away)
    await bench.finish(bench.store.new_claim("hi"), timeout=30)
    assert bench.outcome == "lost"


@pytest.mark.parametrize("how", ["cannot be made", "is too large"])
async def test_one_write_that_cannot_be_sent_breaks_no_other_run(make_bench, monkeypatch, how):
    bench = make_bench(FakeModel([[TextDelta("bad")], [Finished("stop")]], HELLO))
    bad = bench.store.new_claim("bad")
    real = RunWriter.take

    def take(writer, target):
        size = real(writer, target)
        if writer.run_id != bad.run.run_id:
            return size
        if how == "cannot be made":
            raise UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed")
        return 10**9

    monkeypatch.setattr(RunWriter, "take", take)
    await bench.finish(bad, timeout=30)
    assert bench.store.failed == [(bad.run.run_id, True)]
    good = await bench.finish(bench.store.new_claim("good"), timeout=30)
    assert good.status == RUN_STATUS_COMPLETED
    # Nothing broke: it is the first stream still.
    assert len(bench.store.streams) == 1


async def test_counts_of_tokens_beyond_all_bounds_are_no_reason_to_fail(make_bench):
    most = Usage(2**31 - 1, 2**31 - 1, 2**31 - 1)
    turn = [[ToolCallDelta(0, "add", "{}")], [most, Finished("tool_calls")]]
    bench = make_bench(FakeModel(turn, [[TextDelta("done")], [most, Finished("stop")]]))
    bench.tools.answers = {"add": "3"}
    run = await bench.finish(bench.store.new_claim("hi"), timeout=30)
    assert run.status == RUN_STATUS_COMPLETED
    assert run.data("usage")[0]["output_tokens"] == 2**31 - 1


# how often a model is asked


def written_or_over(run, attempts):
    return run.types().count("text.delta") == attempts or bool(run.status)


async def taken_over_until_it_ends(bench, claim):
    """A run each of whose agents is lost once it has written something."""
    run = bench.store.runs[claim.run.run_id]
    for attempt in range(1, 50):
        bench.supervisor.begin(claim if attempt == 1 else bench.store.take_over(run.run_id))
        await bench.store.until(partial(written_or_over, run, attempt), 30)
        if run.status:
            break
    await bench.tasks.wait_idle(30)
    return run


def requests(kind: str) -> float:
    """What the metric says by now."""
    return REGISTRY.get_sample_value("hermesh_agent_model_requests_total", {"kind": kind}) or 0.0


@pytest.mark.parametrize("prefill", [False, True])
async def test_the_model_requests_of_a_run_are_bounded_over_its_takeovers(make_bench, prefill):
    replies = [[[TextDelta("x")], asyncio.Event()] for _ in range(50)]
    bench = make_bench(FakeModel(*replies), llm_spare_requests=6, llm_prefill=prefill)
    before = {kind: requests(kind) for kind in ("first", "again")}
    run = await taken_over_until_it_ends(bench, bench.store.new_claim("hi"))
    assert run.status == RUN_STATUS_FAILED
    failed = run.data("run.failed")[0]
    assert (failed["code"], failed["reason"], failed["retryable"]) == (
        "RESOURCE_EXHAUSTED",
        "MODEL_REQUEST_LIMIT",
        False,
    )
    assert len(bench.model.requests) == 7
    assert {kind: requests(kind) - before[kind] for kind in before} == {"first": 1, "again": 6}
    assert [data["request"] for data in run.data("attempt.reset")] == ([] if prefill else [*range(2, 9)])


async def test_finished_turns_leave_the_spare_requests_as_they_are(make_bench):
    turns = [[[ToolCallDelta(0, "add", "{}")], [Finished("tool_calls")]] for _ in range(10)]
    bench = make_bench(FakeModel(*turns, HELLO), llm_spare_requests=0)
    bench.tools.answers = {"add": "3"}
    run = await bench.finish(bench.store.new_claim("hi"), timeout=30)
    assert run.status == RUN_STATUS_COMPLETED
    # Said only where it differs from the step's number.
    assert all(set(data) == {"step"} for data in run.data("step.started"))


async def test_a_repeated_request_is_counted_in_the_log_from_then_on(make_bench):
    broken_off = [[TextDelta("Hel")], ModelTruncatedError("broke")]
    call = [[ToolCallDelta(0, "add", "{}")], [Finished("tool_calls")]]
    bench = make_bench(FakeModel(broken_off, call, HELLO), llm_spare_requests=1)
    bench.tools.answers = {"add": "3"}
    run = await bench.finish(bench.store.new_claim("hi"), timeout=30)
    assert run.status == RUN_STATUS_COMPLETED
    assert [data["request"] for data in run.data("attempt.reset")] == [2]
    assert run.data("step.started") == [{"step": 1}, {"step": 2, "request": 3}]


async def test_each_try_at_each_backend_is_a_request(make_bench):
    backends = [
        (name, FakeModel(*[[ModelUnavailableError("away")] for _ in range(20)])) for name in ("one", "two")
    ]
    pool = Backends(backends, retry=Retry(10, 0.0001, 0.001), monotonic=asyncio.get_running_loop().time)
    bench = make_bench(pool, llm_spare_requests=4)
    run = await bench.finish(bench.store.new_claim("hi"), timeout=30)
    assert run.data("run.failed")[0]["reason"] == "MODEL_REQUEST_LIMIT"
    assert sum(len(model.requests) for _, model in backends) == 5
    # The limit is the run's: no backend is blamed for it.
    assert {backend.wrong for backend in pool.backends} == {"MODEL_UNAVAILABLE"}
