"""The load generator, against the scripted model server."""

import asyncio
import re
from itertools import pairwise

import pytest

from bench.load import LoadError, load, started
from bench.model_server import ModelServer
from bench.reading import arrivals, check
from bench.target import Ask, IncompleteReply
from bench.targets import MeshTarget, ModelTarget
from tests.unit.bench.events import EventServer

EXPECTED = "t0 t1 t2 t3 t4 "


@pytest.fixture
async def server():
    async with ModelServer() as running:
        yield running


def ask(server, prompt):
    messages = [{"role": "user", "content": prompt}]
    return Ask(
        f"{server.base_url}/chat/completions", {"model": "scripted", "stream": True, "messages": messages}
    )


@pytest.fixture
def target(server):
    made = ModelTarget.__new__(ModelTarget)
    made.url, made.pid = server.base_url, 0
    return made


async def replies_to(server, *prompts):
    async with load([[ask(server, prompt) for prompt in prompts]]) as generator:
        await generator.go()
        return await generator.replies()


async def test_clients_ask_one_after_the_other_over_one_connection(server, target):
    asks = [ask(server, "[[tokens=5]]")] * 3
    async with load([asks, asks]) as generator:
        assert server.state.stats.connections == 2
        window = await generator.go()
        replies = await generator.replies()
    assert [reply.client for reply in replies] == [0, 0, 0, 1, 1, 1]
    assert server.state.stats.requests == 6
    assert server.state.stats.accepted == 2
    for reply in replies:
        check(target, reply, EXPECTED)
        assert window.began <= reply.began < arrivals(target, reply, 5)[0] <= reply.ended <= window.ended
    assert replies[0].ended <= replies[1].began


async def test_clients_in_the_background_ask_again_until_the_others_are_done(server, target):
    forever, once = [ask(server, "[[tokens=2]]")], [ask(server, "[[tokens=5]]")] * 20
    async with load([forever, once], background=1) as generator:
        await generator.go()
        replies = await generator.replies()
    background = [reply for reply in replies if reply.client == 0]
    others = [reply for reply in replies if reply.client == 1]
    assert len(others) == 20
    assert len(background) > 1
    # None begins when there is nobody left to be beside.
    assert background[-1].began <= others[-1].ended
    for reply in background:
        check(target, reply, "t0 t1 ")


async def test_a_reply_that_breaks_off_is_noticed_and_the_client_goes_on(server, target):
    broken, whole = await replies_to(server, "[[tokens=5 half]]", "[[tokens=5]]")
    with pytest.raises(IncompleteReply, match="closed"):
        check(target, broken, EXPECTED)
    check(target, whole, EXPECTED)


async def test_another_status_is_an_error_with_its_body(server, target):
    (refused,) = await replies_to(server, "[[status=503]]")
    assert "status 503" in refused.error
    assert "scripted status 503" in refused.error


async def test_a_generator_that_cannot_connect_is_no_result():
    with pytest.raises(LoadError, match="ended"):
        async with load([[Ask("http://127.0.0.1:9/", {})]]):
            pass


async def watch(server, count):
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    async with listener:
        url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        job = {
            "watchers": [{"url": f"{url}/{number}", "headers": {}} for number in range(count)],
            "posts": [{"url": f"{url}/{number}", "headers": {}, "body": {}} for number in range(count)],
            "per_second": 100,
            "deadline_seconds": 0.3,
        }
        async with started("bench.watch_generator", job) as generator:
            for command in ("open 1", f"open {count}", "post"):
                generator.tell(command)
                assert '"error":""' in await generator.line(20)
            generator.tell("end")
            rows = await generator.written()
        await asyncio.gather(*server.connections)
    return rows


async def test_each_watcher_gets_the_event_that_its_post_brings():
    rows = await watch(EventServer(), 5)
    assert [row["due"] < row["event"] for row in rows] == [True] * 5
    assert [after["due"] - before["due"] for before, after in pairwise(rows)] == pytest.approx(
        [10_000_000] * 4, abs=2
    )


async def test_a_heartbeat_is_no_event():
    assert [row["event"] for row in await watch(EventServer(answers=False), 2)] == [0, 0]


async def test_a_watcher_whose_stream_ends_is_an_error(server):
    watcher = {"url": f"{server.base_url}/models", "headers": {}}
    job = {"watchers": [watcher], "posts": [], "per_second": 50, "deadline_seconds": 0.1}
    async with started("bench.watch_generator", job) as generator:
        generator.tell("open 1")
        assert "the stream ended" in await generator.line(10)


def test_the_mesh_s_events_are_joined_and_its_end_is_needed():
    target = MeshTarget.__new__(MeshTarget)

    def event(kind, data):
        return f'id: r:1\nevent: {kind}\ndata: {{"run_id":"r","seq":1,"type":"{kind}","data":{data}}}\n\n'

    start = event("run.created", '{"input":[{"role":"user","content":"t0"}]}')
    deltas = event("text.delta", '{"text":"t0 t1 "}') + event("text.delta", '{"text":"t2 "}')
    end = event("run.completed", "{}")
    assert target.text((start + deltas + end).encode()) == "t0 t1 t2 "
    assert re.search(target.first_token, (start + deltas).encode()).start() > len(start) - 10
    with pytest.raises(IncompleteReply):
        target.text((start + deltas).encode())
    with pytest.raises(IncompleteReply):
        target.text((start + deltas + event("attempt.reset", "{}") + end).encode())
