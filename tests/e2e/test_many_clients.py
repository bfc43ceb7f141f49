"""Many clients at once: one order for all of them, one run a key, the same bytes everywhere."""

import asyncio
import json
import random
import uuid
from collections.abc import Awaitable, Callable
from contextlib import suppress
from itertools import pairwise
from typing import Any

import grpc
import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.mesh import Mesh
from hermesh.agent.v1 import agent_service_pb2 as agent_pb
from hermesh.agent.v1.agent_service_pb2_grpc import AgentServiceStub
from hermesh.common.v1.event_pb2 import InputMessage
from hermesh.session.v1 import session_service_pb2 as session_pb
from hermesh.session.v1.session_service_pb2_grpc import SessionServiceStub
from tests.e2e.client import (
    TERMINAL,
    Frame,
    assert_whole,
    frames_of,
    http,
    new_session,
    run_stream,
    run_to_end,
    submit,
    text_of,
    watch,
    watch_to_end,
)

NO_MEMORY = {"options": {"memory": False}}


async def session_frames(
    client: httpx.AsyncClient, session: str, enough: Callable[[Frame], bool], after: str = ""
) -> list[Frame]:
    """A session's frames after a cursor, up to the one where `enough` holds."""
    got: list[Frame] = []
    headers = {"Last-Event-ID": after} if after else {}
    async with client.stream("GET", f"/v1/sessions/{session}/events", headers=headers) as response:
        assert response.status_code == 200
        async for frame in frames_of(response):
            if frame.id:
                got.append(frame)
                if enough(frame):
                    break
    return got


async def test_inputs_at_once_are_answered_one_after_another(mesh: Mesh) -> None:
    """Every client has its reply, and nobody's run begins before the one ahead has ended."""
    async with http(mesh) as client:
        session = await new_session(client)

        async def talk(number: int) -> list[Frame]:
            async with http(mesh) as one:
                if number % 2:
                    return await run_to_end(one, session, f"[[echo]] I am {number}", **NO_MEMORY)
                return await watch_to_end(
                    one, await submit(one, session, f"[[echo]] I am {number}", **NO_MEMORY)
                )

        async with asyncio.timeout(60):
            logs = await asyncio.gather(*(talk(number) for number in range(20)))
        for number, log in enumerate(logs):
            log = [frame for frame in log if frame.id]
            assert_whole(log)
            assert log[-1].event == "run.completed"
            assert f"I am {number}" in text_of(log)
        runs = (await client.get(f"/v1/sessions/{session}/runs", params={"page_size": 50})).json()["runs"]
        assert [run["ordinal"] for run in runs] == list(range(20, 0, -1))
        order = [run["run_id"] for run in reversed(runs)]
        seen = await session_frames(
            client, session, lambda frame: frame.run_id == order[-1] and frame.event in TERMINAL
        )
        assert list(dict.fromkeys(frame.run_id for frame in seen)) == order
        by_run = {log[0].run_id: [frame.raw for frame in log if frame.id] for log in logs}
        ends, begins = {}, {}
        for run in order:
            own = [frame for frame in seen if frame.run_id == run]
            assert_whole(own)
            assert [frame.raw for frame in own] == by_run[run]
            begins[run] = next(frame for frame in own if frame.event == "run.started").data["time"]
            ends[run] = own[-1].data["time"]
        for former, latter in pairwise(order):
            # Two replicas of one machine: one clock.
            assert ends[former] <= begins[latter]
        messages = (await client.get(f"/v1/sessions/{session}/messages")).json()["messages"]
        assert [message["role"] for message in messages] == ["user", "assistant"] * 20
        assert [message["ordinal"] for message in messages] == list(range(1, 41))


