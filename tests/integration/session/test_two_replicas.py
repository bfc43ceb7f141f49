"""Two replicas on real PostgreSQL and Valkey: written on one, watched, cancelled and taken up on any."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest

from hermesh.common.v1.event_pb2 import Event, InputMessage
from hermesh.session.v1 import resources_pb2 as resources
from hermesh.session.v1 import session_internal_service_pb2 as internal
from hermesh.session.v1 import session_service_pb2 as public
from meshkit.channel import stream_call
from meshkit.errors import from_rpc_error
from tests.integration.session.conftest import Pair
from tests.integration.session.process import Client
from tests.unit.session.calls import (
    Writer,
    append_stream,
    events_of,
    events_until,
    new_session,
    new_writer,
    submit,
    watch,
)
from tests.valkeys import client_of

COMMITTED = internal.APPEND_OUTCOME_COMMITTED
FENCED = internal.APPEND_OUTCOME_FENCED


async def flush(pair: Pair) -> None:
    """Loses all of Redis's data."""
    client = client_of(pair.valkey.url)
    try:
        await client.flushall()
    finally:
        await client.aclose()


async def test_both_replicas_give_identical_events(first: Client, second: Client) -> None:
    writer = await new_writer(first)
    async with (
        append_stream(first) as stream,
        watch(first, writer.run_id) as here,
        watch(second, writer.run_id) as there,
    ):
        for word in range(50):
            [result] = await stream.write(writer.append("text.delta", data=f'{{"text":"é {word} \\u0000"}}'))
            assert result.outcome == COMMITTED
        await stream.write(writer.append("run.completed", status=4))
        async with asyncio.timeout(10):
            seen_here, seen_there = await asyncio.gather(events_of(here), events_of(there))
    assert seen_here == seen_there
    assert [event.seq for event in seen_here] == list(range(1, 53))
    assert seen_here[1].data == '{"text":"é 0 \\u0000"}'


async def test_the_tail_of_the_other_replica_is_live(first: Client, second: Client) -> None:
    """Redis carries it: an event is there long before the look at PostgreSQL that would find it."""
    writer = await new_writer(first)
    async with append_stream(first) as stream, watch(second, writer.run_id) as watched:
        await stream.write(writer.append("text.delta"))
        assert len(await events_until(watched, 2)) == 2
        delays = []
        for seq in range(3, 23):
            started = time.monotonic()
            await stream.write(writer.append("text.delta"))
            assert [event.seq for event in await events_until(watched, seq)] == [seq]
            delays.append(time.monotonic() - started)
    assert sorted(delays)[10] < 0.2


async def test_redis_holds_a_fenced_subset_of_the_log(first: Client, pair: Pair) -> None:
    writer = await new_writer(first)
    async with append_stream(first) as stream:
        for _ in range(5):
            await stream.write(writer.append("text.delta"))
        client = client_of(pair.valkey.url)
        key = f"hermesh:{{{writer.session_id}}}:run:{writer.run_id}:events"
        async with asyncio.timeout(5):
            while await client.xlen(key) < 5:  # noqa: ASYNC110 -- Redis is written behind the answer
                await asyncio.sleep(0.01)
        entries = await client.xrange(key)
        assert [entry for entry, _ in entries] == [b"%d-0" % seq for seq in range(2, 7)]
        assert int(await client.get(f"hermesh:{{{writer.session_id}}}:fence") or 0) == writer.fence
        await client.aclose()


async def play(
    first: Client, second: Client, disturb: Callable[[int], Awaitable[None]], seed: int
) -> tuple[list[Event], list[list[Event]]]:
    """Writes a run on one replica while clients watch it, leave at random points and come back on any."""
    rng = random.Random(seed)
    writer = await new_writer(first)
    length = 60
    clients = [first, second]

    async def write() -> None:
        async with append_stream(first) as stream:
            while writer.next_seq < length:
                count = min(rng.randint(1, 3), length - writer.next_seq)
                await disturb(writer.next_seq)
                [result] = await stream.write(
                    writer.append(*["text.delta"] * count, data=f'{{"text":"{writer.next_seq}"}}')
                )
                assert result.outcome == COMMITTED
            await stream.write(writer.append("run.completed", status=4))

    async def follow(number: int) -> list[Event]:
        chooser = random.Random(seed * 10 + number)
        seen: list[Event] = []
        while not seen or seen[-1].type != "run.completed":
            client = clients[chooser.randrange(2)]
            after = seen[-1].seq if seen else 0
            async with watch(client, writer.run_id, after) as watched:
                cut = chooser.choice([1, 2, 5, 20, 100])
                async for response in watched:
                    seen.extend(response.frame.events)
                    cut -= 1
                    if not cut:
                        break
        return seen

    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        follows = [group.create_task(follow(number)) for number in range(4)]
        group.create_task(write())
    async with watch(second, writer.run_id) as watched:
        stored = await events_of(watched)
    return stored, [task.result() for task in follows]


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_cut_points_show_no_gap_and_no_duplicate(first: Client, second: Client, seed: int) -> None:
    async def disturb(_seq: int) -> None:
        pass

    stored, seen = await play(first, second, disturb, seed)
    assert [event.seq for event in stored] == list(range(1, 61))
    assert all(events == stored for events in seen)


