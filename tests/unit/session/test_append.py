"""The append hub and the flusher, over gRPC and the fake store."""

from __future__ import annotations

import asyncio
from uuid import UUID

import grpc
import pytest

from hermesh.session.v1 import session_internal_service_pb2 as internal
from hermesh.session.v1 import session_internal_service_pb2_grpc as internal_grpc
from meshkit.errors import InternalError, from_rpc_error
from services.session.store.notifications import CANCEL
from services.session.storm import GRACE_MS, STORM_GRACE_MS
from tests.unit.session.calls import (
    append_stream,
    events_of,
    events_until,
    new_session,
    new_writer,
    submit,
    until,
    watch,
)
from tests.unit.session.conftest import Client, serve
from tests.unit.session.fake_store import FakeStore, unavailable

COMMITTED = internal.APPEND_OUTCOME_COMMITTED
FENCED = internal.APPEND_OUTCOME_FENCED
GAP = internal.APPEND_OUTCOME_GAP
RETRY = internal.APPEND_OUTCOME_RETRY
INVALID = internal.APPEND_OUTCOME_INVALID


async def test_a_run_is_written_and_watched(client: Client) -> None:
    writer = await new_writer(client)
    async with append_stream(client) as stream, watch(client, writer.run_id) as watched:
        [result] = await stream.write(writer.append("run.started", "text.delta"))
        assert (result.outcome, result.next_seq) == (COMMITTED, 4)
        [result] = await stream.write(writer.append("run.completed", status=4))
        assert result.outcome == COMMITTED
        events = await events_of(watched)
        assert [event.type for event in events] == [
            "run.created",
            "run.started",
            "text.delta",
            "run.completed",
        ]
        assert [event.seq for event in events] == [1, 2, 3, 4]
        await stream.call.done_writing()
        assert await stream.call.read() is grpc.aio.EOF
    assert client.store.shortened == []


async def test_a_writer_that_was_told_elsewhere_to_stop_is_forgotten(
    monkeypatch: pytest.MonkeyPatch, store: FakeStore
) -> None:
    monkeypatch.setattr("services.session.append_hub._LOOK_S", 0.01)
    async with serve(store) as client:
        taken, released, kept = writers = [await new_writer(client) for _ in range(3)]
        async with append_stream(client) as stream:
            await stream.write(*(writer.append("text.delta") for writer in writers))
            hub = client.replica.hub
            assert all(hub.holds(UUID(writer.run_id)) for writer in writers)
            # Their agents heard of it from other replicas, and say nothing more here.
            store.leases[UUID(taken.session_id)].fence += 1
            store.leases[UUID(released.session_id)].owner = ""
            store.fail = [unavailable()]
            await until(lambda: not any(hub.holds(UUID(one.run_id)) for one in (taken, released)))
            assert not store.fail
            assert hub.holds(UUID(kept.run_id))
            [result] = await stream.write(kept.append("text.delta"))
            assert result.outcome == COMMITTED


async def test_appends_that_arrive_during_a_flush_commit_together(client: Client) -> None:
    writers = [await new_writer(client) for _ in range(20)]
    client.store.gate.clear()
    async with append_stream(client) as stream:
        appends = [writer.append("text.delta") for writer in writers]
        await stream.send(appends[0])
        await stream.send(*appends[1:])
        # The second message is in once a reader that came after it is answered.
        await client.mesh.RenewLeases(internal.RenewLeasesRequest())
        client.store.gate.set()
        results = await stream.results(*appends)
    assert {result.outcome for result in results} == {COMMITTED}
    assert sum(client.store.flushes) == 20
    assert len(client.store.flushes) <= 3


async def test_two_appends_of_one_session_go_in_two_flushes(client: Client) -> None:
    writer = await new_writer(client)
    async with append_stream(client) as stream:
        first, second = writer.append("text.delta"), writer.append("text.delta")
        results = await stream.write(first, second)
    assert [result.outcome for result in results] == [COMMITTED, COMMITTED]
    assert client.store.flushes == [1, 1]