@pytest.mark.parametrize("stream", [True, False])
async def test_one_key_at_once_from_many_clients_is_one_run(mesh: Mesh, stream: bool) -> None:
    key = {"Idempotency-Key": str(uuid.uuid4())}
    async with http(mesh) as client:
        session = await new_session(client)

        async def send(number: int) -> str:
            async with http(mesh) as one:
                if stream:
                    async with run_stream(one, session, "[[tokens=10]]", headers=key, **NO_MEMORY) as frames:
                        log = [frame async for frame in frames if frame.id]
                    assert_whole(log)
                    return log[0].run_id
                answer = await one.post(
                    f"/v1/sessions/{session}/runs", json={"input": "[[tokens=10]]"} | NO_MEMORY, headers=key
                )
                assert answer.status_code == 202, answer.text
                return str(answer.json()["run_id"])

        async with asyncio.timeout(30):
            runs = await asyncio.gather(*(send(number) for number in range(10)))
        assert len(set(runs)) == 1
        assert_whole(await watch_to_end(client, runs[0]))
        assert len((await client.get(f"/v1/sessions/{session}/runs")).json()["runs"]) == 1
        assert len((await client.get(f"/v1/sessions/{session}/messages")).json()["messages"]) == 2


async def test_one_key_at_once_is_one_session(mesh: Mesh) -> None:
    key = {"Idempotency-Key": str(uuid.uuid4())}

    async def make() -> str:
        async with http(mesh, **key) as one:
            return await new_session(one, title="same")

    assert len(set(await asyncio.gather(*(make() for _ in range(10))))) == 1


async def test_interrupts_at_once_leave_one_that_is_answered(mesh: Mesh) -> None:
    """Ten clients who all want to be next: each run ends, in order, and the last one completes."""
    async with http(mesh) as client:
        session = await new_session(client)
        first = await submit(client, session, "[[tokens=2000 rate=50]]", **NO_MEMORY)
        await watch(client, first, 0, lambda frame: frame.event == "text.delta")

        async def interrupt() -> list[Frame]:
            async with http(mesh) as one:
                run = await submit(one, session, "[[tokens=3]]", concurrency="interrupt", **NO_MEMORY)
                return await watch_to_end(one, run)

        async with asyncio.timeout(60):
            logs = await asyncio.gather(*(interrupt() for _ in range(10)))
        for log in logs:
            assert_whole(log)
        runs = (await client.get(f"/v1/sessions/{session}/runs")).json()["runs"]
        assert runs[0]["status"] == "completed"
        assert {run["status"] for run in runs} <= {"completed", "cancelled"}
        assert runs[-1]["status"] == "cancelled"


async def test_a_session_watched_on_two_gateways_and_two_sessions_is_the_same(mesh: Mesh) -> None:
    """While its runs come and go; a gRPC watcher of each session replica sees the same events."""
    gateways = [row.address for row in mesh.of("gateway")]
    async with http(mesh) as client:
        session = await new_session(client)
        last = asyncio.get_running_loop().create_future()

        def enough(frame: Frame) -> bool:
            return last.done() and frame.run_id == last.result() and frame.event in TERMINAL

        async def direct(address: str) -> list[str]:
            async with http(mesh) as one:
                one.base_url = httpx.URL(f"http://{address}")
                return [frame.raw for frame in await session_frames(one, session, enough)]

        async def by_grpc() -> list[str]:
            key = (("authorization", f"Bearer {mesh.api_key}"),)
            seen = []
            async with grpc.aio.insecure_channel(mesh.grpc_address) as channel:
                stub: Any = SessionServiceStub(channel)  # type: ignore[no-untyped-call]
                call = stub.WatchSession(
                    session_pb.WatchSessionRequest(session_id=session), metadata=key, timeout=60
                )
                async for answer in call:
                    for event in answer.frame.events:
                        seen.append(f"{event.run_id}:{event.seq} {event.type} {json.loads(event.data)}")
                        if last.done() and event.run_id == last.result() and event.type in TERMINAL:
                            return seen
            raise AssertionError("the watch ended before the last run")

        async def talk() -> None:
            for _ in range(3):
                await submit(client, session, "[[tokens=20 rate=200]]", **NO_MEMORY)
            run = await submit(client, session, "[[tokens=20 rate=100]]", **NO_MEMORY)
            last.set_result(run)

        async with asyncio.timeout(60):
            *seen, _ = await asyncio.gather(
                *(direct(address) for address in gateways), by_grpc(), by_grpc(), talk()
            )
    assert seen[0] == seen[1]
    assert seen[2] == seen[3]
    assert len(seen[0]) == len(seen[2])
    assert [raw.partition("id: ")[2].partition("\n")[0] for raw in seen[0]] == [
        line.partition(" ")[0] for line in seen[2]
    ]


