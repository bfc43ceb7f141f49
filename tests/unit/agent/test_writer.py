import asyncio
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hermesh.session.v1.resources_pb2 import Grant
from hermesh.session.v1.session_internal_service_pb2 import (
    APPEND_OUTCOME_COMMITTED,
    APPEND_OUTCOME_RETRY,
    AppendResult,
    RunAppend,
    StepCommit,
)
from meshkit.tasks import TaskOwner
from services.agent.runs.link import AppendLink
from services.agent.runs.subscription import Subscription
from services.agent.runs.writer import HIGH_WATER, RunWriter, WriterStopped
from tests.unit.agent.fakes import FakeStore


class Setup:
    """A store, a link and writers on it; time is set by hand."""

    def __init__(self, tasks):
        loop = asyncio.get_running_loop()
        self.ahead = 0.0
        self.monotonic = lambda: loop.time() + self.ahead
        self.store = FakeStore()
        self.cancelled = asyncio.Queue()
        self.link = AppendLink(
            self.store.open_stream, "agent-test", self.cancelled.put_nowait, self.monotonic, rate=1000
        )
        tasks.start(self.link.run(), name="link")

    def writer(self):
        claim = self.store.new_claim("hi")
        writer = RunWriter(
            claim.grant,
            lease_until=self.monotonic() + 10,
            now_ms=lambda: 1,
            schedule=self.link.schedule,
            monotonic=self.monotonic,
        )
        self.link.add(writer)
        return writer, self.store.runs[writer.run_id]


def assert_whole(run, text):
    assert [event.seq for event in run.events] == list(range(1, len(run.events) + 1))
    assert run.text() == text
    assert run.fences == sorted(run.fences)


@settings(max_examples=60, deadline=None)
@given(
    script=st.lists(
        st.sampled_from(["commit", "retry", "commit-retry", "break", "commit-break", "drain"]), max_size=12
    ),
    texts=st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=20),
    commits=st.sets(st.integers(0, 19)),
)
def test_whatever_happens_to_the_stream_the_log_has_every_event_once_and_in_order(script, texts, commits):
    async def scenario():
        async with TaskOwner() as tasks:
            setup = Setup(tasks)
            setup.store.script = [action for action in script if action != "drain"]
            writer, run = setup.writer()
            subscription = Subscription()
            writer.subscribe(subscription)
            for place, text in enumerate(texts):
                writer.text("text.delta", text)
                if place in commits:
                    writer.events([("usage", {}), ("step.started", {"step": place})], StepCommit(status=2))
                if place % 3 == 0:
                    await asyncio.sleep(0)
                if "drain" in script and place == len(texts) // 2 and setup.store.streams:
                    setup.store.say_draining()
            async with asyncio.timeout(20):
                await writer.flush()
            writer.close_subscriptions()
            got = []
            while events := await subscription.next():
                got += events
            assert_whole(run, "".join(texts))
            assert got == run.events[1:]

    with patch.multiple("services.agent.runs.link", BACKOFF=(0.0, 0.001), RETRY_DELAY=0.001):
        asyncio.run(scenario())


async def test_the_first_event_goes_out_at_once_and_the_rest_waits_for_its_answer():
    async with TaskOwner() as tasks:
        setup = Setup(tasks)
        setup.store.hold = True
        writer, run = setup.writer()
        writer.text("text.delta", "a")
        await setup.store.until(lambda: len(setup.store.held) == 1)
        for _ in range(100):
            writer.text("text.delta", "b")
        await asyncio.sleep(0)
        assert len(setup.store.held) == 1
        setup.store.release_held()
        await writer.flush()
        assert [event.data for event in run.events[1:]] == ['{"text":"a"}', '{"text":"' + "b" * 100 + '"}']


async def test_writes_of_many_runs_share_a_message():
    async with TaskOwner() as tasks:
        setup = Setup(tasks)
        setup.store.hold = True
        writers = [setup.writer()[0] for _ in range(20)]
        for writer in writers:
            writer.text("text.delta", "a")
        await setup.store.until(lambda: bool(setup.store.held))
        assert len(setup.store.held[0][1].appends) == 20
        setup.store.release_held()
        for writer in writers:
            await writer.flush()


