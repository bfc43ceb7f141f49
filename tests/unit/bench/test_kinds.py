"""The scenarios beside plain replies, from end to end on doubles of a mesh."""

import asyncio
import os
import re

import pytest

from bench.load import LoadError
from bench.long_sessions import measure_long_sessions
from bench.measure import measure
from bench.model_server import ModelServer
from bench.neighbours import measure_neighbours
from bench.run import meshes
from bench.scenarios import LongSessions, Neighbours, Replies, Watchers
from bench.target import Ask, IncompleteReply
from bench.targets import ModelTarget
from bench.watchers import measure_watchers
from tests.unit.bench.events import EventServer


class Sessions(ModelTarget):
    """The model server with sessions that are only numbers."""

    def __init__(self, server):
        self.url, self.pid = server.base_url, os.getpid()
        self.filled = {}

    def processes(self):
        return {"gateway-1": self.pid}

    async def new_session(self):
        self.filled[str(len(self.filled))] = 0
        return str(len(self.filled) - 1)

    async def fill(self, session, messages):
        self.filled[session] += messages

    async def message_count(self, session):
        return self.filled[session]

    def ask(self, session, prompt):
        messages = [{"role": "user", "content": prompt}]
        return Ask(
            f"{self.url}/chat/completions", {"model": "scripted", "stream": True, "messages": messages}
        )


class Watched(Sessions):
    """Sessions whose events an EventServer sends."""

    def watch(self, session):
        return f"{self.url}/{session}", {}

    def ask(self, session, prompt):
        return Ask(f"{self.url}/{session}", {"input": prompt})


@pytest.fixture
async def server():
    async with ModelServer() as running:
        yield running


async def test_long_sessions_are_asked_in_turn_with_short_ones(server):
    target = Sessions(server)
    scenario = LongSessions("x", "x", short=10, long=1000, sessions=2, turns=3)
    run = await measure_long_sessions(target, scenario, os.getppid())
    assert sorted(target.filled.values()) == [10, 10, 1000, 1000]
    assert (run.times["short"].count, run.times["long"].count) == (6, 6)
    assert run.figures["ttft_ratio"] > 0
    assert run.figures["long_first_ms"] > 0


async def test_polite_clients_are_measured_alone_and_beside_a_flood(server):
    scenario = Neighbours("x", "x", clients=2, asks=5, tokens=3, flood=3, flood_tokens=40)
    run = await measure_neighbours(Sessions(server), Sessions(server), scenario, os.getppid())
    assert (run.times["alone"].count, run.times["beside"].count) == (10, 10)
    assert run.figures["polite_replies"] == 10
    assert run.figures["flood_replies"] == run.times["flood"].count >= 3
    assert run.figures["tokens"] == 10 * 3 + run.times["flood"].count * 40


async def test_a_flood_whose_replies_lack_something_is_no_result(server):
    class Cut(Sessions):
        async def prepare(self, prompt):
            return await super().prepare("[[tokens=40 half]]")

    scenario = Neighbours("x", "x", clients=1, asks=1, tokens=3, flood=1, flood_tokens=40)
    with pytest.raises(IncompleteReply):
        await measure_neighbours(Cut(server), Sessions(server), scenario, os.getppid())


async def test_watchers_are_measured_from_the_first_to_the_last_event():
    events = EventServer()
    listener = await asyncio.start_server(events.serve, "127.0.0.1", 0)
    async with listener:
        target = Watched.__new__(Watched)
        target.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        target.pid, target.filled = os.getpid(), {}
        scenario = Watchers("x", "x", watchers=6, sessions=3, first=2, idle_seconds=0.1, deadline_seconds=0.5)
        run = await measure_watchers(target, scenario, os.getppid(), quiet_seconds=0.0)
        events.answers = False
        with pytest.raises(LoadError, match="6 of 6 watchers"):
            await measure_watchers(target, scenario, os.getppid(), quiet_seconds=0.0)
        await asyncio.gather(*events.connections)
    assert run.times["event"].count == 6
    assert run.figures["gateway_percent"] >= 0
    assert set(run.figures) >= {"gateway_kib_each", "event_max_ms", "mesh_percent"}


async def test_paced_replies_are_compared_with_the_model_s_schedule(server):
    scenario = Replies("x", "x", clients=3, asks=2, tokens=10, rate=200, spread=0.05)
    run = await measure(Sessions(server), scenario, (server.base_url, os.getppid()))
    assert run.times["added"].count == 60
    assert run.figures["behind"] == 0
    assert run.figures["tokens"] == 60


async def test_memories_that_are_asked_for_must_be_recalled(server):
    class Recalls(Sessions):
        found = (5, 4)

        def __init__(self, server):
            super().__init__(server)
            self.next = iter(self.found)

        def recalled(self, body):
            assert b"t1 " in body
            return next(self.next)

    class Forgetful(Recalls):
        found = (5, 0)

    scenario = Replies("x", "x", clients=1, asks=2, tokens=3, memory=True)
    run = await measure(Recalls(server), scenario, (server.base_url, os.getppid()))
    assert run.figures["recalled"] == 4.5
    with pytest.raises(IncompleteReply, match="1 of 2 runs recalled nothing"):
        await measure(Forgetful(server), scenario, (server.base_url, os.getppid()))


async def test_a_target_whose_log_differs_from_what_it_streamed_is_no_result(server):
    class Forgets(Sessions):
        async def check_kept(self, body):
            assert re.search(rb"t1 ", body)
            raise IncompleteReply("differs")

    with pytest.raises(IncompleteReply, match="differs"):
        await measure(
            Forgets(server), Replies("x", "x", clients=1, asks=1, tokens=3), (server.base_url, os.getppid())
        )


def test_a_selection_without_replies_needs_no_shared_mesh():
    only = Watchers("x", "x", watchers=5, sessions=5)
    assert meshes([only]) == [[only]]
