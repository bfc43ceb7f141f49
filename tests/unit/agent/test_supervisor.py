import asyncio

import pytest

from hermesh.session.v1.resources_pb2 import RUN_STATUS_COMPLETED
from meshkit.errors import NotFoundError, ResourceExhaustedError, UnavailableError
from services.agent.clients.session import NotClaimed
from services.agent.model.catalog import ModelCatalog
from services.agent.model.errors import ModelUnavailableError
from services.agent.model.port import Finished, ModelInfo, TextDelta, ToolCallDelta
from services.agent.runs.leases import LeaseKeeper
from services.agent.runs.subscription import Subscription
from tests.unit.agent.fakes import FakeModel

HELLO = [[TextDelta("Hello")], [Finished("stop")]]


async def test_a_dispatched_run_is_claimed_and_worked_on(make_bench):
    bench = make_bench(FakeModel(HELLO))
    claim = bench.store.new_claim("hi")
    active = await bench.supervisor.execute(claim.run.run_id)
    await active.done.wait()
    assert active.outcome == "completed"


async def test_a_run_that_is_here_already_is_not_claimed_again(make_bench):
    bench = make_bench(FakeModel([asyncio.Event()]))
    claim = bench.store.new_claim("hi")
    bench.supervisor.begin(claim)
    assert await bench.supervisor.execute(claim.run.run_id) == NotClaimed(elsewhere=True)


async def test_two_dispatches_of_one_run_at_once_claim_it_once(make_bench):
    bench = make_bench(FakeModel(HELLO))
    run_id = bench.store.new_claim("hi").run.run_id
    answers = await asyncio.gather(*(bench.supervisor.execute(run_id) for _ in range(3)))
    assert answers.count(NotClaimed(elsewhere=True)) == 2
    [active] = [one for one in answers if not isinstance(one, NotClaimed)]
    await active.done.wait()
    assert active.outcome == "completed"


async def test_what_was_claimed_is_worked_on_though_its_caller_left(make_bench):
    bench = make_bench(FakeModel(HELLO))
    run_id = bench.store.new_claim("hi").run.run_id
    caller = asyncio.ensure_future(bench.supervisor.kept(bench.supervisor.execute(run_id)))
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    await bench.store.until(lambda: "run.completed" in bench.store.runs[run_id].types())


async def test_a_caller_that_stays_hears_of_a_refusal(make_bench):
    bench = make_bench(FakeModel(), max_active_runs=1)
    with bench.supervisor.place(), pytest.raises(ResourceExhaustedError):
        await bench.supervisor.kept(bench.supervisor.execute("run"))


async def test_a_full_replica_says_when_to_come_back(make_bench):
    bench = make_bench(FakeModel([asyncio.Event()]), max_active_runs=1)
    bench.supervisor.begin(bench.store.new_claim("hi"))
    with pytest.raises(ResourceExhaustedError) as caught:
        await bench.supervisor.execute(bench.store.new_claim("hi").run.run_id)
    assert caught.value.reason == "OVERLOADED"
    assert caught.value.retry_after_ms


async def test_a_place_is_kept_while_a_claim_is_under_way(make_bench):
    bench = make_bench(FakeModel(HELLO), max_active_runs=1)
    with bench.supervisor.place(), pytest.raises(ResourceExhaustedError):
        await bench.supervisor.execute(bench.store.new_claim("hi").run.run_id)
    active = await bench.supervisor.execute(bench.store.new_claim("hi").run.run_id)
    await active.done.wait()


async def test_a_run_that_was_cancelled_before_its_claim_ends_at_once(make_bench):
    bench = make_bench(FakeModel())
    run = await bench.finish(bench.store.new_claim("hi", cancel_requested=True))
    assert bench.outcome == "cancelled"
    assert run.types()[-1] == "run.cancelled"


async def test_draining_finishes_the_turn_and_gives_the_run_up_at_the_step(make_bench):
    gate = asyncio.Event()
    turn = [[TextDelta("hm")], gate, [ToolCallDelta(0, "add", "{}")], [Finished("tool_calls")]]
    bench = make_bench(FakeModel(turn, HELLO), drain_delay_seconds=0, drain_seconds=10)
    bench.tools.answers = {"add": "3"}
    claim = bench.store.new_claim("hi")
    subscription = Subscription()
    active = bench.supervisor.begin(claim, subscription)
    run = bench.store.runs[claim.run.run_id]
    await bench.store.until(lambda: "text.delta" in run.types())
    drain = asyncio.ensure_future(bench.supervisor.drain())
    await asyncio.sleep(0)
    with pytest.raises(ResourceExhaustedError):
        await bench.supervisor.execute(run.run_id + "x")
    gate.set()
    await drain
    assert active.outcome == "released"
    assert bench.store.released == [run.run_id]
    assert run.types()[-1] == "tool.call"
    while await subscription.next():
        pass
    assert subscription.reconnect == "drain"
    bench.supervisor.draining = False
    done = await bench.finish(bench.store.take_over(run.run_id))
    assert done.status == RUN_STATUS_COMPLETED
    assert bench.tools.executed == [f"{run.run_id}:1:0"]