async def test_the_seq_of_text_is_known_before_it_is_stored():
    async with TaskOwner() as tasks:
        setup = Setup(tasks)
        setup.store.hold = True
        writer, run = setup.writer()
        writer.events([("usage", {}), ("usage", {})])
        first = writer.text("text.delta", "a")
        await setup.store.until(lambda: bool(setup.store.held))
        second = writer.text("text.delta", "b")
        assert writer.text("text.delta", "c") == second
        writer.event("usage", {})
        third = writer.text("text.delta", "d")
        setup.store.release_held()
        await writer.flush()
        texts = {event.seq: event.data for event in run.events if event.type == "text.delta"}
        assert texts == {first: '{"text":"a"}', second: '{"text":"bc"}', third: '{"text":"d"}'}


async def test_a_stale_fence_stops_the_writer():
    async with TaskOwner() as tasks:
        setup = Setup(tasks)
        writer, run = setup.writer()
        stopped = []
        writer.on_stopped = stopped.append
        run.fence += 1
        writer.text("text.delta", "a")
        with pytest.raises(WriterStopped):
            await writer.flush()
        assert [one.kind for one in stopped] == ["lost"]
        assert len(run.events) == 1


async def test_a_run_that_was_taken_while_the_stream_was_broken_is_lost():
    async with TaskOwner() as tasks:
        setup = Setup(tasks)
        writer, run = setup.writer()
        writer.text("text.delta", "a")
        await writer.flush()
        run.fence += 1
        setup.store.break_streams()
        writer.text("text.delta", "b")
        with pytest.raises(WriterStopped):
            async with asyncio.timeout(5):
                await writer.flush()
        assert run.text() == "a"


async def test_a_lease_that_ran_out_by_our_clock_is_attached_anew_before_the_next_write():
    async with TaskOwner() as tasks:
        setup = Setup(tasks)
        writer, run = setup.writer()
        writer.text("text.delta", "a")
        await writer.flush()
        setup.ahead += 11
        writer.text("text.delta", "b")
        await writer.flush()
        assert writer.fence == run.fence == 2
        assert writer.lease_held
        assert run.fences == [1, 2]


async def test_a_draining_session_replica_is_left_for_another():
    async with TaskOwner() as tasks:
        setup = Setup(tasks)
        writer, run = setup.writer()
        writer.text("text.delta", "a")
        await writer.flush()
        setup.store.say_draining()
        await setup.store.until(lambda: len(setup.store.streams) == 2)
        writer.text("text.delta", "b")
        await writer.flush()
        assert_whole(run, "ab")
        assert run.fence == 2


async def test_a_producer_waits_when_too_much_is_not_stored():
    async with TaskOwner() as tasks:
        setup = Setup(tasks)
        setup.store.hold = True
        writer, run = setup.writer()
        writer.text("text.delta", "a")
        await setup.store.until(lambda: bool(setup.store.held))
        while not writer.full:
            writer.text("text.delta", "x" * 60_000)
        assert writer.full
        waiting = asyncio.ensure_future(writer.room())
        await asyncio.sleep(0)
        assert not waiting.done()
        setup.store.release_held()
        await waiting
        await writer.flush()
        assert len(run.text()) > HIGH_WATER


async def test_a_silent_session_replica_is_given_up(monkeypatch):
    monkeypatch.setattr("services.agent.runs.link.ANSWER_TIMEOUT", -1.0)
    monkeypatch.setattr("services.agent.runs.link.WATCH_SECONDS", 0.01)
    async with TaskOwner() as tasks:
        setup = Setup(tasks)
        setup.store.hold = True
        writer, run = setup.writer()
        writer.text("text.delta", "a")
        await setup.store.until(lambda: len(setup.store.streams) > 1)
        monkeypatch.setattr("services.agent.runs.link.ANSWER_TIMEOUT", 8.0)
        setup.store.hold = False
        setup.store.break_streams()
        async with asyncio.timeout(5):
            await writer.flush()
        assert_whole(run, "a")


async def test_a_writer_that_never_wrote_is_attached_anew_too_when_the_stream_breaks():
    async with TaskOwner() as tasks:
        setup = Setup(tasks)
        await setup.store.until(lambda: setup.store.streams)
        writer, run = setup.writer()
        setup.store.break_streams()
        await setup.store.until(lambda: run.fence == 2)
        writer.text("text.delta", "a")
        await writer.flush()
        assert run.fence == 2


async def test_a_lease_that_was_asked_for_before_the_stream_broke_is_attached_anew():
    async with TaskOwner() as tasks:
        setup = Setup(tasks)
        await setup.store.until(lambda: setup.store.streams)
        setup.store.break_streams()
        await setup.store.until(lambda: len(setup.store.streams) > 1)
        writer, run = setup.writer()
        writer.text("text.delta", "a")
        await writer.flush()
        assert run.fence == 2


