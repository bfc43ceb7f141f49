"""The dispatcher over the fake store and an agent that is a fake too."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio

from hermesh.agent.v1 import agent_service_pb2 as agent_pb
from hermesh.agent.v1 import agent_service_pb2_grpc as agent_grpc
from meshkit.ids import uuid7
from meshkit.tasks import TaskOwner
from services.session.sweeper import Sweeper
from tests.unit.session.calls import until
from tests.unit.session.fake_store import FakeStore, unavailable


class FakeAgent(agent_grpc.AgentServiceServicer):
    """A fake agent: takes runs and holds their streams until told to end."""

    def __init__(self) -> None:
        self.taken: asyncio.Queue[str] = asyncio.Queue()
        self.end = asyncio.Event()
        self.refuse = False
        self.gone = 0

    async def Execute(self, request: agent_pb.ExecuteRequest, context: Any) -> AsyncIterator[Any]:
        self.taken.put_nowait(request.run_id)
        if self.gone:
            self.gone -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "no agent")
        if self.refuse:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        await self.end.wait()
        yield agent_pb.ExecuteResponse(finished=True)

    async def Run(self, request: Any, context: Any) -> Any:
        raise NotImplementedError

    async def ListModels(self, request: Any, context: Any) -> Any:
        raise NotImplementedError


@asynccontextmanager
async def dispatcher(agent: FakeAgent, store: FakeStore, **values: Any) -> AsyncIterator[Sweeper]:
    server = grpc.aio.server()
    agent_grpc.add_AgentServiceServicer_to_server(agent, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        async with TaskOwner("test") as tasks:
            values = {"interval": 0.05, "max_dispatches": 10} | values
            sweeper = Sweeper(store, agent_grpc.AgentServiceStub(channel), tasks=tasks, **values)
            tasks.start(sweeper.run(), name="sweeper")
            yield sweeper
    await server.stop(0)


async def test_due_runs_are_dispatched_and_their_streams_held() -> None:
    agent, store = FakeAgent(), FakeStore()
    runs = [uuid7() for _ in range(3)]
    store.due_runs = list(runs)
    async with dispatcher(agent, store) as sweeper, asyncio.timeout(5):
        assert {await agent.taken.get() for _ in runs} == {str(run) for run in runs}
        assert sweeper._held == 3
        agent.end.set()
        await until(lambda: not sweeper._held)


async def test_a_notice_sweeps_at_once() -> None:
    agent, store = FakeAgent(), FakeStore()
    async with dispatcher(agent, store, interval=60) as sweeper, asyncio.timeout(5):
        await asyncio.sleep(0)
        run = uuid7()
        store.due_runs = [run]
        sweeper.wake()
        assert await agent.taken.get() == str(run)


async def test_held_streams_are_bounded() -> None:
    agent, store = FakeAgent(), FakeStore()
    store.due_runs = [uuid7() for _ in range(30)]
    async with dispatcher(agent, store) as sweeper, asyncio.timeout(5):
        for _ in range(10):
            await agent.taken.get()
        assert await sweeper.sweep() == 0
        assert len(store.due_runs) == 20
        agent.end.set()
        for _ in range(20):
            await agent.taken.get()


async def test_a_full_agent_leaves_the_run_to_a_later_sweep() -> None:
    agent, store = FakeAgent(), FakeStore()
    agent.refuse = True
    run = uuid7()
    store.due_runs = [run]
    async with dispatcher(agent, store) as sweeper, asyncio.timeout(5):
        await agent.taken.get()
        await until(lambda: not sweeper._held)
        agent.refuse = False
        store.due_runs = [run]
        assert await agent.taken.get() == str(run)


async def test_the_sweep_outlives_database_trouble() -> None:
    agent, store = FakeAgent(), FakeStore()
    store.fail_due = [unavailable()]
    run = uuid7()
    store.due_runs = [run]
    async with dispatcher(agent, store), asyncio.timeout(5):
        assert await agent.taken.get() == str(run)


async def test_nothing_is_dispatched_while_draining() -> None:
    agent, store = FakeAgent(), FakeStore()
    async with dispatcher(agent, store) as sweeper:
        sweeper.stop()
        store.due_runs = [uuid7()]
        assert await sweeper.sweep() == 0
        assert agent.taken.empty()


async def test_orphans_that_need_no_agent_are_ended_each_interval_and_not_at_each_wake() -> None:
    agent, store = FakeAgent(), FakeStore()
    store.orphans = 100
    asked = 0

    async def end_orphans(limit: int) -> int:
        nonlocal asked
        asked += 1
        return await FakeStore.end_orphans(store, limit)

    store.end_orphans = end_orphans  # type: ignore[method-assign]  # counts and passes on
    async with dispatcher(agent, store, interval=0.2) as sweeper:
        for _ in range(20):
            sweeper.wake()
            await asyncio.sleep(0.005)
        assert asked == 1
        await until(lambda: store.orphans == 0)
    assert asked >= 2


async def test_a_store_that_is_away_while_orphans_are_ended_is_asked_again() -> None:
    agent, store = FakeAgent(), FakeStore()
    store.orphans = 1
    store.fail_due = [unavailable()]
    async with dispatcher(agent, store):
        await until(lambda: store.orphans == 0)


async def test_full_agents_are_asked_about_few_runs_and_then_about_more() -> None:
    agent, store = FakeAgent(), FakeStore()
    agent.refuse = True
    store.due_runs = [uuid7() for _ in range(1000)]
    async with dispatcher(agent, store, max_dispatches=512) as sweeper, asyncio.timeout(10):
        await until(lambda: sweeper._batch == 1)
        # Not each of a thousand costs a full agent an answer.
        assert store.due_runs
        agent.refuse = False
        await until(lambda: sweeper._held == 512)


async def test_a_run_that_reached_no_agent_is_asked_about_again_without_the_database() -> None:
    agent, store = FakeAgent(), FakeStore()
    agent.gone = 3
    run = uuid7()
    store.due_runs = [run]
    async with dispatcher(agent, store, interval=30) as sweeper, asyncio.timeout(5):
        sweeper.wake()
        for _ in range(4):
            assert await agent.taken.get() == str(run)
        await until(lambda: sweeper._held == 1)


async def test_what_a_look_without_an_answer_may_have_taken_is_taken_again() -> None:
    agent, store = FakeAgent(), FakeStore()
    store.fail_due = [unavailable()]
    async with dispatcher(agent, store), asyncio.timeout(5):
        await until(lambda: len(store.asked_again) >= 3)
    assert store.asked_again[:3] == [False, True, False]


async def test_a_place_that_gets_free_is_used_at_once() -> None:
    agent, store = FakeAgent(), FakeStore()
    first = uuid7()
    store.due_runs = [first]
    async with dispatcher(agent, store, interval=30) as sweeper, asyncio.timeout(5):
        sweeper.wake()
        assert await agent.taken.get() == str(first)
        agent.refuse = True
        store.due_runs = [uuid7()]
        sweeper.wake()
        await agent.taken.get()
        await until(lambda: sweeper._held == 1)
        agent.refuse = False
        store.due_runs = [last := uuid7()]
        agent.end.set()
        assert await agent.taken.get() == str(last)
