"""Many watches on one stream: each with its own tenant, errors and window, and all of them end on a drain."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.rpc import status_pb2

from hermesh.session.v1 import session_internal_service_pb2 as pb
from hermesh.session.v1 import session_service_pb2 as public
from hermesh.session.v1.session_internal_service_pb2_grpc import SessionInternalServiceStub
from meshkit.channel import stream_call
from meshkit.errors import from_rpc_error, from_status
from meshkit.ids import uuid7
from services.session import watch_hub
from tests.unit.session.calls import append_stream, new_session, new_writer, submit
from tests.unit.session.conftest import Client


class Stream:
    """An open stream of watches, and what came of each."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.frames: dict[int, list[pb.WatchFrame]] = {}
        self.messages = 0

    async def send(self, *starts: pb.WatchStart, **fields: Any) -> None:
        await self.call.write(pb.WatchRequest(starts=starts, **fields))

    async def until(self, watch_id: int, content: str) -> pb.WatchFrame:
        """Reads on until a watch had a frame of this content, and returns its last one."""
        async with asyncio.timeout(10):
            while not any(frame.WhichOneof("content") == content for frame in self.frames.get(watch_id, ())):
                await self.read()
        return self.frames[watch_id][-1]

    async def until_seq(self, watch_id: int, seq: int) -> list[int]:
        """Reads on until a watch had an event, and returns the seqs of all it had."""
        async with asyncio.timeout(10):
            while seq not in (found := self.seqs(watch_id)):
                await self.read()
        return found

    def seqs(self, watch_id: int) -> list[int]:
        return [event.seq for frame in self.frames.get(watch_id, ()) for event in frame.frame.events]

    async def read(self) -> None:
        response = await self.call.read()
        assert response, "the stream ended"
        self.messages += 1
        for frame in response.frames:
            self.frames.setdefault(frame.watch_id, []).append(frame)


@pytest.fixture
async def stream(client: Client) -> AsyncIterator[Stream]:
    async with stream_call(client.mesh.Watch()) as call:
        await call.initial_metadata()
        yield Stream(call)


def of_run(client: Client, watch_id: int, run_id: str, after_seq: int = 0, tenant: str = "") -> pb.WatchStart:
    run = public.WatchRunRequest(run_id=run_id, after_seq=after_seq)
    return pb.WatchStart(watch_id=watch_id, tenant_id=tenant or str(client.tenant_id), run=run)


def of_session(client: Client, watch_id: int, session_id: str, tenant: str = "") -> pb.WatchStart:
    session = public.WatchSessionRequest(session_id=session_id)
    return pb.WatchStart(watch_id=watch_id, tenant_id=tenant or str(client.tenant_id), session=session)


async def test_watches_of_runs_and_sessions_come_over_one_stream(client: Client, stream: Stream) -> None:
    session = await new_session(client)
    await stream.send(of_session(client, 1, session.session_id))
    await stream.until(1, "opened")
    submitted = await submit(client, session.session_id)
    await stream.send(of_run(client, 2, submitted.run.run_id))
    assert await stream.until_seq(1, 1) == [1]
    assert await stream.until_seq(2, 1) == [1]
    assert stream.frames[2][0].WhichOneof("content") == "opened"


async def test_a_watch_goes_to_its_runs_end(client: Client, stream: Stream) -> None:
    writer = await new_writer(client)
    await stream.send(of_run(client, 7, writer.run_id, after_seq=1))
    await stream.until(7, "opened")
    async with append_stream(client) as append:
        await append.write(writer.append("run.started", "text.delta"))
        await append.write(writer.append("run.completed", status=4))
    await stream.until(7, "ended")
    assert stream.seqs(7) == [2, 3, 4]


async def test_what_is_anothers_does_not_exist_and_harms_no_other_watch(
    client: Client, stream: Stream
) -> None:
    writer = await new_writer(client)
    stranger = str(uuid7())
    await stream.send(
        of_run(client, 1, writer.run_id),
        of_run(client, 2, writer.run_id, tenant=stranger),
        of_session(client, 3, writer.session_id, tenant=stranger),
        of_run(client, 4, writer.run_id, after_seq=99),
        of_run(client, 5, "no-uuid"),
        pb.WatchStart(watch_id=6, tenant_id=str(client.tenant_id)),
        of_run(client, 8, writer.run_id, tenant="nobody"),
    )
    reasons = {}
    for watch_id in (2, 3, 4, 5, 6, 8):
        frame = await stream.until(watch_id, "error")
        reasons[watch_id] = from_status(status_pb2.Status.FromString(frame.error)).reason
        assert len(stream.frames[watch_id]) == 1
    assert reasons == {
        2: "RUN_NOT_FOUND",
        3: "SESSION_NOT_FOUND",
        4: "CURSOR_PAST_END",
        5: "INVALID_ARGUMENT",
        6: "INVALID_ARGUMENT",
        8: "INVALID_ARGUMENT",
    }
    assert await stream.until_seq(1, 1) == [1]