async def test_text_faster_than_anyone_reads_gathers_and_slow_text_does_not_wait_for_it():
    async with TaskOwner() as tasks:
        setup = Setup(tasks)
        fast, fast_run = setup.writer()
        slow, slow_run = setup.writer()
        for writer in (fast, slow):
            writer.text("text.delta", "first ")
            await writer.flush()
        fast.text("text.delta", "x" * 1000)
        await setup.store.until(lambda: "x" in fast_run.text())
        assert fast.fast
        fast.text("text.delta", " gathers")
        slow.text("text.delta", "goes")
        await setup.store.until(lambda: "goes" in slow_run.text())
        assert not slow.fast
        assert "gathers" not in fast_run.text()
        fast.text("text.delta", " with this")
        await setup.store.until(lambda: "gathers" in fast_run.text())
        assert fast_run.text().endswith(" gathers with this")


async def test_a_process_says_that_it_is_new_as_long_as_its_former_one_may_hold_leases(monkeypatch):
    async with TaskOwner() as tasks:
        setup = Setup(tasks)
        setup.store.hold = True
        for opened in (1, 2, 3):
            await setup.store.until(lambda opened=opened: len(setup.store.held) == opened)
            if opened == 1:
                setup.writer()
            if opened == 2:
                monkeypatch.setattr("services.agent.runs.link.NEW_SECONDS", 0.0)
            # The last time the link is cancelled while its stream breaks, and ends all the same.
            setup.store.break_streams()
    assert [request.owner for _, request in setup.store.held] == ["agent-test"] * 3
    assert [request.new_process for _, request in setup.store.held] == [True, True, False]


async def test_a_writer_that_its_own_unheard_re_attach_fenced_goes_on():
    async with TaskOwner() as tasks:
        setup = Setup(tasks)
        writer, run = setup.writer()
        writer.text("text.delta", "a")
        await writer.flush()
        run.fence += 1
        setup.store.unheard.add(run.run_id)
        writer.text("text.delta", "b")
        async with asyncio.timeout(5):
            await writer.flush()
        assert_whole(run, "ab")
        assert run.fence == 3


async def test_cancel_notices_are_passed_on():
    async with TaskOwner() as tasks:
        setup = Setup(tasks)
        writer, run = setup.writer()
        writer.text("text.delta", "a")
        await writer.flush()
        setup.store.say_cancelled(run.run_id)
        async with asyncio.timeout(2):
            assert await setup.cancelled.get() == run.run_id


async def test_a_stream_that_its_peer_cancelled_is_opened_anew():
    async with TaskOwner() as tasks:
        setup = Setup(tasks)
        writer, run = setup.writer()
        writer.text("text.delta", "a")
        await writer.flush()
        setup.store.streams[-1].cancel_by_peer()
        writer.text("text.delta", "b")
        async with asyncio.timeout(5):
            await writer.flush()
        assert_whole(run, "ab")


async def test_under_load_text_gathers_but_a_first_word_and_an_end_do_not_wait(monkeypatch):
    monkeypatch.setattr("services.agent.runs.link.MAX_PACE", 1000.0)
    monkeypatch.setattr("services.agent.runs.link.FEW_RUNS", 1)
    async with TaskOwner() as tasks:
        setup = Setup(tasks)
        setup.link._rate = 0.001
        writer, run = setup.writer()
        writer.events([("step.started", {"step": 1})])
        writer.text("text.delta", "a")
        await writer.flush()
        for _ in range(10):
            writer.text("text.delta", "b")
            await asyncio.sleep(0)
        assert run.text() == "a"
        writer.events([("usage", {})])
        async with asyncio.timeout(2):
            await writer.flush()
        assert run.text() == "a" + "b" * 10
        assert run.types() == ["run.created", "step.started", "text.delta", "text.delta", "usage"]


async def test_few_runs_write_when_they_have_something(monkeypatch):
    monkeypatch.setattr("services.agent.runs.link.MIN_PACE", 1000.0)
    async with TaskOwner() as tasks:
        setup = Setup(tasks)
        writer, run = setup.writer()
        for text in "ab":
            writer.text("text.delta", text)
            async with asyncio.timeout(5):
                await setup.store.until(lambda text=text: run.text().endswith(text))
        assert setup.store.messages == 2


