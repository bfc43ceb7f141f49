"""The streams of runs as one bundle: an agent's real half, and streams that overtake each other."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import bundle as gateway_bundle
from gateway.bundle import MAX_UNREAD, RunCall, RunCalls
from hermesh.agent.v1.agent_service_pb2 import RunRequest, RunResponse
from hermesh.common.v1.event_pb2 import Event, Frame
from services.agent.runs.bundle import Bundle, BundledSubscription


def event(run: str, seq: int, data: str = "{}") -> Event:
    return Event(run_id=run, seq=seq, type="text.delta", data=data)


class Call:
    """A FAKE call of grpc.aio: what the test puts in comes out."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[Any] = asyncio.Queue()
        self.cancelled = False

    def put(self, *items: Any) -> None:
        for item in items:
            self.queue.put_nowait(item)

    async def read(self) -> Any:
        item = await self.queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def cancel(self) -> bool:
        if not self.cancelled:
            self.cancelled = True
            self.put(asyncio.CancelledError())
        return True


class Agents:
    """A FAKE stub: each Run is a `Call`."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.bundles: set[str] = set()

    def Run(self, request: RunRequest, *, metadata: Any) -> Call:
        self.bundles.add(request.bundle)
        self.calls.append(Call())
        return self.calls[-1]


Using = Callable[[Agents, RunCalls], Awaitable[None]]


def using(body: Using) -> None:
    async def run() -> None:
        agents = Agents()
        runs = RunCalls(agents)
        try:
            async with asyncio.timeout(10):
                await body(agents, runs)
        finally:
            await runs.close()

    asyncio.run(run())


def own(run: str, *seqs: int, last: int = 0, reason: str = "") -> RunResponse:
    frame = Frame(events=[event(run, seq) for seq in seqs])
    if reason:
        frame.reconnect.reason = reason
    return RunResponse(frame=frame, last_seq=last)


def carried(*frames: tuple[str, tuple[int, ...]]) -> RunResponse:
    return RunResponse(others=[Frame(events=[event(run, seq) for seq in seqs]) for run, seqs in frames])


async def begun(agents: Agents, runs: RunCalls) -> tuple[RunCall, RunCall]:
    """Begins run a, run b, of which the first event was read, and a third; returns the last two."""
    runs.run(RunRequest())
    b, third = runs.run(RunRequest()), runs.run(RunRequest())
    agents.calls[0].put(own("a", 1))
    agents.calls[1].put(own("b", 1))
    await b.read()
    return b, third


async def read_all(call: RunCall) -> tuple[list[int], str]:
    """Reads to the end; returns the seqs and the reason of the reconnect, if there was one."""
    seqs: list[int] = []
    reason = ""
    while (passed := await call.read()) is not grpc.aio.EOF:
        seqs += [each.seq for each in passed.frame.events]
        reason = passed.frame.reconnect.reason or reason
    return seqs, reason


def test_all_runs_of_a_gateway_are_one_bundle() -> None:
    async def body(agents: Agents, runs: RunCalls) -> None:
        for _ in range(3):
            runs.run(RunRequest(session_id="s"))
        assert len(agents.bundles) == 1
        assert "" not in agents.bundles

    using(body)


def test_a_run_reads_what_another_stream_carried() -> None:
    async def body(agents: Agents, runs: RunCalls) -> None:
        a, b = runs.run(RunRequest()), runs.run(RunRequest())
        first, second = agents.calls
        first.put(own("a", 1))
        second.put(own("b", 1))
        await b.read()
        first.put(carried(("b", (2, 3))), own("a", 2, last=2), grpc.aio.EOF)
        second.put(own("b", last=3), grpc.aio.EOF)
        assert await read_all(b) == ([2, 3], "")
        assert await read_all(a) == ([1, 2], "")

    using(body)


def test_what_came_before_its_run_was_known_is_kept_for_it() -> None:
    async def body(agents: Agents, runs: RunCalls) -> None:
        runs.run(RunRequest())
        b = runs.run(RunRequest())
        first, second = agents.calls
        first.put(own("a", 1), carried(("b", (2,))), carried(("b", (3,))))
        await asyncio.sleep(0.01)
        second.put(own("b", 1), own("b", 4, last=4), grpc.aio.EOF)
        assert await read_all(b) == ([1, 2, 3, 4], "")

    using(body)


def test_the_end_waits_for_what_is_under_way_on_another_stream() -> None:
    async def body(agents: Agents, runs: RunCalls) -> None:
        runs.run(RunRequest())
        b = runs.run(RunRequest())
        first, second = agents.calls
        second.put(own("b", 1), own("b", 4, last=4, reason="drain"), grpc.aio.EOF)
        reading = asyncio.ensure_future(read_all(b))
        await asyncio.sleep(0.01)
        assert not reading.done()
        first.put(carried(("b", (3,))), carried(("b", (2,))))
        assert await reading == ([1, 2, 3, 4], "drain")

    using(body)


def test_a_second_call_about_the_same_run_does_not_take_what_is_the_first_one_s() -> None:
    async def body(agents: Agents, runs: RunCalls) -> None:
        b, again = await begun(agents, runs)
        first, second, third = agents.calls
        third.put(own("b", 1, last=1, reason="not_claimed"), grpc.aio.EOF)
        assert await read_all(again) == ([1], "not_claimed")
        first.put(carried(("b", (2, 3))))
        second.put(own("b", last=3), grpc.aio.EOF)
        assert await read_all(b) == ([2, 3], "")

    using(body)


def test_a_call_takes_the_place_of_one_about_the_same_run_that_is_over() -> None:
    async def body(agents: Agents, runs: RunCalls) -> None:
        left, b = await begun(agents, runs)
        first, _, third = agents.calls
        left.cancel()
        third.put(own("b", 1))
        await b.read()
        first.put(carried(("b", (2,))))
        third.put(own("b", last=2), grpc.aio.EOF)
        assert await read_all(b) == ([2], "")

    using(body)


def test_what_does_not_come_is_left_to_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_bundle, "PATIENCE", 0.02)

    async def body(agents: Agents, runs: RunCalls) -> None:
        for last in (own("b", last=4, reason="drain"), own("b", 4, last=4), own("b", last=4)):
            call = runs.run(RunRequest())
            agents.calls[-1].put(own("b", 1), carried(("b", (3,))), last, grpc.aio.EOF)
            assert await read_all(call) == ([1], "")

    using(body)


def test_an_error_comes_after_what_was_read() -> None:
    async def body(agents: Agents, runs: RunCalls) -> None:
        call = runs.run(RunRequest())
        error = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata())
        agents.calls[0].put(own("a", 1, 2), error)
        assert len((await call.read()).frame.events) == 2
        with pytest.raises(grpc.aio.AioRpcError):
            await call.read()

    using(body)


def test_a_call_that_the_other_side_cancelled_ends() -> None:
    async def body(agents: Agents, runs: RunCalls) -> None:
        call = runs.run(RunRequest())
        agents.calls[0].put(own("a", 1), asyncio.CancelledError())
        assert await read_all(call) == ([1], "")

    using(body)


def test_a_reader_that_falls_behind_is_sent_to_the_log_and_holds_nobody_up() -> None:
    async def body(agents: Agents, runs: RunCalls) -> None:
        slow, other = runs.run(RunRequest()), runs.run(RunRequest())
        first, second = agents.calls
        second.put(own("b", 1))
        first.put(own("a", 1))
        for seq in range(2, 12):
            big = event("a", seq, "x" * (MAX_UNREAD // 4))
            first.put(RunResponse(frame=Frame(events=[big]), others=[Frame(events=[event("b", seq)])]))
        second.put(own("b", last=11), grpc.aio.EOF)
        assert await read_all(other) == (list(range(1, 12)), "")
        seqs, reason = await read_all(slow)
        assert seqs == list(range(1, len(seqs) + 1))
        assert len(seqs) < 11
        assert reason == "slow_reader"

    using(body)


def test_a_stream_without_a_reader_goes_on_while_it_carries_for_others() -> None:
    async def body(agents: Agents, runs: RunCalls) -> None:
        a, b = runs.run(RunRequest()), runs.run(RunRequest())
        first, second = agents.calls
        second.put(own("b", 1))
        first.put(own("a", 1), carried(("b", (2,))))
        assert len((await b.read()).frame.events) == 1
        assert len((await b.read()).frame.events) == 1
        a.cancel()
        assert not first.cancelled
        with pytest.raises(asyncio.CancelledError):
            await read_all(a)
        first.put(own("a", 2), carried(("b", (3,))))
        second.put(own("b", last=3), grpc.aio.EOF)
        assert await read_all(b) == ([3], "")

    using(body)


def test_a_stream_without_a_reader_that_falls_silent_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last read began while it still had a reader."""
    monkeypatch.setattr(gateway_bundle, "_SILENCE", 0.05)

    async def body(agents: Agents, runs: RunCalls) -> None:
        call = runs.run(RunRequest())
        agents.calls[0].put(own("a", 1), carried(("b", (2,))))
        await call.read()
        call.cancel()
        assert not agents.calls[0].cancelled
        while not agents.calls[0].cancelled:  # noqa: ASYNC110 -- no event tells of it
            await asyncio.sleep(0.01)

    using(body)


