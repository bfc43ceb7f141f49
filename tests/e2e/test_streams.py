"""Streams of events: whole, the same for everyone, and resumable at any point."""

import asyncio
import os
import random
import signal

import pytest

from bench.mesh import Mesh
from tests.e2e.client import (
    Frame,
    assert_whole,
    http,
    new_session,
    run_stream,
    run_to_end,
    submit,
    text_of,
    watch,
    watch_to_end,
)


async def test_a_message_streams_back_and_is_kept(mesh: Mesh) -> None:
    async with http(mesh) as client:
        session = await new_session(client)
        frames = await run_to_end(client, session, "[[tokens=40]]")
        assert_whole(frames)
        assert [frame.event for frame in frames[:2]] == ["run.created", "run.started"]
        assert frames[-1].event == "run.completed"
        messages = (await client.get(f"/v1/sessions/{session}/messages")).json()["messages"]
        assert [message["role"] for message in messages] == ["user", "assistant"]
        assert messages[1]["content"] == text_of(frames)


async def test_the_first_token_comes_before_the_last_is_written(mesh: Mesh) -> None:
    async with http(mesh) as client:
        session = await new_session(client)
        async with run_stream(client, session, "[[tokens=30 rate=20]]") as frames:
            async for frame in frames:
                if frame.event == "text.delta":
                    run = (await client.get(f"/v1/runs/{frame.run_id}")).json()
                    assert run["status"] == "running"
                    break
        assert_whole(await watch_to_end(client, frame.run_id))


async def test_two_watchers_on_two_gateways_get_the_same_bytes(mesh: Mesh) -> None:
    gateways = [row.address for row in mesh.of("gateway")]
    assert len(gateways) == 2
    async with http(mesh) as client:
        run = await submit(client, await new_session(client), "[[tokens=60 rate=60]]")

        async def direct(address: str) -> list[str]:
            async with http(mesh) as one:
                one.base_url = f"http://{address}"
                return [frame.raw for frame in await watch(one, run)]

        first, second = await asyncio.gather(*(direct(address) for address in gateways))
    assert first == second
    assert len(first) > 5


async def test_a_client_that_leaves_mid_stream_changes_nothing(mesh: Mesh) -> None:
    async with http(mesh) as client:
        session = await new_session(client)
        async with run_stream(client, session, "[[tokens=50 rate=50]]") as frames:
            run = await anext(frames)
        assert_whole(await watch_to_end(client, run.run_id))
        assert (await client.get(f"/v1/runs/{run.run_id}")).json()["status"] == "completed"


async def test_a_finished_run_answers_a_reconnect_with_204(mesh: Mesh) -> None:
    async with http(mesh) as client:
        frames = await run_to_end(client, await new_session(client), "[[tokens=5]]")
        last = frames[-1]
        again = await client.get(f"/v1/runs/{last.run_id}/events", headers={"Last-Event-ID": last.id})
        assert again.status_code == 204


async def test_a_session_stream_goes_from_run_to_run(mesh: Mesh) -> None:
    async with http(mesh) as client:
        session = await new_session(client)
        runs = [(await run_to_end(client, session, "[[tokens=3]]"))[0].run_id for _ in range(3)]
        seen: list[Frame] = []
        async with client.stream("GET", f"/v1/sessions/{session}/events") as response:
            from tests.e2e.client import TERMINAL, frames_of

            async for frame in frames_of(response):
                seen.append(frame)
                if frame.run_id == runs[-1] and frame.event in TERMINAL:
                    break
    assert list(dict.fromkeys(frame.run_id for frame in seen)) == runs
    for run in runs:
        assert_whole([frame for frame in seen if frame.run_id == run])


@pytest.mark.parametrize("redis", ["up", "flushed", "down"])
async def test_a_watcher_that_reconnects_anywhere_sees_no_gap_and_no_duplicate(
    mesh: Mesh, redis: str
) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    chance = random.Random(seed)
    print("seed", seed)
    async with http(mesh) as client:
        run = await submit(client, await new_session(client), "[[tokens=150 rate=50]]")

        async def cutting_watcher() -> list[Frame]:
            got: list[Frame] = []
            while True:
                want = chance.randint(1, 12)
                seen = 0

                def enough(frame: Frame, want: int = want) -> bool:
                    nonlocal seen
                    seen += 1
                    return seen >= want or frame.event in {"run.completed", "run.failed", "run.cancelled"}

                got += await watch(client, run, got[-1].seq if got else 0, enough, chance.random() < 0.5)
                if got and got[-1].event in {"run.completed", "run.failed", "run.cancelled"}:
                    return got

        async def disturb() -> None:
            if redis == "flushed":
                for _ in range(3):
                    await asyncio.to_thread(flush_redis, mesh)
                    await watch(client, run, 0, lambda frame: frame.seq >= 1)
            elif redis == "down":
                for row in await asyncio.to_thread(mesh.of, "valkey"):
                    os.kill(row.pid, signal.SIGSTOP)

        try:
            logs = await asyncio.gather(cutting_watcher(), cutting_watcher(), cutting_watcher(), disturb())
        finally:
            for row in await asyncio.to_thread(mesh.of, "valkey"):
                os.kill(row.pid, signal.SIGCONT)
        truth = [frame.raw for frame in await watch(client, run)]
    for log in logs[:3]:
        assert log is not None
        assert_whole(log)
        assert [frame.raw for frame in log] == truth


def flush_redis(mesh: Mesh) -> None:
    """FLUSHALL, as an operator would do it by mistake."""
    import redis

    url = mesh.command("env", "HERMESH_REDIS_URL").strip()
    with redis.Redis.from_url(url) as client:
        client.flushall()