@pytest.mark.parametrize("seed", [4, 5])
async def test_cut_points_while_redis_is_flushed(
    first: Client, second: Client, pair: Pair, seed: int
) -> None:
    rng = random.Random(seed)

    async def disturb(_seq: int) -> None:
        if rng.random() < 0.2:
            await flush(pair)

    stored, seen = await play(first, second, disturb, seed)
    assert all(events == stored for events in seen)


async def test_a_cancel_on_one_replica_reaches_the_stream_on_the_other(first: Client, second: Client) -> None:
    writer = await new_writer(first)
    async with append_stream(first) as stream:
        await stream.write(writer.append("text.delta"))
        response = await second.public.CancelRun(
            public.CancelRunRequest(run_id=writer.run_id, reason="stop"), metadata=second.metadata
        )
        assert response.run.cancel_requested
        async with asyncio.timeout(5):
            answer = await stream.call.read()
        assert list(answer.cancelled_run_ids) == [writer.run_id]
        lease = internal.LeaseRef(session_id=writer.session_id, run_id=writer.run_id, fence=writer.fence)
        renewed = await second.mesh.RenewLeases(internal.RenewLeasesRequest(leases=[lease], owner="agent-1"))
        assert list(renewed.cancelled_run_ids) == [writer.run_id]
        [result] = await stream.write(writer.append("run.cancelled", status=6))
        assert result.outcome == COMMITTED


async def test_a_cancel_of_a_waiting_run_ends_a_watch_elsewhere(first: Client, second: Client) -> None:
    session = await new_session(first)
    run = (await submit(first, session.session_id)).run
    async with watch(second, run.run_id) as watched:
        assert len(await events_until(watched, 1)) == 1
        await first.public.CancelRun(public.CancelRunRequest(run_id=run.run_id), metadata=first.metadata)
        async with asyncio.timeout(5):
            assert [event.type for event in await events_of(watched)] == ["run.cancelled"]


async def test_a_writer_moves_to_the_other_replica(first: Client, second: Client) -> None:
    writer = await new_writer(first)
    async with watch(first, writer.run_id) as here, watch(second, writer.run_id) as there:
        async with append_stream(first) as stream:
            await stream.write(writer.append("text.delta", "text.delta"))
        async with append_stream(second) as stream:
            await reattach(stream, writer)
            [result] = await stream.write(writer.append("text.delta"))
            assert result.outcome == COMMITTED
            async with append_stream(first) as old:
                stale = writer.append("text.delta", first_seq=5)
                stale.fence -= 1
                [result] = await old.write(stale)
                assert result.outcome == FENCED
            await stream.write(writer.append("run.completed", status=4))
        async with asyncio.timeout(10):
            assert await events_of(here) == await events_of(there)


async def test_a_deleted_session_leaves_no_conversation_in_redis(first: Client, pair: Pair) -> None:
    session = await new_session(first)
    for _ in range(2):
        response = await first.mesh_submit(session.session_id)
        assert response.grant.fence
        grant = response.grant
        writer = Writer(grant.session_id, grant.run_id, grant.fence, grant.next_seq)
        async with append_stream(first) as stream:
            step = writer.append("run.completed", status=4)
            step.commit.messages.add(message_id=writer.run_id, role="assistant", content="secret")
            assert (await stream.write(step))[0].outcome == COMMITTED
    client = client_of(pair.valkey.url)
    key = f"hermesh:{{{session.session_id}}}:messages"
    async with asyncio.timeout(5):
        while await client.llen(key) != 4:  # noqa: ASYNC110 -- Redis is written behind the answer
            await asyncio.sleep(0.01)
        await first.public.DeleteSession(
            public.DeleteSessionRequest(session_id=session.session_id), metadata=first.metadata
        )
        while await client.exists(key):  # noqa: ASYNC110 -- as above
            await asyncio.sleep(0.01)
    await client.aclose()


async def reattach(stream: Any, writer: Writer, owner: str = "agent-1") -> None:
    """Moves a run onto a stream."""
    request = internal.Reattach(session_id=writer.session_id, run_id=writer.run_id, fence=writer.fence)
    await stream.call.write(internal.AppendRequest(owner=owner, reattach=[request]))
    response = await stream.call.read()
    [answer] = response.reattached
    assert not answer.lost
    writer.fence = answer.grant.fence
    writer.next_seq = answer.grant.next_seq


async def test_one_request_id_on_both_replicas_is_one_run(first: Client, second: Client) -> None:
    session = await new_session(first)
    answers = await asyncio.gather(
        *(submit(client, session.session_id, "hi", request_id="both") for client in (first, second) * 8)
    )
    assert len({answer.run.run_id for answer in answers}) == 1
    assert sum(not answer.duplicate for answer in answers) == 1
    assert len({answer.created.SerializeToString() for answer in answers}) == 1
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await submit(second, session.session_id, "ho", request_id="both")
    assert from_rpc_error(raised.value).reason == "REQUEST_ID_REUSED"


