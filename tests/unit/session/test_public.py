"""The public RPCs over the fake store: errors, tenants, idempotency, watching."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID

import grpc
import pytest

from hermesh.common.v1.event_pb2 import InputMessage
from hermesh.session.v1 import resources_pb2 as resources
from hermesh.session.v1 import session_internal_service_pb2 as internal
from hermesh.session.v1 import session_service_pb2 as public
from meshkit.channel import stream_call
from meshkit.errors import HermeshError, from_rpc_error
from tests.unit.session.calls import (
    append_stream,
    claim,
    events_of,
    events_until,
    new_session,
    new_writer,
    submit,
    watch,
)
from tests.unit.session.conftest import KEY, Client

NOBODY = "00000000-0000-7000-8000-000000000000"
OTHER_KEY = "hm_" + "o" * 43


async def error_of(call: Any) -> HermeshError:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return from_rpc_error(raised.value)


async def submit_error(
    client: Client, session_id: str, messages: list[tuple[str, str]], **more: Any
) -> HermeshError:
    request = public.SubmitRunRequest(
        session_id=session_id,
        input=[InputMessage(role=role, content=content) for role, content in messages],
        **more,
    )
    return await error_of(client.public.SubmitRun(request, metadata=client.metadata))


@pytest.mark.parametrize(
    ("messages", "reason", "field"),
    [
        ([], "INVALID_ARGUMENT", "input"),
        ([("user", "")], "INVALID_ARGUMENT", "input[0].content"),
        ([("user", " \n ")], "INVALID_ARGUMENT", "input[0].content"),
        ([("user", "a"), ("wizard", "b")], "INVALID_ARGUMENT", "input[1].role"),
        ([("tool", "b")], "INVALID_ARGUMENT", "input[0].role"),
        ([("user", "a\x00b")], "INVALID_ARGUMENT", "input[0].content"),
        ([("user", "x" * (1024 * 1024 + 1))], "INPUT_TOO_LARGE", "input"),
        ([("user", "x" * 600_000), ("user", "é" * 300_000)], "INPUT_TOO_LARGE", "input"),
    ],
)
async def test_bad_input_is_refused_by_field(
    client: Client, messages: list[tuple[str, str]], reason: str, field: str
) -> None:
    session = await new_session(client)
    error = await submit_error(client, session.session_id, messages)
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.reason == reason
    assert [violation.field for violation in error.violations] == [field]
    if reason == "INPUT_TOO_LARGE":
        assert error.metadata["limit_bytes"] == "1048576"
    assert not client.store.runs


async def test_input_of_exactly_the_limit_is_accepted(client: Client) -> None:
    session = await new_session(client)
    response = await submit(client, session.session_id, "x" * 1024 * 1024)
    assert response.run.ordinal == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 2.5),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("max_output_tokens", -1),
        ("max_turns", -1),
        ("max_turns", 1001),
        ("timeout_ms", -5),
        ("stop", [""]),
        ("instructions", "x" * 300_000),
    ],
)
async def test_bad_options_are_refused_by_field(client: Client, field: str, value: Any) -> None:
    session = await new_session(client)
    options = resources.RunOptions(**{field: value})
    error = await submit_error(client, session.session_id, [("user", "hi")], options=options)
    assert [violation.field for violation in error.violations] == [f"options.{field}"]


async def test_only_the_mesh_takes_a_lease_with_its_input(client: Client) -> None:
    session = await new_session(client)
    error = await submit_error(client, session.session_id, [("user", "hi")], claim_owner="me")
    assert (error.code, error.reason) == (grpc.StatusCode.PERMISSION_DENIED, "MESH_ONLY")
    assert not client.store.runs


async def test_a_repeated_request_id_is_one_run(client: Client) -> None:
    session = await new_session(client)
    first = await submit(client, session.session_id, "hi", request_id="r1")
    again = await submit(client, session.session_id, "hi", request_id="r1")
    assert (first.duplicate, again.duplicate) == (False, True)
    assert again.run.run_id == first.run.run_id
    assert again.created == first.created
    for text, more in [
        ("ho", {}),
        ("hi", {"options": resources.RunOptions(temperature=0.5)}),
        ("hi", {"options": resources.RunOptions(seed=0)}),
        ("hi", {"concurrency": resources.CONCURRENCY_POLICY_REJECT}),
    ]:
        error = await submit_error(client, session.session_id, [("user", text)], request_id="r1", **more)
        assert (error.code, error.reason) == (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED")


async def test_what_is_split_otherwise_is_another_request(client: Client) -> None:
    session = await new_session(client)
    messages = [("user", "ab"), ("user", "c")]
    request = public.SubmitRunRequest(
        session_id=session.session_id,
        request_id="r",
        input=[InputMessage(role=role, content=content) for role, content in messages],
    )
    await client.public.SubmitRun(request, metadata=client.metadata)
    error = await submit_error(client, session.session_id, [("user", "a"), ("user", "bc")], request_id="r")
    assert error.reason == "REQUEST_ID_REUSED"


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ((), "API_KEY_MISSING"),
        ((("authorization", "Bearer wrong"),), "API_KEY_INVALID"),
        ((("authorization", KEY),), "API_KEY_INVALID"),
        ((("x-hermesh-mesh", "wrong"),), "API_KEY_INVALID"),
    ],
)
async def test_a_call_without_a_valid_key_is_refused(client: Client, metadata: Any, reason: str) -> None:
    error = await error_of(client.public.ListSessions(public.ListSessionsRequest(), metadata=metadata))
    assert (error.code, error.reason) == (grpc.StatusCode.UNAUTHENTICATED, reason)


async def test_watching_ends_by_cursor(client: Client) -> None:
    writer = await new_writer(client)
    async with append_stream(client) as stream:
        await stream.write(writer.append("text.delta", "run.completed", status=4))
    async with watch(client, writer.run_id, 3) as watched:
        assert await events_of(watched) == []
    async with watch(client, writer.run_id, 1) as watched:
        assert [event.seq for event in await events_of(watched)] == [2, 3]
    async with watch(client, writer.run_id, 4) as watched:
        error = await error_of(events_of(watched))
    assert (error.code, error.reason) == (grpc.StatusCode.OUT_OF_RANGE, "CURSOR_PAST_END")
    assert error.metadata["last_seq"] == "3"


async def test_two_watchers_get_the_same_events(client: Client) -> None:
    writer = await new_writer(client)
    async with append_stream(client) as stream, watch(client, writer.run_id) as first:
        await stream.write(writer.append("text.delta", data='{"text":"é\\u0000"}'))
        async with watch(client, writer.run_id) as second:
            await stream.write(writer.append("text.delta"))
            await stream.write(writer.append("run.completed", status=4))
            assert await events_of(first) == await events_of(second)


@pytest.mark.parametrize("envoy", [False, True])
async def test_a_drain_ends_watches_with_a_reconnect(client: Client, envoy: bool) -> None:
    writer = await new_writer(client)
    tail = client.replica.tail
    async with watch(client, writer.run_id) as watched:
        frames = []
        async for response in watched:
            frames.append(response.frame)
            if envoy and len(frames) == 1:
                # Of the Envoy that the watch came by, here the client itself.
                assert tail.drain_from("192.0.2.1") == 0
                (peer,) = tail.peers()
                assert tail.drain_from(peer) == 1
            elif not envoy:
                tail.drain()
        assert [event.seq for event in frames[0].events] == [1]
        assert frames[-1].reconnect.reason == "drain"
    await watches_gone(client, writer.run_id)


async def test_a_watcher_that_leaves_is_forgotten(client: Client) -> None:
    writer = await new_writer(client)
    async with watch(client, writer.run_id) as watched:
        assert await events_until(watched, 1)
        assert len(client.replica.tail._feeds) == 1
    await watches_gone(client, writer.run_id)


async def watches_gone(client: Client, run_id: str) -> None:
    tail = client.replica.tail
    async with asyncio.timeout(5):
        while tail._feeds or tail.peers():
            await client.public.GetRun(public.GetRunRequest(run_id=run_id), metadata=client.metadata)


async def session_events(call: Any, count: int) -> list[tuple[str, int]]:
    found: list[tuple[str, int]] = []
    async for response in call:
        found += [(event.run_id, event.seq) for event in response.frame.events]
        if len(found) >= count:
            break
    return found


async def test_a_session_is_watched_run_by_run(client: Client) -> None:
    session = await new_session(client)
    first = (await submit(client, session.session_id)).run
    request = public.WatchSessionRequest(session_id=session.session_id)
    async with stream_call(client.public.WatchSession(request, metadata=client.metadata)) as watched:
        writer = await claim(client, first.run_id)
        # A second run queues while the first one works; its events come after the first one's last.
        second = (await submit(client, session.session_id)).run
        async with append_stream(client) as stream:
            await stream.write(writer.append("text.delta"))
            await stream.write(writer.append("run.completed", status=4))
            assert await session_events(watched, 4) == [
                (first.run_id, 1),
                (first.run_id, 2),
                (first.run_id, 3),
                (second.run_id, 1),
            ]
            writer = await claim(client, second.run_id)
            await stream.write(writer.append("run.completed", status=4))
            assert await session_events(watched, 1) == [(second.run_id, 2)]
            third = (await submit(client, session.session_id)).run
            assert await session_events(watched, 1) == [(third.run_id, 1)]
    request = public.WatchSessionRequest(
        session_id=session.session_id, after_run_id=first.run_id, after_seq=2
    )
    async with stream_call(client.public.WatchSession(request, metadata=client.metadata)) as watched:
        assert await session_events(watched, 4) == [
            (first.run_id, 3),
            (second.run_id, 1),
            (second.run_id, 2),
            (third.run_id, 1),
        ]


async def test_only_new_begins_in_the_run_at_work(client: Client) -> None:
    session = await new_session(client)
    run = (await submit(client, session.session_id)).run
    in_line = (await submit(client, session.session_id)).run
    writer = await claim(client, run.run_id)
    # It is over before the one ahead of it.
    await client.public.CancelRun(
        public.CancelRunRequest(run_id=in_line.run_id, reason="x"), metadata=client.metadata
    )
    async with append_stream(client) as stream:
        await stream.write(writer.append("text.delta"))
        request = public.WatchSessionRequest(session_id=session.session_id, only_new=True)
        async with stream_call(client.public.WatchSession(request, metadata=client.metadata)) as watched:
            async with asyncio.timeout(5):
                while not client.replica.tail._feeds:
                    await client.mesh.RenewLeases(internal.RenewLeasesRequest())
            await stream.write(writer.append("text.delta"))
            assert await session_events(watched, 1) == [(run.run_id, 3)]


async def test_session_cursors_are_checked(client: Client) -> None:
    session, other = await new_session(client), await new_session(client)
    run = (await submit(client, other.session_id)).run

    async def error(**fields: Any) -> HermeshError:
        request = public.WatchSessionRequest(session_id=session.session_id, **fields)
        async with stream_call(client.public.WatchSession(request, metadata=client.metadata)) as watched:
            return await error_of(session_events(watched, 1))

    assert (await error(after_run_id=run.run_id)).reason == "RUN_NOT_FOUND"
    assert (await error(after_run_id="nonsense")).reason == "INVALID_ARGUMENT"
    assert (await error(after_seq=3)).reason == "INVALID_ARGUMENT"


async def test_foreign_ids_look_like_unknown_ones(client: Client) -> None:
    """Every public RPC, with another tenant's ids and with ids of nothing, answers the same."""
    writer = await new_writer(client)
    client.store.add_key(OTHER_KEY)
    metadata = (("authorization", f"Bearer {OTHER_KEY}"),)

    async def answers(session_id: str, run_id: str) -> dict[str, tuple[Any, str, str]]:
        found = {}
        stub = client.public
        unary = {
            "GetSession": public.GetSessionRequest(session_id=session_id),
            "DeleteSession": public.DeleteSessionRequest(session_id=session_id),
            "SubmitRun": public.SubmitRunRequest(
                session_id=session_id, input=[InputMessage(role="user", content="x")]
            ),
            "ListRuns": public.ListRunsRequest(session_id=session_id),
            "GetRun": public.GetRunRequest(run_id=run_id),
            "CancelRun": public.CancelRunRequest(run_id=run_id),
        }
        for name, request in unary.items():
            error = await error_of(getattr(stub, name)(request, metadata=metadata))
            found[name] = (error.code, error.reason, error.message)
        streams = {
            "WatchRun": public.WatchRunRequest(run_id=run_id),
            "WatchSession": public.WatchSessionRequest(session_id=session_id),
        }
        for name, stream_request in streams.items():
            async with stream_call(getattr(stub, name)(stream_request, metadata=metadata)) as call:
                error = await error_of(events_of(call))
            found[name] = (error.code, error.reason, error.message)
        return found

    foreign = await answers(writer.session_id, writer.run_id)
    assert foreign == await answers(NOBODY, NOBODY)
    assert {code for code, _, _ in foreign.values()} == {grpc.StatusCode.NOT_FOUND}
    assert UUID(writer.session_id) in client.store.sessions


async def test_a_cancel_of_a_waiting_run_ends_its_watch(client: Client) -> None:
    session = await new_session(client)
    run = (await submit(client, session.session_id)).run
    async with watch(client, run.run_id) as watched:
        response = await client.public.CancelRun(
            public.CancelRunRequest(run_id=run.run_id, reason="enough"), metadata=client.metadata
        )
        assert response.run.status == resources.RUN_STATUS_CANCELLED
        events = await events_of(watched)
        assert [event.type for event in events] == ["run.created", "run.cancelled"]


async def test_broken_bytes_are_a_typed_error(client: Client) -> None:
    async with grpc.aio.insecure_channel(client.replica.server.address) as channel:
        call = channel.unary_unary("/hermesh.session.v1.SessionService/SubmitRun")
        for body in (b"\xff\xff\xff", b"\x12\x05\x12\x03\xff\xfe\xfd"):
            error = await error_of(call(body, metadata=client.metadata))
            assert error.code is grpc.StatusCode.INVALID_ARGUMENT
            assert error.reason == "INVALID_ARGUMENT"
