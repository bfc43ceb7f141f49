import asyncio
import json
import os
import signal
import socket
import sys
import time
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc
import grpc.aio
import pytest
from pydantic import SecretStr

from bench.model_server import ModelServer
from hermesh.agent.v1.agent_service_pb2 import ExecuteRequest, ListModelsRequest, RunRequest
from hermesh.agent.v1.agent_service_pb2_grpc import AgentServiceStub
from hermesh.common.v1.event_pb2 import InputMessage
from hermesh.session.v1.resources_pb2 import RUN_STATUS_COMPLETED, TOOL_CALL_STATE_COMPLETED, RunOptions
from hermesh.session.v1.session_internal_service_pb2 import BEGIN_OUTCOME_NOT_APPROVED, BEGIN_OUTCOME_UNKNOWN
from hermesh.tool.v1.tool_service_pb2 import (
    RECONCILE_OUTCOME_ASK_AGAIN,
    RECONCILE_OUTCOME_CANNOT_TELL,
    RECONCILE_OUTCOME_NOT_DONE,
    RECONCILE_OUTCOME_SETTLED,
    ReconcileResponse,
    Result,
)
from meshkit.channel import mesh_metadata, open_channel
from meshkit.errors import DeadlineError, from_rpc_error
from meshkit.ids import uuid7
from meshkit.tasks import Backoff
from services.agent.app import assemble
from services.agent.clients.memory import MemoryClient, cut
from services.agent.clients.tools import (
    CANCEL_SECONDS,
    EXECUTE_TRIES,
    CallPlace,
    ToolClient,
)
from services.agent.domain.loop import Call, CallState
from services.agent.domain.prompt import RunSpec
from services.agent.settings import AgentSettings
from tests.unit.agent.fake_mesh import TOKEN, FakeMesh
from tests.unit.agent.fakes import TENANT

SPEC = RunSpec(str(uuid7()), str(uuid7()), TENANT, "scripted", user="ada", ordinal=2)


@pytest.fixture
async def mesh():
    async with FakeMesh().serve() as running:
        yield running


@pytest.fixture
async def model():
    async with ModelServer() as running:
        yield running


@asynccontextmanager
async def agent_on(mesh, model, **values):
    settings = AgentSettings(
        mesh_address=mesh.address,
        mesh_token=SecretStr(TOKEN),
        llm_base_url=model.base_url,
        replica="agent-test",
        **{"drain_delay_seconds": 0, "drain_seconds": 3, **values},
    )
    async with assemble(settings, configure_logging=False) as server:
        await server.start()
        async with open_channel(settings, server.address) as channel:
            stub = AgentServiceStub(channel)
            stub.server = server
            stub.metadata = mesh_metadata(settings, TENANT)
            yield stub


@pytest.fixture
async def agent(mesh, model):
    async with agent_on(mesh, model) as stub:
        yield stub


def asked(text, **more):
    return RunRequest(session_id=str(uuid7()), input=[InputMessage(role="user", content=text)], **more)


async def read(agent, request):
    """Return a Run's events and the reason of its reconnect, if any."""
    events, reconnect = [], ""
    async for response in agent.Run(request, metadata=agent.metadata, timeout=20):
        events += response.frame.events
        reconnect = response.frame.reconnect.reason or reconnect
    return events, reconnect


async def test_run_streams_the_stored_events_from_the_first_to_the_last(agent, mesh):
    events, reconnect = await read(agent, asked("hi [[tokens=50]]"))
    row = next(iter(mesh.store.runs.values()))
    assert events == row.events
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert row.text() == "".join(f"t{i} " for i in range(50))
    assert reconnect == ""
    name, _, epoch = mesh.submits[0].claim_owner.partition("~")
    assert (name, len(epoch)) == ("agent-test", 8)