async def test_an_old_fence_is_refused_and_others_in_the_batch_are_not(client: Client) -> None:
    writer, other = await new_writer(client), await new_writer(client)
    stale = writer.append("text.delta")
    stale.fence -= 1
    async with append_stream(client) as stream:
        fenced, committed = await stream.write(stale, other.append("text.delta"))
    assert fenced.outcome == FENCED
    assert committed.outcome == COMMITTED


async def test_a_gap_names_the_next_seq(client: Client) -> None:
    writer = await new_writer(client)
    async with append_stream(client) as stream:
        [result] = await stream.write(writer.append("text.delta", first_seq=7))
    assert (result.outcome, result.next_seq) == (GAP, 2)


async def test_a_write_whose_answer_was_lost_is_committed_when_it_comes_again(client: Client) -> None:
    writer = await new_writer(client)
    client.store.committed_then_fail = [unavailable()]
    async with append_stream(client) as stream:
        append = writer.append("text.delta", "text.delta")
        [result] = await stream.write(append)
        assert result.outcome == RETRY
        [result] = await stream.write(append)
        assert (result.outcome, result.next_seq) == (COMMITTED, 4)


async def test_database_trouble_is_a_retry_and_loses_nothing(client: Client) -> None:
    writer = await new_writer(client)
    async with append_stream(client) as stream, watch(client, writer.run_id) as watched:
        client.store.fail = [unavailable()]
        append = writer.append("text.delta")
        [result] = await stream.write(append)
        assert result.outcome == RETRY
        [result] = await stream.write(append)
        assert result.outcome == COMMITTED
        client.store.fail = [unavailable()]
        step = writer.append("run.completed", status=4)
        [result] = await stream.write(step)
        assert result.outcome == RETRY
        [result] = await stream.write(step)
        assert result.outcome == COMMITTED
        assert [event.seq for event in await events_of(watched)] == [1, 2, 3]


async def test_one_unstorable_write_does_not_fail_the_others(client: Client) -> None:
    writers = [await new_writer(client) for _ in range(5)]
    client.store.gate.clear()
    async with append_stream(client) as stream:
        appends = [writer.append("text.delta") for writer in writers]
        appends[2].events[0].data = '{"text":"\x00"}'
        await stream.send(*appends)
        client.store.gate.set()
        results = await stream.results(*appends)
    assert [result.outcome for result in results] == [COMMITTED, COMMITTED, INVALID, COMMITTED, COMMITTED]
    assert "stored" in results[2].detail


async def test_a_failure_inside_the_store_is_not_shown(client: Client) -> None:
    writer = await new_writer(client)
    client.store.fail = [InternalError(message="column foo of secret_table")]
    async with append_stream(client) as stream:
        [result] = await stream.write(writer.append("text.delta"))
    assert result.outcome == INVALID
    assert "secret_table" not in result.detail


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        ({"session_id": "x"}, "UUID"),
        ({"run_id": "x"}, "UUID"),
        ({"first_seq": 0}, "first_seq"),
        ({"events": []}, "needs events"),
    ],
)
async def test_malformed_writes_are_invalid(client: Client, change: dict[str, object], detail: str) -> None:
    writer = await new_writer(client)
    append = writer.append("text.delta")
    for field, value in change.items():
        if field == "events":
            del append.events[:]
        else:
            setattr(append, field, value)
    async with append_stream(client) as stream:
        [result] = await stream.write(append)
    assert result.outcome == INVALID
    assert detail in result.detail


@pytest.mark.parametrize("status", [1, 2])
async def test_a_step_cannot_set_a_status_that_is_the_stores(client: Client, status: int) -> None:
    writer = await new_writer(client)
    async with append_stream(client) as stream:
        [result] = await stream.write(writer.append("text.delta", status=status))
    assert result.outcome == INVALID


