"""A run that has written much is moved by pages, writes by pieces, and is told when it is too large."""

import asyncio

import grpc.aio
import pytest
from grpc import StatusCode
from grpc.aio import AioRpcError, Metadata

from hermesh.common.v1.event_pb2 import Event
from hermesh.session.v1.resources_pb2 import (
    RUN_STATUS_COMPLETED,
    RUN_STATUS_FAILED,
    TOOL_CALL_STATE_COMPLETED,
    ContextPosition,
    Message,
    RunContext,
)
from hermesh.session.v1.session_internal_service_pb2 import ReadContextResponse
from meshkit.errors import AbortedError, UnavailableError
from services.agent.clients.session import SessionClient
from services.agent.model.port import Finished, ReasoningDelta, TextDelta, ToolCallDelta
from services.agent.runs import bundle as bundle_module
from services.agent.runs import journal, subscription
from services.agent.runs.bundle import BundledSubscription, Bundles
from services.agent.runs.subscription import Subscription
from services.agent.settings import AgentSettings
from tests.unit.agent.fakes import FakeModel

HELLO = [[TextDelta("Hello")], [Finished("stop")]]
MIB = 1024 * 1024


def calls(count):
    made = [ToolCallDelta(place, "add", "{}") for place in range(count)]
    return [made, [Finished("tool_calls")]]


async def half_done(bench, *, answer="3", count=4):
    """A run that has done one step and was cut off in its second, as the store has it."""
    bench.tools.answers = {"add": answer}
    claim = bench.store.new_claim("sum")
    active = bench.supervisor.begin(claim)
    run = bench.store.runs[claim.run.run_id]
    await bench.store.until(lambda: run.types().count("text.delta") == 1)
    run.fence += 1  # another replica's from here on
    active.runner._stop("lost")
    await active.done.wait()
    assert len(run.messages) == 2 + count
    return run


def gated(count=4):
    return FakeModel(calls(count), [[TextDelta("Hel")], asyncio.Event()], HELLO)


@pytest.mark.parametrize("page", [0, 1, 2, 4, 6])
async def test_a_takeover_reads_a_long_run_by_pages_and_gives_the_model_the_same(make_bench, page):
    bench = make_bench(gated())
    run = await half_done(bench)
    before = bench.model.requests[1].messages
    bench.store.page = page
    await bench.finish(bench.store.take_over(run.run_id))
    assert run.status == RUN_STATUS_COMPLETED
    assert bench.model.requests[2].messages == before
    [reset] = run.data("attempt.reset")
    assert (reset["from_seq"], reset["reason"]) == (run.types().index("text.delta") + 1, "taken_over")
    assert bench.store.rests == ([(run.fence, page)] if 0 < page < 6 else [])


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(AbortedError("FENCE_STALE", ""), "lost"), (UnavailableError("SERVICE_UNAVAILABLE", ""), "released")],
)
async def test_a_run_whose_context_cannot_be_read_is_left_to_another_replica(make_bench, error, outcome):
    bench = make_bench(gated())
    run = await half_done(bench)
    bench.store.page, bench.store.rest_error = 1, error
    await bench.finish(bench.store.take_over(run.run_id))
    assert bench.outcome == outcome
    assert bench.store.released == ([run.run_id] if outcome == "released" else [])
    assert len(bench.model.requests) == 2


async def test_the_results_of_a_step_become_messages_in_several_commits(make_bench, monkeypatch):
    monkeypatch.setattr(journal, "MAX_COMMIT", 250)
    bench = make_bench(FakeModel(calls(6), HELLO))
    bench.tools.answers = {"add": "x" * 100}
    run = await bench.finish(bench.store.new_claim("sum"))
    assert run.status == RUN_STATUS_COMPLETED
    assert [message.tool_call_id for message in run.messages if message.role == "tool"] == [
        f"{run.run_id}:1:{place}" for place in range(6)
    ]
    assert [event.seq for event in run.events] == list(range(1, len(run.events) + 1))
    assert "" not in run.types()


async def test_a_takeover_between_two_of_these_commits_stores_no_result_twice(make_bench):
    bench = make_bench(FakeModel(calls(4), [[TextDelta("Hel")], asyncio.Event()], HELLO))
    run = await half_done(bench)
    # As if the last two results were not yet messages, and nothing of the next step had begun.
    del run.messages[-2:]
    second = run.types().index("step.started", run.types().index("tool.result"))
    del run.events[second:]
    run.next_seq = len(run.events) + 1
    for entry in run.calls.values():
        entry.state, entry.content = TOOL_CALL_STATE_COMPLETED, "3"
    await bench.finish(bench.store.take_over(run.run_id))
    assert run.status == RUN_STATUS_COMPLETED
    assert [message.tool_call_id for message in run.messages if message.role == "tool"] == [
        f"{run.run_id}:1:{place}" for place in range(4)
    ]
    assert len(bench.tools.executed) == 4