async def test_streams_of_a_gateway_are_bundled(agent, mesh):
    """One stream brings what the model says in both runs; each ends by itself."""

    async def read():
        call = agent.Run(
            asked("hi [[tokens=40 rate=100]]", bundle="the-gateways"), metadata=agent.metadata, timeout=20
        )
        return [response async for response in call]

    both = await asyncio.gather(read(), read())
    got = {run_id: [] for run_id in mesh.store.runs}
    for responses in both:
        assert responses[-1].last_seq > 1
        for response in responses:
            for frame in (response.frame, *response.others):
                for event in frame.events:
                    got[event.run_id].append(event)
    assert any(response.others for responses in both for response in responses)
    for run_id, row in mesh.store.runs.items():
        assert sorted(got[run_id], key=lambda event: event.seq) == row.events


async def test_a_bundle_is_for_the_mesh_only(agent, mesh):
    """Whoever knew a gateway's name for it could read what is not theirs."""
    async with grpc.aio.insecure_channel(agent.server.address) as channel:
        metadata = (("authorization", "Bearer hm_x"),)
        call = AgentServiceStub(channel).Run(asked("hi", bundle="the-gateways"), metadata=metadata)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    assert from_rpc_error(caught.value).reason == "MESH_ONLY"
    assert not mesh.submits


async def test_an_exchange_is_remembered_under_the_runs_id(agent, mesh):
    await read(agent, asked("hi [[tokens=1]]"))
    await mesh.store.until(lambda: bool(mesh.remembered))
    run = next(iter(mesh.store.runs))
    assert mesh.remembered[0].request_id == run
    assert mesh.remembered[0].text == "User: hi [[tokens=1]]\nAssistant: t0"


async def test_a_caller_of_a_silent_model_gets_signs_of_life(agent, mesh, monkeypatch):
    monkeypatch.setattr("services.agent.servicer.FRAME_BEAT_SECONDS", 0.02)
    call = agent.Run(asked("hi [[silent]]"), metadata=agent.metadata)
    empty = 0
    async with asyncio.timeout(5):
        while empty < 3:
            response = await call.read()
            empty += not response.frame.events
    call.cancel()


async def test_a_busy_session_gets_its_created_event_and_a_reconnect(agent, mesh):
    mesh.busy = True
    events, reconnect = await read(agent, asked("hi"))
    assert [event.type for event in events] == ["run.created"]
    assert reconnect == "not_claimed"


async def test_a_caller_that_leaves_ends_nothing(agent, mesh):
    call = agent.Run(asked("hi [[tokens=20 rate=200]]"), metadata=agent.metadata)
    await call.read()
    call.cancel()
    row = next(iter(mesh.store.runs.values()))
    await mesh.store.until(lambda: row.status == RUN_STATUS_COMPLETED)
    assert row.text() == "".join(f"t{i} " for i in range(20))


async def test_a_submit_that_fails_for_a_moment_is_tried_again_with_one_key(agent, mesh):
    mesh.failing_submits = 2
    events, _ = await read(agent, asked("hi [[tokens=1]]"))
    assert events[-1].type == "run.completed"
    assert len({submit.request_id for submit in mesh.submits}) == 1
    assert len(mesh.submits) == 3


async def test_an_error_of_the_session_service_reaches_the_caller_as_it_is(agent, mesh):
    request = asked("hi")
    mesh.unknown_session = request.session_id
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read(agent, request)
    assert from_rpc_error(caught.value).reason == "SESSION_NOT_FOUND"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (RunOptions(model="nope"), "MODEL_NOT_FOUND"),
        (RunOptions(tools=["nope"]), "TOOL_NOT_FOUND"),
        (RunOptions(tool_choice="nope"), "TOOL_NOT_FOUND"),
    ],
)
async def test_what_does_not_exist_is_refused_before_anything_is_stored(agent, mesh, options, reason):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read(agent, asked("hi", options=options))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert from_rpc_error(caught.value).reason == reason
    assert mesh.submits == []