async def test_a_session_read_in_any_pieces_is_its_log(mesh: Mesh) -> None:
    """Property: whatever the cut points, and whichever gateway each piece comes from."""
    gateways = [row.address for row in mesh.of("gateway")]
    async with http(mesh) as client:
        session = await new_session(client)
        runs = [
            await submit(client, session, text, **NO_MEMORY)
            for text in (
                "[[tokens=4]]",
                '[[tool=calculator {"expression":"1+1"}]]',
                "[[status=401]]",
                "[[tokens=2]]",
            )
        ]

        def is_last(frame: Frame) -> bool:
            return frame.run_id == runs[-1] and frame.event in TERMINAL

        truth = [frame.raw for frame in await session_frames(client, session, is_last)]
        assert len(truth) > 20

        async def pieces(cuts: list[int], places: random.Random) -> list[str]:
            got: list[Frame] = []
            for cut in [*sorted(cuts), len(truth)]:
                if cut <= len(got):
                    continue
                want = cut - len(got)
                seen = 0

                def enough(_: Frame, want: int = want) -> bool:
                    nonlocal seen
                    seen += 1
                    return seen >= want

                async with http(mesh) as one:
                    one.base_url = httpx.URL(f"http://{places.choice(gateways)}")
                    got += await session_frames(one, session, enough, got[-1].id if got else "")
            return [frame.raw for frame in got]

        await explore(pieces, truth)


async def explore(
    pieces: Callable[[list[int], random.Random], Awaitable[list[str]]], truth: list[str]
) -> None:
    """Lets hypothesis, which knows no coroutines, choose cut points in a thread of its own."""
    loop = asyncio.get_running_loop()

    @settings(
        max_examples=20,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        derandomize=False,
    )
    @given(st.lists(st.integers(0, len(truth)), max_size=6), st.integers(0, 1 << 16))
    def holds(cuts: list[int], seed: int) -> None:
        found = asyncio.run_coroutine_threadsafe(pieces(cuts, random.Random(seed)), loop).result(30)
        assert found == truth

    await asyncio.to_thread(holds)


async def test_a_run_outlives_its_callers_deadline(mesh: Mesh) -> None:
    key = (("authorization", f"Bearer {mesh.api_key}"),)
    text = "[[tokens=40 rate=20]]"
    async with http(mesh) as client, grpc.aio.insecure_channel(mesh.grpc_address) as channel:
        agents: Any = AgentServiceStub(channel)  # type: ignore[no-untyped-call]

        async def late(seconds: float) -> list[Any]:
            words = [InputMessage(role="user", content=text)]
            request = agent_pb.RunRequest(session_id=await new_session(client), input=words)
            seen: list[Any] = []
            call = agents.Run(request, metadata=key, timeout=seconds)
            with suppress(grpc.aio.AioRpcError):
                async for answer in call:
                    seen += answer.frame.events
            assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED, call
            return seen

        # Several, a moment apart: whoever looks at the clock first, the caller reads the same.
        logs = await asyncio.gather(*(late(1.0 + 0.013 * number) for number in range(8)))
        for seen in logs:
            assert [event.seq for event in seen] == list(range(1, len(seen) + 1))
            assert seen[-1].type not in TERMINAL
            frames = await watch_to_end(client, seen[0].run_id)
            assert_whole(frames)
            assert frames[-1].event == "run.completed"
            assert len([frame for frame in frames if frame.event == "run.started"]) == 1
            assert len(text_of(frames).split()) == 40


async def test_a_run_outlives_its_hasty_http_caller(mesh: Mesh) -> None:
    async with http(mesh) as client:
        session = await new_session(client)
        async with http(mesh) as hasty:
            hasty.timeout = httpx.Timeout(10, read=0.4)
            with pytest.raises(httpx.ReadTimeout):
                await run_to_end(hasty, session, "[[tokens=3 delay=1.5]]")
        run = (await client.get(f"/v1/sessions/{session}/runs")).json()["runs"][0]["run_id"]
        frames = await watch_to_end(client, run)
        assert_whole(frames)
        assert frames[-1].event == "run.completed"