async def test_draining_gives_up_a_turn_that_does_not_end(make_bench, monkeypatch):
    monkeypatch.setattr("services.agent.runs.supervisor.RELEASE_MARGIN", 1.0)
    bench = make_bench(
        FakeModel([[TextDelta("Hel")], asyncio.Event()], HELLO), drain_delay_seconds=0, drain_seconds=1.05
    )
    claim = bench.store.new_claim("hi")
    active = bench.supervisor.begin(claim)
    run = bench.store.runs[claim.run.run_id]
    await bench.store.until(lambda: "text.delta" in run.types())
    await bench.supervisor.drain()
    assert active.outcome == "released"
    assert bench.store.released == [run.run_id]
    assert bench.model.closed == 1
    bench.supervisor.draining = False
    await bench.finish(bench.store.take_over(run.run_id))
    assert run.text() == "Hello"


async def test_leases_are_renewed_in_one_call_and_a_lost_one_stops_its_run(make_bench):
    bench = make_bench(FakeModel([asyncio.Event()], [asyncio.Event()]))
    lost, kept = bench.store.new_claim("a"), bench.store.new_claim("b")
    first, second = bench.supervisor.begin(lost), bench.supervisor.begin(kept)
    now = asyncio.get_running_loop().time()
    keeper = LeaseKeeper(bench.store, bench.supervisor.writers, bench.supervisor.cancel, lambda: now + 5)
    bench.store.runs[lost.run.run_id].fence += 1
    await keeper.renew_once()
    async with asyncio.timeout(2):
        await first.done.wait()
    assert len(bench.store.renewals) == 1
    assert len(bench.store.renewals[0]) == 2
    assert first.outcome == "lost"
    assert second.writer.lease_until == pytest.approx(now + 15)
    assert not second.done.is_set()


async def test_a_renewal_brings_cancels_that_no_stream_told(make_bench):
    bench = make_bench(FakeModel([asyncio.Event()]))
    active = bench.supervisor.begin(bench.store.new_claim("a"))
    bench.store.cancelled = [active.writer.run_id]
    keeper = LeaseKeeper(
        bench.store, bench.supervisor.writers, bench.supervisor.cancel, asyncio.get_running_loop().time
    )
    await keeper.renew_once()
    async with asyncio.timeout(2):
        await active.done.wait()
    assert active.outcome == "cancelled"


async def test_no_task_is_left_when_all_runs_are_over(make_bench):
    bench = make_bench(FakeModel(*([HELLO] * 20)))
    runs = [bench.supervisor.begin(bench.store.new_claim("hi")) for _ in range(20)]
    async with asyncio.timeout(5):
        for active in runs:
            await active.done.wait()
    assert await bench.tasks.wait_idle(5)
    assert bench.supervisor.active == 0


def events(count, size=10):
    from hermesh.common.v1.event_pb2 import Event

    return [Event(seq=place, data="x" * size) for place in range(count)]


async def test_a_slow_caller_gets_a_prefix_and_is_told_to_reconnect():
    subscription = Subscription(max_events=10, max_bytes=1000)
    subscription.push(events(8))
    subscription.push(events(8))
    subscription.push(events(1))
    assert len(await subscription.next()) == 8
    assert await subscription.next() is None
    assert subscription.reconnect == "slow_reader"


async def test_one_huge_batch_is_delivered_to_a_caller_that_keeps_up():
    subscription = Subscription(max_events=10, max_bytes=100)
    subscription.push(events(1, 1000))
    assert len(await subscription.next()) == 1
    subscription.close("drain")
    assert await subscription.next() is None
    assert subscription.reconnect == "drain"


class Backend:
    """A model backend's list of models."""

    def __init__(self, *names):
        self.names = names
        self.asked = 0

    async def list_models(self):
        self.asked += 1
        if not self.names:
            raise ModelUnavailableError("away")
        return [ModelInfo(name) for name in self.names]


async def test_the_default_model_needs_no_list():
    backend = Backend()
    catalog = ModelCatalog(backend, "mine", lambda: 0.0)
    assert await catalog.resolve("") == await catalog.resolve("mine") == "mine"
    assert backend.asked == 0


async def test_without_a_default_the_first_of_the_list_is_it():
    catalog = ModelCatalog(Backend("a", "b"), "", lambda: 0.0)
    assert await catalog.resolve("") == "a"
    assert await catalog.resolve("b") == "b"


async def test_an_unknown_model_is_looked_for_in_a_fresh_list_now_and_then():
    backend, now = Backend("a"), 0.0
    catalog = ModelCatalog(backend, "", lambda: now)
    for _ in range(5):
        with pytest.raises(NotFoundError):
            await catalog.resolve("b")
    assert backend.asked == 1
    now, backend.names = 10.0, ("a", "b")
    assert await catalog.resolve("b") == "b"


async def test_the_default_comes_first_in_the_list():
    catalog = ModelCatalog(Backend("a", "b"), "b", lambda: 0.0)
    assert [one.name for one in await catalog.models()] == ["b", "a"]


async def test_a_backend_that_is_away_is_unavailable():
    with pytest.raises(UnavailableError):
        await ModelCatalog(Backend(), "", lambda: 0.0).resolve("a")