async def test_a_full_replica_refuses_with_the_time_to_come_back(mesh, model):
    async with agent_on(mesh, model, max_active_runs=1) as agent:
        first = agent.Run(asked("hi [[silent]]"), metadata=agent.metadata)
        await first.read()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read(agent, asked("hi"))
        error = from_rpc_error(caught.value)
        assert (error.reason, bool(error.retry_after_ms)) == ("OVERLOADED", True)
        first.cancel()


async def test_execute_works_on_a_queued_run_and_says_when_it_is_over(agent, mesh):
    claim = mesh.store.new_claim("hi [[tokens=3]]")
    call = agent.Execute(ExecuteRequest(run_id=claim.run.run_id), metadata=agent.metadata)
    answers = [answer async for answer in call]
    assert answers[-1].finished
    assert answers[-1].last_seq == mesh.store.runs[claim.run.run_id].events[-1].seq


async def test_execute_of_a_run_that_is_not_ours_ends_well(agent, mesh):
    call = agent.Execute(ExecuteRequest(run_id=str(uuid7())), metadata=agent.metadata)
    assert [answer.already_claimed async for answer in call] == [True]


async def test_execute_is_for_the_mesh_only(agent):
    async with grpc.aio.insecure_channel(agent.server.address) as channel:
        outside = AgentServiceStub(channel)
        call = outside.Execute(
            ExecuteRequest(run_id=str(uuid7())), metadata=(("authorization", "Bearer hm_key"),)
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    assert from_rpc_error(caught.value).reason == "MESH_ONLY"


async def test_the_models_of_the_backend_are_listed(agent):
    listed = await agent.ListModels(ListModelsRequest(), metadata=agent.metadata)
    assert [(one.name, one.tool_mode) for one in listed.models] == [("scripted", "native")]


async def test_tools_are_called_through_the_tool_service(agent, mesh):
    events, _ = await read(agent, asked('[[tool=add {"a":1}]]'))
    assert [event.type for event in events].count("tool.progress") == 1
    result = next(json.loads(event.data) for event in events if event.type == "tool.result")
    assert (result["status"], result["content"]) == ("completed", "ok")
    call = mesh.executed[0]
    assert (call.name, json.loads(call.arguments)) == ("add", {"a": 1})
    assert call.fence == mesh.store.runs[call.run_id].fence


async def test_a_cancel_says_why_and_reaches_the_model(agent, mesh, model):
    call = agent.Run(asked("hi [[tokens=1000 rate=50]]"), metadata=agent.metadata)
    await call.read()
    run_id = next(iter(mesh.store.runs))
    await mesh.store.until(lambda: "text.delta" in mesh.store.runs[run_id].types())
    mesh.store.say_cancelled(run_id)
    await model.wait_for("aborted", 1)
    last = None
    while (response := await call.read()) is not grpc.aio.EOF:
        last = response.frame.events[-1]
    assert (last.type, json.loads(last.data)) == ("run.cancelled", {"reason": "enough"})


async def test_a_draining_replica_still_accepts_input_for_others(mesh, model):
    async with agent_on(mesh, model, drain_delay_seconds=5) as agent:
        open_run = agent.Run(asked("hi [[silent]]"), metadata=agent.metadata)
        await open_run.read()
        drain = asyncio.ensure_future(agent.server.drain())
        await agent.server.draining.wait()
        await asyncio.sleep(0)
        events, reconnect = await read(agent, asked("hi"))
        assert [event.type for event in events] == ["run.created"]
        assert reconnect == "not_claimed"
        assert mesh.submits[-1].claim_owner == ""
        agent.server.signals.now.set()
        await drain
        open_run.cancel()


@asynccontextmanager
async def clients(mesh, **more):
    settings = AgentSettings(
        mesh_address=mesh.address, mesh_token=SecretStr(TOKEN), llm_base_url="http://model.invalid/v1", **more
    )
    async with open_channel(settings) as channel, asyncio.TaskGroup() as group:
        tools = ToolClient(channel, settings)
        fresh = group.create_task(tools.keep_fresh())
        yield tools, MemoryClient(channel, settings)
        fresh.cancel()


async def execute(tools, name="pay", fence=lambda: 7, seconds_left=lambda: 60.0, place=None):
    info = (await tools.tools())[name]
    call = Call(f"{SPEC.run_id}:1:0", name, "{}")
    place = CallPlace() if place is None else place
    return await tools.execute(SPEC, call, info, fence, lambda text: None, seconds_left, place)


async def test_all_pages_of_tools_are_read(mesh):
    async with clients(mesh) as (tools, _):
        assert set(await tools.tools()) == {"add", "pay"}


async def test_a_tool_service_that_is_about_to_come_is_waited_for(mesh):
    mesh.list_failures = 3
    async with clients(mesh) as (tools, _):
        assert set(await tools.tools()) == {"add", "pay"}


async def test_a_tool_service_that_stays_away_is_not_waited_for_long_nor_in_turn(mesh, monkeypatch):
    monkeypatch.setattr("services.agent.clients.tools.FIRST_SECONDS", 0.2)
    mesh.list_failures = 1_000_000
    async with clients(mesh) as (tools, _):
        began = asyncio.get_running_loop().time()
        told = await asyncio.gather(*(tools.tools() for _ in range(50)), return_exceptions=True)
        assert {error.reason for error in told} == {"SERVICE_UNAVAILABLE"}
        assert asyncio.get_running_loop().time() - began < 5
        # And known as soon as it is there.
        mesh.list_failures = 0
        monkeypatch.setattr("services.agent.clients.tools.FIRST_SECONDS", 30.0)
        assert set(await tools.tools()) == {"add", "pay"}


async def test_a_broken_tool_stream_is_asked_for_again(mesh):
    mesh.tool_script = ["unavailable", "nothing", "ok"]
    async with clients(mesh) as (tools, _):
        assert (await execute(tools)).state is CallState.COMPLETED
    assert len(mesh.executed) == 3


async def test_a_tool_service_that_shows_life_is_waited_for_and_a_silent_one_is_not(mesh, monkeypatch):
    monkeypatch.setattr("services.agent.clients.tools.EXECUTE_MARGIN", 1.0)
    # In all longer than the tool's timeout and the margin, and never silent for so long.
    mesh.tool_script = ["alive"]
    async with clients(mesh) as (tools, _):
        assert (await execute(tools)).state is CallState.COMPLETED
        assert len(mesh.executed) == 1
        mesh.tool_script = ["hang", "ok"]
        assert (await execute(tools)).state is CallState.COMPLETED
    assert len(mesh.executed) == 3


async def test_a_stale_fence_is_followed_by_the_new_one(mesh):
    mesh.tool_script = ["stale", "ok"]
    fences = iter([7, 8, 8, 8])
    async with clients(mesh) as (tools, _):
        assert (await execute(tools, fence=lambda: next(fences))).state is CallState.COMPLETED
    assert [request.fence for request in mesh.executed] == [7, 8]


async def test_a_tool_that_is_gone_is_told_to_the_model(mesh):
    mesh.tool_script = ["gone"]
    async with clients(mesh) as (tools, _):
        result = await execute(tools)
    assert (result.state, result.content) == (CallState.FAILED, "no such tool")


async def test_a_call_nobody_answers_for_is_closed_where_it_was_never_begun(mesh):
    mesh.tool_script = ["unavailable"] * EXECUTE_TRIES
    async with clients(mesh) as (tools, _):
        result = await execute(tools)
    assert result.state is CallState.FAILED
    assert mesh.begun == [f"{SPEC.run_id}:1:0"]


async def test_a_call_nobody_answers_for_is_unknown_where_it_may_have_run(mesh):
    mesh.tool_script = ["unavailable"] * EXECUTE_TRIES
    mesh.begin_outcome, mesh.journal.state = BEGIN_OUTCOME_UNKNOWN, 5
    async with clients(mesh) as (tools, _):
        assert (await execute(tools)).state is CallState.UNKNOWN


async def test_a_call_is_asked_for_again_where_it_is_and_in_the_end_anywhere(mesh):
    place = CallPlace()
    mesh.tool_script = ["break"] * (EXECUTE_TRIES - 1)
    async with clients(mesh) as (tools, _):
        assert (await execute(tools, place=place)).state is CallState.COMPLETED
    assert place.replica == "here"
    assert mesh.led_to == ["", "here", "here", "here", "", ""]


async def test_a_tool_service_learns_how_long_the_run_may_still_take(mesh):
    left = iter([2.0, 0.25, -1.0])
    mesh.tool_script = ["unavailable"] * 2
    async with clients(mesh) as (tools, _):
        await execute(tools, seconds_left=lambda: next(left))
    # 0 would mean no bound.
    assert [request.time_left_ms for request in mesh.executed] == [2000, 250, 1]


async def test_a_cancel_goes_to_the_replica_of_its_call_also_when_that_said_nothing_yet(mesh):
    place = CallPlace()
    mesh.tool_script = ["gated"]
    async with clients(mesh) as (tools, _):
        running = asyncio.ensure_future(execute(tools, place=place))
        async with asyncio.timeout(5):
            await mesh.tool_asked.wait()
        # Given up before the headers have come: they are waited for, or nobody could stop the tool.
        running.cancel()
        await asyncio.sleep(0)
        mesh.tool_gate.set()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert place.replica == "here"
        await tools.cancel("call", SPEC.tenant_id, place)
    assert mesh.tool_cancels == ["call"]
    assert mesh.led_to == ["", "here"]


async def test_a_cancel_is_sent_again_while_nobody_takes_it_and_not_for_ever(mesh):
    mesh.failing_cancels = 2
    async with clients(mesh) as (tools, _):
        await tools.cancel("call", SPEC.tenant_id, CallPlace("here"))
        assert mesh.tool_cancels == ["call"]
        mesh.failing_cancels = 1000
        async with asyncio.timeout(CANCEL_SECONDS + 1):
            await tools.cancel("other", SPEC.tenant_id, CallPlace("here"))
    assert mesh.tool_cancels == ["call"]


async def test_a_call_that_turns_out_to_need_approval_is_asked_for(mesh):
    mesh.tool_script = ["unapproved"]
    async with clients(mesh) as (tools, _):
        result = await execute(tools)
    assert result.waits
    mesh.tool_script = ["unavailable"] * EXECUTE_TRIES
    mesh.begin_outcome, mesh.journal.state = BEGIN_OUTCOME_NOT_APPROVED, 1
    async with clients(mesh) as (tools, _):
        assert (await execute(tools)).waits


NOT_DONE = ReconcileResponse(outcome=RECONCILE_OUTCOME_NOT_DONE)
ASK_AGAIN = ReconcileResponse(outcome=RECONCILE_OUTCOME_ASK_AGAIN)
EARLY = ReconcileResponse(outcome=RECONCILE_OUTCOME_ASK_AGAIN, retry_after_ms=3)
DONE = ReconcileResponse(
    outcome=RECONCILE_OUTCOME_SETTLED, result=Result(state=TOOL_CALL_STATE_COMPLETED, content="found")
)
UNCLEAR = Call(f"{SPEC.run_id}:1:0", "pay", '{"a":1}', CallState.UNKNOWN)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(
        "services.agent.clients.tools.Backoff", lambda first, limit: Backoff(first / 1000, limit / 1000)
    )


async def find_out(mesh, *findings, **settings):
    mesh.findings = list(findings)
    async with clients(mesh, **settings) as (tools, _):
        return await tools.reconcile(SPEC, UNCLEAR, time.monotonic() - 3)


async def test_a_tool_is_asked_until_it_has_found_out(mesh, quick):
    found = await find_out(mesh, None, ASK_AGAIN, EARLY, DONE)
    assert (found.state, found.content) == (CallState.COMPLETED, "found")
    assert len(mesh.looked) == 4
    assert {(one.call_id, one.name, one.arguments) for one in mesh.looked} == {
        (UNCLEAR.call_id, "pay", '{"a":1}')
    }
    waited = [one.waited_ms for one in mesh.looked]
    assert waited == sorted(waited)
    assert waited[0] >= 3000


async def test_a_call_that_was_not_done_may_run_again(mesh):
    found = await find_out(mesh, NOT_DONE)
    assert (found.state, found.needs_approval, found.looks) == (CallState.INTENT, False, 1)


async def test_what_cannot_be_found_out_is_left_to_a_person(mesh, quick):
    cannot = ReconcileResponse(outcome=RECONCILE_OUTCOME_CANNOT_TELL)
    for findings, settings, looks in (
        ([cannot], {}, 1),
        ([ASK_AGAIN] * 9, {"reconcile_tries": 3}, 3),
        ([EARLY] * 9, {"reconcile_seconds": 0.0}, 1),
    ):
        mesh.looked.clear()
        found = await find_out(mesh, *findings, **settings)
        assert found.state is CallState.UNKNOWN
        assert not replace(found, reconcilable=True).may_be_found_out
        assert len(mesh.looked) == looks


async def test_what_is_known_is_asked_for_side_by_side(mesh):
    mesh.memories = ["likes tea"]
    async with clients(mesh) as (_, memory):
        known = await memory.known(SPEC, "tea?", 5)
    assert [one.text for one in known.recalled] == ["likes tea"]
    assert known.preferences == {"tone": "short"}
    assert not known.missing


async def test_a_slow_memory_service_is_not_waited_for(mesh):
    mesh.memory_hangs = True
    async with clients(mesh) as (_, memory):
        known = await memory.known(SPEC, "tea?", 0.05)
    # What did come in time is used.
    assert (known.recalled, known.preferences) == ((), {"tone": "short"})
    assert {part: type(error) for part, error in known.missing.items()} == {"memory": DeadlineError}


def test_text_is_cut_at_a_character():
    assert cut("aé", 2) == "a"
    assert cut("aé", 3) == "aé"


async def start_process(**environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HERMESH_")}
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.agent",
        env={**clean, "HERMESH_DRAIN_DELAY_SECONDS": "0", **environment},
        stderr=asyncio.subprocess.PIPE,
    )


async def ended(process):
    async with asyncio.timeout(30):
        _, said = await process.communicate()
    return process.returncode, said.decode().strip()


async def test_without_a_model_the_process_says_what_to_set():
    code, said = await ended(await start_process())
    assert code == 1
    assert len(said.splitlines()) == 1
    assert "HERMESH_LLM_BASE_URL" in said


async def test_a_bad_model_url_is_one_clear_line():
    code, said = await ended(await start_process(HERMESH_LLM_BASE_URL="ftp://x"))
    assert (code, len(said.splitlines())) == (1, 1)
    assert "HERMESH_LLM_BASE_URL" in said


async def test_a_port_in_use_is_one_clear_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        code, said = await ended(
            await start_process(HERMESH_LISTEN=listen, HERMESH_LLM_BASE_URL="http://127.0.0.1:9/v1")
        )
    assert code == 1
    assert listen in said.splitlines()[-1]


async def test_the_process_ends_well_on_sigterm(mesh, model, tmp_path):
    ready = tmp_path / "ready.json"
    process = await start_process(
        HERMESH_LLM_BASE_URL=model.base_url, HERMESH_MESH_ADDRESS=mesh.address, HERMESH_READY_FILE=str(ready)
    )
    async with asyncio.timeout(30):
        while not ready.exists():
            assert process.returncode is None
            await asyncio.sleep(0.02)
    record = json.loads(ready.read_text())
    assert (record["service"], record["pid"]) == ("agent", process.pid)
    process.send_signal(signal.SIGTERM)
    code, _ = await ended(process)
    assert code == 0