async def test_a_cancel_reaches_the_stream_that_holds_the_run(client: Client) -> None:
    writer, other = await new_writer(client), await new_writer(client)
    async with append_stream(client) as stream, append_stream(client) as second:
        await stream.write(writer.append("text.delta"))
        await second.write(other.append("text.delta"))
        client.replica.notice(CANCEL, writer.run_id)
        response = await stream.call.read()
        assert list(response.cancelled_run_ids) == [writer.run_id]
        client.replica.notice(CANCEL, "00000000-0000-7000-8000-000000000000")
        client.replica.notice(CANCEL, "no id")
        client.replica.notice(CANCEL, other.run_id)
        response = await second.call.read()
        assert list(response.cancelled_run_ids) == [other.run_id]


async def test_reattach_moves_the_run_under_a_new_fence(client: Client) -> None:
    writer = await new_writer(client)
    async with append_stream(client) as first, append_stream(client) as second:
        await first.write(writer.append("text.delta"))
        request = internal.Reattach(session_id=writer.session_id, run_id=writer.run_id, fence=writer.fence)
        await second.call.write(internal.AppendRequest(owner="agent-1", reattach=[request]))
        response = await second.call.read()
        [answer] = response.reattached
        assert answer.grant.fence == writer.fence + 1
        assert answer.grant.next_seq == 3
        [result] = await first.write(writer.append("text.delta", first_seq=3))
        assert result.outcome == FENCED
        writer.fence = answer.grant.fence
        [result] = await second.write(writer.append("text.delta", first_seq=3))
        assert result.outcome == COMMITTED
        client.replica.notice(CANCEL, writer.run_id)
        assert list((await second.call.read()).cancelled_run_ids) == [writer.run_id]


async def test_reattach_says_lost_or_nothing(client: Client) -> None:
    writer = await new_writer(client)
    async with append_stream(client) as stream:
        request = internal.Reattach(session_id=writer.session_id, run_id=writer.run_id, fence=99)
        await stream.call.write(internal.AppendRequest(owner="agent-1", reattach=[request]))
        [answer] = (await stream.call.read()).reattached
        assert answer.lost
        client.store.fail = [unavailable()]
        await stream.call.write(internal.AppendRequest(reattach=[request]))
        [answer] = (await stream.call.read()).reattached
        assert not answer.lost
        assert not answer.HasField("grant")


@pytest.mark.parametrize(
    ("reachable", "least", "most"), [(True, 1, GRACE_MS), (False, GRACE_MS + 1, STORM_GRACE_MS)]
)
async def test_a_broken_stream_shortens_its_leases(
    client: Client, monkeypatch: pytest.MonkeyPatch, reachable: bool, least: int, most: int
) -> None:
    monkeypatch.setattr(client.replica.hub, "_reachable", lambda: reachable)
    writer, other = await new_writer(client), await new_writer(client)
    async with append_stream(client) as kept:
        await kept.write(other.append("text.delta"))
        async with append_stream(client) as broken:
            await broken.write(writer.append("text.delta"))
        async with asyncio.timeout(5):
            await client.store.shortened_event.wait()
    [(refs, grace_ms)] = client.store.shortened
    assert [(str(ref.run_id), ref.fence) for ref in refs] == [(writer.run_id, writer.fence)]
    assert least <= grace_ms <= most


async def test_a_broken_stream_without_a_run_cuts_what_its_owner_claimed(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.replica.hub, "_reachable", lambda: True)
    call = client.mesh.Append()
    await call.write(internal.AppendRequest(owner="agent-7"))
    # Its answer says that what came before it was read.
    await call.write(internal.AppendRequest(appends=[internal.RunAppend(run_id="none")]))
    assert await call.read()
    call.cancel()
    async with asyncio.timeout(5):
        owner, grace_ms = await client.store.shortened_claims.get()
    assert owner == "agent-7"
    assert 1 <= grace_ms <= GRACE_MS


async def test_a_process_that_begins_has_its_former_ones_leases_ended_once_the_store_is_back(
    client: Client,
) -> None:
    client.store.fail = [unavailable()] * 3
    async with append_stream(client) as stream:
        await stream.call.write(internal.AppendRequest(owner="agent-7~01234567", new_process=True))
        async with asyncio.timeout(5):
            assert await client.store.ended_former.get() == "agent-7~01234567"
        await stream.call.write(internal.AppendRequest(owner="agent-7", new_process=True))
    # A name that tells no process from another says nothing about former ones.
    assert client.store.ended_former.empty()


