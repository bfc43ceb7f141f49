import asyncio
from contextlib import suppress

import pytest

from hermesh.common.v1.event_pb2 import Event
from services.agent.runs.bundle import MAX_CARRIED, Bundle, BundledSubscription, Bundles


def events(run, *seqs, data="{}"):
    return [Event(run_id=run, seq=seq, type="text.delta", data=data) for seq in seqs]


class Stream:
    """One stream of a bundle, read step by step."""

    def __init__(self, bundle, run):
        self.run = run
        self.subscription = BundledSubscription(bundle)
        self.responses = self.subscription.responses()

    def push(self, *seqs, data="{}"):
        self.subscription.push(events(self.run, *seqs, data=data))

    async def next(self):
        async with asyncio.timeout(5):
            return await anext(self.responses)

    async def silent(self):
        """Whether nothing comes now."""
        step = asyncio.ensure_future(anext(self.responses))
        for _ in range(5):
            await asyncio.sleep(0)
        if step.done():
            return False
        self.step = step
        return True

    async def waited(self):
        """What came to a `silent` stream in the end."""
        async with asyncio.timeout(5):
            return await self.step


async def two():
    """Two streams of a bundle that have begun and have nothing to say; the first carries."""
    bundle = Bundle()
    a, b = Stream(bundle, "a"), Stream(bundle, "b")
    assert await a.silent()
    assert await b.silent()
    return a, b


def seqs(frame):
    return [(event.run_id, event.seq) for event in frame.events]


async def test_one_stream_carries_what_all_have():
    a, b = await two()
    b.push(2, 3)
    a.push(2)
    response = await a.waited()
    assert seqs(response.frame) == [("a", 2)]
    assert [seqs(frame) for frame in response.others] == [[("b", 2), ("b", 3)]]
    assert not b.step.done()


async def test_a_stream_that_ends_says_how_much_was_sent_and_the_next_one_carries():
    a, b = await two()
    a.push(2)
    assert seqs((await a.waited()).frame) == [("a", 2)]
    a.push(3)
    a.subscription.close()
    b.push(2)
    last = await a.next()
    assert seqs(last.frame) == [("a", 3)]
    assert last.last_seq == 3
    with pytest.raises(StopAsyncIteration):
        await a.next()
    assert seqs((await b.waited()).frame) == [("b", 2)]


async def test_what_others_carried_counts_as_sent():
    a, b = await two()
    b.push(2, 3)
    await a.waited()
    b.subscription.close("drain")
    last = await b.waited()
    assert (last.last_seq, last.frame.reconnect.reason) == (3, "drain")
    assert not last.frame.events


async def test_a_stream_that_sent_nothing_more_ends_after_its_first_event():
    a = Stream(Bundle(), "a")
    a.subscription.close()
    assert (await a.next()).last_seq == 1


async def test_when_the_carrier_breaks_the_others_are_sent_to_the_log():
    """Nobody knows how much of what it carried arrived."""
    a, b = await two()
    b.push(2)
    assert (await a.waited()).others
    await a.responses.aclose()
    assert (await b.waited()).frame.reconnect.reason == "moved"


async def test_when_another_breaks_nobody_notices():
    a, b = await two()
    b.step.cancel()
    with suppress(asyncio.CancelledError):
        await b.step
    await b.responses.aclose()
    b.push(2)
    a.push(2)
    response = await a.waited()
    assert seqs(response.frame) == [("a", 2)]
    assert not response.others


async def test_signs_of_life_go_over_every_stream():
    bundle = Bundle()
    a, b = Stream(bundle, "a"), Stream(bundle, "b")
    for stream in (a, b):
        assert await stream.silent()
        stream.subscription.beat()
        response = await stream.waited()
        assert not response.frame.events
        assert not response.last_seq


async def test_events_stored_before_a_stream_began_are_carried_once_it_has():
    bundle = Bundle()
    a, b = Stream(bundle, "a"), Stream(bundle, "b")
    assert await a.silent()
    b.push(2)
    await asyncio.sleep(0)
    assert not a.step.done()
    assert await b.silent()
    assert [seqs(frame) for frame in (await a.waited()).others] == [[("b", 2)]]


async def test_a_message_carries_no_more_than_its_bound():
    bundle = Bundle()
    streams = [Stream(bundle, name) for name in "abc"]
    for stream in streams:
        assert await stream.silent()
    for stream in streams:
        stream.push(2, data="x" * (MAX_CARRIED // 2 + 1))
    first, second = await streams[0].waited(), await streams[0].next()
    assert (len(first.frame.events), len(first.others)) == (1, 1)
    assert (len(second.frame.events), len(second.others)) == (0, 1)


async def test_bundles_go_with_their_last_stream():
    bundles = Bundles()
    subscription = BundledSubscription(bundles.bundle("x"))
    assert bundles.bundle("x") is subscription._bundle
    assert bundles.bundle("y") is not subscription._bundle
    del subscription
    assert len(bundles) == 0