def test_a_stream_that_carries_nothing_is_cancelled_with_its_reader() -> None:
    async def body(agents: Agents, runs: RunCalls) -> None:
        call = runs.run(RunRequest())
        agents.calls[0].put(own("a", 1))
        await call.read()
        call.cancel()
        assert agents.calls[0].cancelled

    using(body)


def test_a_stream_that_has_said_its_last_ends_by_itself() -> None:
    async def body(agents: Agents, runs: RunCalls) -> None:
        call = runs.run(RunRequest())
        agents.calls[0].put(own("a", 1, 2, last=2))
        assert await read_all(call) == ([1, 2], "")
        call.cancel()
        assert not agents.calls[0].cancelled
        agents.calls[0].put(grpc.aio.EOF)

    using(body)


def test_strays_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_bundle, "PATIENCE", 0.01)

    async def body(agents: Agents, runs: RunCalls) -> None:
        runs.run(RunRequest())
        agents.calls[0].put(own("a", 1), *(carried((f"gone-{n}", (2,))) for n in range(2000)))
        await asyncio.sleep(0.005)
        assert 0 < sum(len(frames) for strays in runs._strays for frames in strays.values()) <= 1000
        while any(runs._strays):  # noqa: ASYNC110 -- no event tells of it
            await asyncio.sleep(0.01)

    using(body)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.integers(0, 3), st.integers(1, 4)),
        st.tuples(st.just("begin"), st.integers(0, 3)),
        st.tuples(st.just("close"), st.integers(0, 3), st.sampled_from(["", "drain"])),
        st.tuples(st.just("pass"), st.integers(0, 3), st.integers(1, 5)),
    ),
    max_size=60,
)