async def test_a_process_that_ended_again_ends_no_leases_of_its_successor(client: Client) -> None:
    """One that began while the store was away and died may have a successor when it is back."""
    client.store.fail = [unavailable()] * 1000
    async with append_stream(client) as stream:
        await stream.call.write(internal.AppendRequest(owner="agent-7~01234567", new_process=True))
        await until(lambda: len(client.store.fail) < 1000)
        hub = client.replica.hub
        [serving] = hub._streams
    await until(lambda: serving.closed)
    client.store.fail = []
    await until(lambda: not any("end-former" in task.get_name() for task in asyncio.all_tasks()))
    assert client.store.ended_former.empty()


async def test_streams_that_break_together_keep_most_of_their_leases(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.replica.hub, "_reachable", lambda: True)
    writers = [await new_writer(client) for _ in range(5)]
    calls = []
    for writer in writers:
        call = client.mesh.Append()
        await call.write(internal.AppendRequest(owner="a", appends=[writer.append("text.delta")]))
        assert await call.read()
        calls.append(call)
    for call in calls:
        call.cancel()
    async with asyncio.timeout(5):
        await client.store.shortened_event.wait()
    [(refs, grace_ms)] = client.store.shortened
    assert len(refs) == 5
    assert GRACE_MS < grace_ms <= STORM_GRACE_MS


async def test_a_locked_lease_holds_up_no_other_runs_append_and_is_tried_again(client: Client) -> None:
    locked, other = await new_writer(client), await new_writer(client)
    client.store.locked.add(UUID(locked.run_id))
    async with append_stream(client) as stream, asyncio.timeout(5):
        late = [locked.append("text.delta"), locked.append("run.completed", status=4)]
        await stream.call.write(internal.AppendRequest(appends=late[:1]))
        [result] = await stream.write(other.append("text.delta"))
        assert (result.run_id, result.outcome) == (other.run_id, COMMITTED)
        client.store.locked.clear()
        [result] = (await stream.call.read()).results
        assert (result.run_id, result.outcome) == (locked.run_id, COMMITTED)
        client.store.locked.add(UUID(locked.run_id))
        await stream.call.write(internal.AppendRequest(appends=late[1:]))
        [result] = await stream.write(other.append("text.delta"))
        assert result.run_id == other.run_id
        client.store.locked.clear()
        [result] = (await stream.call.read()).results
        assert (result.run_id, result.outcome) == (locked.run_id, COMMITTED)


async def test_a_stream_that_ends_after_its_runs_shortens_nothing(client: Client, store: FakeStore) -> None:
    writer, released = await new_writer(client), await new_writer(client)
    async with append_stream(client) as stream:
        await stream.write(writer.append("run.completed", status=4), released.append("text.delta"))
        lease = internal.LeaseRef(
            session_id=released.session_id, run_id=released.run_id, fence=released.fence
        )
        response = await client.mesh.ReleaseLease(internal.ReleaseLeaseRequest(lease=lease))
        assert response.released
        assert not client.replica.hub._holders


async def test_a_run_that_cannot_write_its_end_is_ended_for_its_holder_alone(
    client: Client, store: FakeStore
) -> None:
    writer = await new_writer(client)
    lease = internal.LeaseRef(session_id=writer.session_id, run_id=writer.run_id, fence=writer.fence)
    stale = internal.LeaseRef(session_id=writer.session_id, run_id=writer.run_id, fence=writer.fence + 1)
    async with append_stream(client) as stream, watch(client, writer.run_id) as watched:
        await stream.write(writer.append("text.delta"))
        refused = await client.mesh.FailRun(internal.FailRunRequest(lease=stale))
        assert not refused.ended
        assert client.replica.hub.holds(UUID(writer.run_id))
        request = internal.FailRunRequest(lease=lease, cause=internal.FAIL_CAUSE_REFUSED)
        assert (await client.mesh.FailRun(request)).ended
        assert not client.replica.hub.holds(UUID(writer.run_id))
        # Whoever watches is told at once, and what the holder still writes is refused.
        events = await events_of(watched)
        assert events[-1].type == "run.failed"
        assert events[-1].data == '{"message": "the run\'s events were refused by the store"}'
        [result] = await stream.write(writer.append("text.delta"))
        assert result.outcome == internal.APPEND_OUTCOME_FENCED
        assert not (await client.mesh.FailRun(request)).ended
    assert store.shortened == []


