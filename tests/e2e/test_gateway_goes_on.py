"""Whatever dies behind the gateway, the one HTTP response that a client has open goes on to the run's end."""

import asyncio
import os
import signal

import pytest

from bench.mesh import Mesh
from tests.e2e.client import Frame, assert_whole, frames_of, http, new_session, run_stream, submit, text_of

TEXT = "[[tokens=150 rate=30]]"


def assert_one_response(frames: list[Frame]) -> None:
    assert "reconnect" not in [frame.event for frame in frames]
    assert_whole(frames)
    assert frames[-1].event == "run.completed"
    assert len(text_of(frames).split()) == 150


async def test_the_response_of_the_caller_survives_its_agent(mesh: Mesh) -> None:
    pids = {row.replica: row.pid for row in mesh.of("agent")}
    frames: list[Frame] = []
    async with http(mesh) as client:
        async with run_stream(client, await new_session(client), TEXT) as stream:
            killed = False
            async with asyncio.timeout(60):
                async for frame in stream:
                    frames.append(frame)
                    if frame.event == "text.delta" and not killed:
                        killed = True
                        started = next(one for one in frames if one.event == "run.started")
                        os.kill(pids[started.data["data"]["replica"]], signal.SIGKILL)
    assert_one_response(frames)
    assert [frame.event for frame in frames].count("run.started") == 2


@pytest.mark.parametrize("service", ["session", "envoy"])
async def test_the_response_of_a_watcher_survives(mesh: Mesh, service: str) -> None:
    if service == "envoy":
        # Its own listener goes with it, so that the client is direct: what is shown is the way behind.
        address = mesh.of("gateway")[0].address
    victims = [row.pid for row in mesh.of(service)]
    frames: list[Frame] = []
    async with http(mesh) as client:
        run = await submit(client, await new_session(client), TEXT)
        if service == "envoy":
            client.base_url = f"http://{address}"
        async with client.stream("GET", f"/v1/runs/{run}/events") as response:
            async with asyncio.timeout(90):
                async for frame in frames_of(response):
                    frames.append(frame)
                    if frame.event == "text.delta" and victims:
                        # One after the other, so that whichever serves the stream is among them.
                        os.kill(victims.pop(), signal.SIGKILL)
                        await asyncio.to_thread(mesh.wait_healthy)
    assert_one_response(frames)