async def test_a_run_that_wrote_more_than_it_may_fails_and_says_so(make_bench):
    model = FakeModel(*[calls(4) for _ in range(16)])
    bench = make_bench(model, max_run_bytes=MIB)
    bench.tools.answers = {"add": "é" * 50_000}
    run = await bench.finish(bench.store.new_claim("sum"))
    assert run.status == RUN_STATUS_FAILED
    (failed,) = run.data("run.failed")
    assert (failed["code"], failed["reason"]) == ("RESOURCE_EXHAUSTED", "RUN_TOO_LARGE")
    assert not failed["retryable"]
    # 400 kB of results a turn: the third passes the bound, and the model is not asked a fourth time.
    assert len(model.requests) == 3
    # What was done is in the conversation.
    assert [message.role for message in run.messages].count("tool") == 12


async def test_what_a_run_wrote_before_a_takeover_counts(make_bench):
    bench = make_bench(gated(), max_run_bytes=MIB)
    run = await half_done(bench, answer="x" * 200_000)
    before = len(bench.model.requests)
    run.events.insert(0, Event(run_id=run.run_id, seq=0, type="reasoning.delta", data="r" * MIB))
    claim = bench.store.take_over(run.run_id)
    del run.events[0]
    await bench.finish(claim)
    assert run.data("run.failed")[0]["reason"] == "RUN_TOO_LARGE"
    assert len(bench.model.requests) == before


async def test_endless_reasoning_is_cut_off_like_an_endless_reply(make_bench):
    piece = [ReasoningDelta("r" * 100_000)]
    bench = make_bench(FakeModel([*[piece] * 50, [Finished("stop")]]))
    run = await bench.finish(bench.store.new_claim("think"))
    assert run.status == RUN_STATUS_COMPLETED
    assert run.data("run.completed")[0]["finish_reason"] == "length"
    assert sum(len(data["text"]) for data in run.data("reasoning.delta")) < 2 * MIB


def event(seq, size):
    return Event(run_id="r", seq=seq, type="tool.result", data="x" * size)


async def test_a_caller_gets_many_large_events_in_messages_of_bounded_size(monkeypatch):
    monkeypatch.setattr(subscription, "MAX_TAKEN", 100)
    caller = Subscription()
    caller.push([event(seq, 60) for seq in range(1, 8)])
    caller.close()
    taken = []
    while (events := await caller.next()) is not None:
        taken.append([one.seq for one in events])
    assert taken == [[1, 2], [3, 4], [5, 6], [7]]


async def test_a_bundle_carries_them_so_too(monkeypatch):
    monkeypatch.setattr(subscription, "MAX_TAKEN", 100)
    monkeypatch.setattr(bundle_module, "MAX_CARRIED", 100)
    bundle = Bundles().bundle("b")
    caller = BundledSubscription(bundle)
    caller.push([event(seq, 60) for seq in range(2, 8)])
    frames = []
    async for response in caller.responses():
        frames.append([one.seq for one in response.frame.events])
        if len(frames) == 2:
            caller.push([event(seq, 60) for seq in range(8, 12)])
            caller.close("moved")
    assert [seq for frame in frames for seq in frame] == list(range(2, 12))
    assert max(map(len, frames)) == 2


class FakePages:
    """The session service's ReadContext: three pages; what a script names goes wrong, once each."""

    def __init__(self, *script):
        self.script = list(script)
        self.asked = []

    def ReadContext(self, request, metadata):
        self.asked.append((request.fence, request.position.message))
        return FakeStream(self, request.position.message)


class FakeStream:
    def __init__(self, pages, after):
        self.pages, self.after = pages, after

    async def __aiter__(self):
        for place in range(self.after + 1, 4):
            if self.pages.script and self.pages.script[0][0] == place:
                what = self.pages.script.pop(0)[1]
                if what == "ends":
                    return
                raise AioRpcError(what, Metadata(), Metadata())
            context = RunContext(messages=[Message(content=str(place))])
            if place < 3:
                context.next.message = place
            yield ReadContextResponse(context=context)

    def cancel(self):
        return True


@pytest.mark.parametrize(
    "script", [[], [(1, StatusCode.UNAVAILABLE)], [(2, "ends"), (3, StatusCode.UNAVAILABLE)]]
)
async def test_pages_go_on_where_a_session_replica_left_off(script):
    fences = iter(range(7, 20))
    async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
        client = SessionClient(
            channel, AgentSettings(llm_base_url="http://m.invalid/v1", mesh_token="t"), "agent-1"
        )
        fake = client._internal = FakePages(*script)
        pages = await client.rest("r", lambda: next(fences), ContextPosition())
    assert [page.messages[0].content for page in pages] == ["1", "2", "3"]
    begun = [0, *[place - 1 for place, _ in script]]
    assert fake.asked == list(zip(range(7, 20), begun, strict=False))


async def test_a_lease_that_is_lost_while_pages_are_read_is_said_at_once():
    async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
        client = SessionClient(
            channel, AgentSettings(llm_base_url="http://m.invalid/v1", mesh_token="t"), "agent-1"
        )
        client._internal = FakePages((2, StatusCode.ABORTED))
        with pytest.raises(AbortedError):
            await client.rest("r", lambda: 7, ContextPosition())