async def test_a_drain_is_announced_and_shortens_nothing(client: Client) -> None:
    writer = await new_writer(client)
    async with append_stream(client) as stream:
        await stream.write(writer.append("text.delta"))
        client.replica.hub.drain()
        assert (await stream.call.read()).draining
        async with append_stream(client) as late:
            assert (await late.call.read()).draining
    await client.mesh.RenewLeases(internal.RenewLeasesRequest())
    assert not client.replica.hub._broken
    assert client.store.shortened == []


async def test_a_writer_that_does_not_read_is_not_read(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.session.append_hub._MAX_OUTSTANDING", 8)
    writer = await new_writer(client)
    stream = client.replica.hub.open()
    taken = 0

    async def requests():
        nonlocal taken
        for _ in range(100):
            taken += 1
            yield internal.AppendRequest(appends=[writer.append("text.delta")])

    async with asyncio.TaskGroup() as group:
        reading = group.create_task(stream.read(requests()))
        await until(lambda: len(client.store.events[stream_run(client)]) >= 9)
        for _ in range(50):
            await asyncio.sleep(0)
        assert taken == 8
        # Taking the answers lets it go on.
        results = 0
        async for response in stream.responses():
            results += len(response.results)
        assert results == taken == 100
        await reading
    client.replica.hub.close(stream)


def stream_run(client: Client):
    [run_id] = client.store.runs
    return run_id


@pytest.mark.parametrize(
    "method", ["ClaimRun", "RenewLeases", "ReleaseLease", "FailRun", "Authenticate", "BeginToolCall"]
)
async def test_internal_methods_are_for_the_mesh_only(client: Client, method: str) -> None:
    requests = {
        "ClaimRun": internal.ClaimRunRequest(run_id="00000000-0000-7000-8000-000000000000", owner="a"),
        "RenewLeases": internal.RenewLeasesRequest(),
        "ReleaseLease": internal.ReleaseLeaseRequest(
            lease=internal.LeaseRef(
                session_id="00000000-0000-7000-8000-000000000000",
                run_id="00000000-0000-7000-8000-000000000000",
            )
        ),
        "FailRun": internal.FailRunRequest(
            lease=internal.LeaseRef(
                session_id="00000000-0000-7000-8000-000000000000",
                run_id="00000000-0000-7000-8000-000000000000",
            )
        ),
        "Authenticate": internal.AuthenticateRequest(api_key="x"),
        "BeginToolCall": internal.BeginToolCallRequest(
            call_id="x", session_id="00000000-0000-7000-8000-000000000000"
        ),
    }
    async with grpc.aio.insecure_channel(client.replica.server.address) as channel:
        stub = internal_grpc.SessionInternalServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await getattr(stub, method)(requests[method], metadata=client.metadata)
        assert from_rpc_error(raised.value).reason == "MESH_ONLY"
        call = stub.Append(metadata=client.metadata)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call.read()
        assert from_rpc_error(raised.value).reason == "MESH_ONLY"


async def test_a_deleted_session_fences_its_writer_and_ends_its_watch(client: Client) -> None:
    session = await new_session(client)
    submitted = await submit(client, session.session_id)
    async with watch(client, submitted.run.run_id) as watched:
        assert len(await events_until(watched, 1)) == 1
        await client.store.delete_session(client.tenant_id, UUID(session.session_id))
        await client.replica.tail.look()
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await events_of(watched)
        assert from_rpc_error(raised.value).reason == "RUN_NOT_FOUND"