async def test_text_that_gathered_goes_out_by_itself(monkeypatch):
    monkeypatch.setattr("services.agent.runs.link.FEW_RUNS", 1)
    async with TaskOwner() as tasks:
        setup = Setup(tasks)
        setup.link._rate = 50
        writer, run = setup.writer()
        for text in "abc":
            writer.text("text.delta", text)
            await asyncio.sleep(0)
        async with asyncio.timeout(2):
            await writer.flush()
        assert run.text() == "abc"


async def test_a_turns_opening_waits_for_a_first_word_that_comes_soon():
    async with TaskOwner() as tasks:
        setup = Setup(tasks)
        writer, run = setup.writer()
        writer.event("run.started", {}, patient=True)
        writer.event("step.started", {}, patient=True)
        await asyncio.sleep(0)
        writer.text("text.delta", "a")
        await writer.flush()
        assert setup.store.appends == 1
        assert run.types() == ["run.created", "run.started", "step.started", "text.delta"]


async def test_a_turns_opening_goes_out_by_itself_when_no_word_comes():
    async with TaskOwner() as tasks:
        setup = Setup(tasks)
        writer, run = setup.writer()
        writer.event("run.started", {}, patient=True)
        await setup.store.until(lambda: "run.started" in run.types())


async def test_runs_share_a_beat(monkeypatch):
    monkeypatch.setattr("services.agent.runs.link.MAX_PACE", 1000.0)
    monkeypatch.setattr("services.agent.runs.link.FEW_RUNS", 1)
    async with TaskOwner() as tasks:
        setup = Setup(tasks)
        setup.link._rate = 0.001
        runs = []
        for _ in range(3):
            writer, run = setup.writer()
            writer.text("text.delta", "a")
            await writer.flush()
            writer.text("text.delta", "b")
            await asyncio.sleep(0)
            runs.append(run)
        assert [run.text() for run in runs] == ["a", "a", "a"]
        setup.store.hold = True
        setup.link._beats[False]._fire()
        await setup.store.until(lambda: setup.store.held)
        [(_, message)] = setup.store.held
        assert {append.run_id for append in message.appends} == {run.run_id for run in runs}


async def test_a_run_that_is_claimed_anew_is_not_kept_waiting_by_its_writer_before():
    async with TaskOwner() as tasks:
        setup = Setup(tasks)
        former, run = setup.writer()
        former.event("run.started", {"attempt": 1}, patient=True)
        claim = setup.store.take_over(run.run_id)
        writer = RunWriter(
            claim.grant,
            lease_until=setup.monotonic() + 10,
            now_ms=lambda: 1,
            schedule=setup.link.schedule,
            monotonic=setup.monotonic,
        )
        setup.link.add(writer)
        writer.event("run.started", {"attempt": 2}, patient=True)
        await setup.store.until(lambda: run.types()[-1] == "run.started", 30)
        assert run.data("run.started") == [{"attempt": 2}]


async def test_an_answer_counts_for_its_own_write_alone_though_one_without_events_has_the_same_place():
    """A write that was to be sent again goes by a re-attach before: the timer finds it under way already."""
    claim = FakeStore().new_claim("hi")
    writer = RunWriter(
        claim.grant, lease_until=10, now_ms=lambda: 1, schedule=lambda writer: None, monotonic=lambda: 0.0
    )
    seq = claim.grant.next_seq
    stored = Subscription()
    writer.subscribe(stored)
    writer.events([], StepCommit())
    writer.event("step.started", {"step": 1})
    writer.take(RunAppend())
    assert writer.answered(AppendResult(first_seq=seq, outcome=APPEND_OUTCOME_RETRY))
    writer.detach()
    grant = Grant()
    grant.CopyFrom(claim.grant)
    grant.fence += 1
    writer.reattached(grant, 10)
    writer.take(RunAppend())
    writer.send_again(seq)
    assert not writer.ready
    # The next one has the same place, and nothing of it is stored by what was said of the first.
    writer.answered(AppendResult(first_seq=seq, outcome=APPEND_OUTCOME_COMMITTED, next_seq=seq))
    assert writer.ready
    writer.take(RunAppend())
    writer.send_again(seq)
    assert not writer.ready
    assert not stored.queued
    writer.answered(AppendResult(first_seq=seq, outcome=APPEND_OUTCOME_COMMITTED, next_seq=seq + 1))
    assert stored.queued == 1
