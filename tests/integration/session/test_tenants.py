"""Tenants on real PostgreSQL: a foreign id looks like one of nothing, in every public RPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import grpc
import pytest

from hermesh.common.v1.event_pb2 import InputMessage
from hermesh.session.v1 import session_service_pb2 as public
from meshkit.auth import hash_key
from meshkit.channel import stream_call
from meshkit.errors import from_rpc_error
from meshkit.ids import uuid7
from tests.integration.session.conftest import Pair
from tests.integration.session.process import OTHER_KEY, Client, connect, environment, run_command
from tests.unit.session.calls import append_stream, events_of, new_writer

NOBODY = "00000000-0000-7000-8000-000000000000"


@pytest.fixture
async def stranger(pair: Pair) -> AsyncIterator[Client]:
    """A client with the key of another tenant."""
    connection = await asyncpg.connect(pair.database)
    try:
        tenant_id = await connection.fetchval(
            "INSERT INTO session.tenant (tenant_id, name) VALUES ($1, 'other') "
            "ON CONFLICT (name) DO UPDATE SET name = 'other' RETURNING tenant_id",
            uuid7(),
        )
        await connection.execute(
            "INSERT INTO session.api_key (key_hash, tenant_id, name) VALUES ($1, $2, 'x') "
            "ON CONFLICT DO NOTHING",
            hash_key(OTHER_KEY),
            tenant_id,
        )
    finally:
        await connection.close()
    async with connect(pair.first, OTHER_KEY) as client:
        yield client


def requests(session_id: str, run_id: str) -> dict[str, Any]:
    """A request of every public RPC that names a session or run."""
    return {
        "GetSession": public.GetSessionRequest(session_id=session_id),
        "UpdateSession": public.UpdateSessionRequest(session_id=session_id, title="mine"),
        "DeleteSession": public.DeleteSessionRequest(session_id=session_id),
        "ListMessages": public.ListMessagesRequest(session_id=session_id),
        "SubmitRun": public.SubmitRunRequest(
            session_id=session_id, input=[InputMessage(role="user", content="x")], request_id="r"
        ),
        "GetRun": public.GetRunRequest(run_id=run_id),
        "ListRuns": public.ListRunsRequest(session_id=session_id),
        "CancelRun": public.CancelRunRequest(run_id=run_id),
        "ResolveAction": public.ResolveActionRequest(run_id=run_id, call_id="x", decision=1),
        "GetRunToolCall": public.GetRunToolCallRequest(run_id=run_id, call_id="x"),
        "WatchRun": public.WatchRunRequest(run_id=run_id),
        "WatchSession": public.WatchSessionRequest(session_id=session_id),
    }


async def answers(client: Client, session_id: str, run_id: str) -> dict[str, tuple[Any, ...]]:
    found = {}
    for name, request in requests(session_id, run_id).items():
        call = getattr(client.public, name)(request, metadata=client.metadata)
        answer = events_of(call) if name.startswith("Watch") else call
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await answer
        error = from_rpc_error(raised.value)
        found[name] = (error.code, error.reason, error.message, sorted(error.metadata))
    return found


async def test_every_public_rpc_hides_other_tenants(first: Client, stranger: Client) -> None:
    methods = {method.name for method in public.DESCRIPTOR.services_by_name["SessionService"].methods}
    assert set(requests("", "")) == methods - {
        "CreateSession",
        "ListSessions",
        "ListPendingActions",
    }
    writer = await new_writer(first)
    waiting = await new_writer(first)
    async with append_stream(first) as stream:
        step = waiting.append("action.required", status=3)
        step.commit.intents.add(call_id=f"{waiting.run_id}:1:0", name="pay", needs_approval=True)
        await stream.write(step)
    foreign = await answers(stranger, writer.session_id, writer.run_id)
    assert foreign == await answers(stranger, NOBODY, NOBODY)
    assert {code for code, *_ in foreign.values()} == {grpc.StatusCode.NOT_FOUND}
    listed = await stranger.public.ListSessions(public.ListSessionsRequest(), metadata=stranger.metadata)
    assert writer.session_id not in {session.session_id for session in listed.sessions}
    pending = {
        name: await client.public.ListPendingActions(
            public.ListPendingActionsRequest(), metadata=client.metadata
        )
        for name, client in (("owner", first), ("stranger", stranger))
    }
    assert [one.tool_call.run_id for one in pending["owner"].actions] == [waiting.run_id]
    assert not pending["stranger"].actions
    # And nothing happened to it.
    async with append_stream(first) as stream:
        [result] = await stream.write(writer.append("run.completed", status=4))
    assert result.outcome == 1
    session = await first.public.GetSession(
        public.GetSessionRequest(session_id=writer.session_id), metadata=first.metadata
    )
    assert session.session.title == "t"


async def test_request_ids_of_tenants_do_not_meet(first: Client, stranger: Client) -> None:
    request = public.CreateSessionRequest(title="a", request_id="same")
    mine = await first.public.CreateSession(request, metadata=first.metadata)
    again = await first.public.CreateSession(request, metadata=first.metadata)
    theirs = await stranger.public.CreateSession(request, metadata=stranger.metadata)
    assert mine.session.session_id == again.session.session_id != theirs.session.session_id


async def test_a_session_watch_cannot_begin_in_a_foreign_run(first: Client, stranger: Client) -> None:
    writer = await new_writer(first)
    own = (
        await stranger.public.CreateSession(public.CreateSessionRequest(), metadata=stranger.metadata)
    ).session
    request = public.WatchSessionRequest(session_id=own.session_id, after_run_id=writer.run_id, after_seq=1)
    async with stream_call(stranger.public.WatchSession(request, metadata=stranger.metadata)) as call:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await events_of(call)
    assert from_rpc_error(raised.value).reason == "RUN_NOT_FOUND"


def test_bootstrap_twice_changes_nothing(pair: Pair) -> None:
    values = environment(pair.database, HERMESH_API_KEY="hm_" + "s" * 43)
    outs = {run_command("bootstrap", **values).stdout for _ in range(2)}
    assert len(outs) == 1


def test_bootstrap_makes_as_many_tenants_as_asked_for(pair: Pair) -> None:
    outs = [
        run_command(
            "bootstrap",
            "--tenant",
            name,
            **environment(pair.database, HERMESH_API_KEY="hm_" + letter * 43),
        ).stdout
        for name, letter in (("acme", "a"), ("globex", "g"), ("acme", "b"))
    ]
    assert outs[0] == outs[2] != outs[1]


def rows_of(*arguments: str, **values: str) -> dict[str, str]:
    """What the command `tenant` prints."""
    done = run_command("tenant", *arguments, **values)
    assert done.returncode == 0, done.stderr
    return {line[:18].strip(): line[18:] for line in done.stdout.splitlines()}


def test_an_operator_sets_and_sees_a_tenants_defaults(pair: Pair) -> None:
    values = environment(pair.database, HERMESH_API_KEY="hm_" + "c" * 43)
    made = run_command("bootstrap", "--tenant", "initech", **values).stdout.split()[-1]
    fresh = {
        "tenant": "initech",
        "id": made,
        "concurrency": "enqueue",
        "require approval": "none",
        "run timeout": "the service's own",
    }
    assert rows_of("--name", "initech", **values) == fresh
    changed = fresh | {
        "concurrency": "reject",
        "require approval": "pay, refund_order",
        "run timeout": "300 s",
    }
    words = ["--concurrency", "reject", "--require-approval", "refund_order, pay", "--run-timeout", "300"]
    assert rows_of("--name", "initech", *words, **values) == changed
    assert rows_of("--name", "initech", **values) == changed
    back = rows_of("--name", "initech", "--require-approval", "", "--run-timeout", "0", **values)
    assert back == fresh | {"concurrency": "reject"}


async def test_a_tenants_defaults_hold_on_every_replica_at_once(
    pair: Pair, first: Client, second: Client
) -> None:
    values = environment(pair.database)
    session = (
        await second.public.CreateSession(public.CreateSessionRequest(), metadata=second.metadata)
    ).session
    before = await first.mesh_submit(session.session_id)
    assert 599_000 < before.grant.time_left_ms <= 600_000
    assert list(before.context.approval_tools) == []
    words = ["--concurrency", "reject", "--require-approval", "pay", "--run-timeout", "60"]
    await asyncio.to_thread(rows_of, *words, **values)
    try:
        for client in (first, second):
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await client.mesh_submit(session.session_id)
            assert from_rpc_error(raised.value).reason == "SESSION_BUSY"
        other = (
            await second.public.CreateSession(public.CreateSessionRequest(), metadata=second.metadata)
        ).session
        after = await second.mesh_submit(other.session_id)
        assert 59_000 < after.grant.time_left_ms <= 60_000
        assert list(after.context.approval_tools) == ["pay"]
    finally:
        words = ["--concurrency", "enqueue", "--require-approval", "", "--run-timeout", "0"]
        await asyncio.to_thread(rows_of, *words, **values)


@pytest.mark.parametrize(
    ("arguments", "values", "words"),
    [
        (["bootstrap"], {}, "HERMESH_API_KEY_FILE is set; it holds the API key"),
        (["bootstrap", "--api-key-env", "MY_KEY"], {"MY_KEY": "short"}, "MY_KEY must be 16 to 500"),
        (["bootstrap", "--tenant", ""], {}, "a tenant's name"),
        (["tenant", "--name", "nobody"], {}, "there is no tenant 'nobody'"),
        (["tenant", "--name", "nobody", "--run-timeout", "3"], {}, "there is no tenant 'nobody'"),
        (["tenant", "--require-approval", "pay,no tool"], {}, "this is no tool's name: 'no tool'"),
        (["tenant", "--run-timeout", "-1"], {}, "a run's time limit is 0 to 604800 seconds"),
        (["tenant", "--run-timeout", "nan"], {}, "a run's time limit is 0 to 604800 seconds"),
        (["tenant"], {"HERMESH_DATABASE_URL": ""}, "HERMESH_DATABASE_URL"),
        (["migrate"], {"HERMESH_DATABASE_URL": ""}, "HERMESH_DATABASE_URL"),
        ([], {"HERMESH_DATABASE_URL": ""}, "HERMESH_DATABASE_URL"),
        # A service waits for its database; a command says that it is away.
        (["tenant"], {"HERMESH_DATABASE_URL": "postgresql://u:secret@127.0.0.1:1/x"}, "HERMESH_DATABASE_URL"),
        ([], {"HERMESH_REDIS_URL": "http://x"}, "HERMESH_REDIS_URL"),
        ([], {"HERMESH_SWEEP_SECONDS": "soon"}, "HERMESH_SWEEP_SECONDS"),
        ([], {"HERMESH_LISTEN": "127.0.0.1:99999"}, "HERMESH_LISTEN"),
    ],
)
def test_a_failed_start_is_one_line(
    pair: Pair, arguments: list[str], values: dict[str, str], words: str
) -> None:
    done = run_command(*arguments, **(environment(pair.database) | values))
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert len([line for line in lines if not line.startswith("{")]) == 1, done.stderr
    assert words in lines[-1]
    assert "secret" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_database_without_tables_is_said(empty_database: str) -> None:
    values = environment(empty_database)
    done = run_command("serve", **values)
    assert done.returncode == 1
    assert "services.session migrate" in done.stderr
    first = run_command("migrate", **values)
    assert first.returncode == 0, first.stderr
    assert "applied 0001" in first.stdout
    assert run_command("migrate", **values).stdout == "the schema is up to date\n"