async def test_one_claim_wins(first: Client, second: Client) -> None:
    session = await new_session(first)
    run = (await submit(first, session.session_id)).run
    answers = await asyncio.gather(
        *(
            client.mesh.ClaimRun(internal.ClaimRunRequest(run_id=run.run_id, owner=f"agent-{number}"))
            for number, client in enumerate((first, second) * 4)
        )
    )
    outcomes = [answer.outcome for answer in answers]
    assert outcomes.count(internal.CLAIM_OUTCOME_CLAIMED) == 1
    assert outcomes.count(internal.CLAIM_OUTCOME_ALREADY_CLAIMED) == 7


async def test_a_session_is_watched_over_its_runs_from_another_replica(first: Client, second: Client) -> None:
    session = await new_session(first)
    request = public.WatchSessionRequest(session_id=session.session_id)
    async with stream_call(second.public.WatchSession(request, metadata=second.metadata)) as watched:
        seen: list[tuple[str, int]] = []
        expected: list[tuple[str, int]] = []
        async with append_stream(first) as stream, asyncio.timeout(20):
            for _ in range(3):
                submitted = await first.public.SubmitRun(
                    public.SubmitRunRequest(
                        session_id=session.session_id, input=[InputMessage(role="user", content="x")]
                    ),
                    metadata=first.metadata,
                )
                claimed = await first.mesh.ClaimRun(
                    internal.ClaimRunRequest(run_id=submitted.run.run_id, owner="agent-1")
                )
                grant = claimed.grant
                writer = Writer(grant.session_id, grant.run_id, grant.fence, grant.next_seq)
                await stream.write(writer.append("text.delta"))
                await stream.write(writer.append("run.completed", status=4))
                expected += [(grant.run_id, seq) for seq in (1, 2, 3)]
                async for response in watched:
                    seen += [(event.run_id, event.seq) for event in response.frame.events]
                    if len(seen) == len(expected):
                        break
                assert seen == expected


async def test_a_call_past_its_deadline_is_a_typed_error(first: Client) -> None:
    writer = await new_writer(first)
    request = public.WatchRunRequest(run_id=writer.run_id)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        async for _ in first.public.WatchRun(request, metadata=first.metadata, timeout=0.3):
            pass
    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    async with append_stream(first) as stream:
        [result] = await stream.write(writer.append("text.delta"))
    assert result.outcome == COMMITTED


@pytest.mark.parametrize(
    ("role", "content", "reason"),
    [
        ("user", "", "INVALID_ARGUMENT"),
        ("robot", "x", "INVALID_ARGUMENT"),
        ("user", "\x00", "INVALID_ARGUMENT"),
        ("user", "x" * (1024 * 1024 + 1), "INPUT_TOO_LARGE"),
    ],
)
async def test_bad_input_leaves_nothing_behind(first: Client, role: str, content: str, reason: str) -> None:
    session = await new_session(first)
    request = public.SubmitRunRequest(
        session_id=session.session_id, input=[InputMessage(role=role, content=content)]
    )
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await first.public.SubmitRun(request, metadata=first.metadata)
    assert from_rpc_error(raised.value).reason == reason
    runs = await first.public.ListRuns(
        public.ListRunsRequest(session_id=session.session_id), metadata=first.metadata
    )
    assert not runs.runs


async def test_a_journalled_call_waits_for_a_person_and_goes_on(first: Client, second: Client) -> None:
    writer = await new_writer(first)
    call_id = f"{writer.run_id}:1:0"
    async with append_stream(first) as stream, watch(second, writer.run_id) as watched:
        step = writer.append("tool.call")
        step.commit.intents.add(call_id=call_id, name="pay", arguments="{}", idempotency_key="k")
        assert (await stream.write(step))[0].outcome == COMMITTED
        begin = internal.BeginToolCallRequest(
            call_id=call_id, session_id=writer.session_id, fence=writer.fence
        )
        assert (await second.mesh.BeginToolCall(begin)).outcome == internal.BEGIN_OUTCOME_GO
        assert (await first.mesh.BeginToolCall(begin)).outcome == internal.BEGIN_OUTCOME_UNKNOWN
        assert (await stream.write(writer.append("action.required", status=3)))[0].outcome == COMMITTED
        run = await second.public.GetRun(public.GetRunRequest(run_id=writer.run_id), metadata=second.metadata)
        assert run.run.status == resources.RUN_STATUS_REQUIRES_ACTION
        assert [call.call_id for call in run.pending_actions] == [call_id]
        resolved = await second.public.ResolveAction(
            public.ResolveActionRequest(
                run_id=writer.run_id,
                call_id=call_id,
                decision=public.ACTION_DECISION_COMPLETED,
                content="paid",
            ),
            metadata=second.metadata,
        )
        assert resolved.tool_call.state == resources.TOOL_CALL_STATE_COMPLETED
        async with asyncio.timeout(5):
            events = await events_until(watched, 4)
        assert [event.type for event in events] == [
            "run.created",
            "tool.call",
            "action.required",
            "action.resolved",
        ]