@given(STEPS)
def test_however_streams_overtake_each_other_every_run_reads_its_log_once_in_order(steps: list[Any]) -> None:
    """A stream keeps its own order; between streams, and between them and their readers, there is none."""

    async def body(agents: Agents, runs: RunCalls) -> None:
        bundle = Bundle()
        names = "abcd"
        subscriptions = [BundledSubscription(bundle) for _ in names]
        stored = [1] * 4
        calls: dict[int, RunCall] = {}
        under_way: list[list[Any]] = [[] for _ in names]
        pumps: list[asyncio.Task[None]] = []

        async def pump(number: int) -> None:
            under_way[number].append(RunResponse(frame=Frame(events=[event(names[number], 1)])))
            async for response in subscriptions[number].responses():
                under_way[number].append(response)
            under_way[number].append(grpc.aio.EOF)

        def begin(number: int) -> None:
            if number not in calls:
                calls[number] = runs.run(RunRequest())
                wires[number] = agents.calls[-1]
                pumps.append(asyncio.ensure_future(pump(number)))

        wires: dict[int, Call] = {}
        for step in steps:
            number = step[1]
            if step[0] == "begin":
                begin(number)
            elif step[0] == "push" and not subscriptions[number].closed:
                first = stored[number] + 1
                stored[number] += step[2]
                subscriptions[number].push(
                    [event(names[number], seq) for seq in range(first, stored[number] + 1)]
                )
            elif step[0] == "close" and number in calls:
                subscriptions[number].close(step[2])
            elif step[0] == "pass" and number in wires:
                for _ in range(step[2]):
                    if under_way[number]:
                        wires[number].put(under_way[number].pop(0))
            for _ in range(4):
                await asyncio.sleep(0)
        for number, subscription in enumerate(subscriptions):
            begin(number)
            subscription.close()
        await asyncio.gather(*pumps)
        for number, waiting in enumerate(under_way):
            wires[number].put(*waiting)
        for number, call in calls.items():
            seqs, reason = await read_all(call)
            assert seqs == list(range(1, stored[number] + 1))
            assert reason == subscriptions[number].reconnect

    using(body)
