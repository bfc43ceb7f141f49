"""Streams that break, clients that leave or stop reading. The mesh is the FAKE of tests/fakes/mesh.py."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, suppress
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from gateway.clients import SAFE_METHODS, MeshClients
from gateway.cursor import RunCursor
from gateway.follow import FeedLost, RunFeed
from gateway.routes.runs import session_place
from gateway.settings import GatewaySettings
from hermesh.agent.v1.agent_service_pb2 import RunRequest
from hermesh.common.v1.event_pb2 import InputMessage
from meshkit.channel import open_channel
from meshkit.errors import NotFoundError, ResourceExhaustedError, UnavailableError
from meshkit.identity import Identity, use_identity
from tests.fakes.mesh import API_KEY, TENANT, FakeMesh, FakeRun

CUTS = [
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.CANCELLED,
    "reconnect",
    "end",
]


def parse(text: str) -> list[dict[str, Any]]:
    return [
        json.loads(line[6:])
        for frame in text.split("\n\n")
        if frame.startswith("id: ")
        for line in frame.split("\n")
        if line.startswith("data: ")
    ]


class Gate:
    """A script that goes on when the test says so."""

    def __init__(self) -> None:
        self.steps: asyncio.Queue[str] = asyncio.Queue()

    async def script(self, run: FakeRun) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        while True:
            text = await self.steps.get()
            if text == "end":
                yield "run.completed", {"message_id": "", "finish_reason": "stop"}
                return
            yield "text.delta", {"text": text}


async def until(check: Callable[[], bool]) -> None:
    """Waits until something that no event announces is so."""
    async with asyncio.timeout(10):
        while not check():  # noqa: ASYNC110 -- what is waited for is a plain attribute
            await asyncio.sleep(0.01)


async def start_run(served: Any, **more: Any) -> tuple[str, Any]:
    session = served.mesh.add_session()
    request = served.client.build_request(
        "POST", f"/v1/sessions/{session.session_id}/runs", json={"input": "a b", "stream": True, **more}
    )
    return session.session_id, await served.client.send(request, stream=True)


class Reader:
    """Reads a stream piece by piece; httpx allows only one pass over it."""

    def __init__(self, answer: Any) -> None:
        self._parts = answer.aiter_text()
        self.text = ""

    async def until(self, text: str) -> str:
        """Reads on until `text` came, or the stream ended."""
        async with asyncio.timeout(10):
            while text not in self.text:
                part = await anext(self._parts, None)
                if part is None:
                    break
                self.text += part
        return self.text


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, 6), st.sampled_from(CUTS)), max_size=5),
    st.integers(1, 4),
)
def test_however_streams_break_the_client_gets_the_log_once(
    cuts: list[tuple[int, Any]], frame_size: int
) -> None:
    """The first cut is of Run, the others of WatchRun, wherever they come."""

    async def scenario() -> None:
        async with FakeMesh() as mesh:
            mesh.frame_size = frame_size
            mesh.run_cuts, mesh.watch_cuts = list(cuts[:1]), list(cuts[1:])
            session = mesh.add_session()
            async with open_channel(
                GatewaySettings(mesh_address=mesh.address, mesh_token="x"), safe=SAFE_METHODS
            ) as channel:
                submit = RunRequest(
                    session_id=session.session_id,
                    input=[InputMessage(role="user", content="one two three")],
                    request_id="r",
                )
                async with MeshClients(channel) as clients:
                    feed = RunFeed(clients, RunCursor(), 5.0, submit)
                    with use_identity(Identity(TENANT, mesh=False)):
                        got = [event async for batch in feed.batches() for event in batch]
            assert len(mesh.runs) == 1
            assert got == session.runs[0].log.events

    asyncio.run(scenario())


@pytest.mark.parametrize("cut", CUTS)
async def test_the_client_does_not_notice_an_agent_that_dies(served: Any, cut: Any) -> None:
    served.mesh.run_cuts = [(3, cut)]
    _, answer = await start_run(served)
    text = (await answer.aread()).decode()
    assert "reconnect" not in text
    events = parse(text)
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert events[-1]["type"] == "run.completed"
    assert served.mesh.calls.count("WatchRun") == 1


async def test_an_agent_that_dies_before_the_first_event_is_asked_again(served: Any) -> None:
    served.mesh.run_cuts = [(0, grpc.StatusCode.UNAVAILABLE)]
    _, answer = await start_run(served)
    assert parse((await answer.aread()).decode())[-1]["type"] == "run.completed"
    assert served.mesh.calls.count("Run") == 2
    assert len(served.mesh.runs) == 1


async def test_without_any_agent_the_input_is_accepted_and_waits(served: Any) -> None:
    served.mesh.run_cuts = [(-1, grpc.StatusCode.UNAVAILABLE)] * 3
    _, answer = await start_run(served)
    assert parse((await answer.aread()).decode())[-1]["type"] == "run.completed"
    assert "SubmitRun" in served.mesh.calls


async def test_with_all_agents_full_the_input_is_queued_at_once(served: Any) -> None:
    served.mesh.run_cuts = [(-1, ResourceExhaustedError("OVERLOADED", "full", retry_after_ms=1000))]
    _, answer = await start_run(served)
    assert parse((await answer.aread()).decode())[-1]["type"] == "run.completed"
    assert served.mesh.calls.count("Run") == 1


async def test_a_run_whose_acceptance_was_not_heard_of_is_not_refused(start: Callable[..., Any]) -> None:
    served = await start(max_waiting_streams=0)
    full = ResourceExhaustedError("OVERLOADED", "full", retry_after_ms=1000)
    served.mesh.run_cuts = [(0, grpc.StatusCode.UNAVAILABLE), (-1, full)]
    _, answer = await start_run(served)
    assert answer.status_code == 200
    assert parse((await answer.aread()).decode())[-1]["type"] == "run.completed"
    assert len(served.mesh.runs) == 1


async def test_when_nobody_goes_on_the_client_is_told_to_come_back(start: Callable[..., Any]) -> None:
    served = await start(follow_timeout_seconds=0.2)
    gate = Gate()
    served.mesh.script = gate.script
    served.mesh.run_cuts = [(1, grpc.StatusCode.UNAVAILABLE)]
    served.mesh.watch_cuts = [(0, grpc.StatusCode.UNAVAILABLE)] * 100
    gate.steps.put_nowait("a")
    _, answer = await start_run(served)
    text = (await answer.aread()).decode()
    assert text.count("event: ") == 2
    assert text.endswith('event: reconnect\ndata: {"reason":"unreachable","after_ms":1000}\n\n')
    run_id = parse(text)[0]["run_id"]
    served.mesh.watch_cuts = []
    gate.steps.put_nowait("end")
    again = await served.client.get(f"/v1/runs/{run_id}/events", headers={"Last-Event-ID": f"{run_id}:1"})
    assert [event["seq"] for event in parse(again.text)] == [2, 3]


async def test_a_session_deleted_under_its_watcher_ends_the_stream(served: Any) -> None:
    gate = Gate()
    served.mesh.script = gate.script
    served.mesh.run_cuts = [(2, "reconnect")]
    gate.steps.put_nowait("a")
    session = served.mesh.add_session()
    request = served.client.build_request(
        "POST", f"/v1/sessions/{session.session_id}/runs", json={"input": "a", "stream": True}
    )
    served.mesh.watch_cuts = [(0, grpc.StatusCode.NOT_FOUND)]
    answer = await served.client.send(request, stream=True)
    assert "event: reconnect" in (await answer.aread()).decode()


async def test_a_source_with_a_gap_is_left(mesh: FakeMesh, start: Callable[..., Any]) -> None:
    served = await start()
    follow = mesh.follow
    skipped: list[int] = []

    async def skipping(run: FakeRun, after: int, cut: Any, context: Any) -> AsyncIterator[Any]:
        async for frame in follow(run, after, cut, context):
            if frame.events and frame.events[0].seq == 4 and not skipped:
                skipped.append(4)
                continue
            yield frame

    mesh.follow = skipping  # type: ignore[method-assign]
    _, answer = await start_run(served)
    events = parse((await answer.aread()).decode())
    assert skipped
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))


async def test_a_client_that_leaves_keeps_its_run_open_until_it_ends(served: Any) -> None:
    gate = Gate()
    served.mesh.script = gate.script
    gate.steps.put_nowait("a")
    _, answer = await start_run(served)
    await Reader(answer).until("text.delta")
    await answer.aclose()
    gate.steps.put_nowait("b")
    run = next(iter(served.mesh.runs.values()))
    await served.mesh.until(lambda: len(run.log.events) == 3)
    assert served.mesh.open_runs == 1
    gate.steps.put_nowait("end")
    await served.mesh.until(lambda: served.mesh.open_runs == 0)
    assert await served.gateway.hub.owner.wait_idle(5)
    again = await served.client.get(f"/v1/runs/{run.run_id}/events")
    assert len(parse(again.text)) == 4


async def test_a_watcher_that_leaves_is_let_go_at_once(served: Any) -> None:
    gate = Gate()
    served.mesh.script = gate.script
    session = served.mesh.add_session()
    made = await served.client.post(f"/v1/sessions/{session.session_id}/runs", json={"input": "a"})
    async with served.client.stream("GET", f"/v1/runs/{made.json()['run_id']}/events") as answer:
        await Reader(answer).until("run.created")
    assert await served.gateway.hub.owner.wait_idle(5)


async def test_silence_is_filled_with_heartbeats(start: Callable[..., Any]) -> None:
    served = await start(heartbeat_seconds=0.05)
    gate = Gate()
    served.mesh.script = gate.script
    _, answer = await start_run(served)
    reader = Reader(answer)
    text = await reader.until(": heartbeat\n\n: heartbeat\n\n")
    assert "id: " in text.split(": heartbeat")[0]
    gate.steps.put_nowait("end")
    assert "run.completed" in await reader.until("run.completed")


async def test_a_quiet_runs_stream_opens_at_once(served: Any) -> None:
    gate = Gate()
    served.mesh.script = gate.script
    session = served.mesh.add_session()
    made = (await served.client.post(f"/v1/sessions/{session.session_id}/runs", json={"input": "a"})).json()
    async with asyncio.timeout(3):
        url = f"/v1/runs/{made['run_id']}/events?after_seq=1"
        async with served.client.stream("GET", url) as answer:
            assert answer.status_code == 200


async def test_a_client_that_stops_reading_is_dropped_and_can_come_back(start: Callable[..., Any]) -> None:
    served = await start(write_timeout_seconds=0.3)

    async def flood(run: FakeRun) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        for _ in range(400):
            yield "text.delta", {"text": "x" * 50_000}
        yield "run.completed", {"message_id": "", "finish_reason": "stop"}

    served.mesh.script = flood
    session = served.mesh.add_session()
    reader, writer = await asyncio.open_connection(*served.host.split(":"), limit=1024)
    body = json.dumps({"input": "a", "stream": True})
    writer.write(
        (
            f"POST /v1/sessions/{session.session_id}/runs HTTP/1.1\r\nHost: {served.host}\r\n"
            f"Authorization: Bearer {API_KEY}\r\nContent-Length: {len(body)}\r\n\r\n{body}"
        ).encode()
    )
    hub = served.gateway.hub
    await served.mesh.until(lambda: bool(session.runs))
    async with asyncio.timeout(10):
        while hub.metrics.dropped._value.get() == 0:
            await asyncio.wait(hub.owner.tasks, timeout=0.05)
    # Its run goes on, and is whole for whoever comes back.
    assert await hub.owner.wait_idle(20)
    assert session.runs[0].log.finished

    async def read_out() -> None:
        while True:
            await reader.readexactly(1 << 16)

    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await read_out()
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()
    run_id = session.runs[0].run_id
    again = await served.client.get(f"/v1/runs/{run_id}/events?after_seq=400")
    assert [event["seq"] for event in parse(again.text)] == [401, 402]


async def test_a_client_that_does_not_even_take_heartbeats_is_dropped(start: Callable[..., Any]) -> None:
    served = await start(write_timeout_seconds=0.2, heartbeat_seconds=0.2)
    go_on = asyncio.Event()

    async def fills_the_buffers(run: FakeRun) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        # More than all buffers on the way hold, and then silence.
        for _ in range(400):
            yield "text.delta", {"text": "x" * 20_000}
        await go_on.wait()
        yield "run.completed", {"message_id": "", "finish_reason": "stop"}

    served.mesh.script = fills_the_buffers
    session = served.mesh.add_session()
    body = json.dumps({"input": "a", "stream": True})
    reader, writer = await asyncio.open_connection(*served.host.split(":"), limit=1024)
    writer.write(
        (
            f"POST /v1/sessions/{session.session_id}/runs HTTP/1.1\r\nHost: {served.host}\r\n"
            f"Authorization: Bearer {API_KEY}\r\nContent-Length: {len(body)}\r\n\r\n{body}"
        ).encode()
    )
    hub = served.gateway.hub
    await served.mesh.until(lambda: bool(session.runs))
    async with asyncio.timeout(20):
        while hub.metrics.dropped._value.get() == 0:
            await asyncio.wait(hub.owner.tasks, timeout=0.05)
    go_on.set()
    assert await hub.owner.wait_idle(10)
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()
    del reader


async def test_the_response_ends_with_the_last_event_not_with_the_stream_behind(
    mesh: FakeMesh, start: Callable[..., Any]
) -> None:
    served = await start()
    follow, lingering = mesh.follow, asyncio.Event()

    async def lingers(*arguments: Any) -> AsyncIterator[Any]:
        async for frame in follow(*arguments):
            yield frame
        await lingering.wait()

    mesh.follow = lingers  # type: ignore[method-assign]
    async with asyncio.timeout(1.5):
        _, answer = await start_run(served)
        assert parse((await answer.aread()).decode())[-1]["type"] == "run.completed"
    lingering.set()


@pytest.mark.parametrize("envoy", [False, True])
async def test_a_drain_sends_reconnect_and_the_cursor_goes_on_elsewhere(
    start: Callable[..., Any], envoy: bool
) -> None:
    first, second = await start(), await start()
    gate = Gate()
    first.mesh.script = gate.script
    gate.steps.put_nowait("a")
    _, answer = await start_run(first)
    reader = Reader(answer)
    await reader.until("text.delta")
    if envoy:
        # Of the Envoy that the stream came by, here the client itself.
        assert first.gateway.hub.drain_from("127.0.0.2") == 0
        assert first.gateway.hub.peers() == {"127.0.0.1"}
        assert first.gateway.hub.drain_from("127.0.0.1") == 1
    else:
        first.gateway.hub.drain()
    text = await reader.until("the end")
    assert text.endswith('event: reconnect\ndata: {"reason":"drain","after_ms":100}\n\n')
    events = parse(text)
    run_id, seq = events[-1]["run_id"], events[-1]["seq"]
    gate.steps.put_nowait("end")
    again = await second.client.get(f"/v1/runs/{run_id}/events", headers={"Last-Event-ID": f"{run_id}:{seq}"})
    assert [event["seq"] for event in parse(again.text)] == [seq + 1]


async def test_more_streams_than_there_is_room_for_are_refused(start: Callable[..., Any]) -> None:
    served = await start(max_streams=1)
    gate = Gate()
    served.mesh.script = gate.script
    _, answer = await start_run(served)
    with capture_logs() as lines:
        _, refused = await start_run(served)
        # Refused before its body is looked at, wrong as it is.
        chat = await served.client.post("/v1/chat/completions", content=b"no JSON")
        served.app.refusals.say()
    assert refused.status_code == chat.status_code == 429
    assert json.loads(await refused.aread())["reason"] == "OVERLOADED"
    assert refused.headers["retry-after"] == "1"
    assert chat.json()["error"]["code"] == "overloaded"
    said = [(line["log_level"], line["event"], line.get("count")) for line in lines if line["status"] == 429]
    assert said == [("debug", "request", None)] * 2 + [("info", "requests refused", 1)] * 2
    gate.steps.put_nowait("end")
    await Reader(answer).until("run.completed")


async def test_a_feed_that_finds_nobody_gives_up_in_time() -> None:
    settings_ = GatewaySettings(mesh_address="127.0.0.1:1", mesh_token="x")
    async with open_channel(settings_) as channel:
        feed = RunFeed(MeshClients(channel), RunCursor("01890000-0000-7000-8000-00000000000a", 3), 0.3)

        async def read_out() -> None:
            async with asyncio.timeout(5):
                async for _ in feed.batches():
                    pass

        with pytest.raises(FeedLost):
            await read_out()


async def test_an_unknown_run_is_not_looked_for_twice(mesh: FakeMesh) -> None:
    settings_ = GatewaySettings(mesh_address=mesh.address, mesh_token="x")
    async with open_channel(settings_) as channel:
        feed = RunFeed(MeshClients(channel), RunCursor("01890000-0000-7000-8000-00000000000a", 3), 5)
        with use_identity(Identity(TENANT, mesh=False)), pytest.raises(NotFoundError):
            async for _ in feed.batches():
                pass
    assert mesh.calls == ["WatchRun"]


async def test_a_bug_before_a_stream_begins_is_an_internal_error(
    served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, answer = await start_run(served)
    await answer.aread()
    run = next(iter(served.mesh.runs.values()))

    def broken(*_: Any) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(served.gateway.hub.watches, "join", broken)
    refused = await served.client.get(f"/v1/runs/{run.run_id}/events")
    assert refused.status_code == 500
    assert refused.json()["reason"] == "INTERNAL"


async def test_a_bug_in_the_middle_of_a_stream_ends_it_properly(
    served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    served.mesh.script = gate.script
    session = served.mesh.add_session()
    await served.client.post(f"/v1/sessions/{session.session_id}/runs", json={"input": "a"})

    def broken(*_: Any) -> None:
        raise ValueError("a bug")

    async with served.client.stream("GET", f"/v1/sessions/{session.session_id}/events") as answer:
        reader = Reader(answer)
        await reader.until("run.created")
        monkeypatch.setattr(served.gateway.hub.watches, "_events", broken)
        gate.steps.put_nowait("a")
        text = await reader.until("the end")
    assert text.endswith('event: reconnect\ndata: {"reason":"internal","after_ms":0}\n\n')


async def test_watchers_share_what_is_watched_and_move_together(served: Any) -> None:
    """All read one watch; its stream breaks, and they go on over another without a gap or a duplicate."""
    gate = Gate()
    served.mesh.script = gate.script
    session = served.mesh.add_session()
    await served.client.post(f"/v1/sessions/{session.session_id}/runs", json={"input": "a"})
    url = f"/v1/sessions/{session.session_id}/events"
    async with AsyncExitStack() as stack:
        readers = [
            Reader(await stack.enter_async_context(served.client.stream("GET", url))) for _ in range(5)
        ]
        for reader in readers:
            await reader.until("run.created")
        for number in range(3):
            for link in list(served.mesh.links):
                link.put_nowait(grpc.StatusCode.UNAVAILABLE)
            gate.steps.put_nowait(f"word-{number}")
            for reader in readers:
                await reader.until(f"word-{number}")
    for reader in readers:
        assert [event["seq"] for event in parse(reader.text)] == [1, 2, 3, 4]
    assert served.mesh.calls.count("WatchSession") < len(readers) * 4


async def submitted(mesh: FakeMesh, session_id: str) -> FakeRun:
    """A run that no gateway knows of; its first event is there."""
    request = RunRequest(session_id=session_id, input=[InputMessage(role="user", content="a")])
    return await mesh.submit(request, str(TENANT))


async def test_who_watches_what_is_new_misses_nothing_while_its_stream_is_broken(served: Any) -> None:
    session = served.mesh.add_session()

    async def run() -> FakeRun:
        made = await submitted(served.mesh, session.session_id)
        await served.mesh.until(lambda: made.log.finished)
        return made

    await run()
    url = f"/v1/sessions/{session.session_id}/events?only_new=true"
    async with served.client.stream("GET", url) as answer:
        await served.mesh.until(lambda: served.mesh.links)
        for link in list(served.mesh.links):
            link.put_nowait(grpc.StatusCode.UNAVAILABLE)
        new = await run()
        text = await Reader(answer).until("run.completed")
    events = parse(text)
    assert {event["run_id"] for event in events} == {new.run_id}
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))


async def test_what_is_new_begins_after_the_last_event_of_the_run_at_work(served: Any) -> None:
    gate = Gate()
    session = served.mesh.add_session()

    async def now() -> tuple[str, int]:
        with use_identity(Identity(TENANT, mesh=False)):
            _, place = await session_place(served.gateway, session.session_id, "", 0, only_new=True)
        return place

    assert await now() == ("", 0)
    first = await submitted(served.mesh, session.session_id)
    await served.mesh.until(lambda: first.log.finished)
    assert await now() == (first.run_id, len(first.log.events))
    served.mesh.script = gate.script
    at_work = await submitted(served.mesh, session.session_id)
    assert await now() == (at_work.run_id, 1)
    in_line = await submitted(served.mesh, session.session_id)
    assert await now() == (at_work.run_id, 1)
    # One that was cancelled while it waited is over before the one ahead of it.
    await in_line.log.append(in_line.run_id, "run.cancelled", {})
    assert await now() == (at_work.run_id, 1)
    gate.steps.put_nowait("end")
    gate.steps.put_nowait("end")


async def test_a_watcher_that_stops_reading_holds_up_nobody_is_dropped_and_can_come_back(
    start: Callable[..., Any],
) -> None:
    served = await start(write_timeout_seconds=0.5)

    async def flood(run: FakeRun) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        for _ in range(400):
            yield "text.delta", {"text": "x" * 50_000}
        yield "run.completed", {"message_id": "", "finish_reason": "stop"}

    served.mesh.script = flood
    session = served.mesh.add_session()
    reader, writer = await asyncio.open_connection(*served.host.split(":"), limit=1024)
    path = f"/v1/sessions/{session.session_id}/events"
    writer.write(
        f"GET {path} HTTP/1.1\r\nHost: {served.host}\r\nAuthorization: Bearer {API_KEY}\r\n\r\n".encode()
    )
    await reader.readuntil(b"\r\n\r\n")
    async with served.client.stream("GET", path) as answer:
        await served.client.post(f"/v1/sessions/{session.session_id}/runs", json={"input": "a"})
        seqs: list[int] = []
        async with asyncio.timeout(20):
            async for line in answer.aiter_lines():
                if line.startswith("id: "):
                    seqs.append(int(line.rpartition(":")[2]))
                    if seqs[-1] == 402:
                        break
    assert seqs == list(range(1, 403))
    hub = served.gateway.hub
    await until(lambda: hub.metrics.dropped._value.get() == 1)

    async def read_out() -> None:
        while True:
            await reader.readexactly(1 << 16)

    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await read_out()
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()
    await until(lambda: hub.open == 0)


async def test_a_slow_watcher_gets_all_of_the_log(served: Any) -> None:
    """It takes a little at a time, and leaves and joins its watch again and again."""

    async def flood(run: FakeRun) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        for _ in range(200):
            yield "text.delta", {"text": "x" * 50_000}
        yield "run.completed", {"message_id": "", "finish_reason": "stop"}

    served.mesh.script = flood
    session = served.mesh.add_session()
    reader, writer = await asyncio.open_connection(*served.host.split(":"), limit=1024)
    path = f"/v1/sessions/{session.session_id}/events"
    writer.write(
        f"GET {path} HTTP/1.1\r\nHost: {served.host}\r\nAuthorization: Bearer {API_KEY}\r\n\r\n".encode()
    )
    await reader.readuntil(b"\r\n\r\n")
    await served.client.post(f"/v1/sessions/{session.session_id}/runs", json={"input": "a"})
    body = b""
    async with asyncio.timeout(30):
        while b"event: run.completed" not in body:
            size = int(await reader.readuntil(b"\r\n"), 16)
            body += (await reader.readexactly(size + 2))[:-2]
            await asyncio.sleep(0.001)
    writer.close()
    assert [event["seq"] for event in parse(body.decode() + "\n\n")] == list(range(1, 203))


async def test_an_agent_that_hangs_holds_up_nobody_who_names_a_model(served: Any) -> None:
    hanging = 0

    async def list_models(request: Any, timeout: float) -> Any:
        nonlocal hanging
        hanging += 1
        raise UnavailableError()

    served.gateway.mesh.agents.ListModels = list_models
    for _ in range(3):
        assert await served.gateway.mesh.check_model("whatever") == "whatever"
    assert hanging == 1