async def test_a_watch_that_was_stopped_is_silent(client: Client, stream: Stream) -> None:
    writer = await new_writer(client)
    await stream.send(of_run(client, 1, writer.run_id), of_run(client, 2, writer.run_id))
    await stream.until_seq(1, 1)
    await stream.until_seq(2, 1)
    await stream.send(stops=[1, 77])
    # What is sent on one stream is taken in its order: after this one stands, the other is gone.
    await stream.send(of_run(client, 3, writer.run_id))
    await stream.until_seq(3, 1)
    async with append_stream(client) as append:
        await append.write(writer.append("run.started"))
    await stream.until_seq(2, 2)
    await stream.until_seq(3, 2)
    assert stream.seqs(1) == [1]


async def test_a_watch_whose_frames_are_not_taken_waits_and_others_go_on(
    client: Client, stream: Stream
) -> None:
    writer = await new_writer(client)
    await stream.send(of_run(client, 1, writer.run_id), of_run(client, 2, writer.run_id))
    await stream.until_seq(1, 1)
    await stream.until_seq(2, 1)
    taken = 0
    async with append_stream(client) as append:
        for seq in range(2, 30):
            await append.write(writer.append("text.delta", data=json.dumps({"text": "x" * 20_000})))
            await stream.until_seq(2, seq)
            taken = sum(frame.size for frame in stream.frames[2])
            await stream.send(acks=[pb.WatchAck(watch_id=2, taken=taken)])
    behind = stream.seqs(1)
    assert behind == list(range(1, len(behind) + 1))
    assert len(behind) < 10
    sent = sum(frame.size for frame in stream.frames[1])
    assert sent < watch_hub.WINDOW_BYTES + 30_000
    # It catches up once its reader takes.
    while (last := stream.seqs(1)[-1]) < 29:
        taken = sum(frame.size for frame in stream.frames[1])
        await stream.send(acks=[pb.WatchAck(watch_id=1, taken=taken)])
        await stream.until_seq(1, last + 1)
    assert stream.seqs(1) == list(range(1, 30))


async def test_a_drain_moves_all_watches_and_ends_the_stream(client: Client, stream: Stream) -> None:
    writer = await new_writer(client)
    session = await new_session(client)
    await stream.send(of_run(client, 1, writer.run_id), of_session(client, 2, session.session_id))
    await stream.until_seq(1, 1)
    await stream.until(2, "opened")
    client.replica.tail.drain()
    client.replica.watches.drain()
    for watch_id in (1, 2):
        frame = await stream.until(watch_id, "frame")
        while not frame.frame.HasField("reconnect"):
            await stream.read()
            frame = stream.frames[watch_id][-1]
        assert frame.frame.reconnect.reason == "drain"
    while await stream.call.read():
        pass
    assert await stream.call.code() is grpc.StatusCode.OK


async def test_an_idle_stream_says_that_it_lives(
    client: Client, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_hub, "HEARTBEAT_S", 0.01)
    async with stream_call(client.mesh.Watch()) as call:
        for _ in range(3):
            assert not (await call.read()).frames


async def test_an_id_that_is_in_use_ends_the_stream(client: Client, stream: Stream) -> None:
    writer = await new_writer(client)
    await stream.send(of_run(client, 1, writer.run_id))
    await stream.until(1, "opened")
    await stream.send(of_run(client, 1, writer.run_id))
    async with asyncio.timeout(5):
        while await stream.call.read():
            pass


async def test_only_the_mesh_may_watch_so(client: Client) -> None:
    async with grpc.aio.insecure_channel(client.replica.server.address) as channel:
        outside = SessionInternalServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            async with stream_call(outside.Watch(metadata=client.metadata)) as call:
                await call.read()
    assert from_rpc_error(raised.value).reason == "MESH_ONLY"
