"""The tool service behind a real gRPC server, with a journal behind another."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

import grpc
import grpc.aio
import pytest

from hermesh.session.v1 import resources_pb2
from hermesh.tool.v1 import tool_service_pb2 as pb
from hermesh.tool.v1.tool_service_pb2_grpc import (
    ToolServiceStub,
    add_ToolServiceServicer_to_server,
)
from meshkit.channel import mesh_metadata, open_channel
from meshkit.errors import HermeshError, UnauthenticatedError, from_rpc_error
from meshkit.server import Server
from meshkit.tasks import TaskOwner
from services.tool.app import SERVICE_NAME, builtin_tools
from services.tool.domain import CallState
from services.tool.execution import Executor
from services.tool.journal import MeshJournal
from services.tool.reconcile import Reconciler
from services.tool.registry import Effect, Reconciled, Registry
from services.tool.results import open_results
from services.tool.servicer import ToolServicer
from services.tool.settings import ToolSettings
from tests.integration.tool.journal_server import mesh_settings, serve_journal
from tests.integration.tool.web import Web, response
from tests.unit.tool.fakes import RUN, SESSION, TENANT, FakeJournal, Lever

DEADLINE = 10.0
CALL = f"{RUN}:1:0"


class Keys:
    async def authenticate(self, api_key: str) -> UUID:
        if api_key != "hm_good":
            raise UnauthenticatedError("API_KEY_INVALID", "no such key")
        return TENANT


@dataclass
class Service:
    stub: ToolServiceStub
    outside: ToolServiceStub
    journal: FakeJournal
    lever: Lever
    web: Web
    folder: Any
    owner: TaskOwner
    stop_journal: Callable[[], Awaitable[None]]
    start_journal: Callable[[], Awaitable[None]]

    def call(self, tool: str, arguments: object = None, **more: Any) -> Any:
        request = pb.ExecuteRequest(
            **{
                "call_id": CALL,
                "session_id": str(SESSION),
                "run_id": str(RUN),
                "fence": 1,
                "name": tool,
                "arguments": json.dumps(arguments or {}),
                **more,
            }
        )
        return self.stub.Execute(request, metadata=metadata(), timeout=DEADLINE)

    async def execute(self, tool: str, arguments: object = None, **more: Any) -> list[pb.ExecuteResponse]:
        try:
            return [update async for update in self.call(tool, arguments, **more)]
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error


def metadata(tenant: UUID | None = TENANT) -> Any:
    return mesh_metadata(mesh_settings(), tenant)


@pytest.fixture
async def service(tmp_path: Any) -> AsyncIterator[Service]:
    journal = FakeJournal()
    journal.intend(CALL)
    lever = Lever(Effect.NON_IDEMPOTENT)
    async with AsyncExitStack() as stack:
        web = await stack.enter_async_context(Web())
        journal_stack = await stack.enter_async_context(AsyncExitStack())
        address = await journal_stack.enter_async_context(serve_journal(journal))
        settings = ToolSettings(
            mesh_token=mesh_settings().mesh_token,
            mesh_address=address,
            tool_fetch_allow=web.place,
            object_store_url=f"file://{tmp_path}/objects",
        )
        channel = await stack.enter_async_context(open_channel(settings))
        owner = await stack.enter_async_context(TaskOwner("tool"))
        registry = Registry([*builtin_tools(settings), lever.tool])
        mesh_journal = MeshJournal(channel, settings)
        executor = Executor(registry, mesh_journal, open_results(settings.object_store_url), owner)
        servicer = ToolServicer(
            registry,
            executor,
            Reconciler(registry, mesh_journal, None),
            open_results(settings.object_store_url),
        )
        server = await stack.enter_async_context(
            Server(settings, service="tool", authenticator=Keys(), configure_logging=False)
        )
        server.add(add_ToolServiceServicer_to_server, servicer, SERVICE_NAME)
        await server.start()
        inside = await stack.enter_async_context(open_channel(settings, server.address))
        outside = await stack.enter_async_context(open_channel(settings, server.address, mesh=False))

        async def start_journal() -> None:
            await journal_stack.enter_async_context(serve_journal(journal, address))

        yield Service(
            ToolServiceStub(inside),
            ToolServiceStub(outside),
            journal,
            lever,
            web,
            tmp_path / "objects",
            owner,
            journal_stack.aclose,
            start_journal,
        )


async def reason(awaitable: Awaitable[Any]) -> str:
    try:
        await awaitable
    except HermeshError as error:
        return error.reason
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error).reason
    return ""


async def test_a_calculation_goes_through_the_journal(service: Service) -> None:
    (last,) = await service.execute("calculator", {"expression": "6 * 7"})
    assert last.result == pb.Result(state=resources_pb2.TOOL_CALL_STATE_COMPLETED, content="42")
    assert [outcome.content for outcome in service.journal.completes] == ["42"]
    service.journal.fence = 8
    (again,) = await service.execute("calculator", {"expression": "6 * 7"}, fence=8)
    assert (again.result.content, again.result.reused) == ("42", True)


async def test_the_time_comes_as_json(service: Service) -> None:
    (last,) = await service.execute("current_time", {"zone": "Asia/Tokyo"})
    assert json.loads(last.result.content)["utc_offset"] == "+09:00"


async def test_a_page_is_fetched_with_progress(service: Service) -> None:
    service.web.answers["/"] = response(b"<p>hello</p>")
    first, last = await service.execute("fetch_page", {"url": service.web.url()})
    assert first.progress.text == f"GET {service.web.url()}"
    assert last.result.content.endswith("hello")


async def test_a_private_page_is_a_failed_result_with_its_reason(service: Service) -> None:
    *_, last = await service.execute("fetch_page", {"url": "http://127.0.0.1:1/"})
    assert last.result.state == resources_pb2.TOOL_CALL_STATE_FAILED
    assert last.result.reason == "ADDRESS_REFUSED"


async def test_arguments_that_do_not_fit_are_a_result(service: Service) -> None:
    (last,) = await service.execute("calculator", {"expression": 7})
    assert last.result.state == resources_pb2.TOOL_CALL_STATE_FAILED
    assert last.result.reason == "TOOL_ARGUMENTS_INVALID"
    assert service.journal.completes[0].state is CallState.FAILED


async def test_a_stream_that_breaks_does_not_end_the_act(service: Service) -> None:
    service.lever.wait = True
    service.journal.intend(CALL, Effect.NON_IDEMPOTENT)
    stream = service.call("lever")
    assert (await stream.read()).progress.text == "started"
    stream.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stream.read()
    service.lever.release.set()
    assert await service.owner.wait_idle(DEADLINE)
    assert [outcome.content for outcome in service.journal.completes] == ["done"]
    assert len(service.lever.calls) == 1


async def test_an_outcome_waits_for_a_journal_that_is_away(service: Service) -> None:
    service.lever.wait = True
    stream = service.call("lever")
    await stream.read()
    await service.stop_journal()
    service.lever.release.set()
    await asyncio.sleep(0)
    assert service.journal.completes == []
    await service.start_journal()
    assert (await stream.read()).result.content == "done"
    assert len(service.lever.calls) == len(service.journal.completes) == 1


async def test_without_a_journal_nothing_acts(service: Service) -> None:
    await service.stop_journal()
    assert await reason(service.execute("lever")) == "SERVICE_UNAVAILABLE"
    assert service.lever.calls == []


async def test_an_old_fence_is_an_error_and_no_act(service: Service) -> None:
    service.journal.fence = 2
    assert await reason(service.execute("lever")) == "FENCE_STALE"
    assert service.lever.calls == []


async def test_a_large_result_is_in_the_object_store_below_its_tenant_and_session(service: Service) -> None:
    service.lever.result = "0123456789" * 10_000
    *_, last = await service.execute("lever")
    digest = last.result.content_ref.removeprefix("sha256:")
    stored = service.folder / "tool-results" / str(TENANT) / str(SESSION) / digest
    assert stored.read_text() == service.lever.result
    assert len(last.result.content) < 2200


async def read(
    service: Service, ref: str, tenant: UUID = TENANT, session: str | None = str(SESSION)
) -> bytes:
    request = pb.ReadResultRequest(content_ref=ref, session_id=session)
    try:
        stream = service.stub.ReadResult(request, metadata=metadata(tenant), timeout=DEADLINE)
        first, *rest = [message async for message in stream]
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error
    data = b"".join(message.data for message in rest)
    assert first.size == len(data)
    assert max(len(message.data) for message in rest) <= 256 * 1024
    return data


async def test_a_large_result_is_read_by_its_tenant_only(service: Service) -> None:
    service.lever.result = "é" * 1_000_000
    *_, last = await service.execute("lever")
    ref = last.result.content_ref
    assert (await read(service, ref)).decode() == service.lever.result
    assert await reason(read(service, ref, UUID(int=9))) == "TOOL_CALL_NOT_FOUND"
    assert await reason(read(service, "sha256:" + "0" * 64)) == "TOOL_CALL_NOT_FOUND"
    assert await reason(read(service, ref, session=str(UUID(int=8)))) == "TOOL_CALL_NOT_FOUND"
    assert await reason(read(service, ref, session=None)) == "TOOL_CALL_NOT_FOUND"
    assert await reason(read(service, "sha256:../../x")) == "INVALID_ARGUMENT"
    assert await reason(read(service, ref, session="../x")) == "INVALID_ARGUMENT"


async def test_a_result_that_an_earlier_version_stored_below_its_tenant_is_read(service: Service) -> None:
    data, digest = b"earlier", hashlib.sha256(b"earlier").hexdigest()
    folder = service.folder / "tool-results" / str(TENANT)
    folder.mkdir(parents=True)
    (folder / digest).write_bytes(data)
    for session in (None, str(SESSION)):
        assert await read(service, f"sha256:{digest}", session=session) == data


async def test_the_results_of_a_deleted_session_are_deleted(service: Service) -> None:
    service.lever.result = "0123456789" * 10_000
    *_, last = await service.execute("lever")
    other = pb.DeleteResultsRequest(session_id=str(UUID(int=8)))
    assert (await service.stub.DeleteResults(other, metadata=metadata())).deleted == 0
    order = pb.DeleteResultsRequest(session_id=str(SESSION))
    assert (await service.stub.DeleteResults(order, metadata=metadata(UUID(int=9)))).deleted == 0
    assert await read(service, last.result.content_ref)
    answer = await service.stub.DeleteResults(order, metadata=metadata())
    assert (answer.deleted, answer.more) == (1, False)
    assert not (await service.stub.DeleteResults(order, metadata=metadata())).deleted
    assert await reason(read(service, last.result.content_ref)) == "TOOL_CALL_NOT_FOUND"
    assert list((service.folder / "tool-results").glob("*/*")) == []


async def test_cancel_ends_a_call(service: Service) -> None:
    service.lever.wait = True
    stream = service.call("lever")
    await stream.read()
    request = pb.CancelRequest(call_id=CALL)
    other = await service.stub.Cancel(request, metadata=metadata(UUID(int=9)))
    assert not other.found
    assert (await service.stub.Cancel(request, metadata=metadata())).found
    assert (await stream.read()).result.state == resources_pb2.TOOL_CALL_STATE_UNKNOWN
    assert not (await service.stub.Cancel(request, metadata=metadata())).found


async def test_a_hook_settles_an_unknown_call_and_never_acts(service: Service) -> None:
    service.journal.intend(CALL, Effect.NON_IDEMPOTENT)
    row = service.journal.rows[CALL]
    row.running, row.entry = True, replace(row.entry, state=CallState.UNKNOWN, tries=1, quiet_in=2.0)
    request = pb.ReconcileRequest(
        call_id=CALL, session_id=str(SESSION), run_id=str(RUN), name="lever", waited_ms=3_600_000
    )
    service.lever.found = Reconciled.NOT_DONE
    early = await service.stub.Reconcile(request, metadata=metadata())
    assert (early.outcome, early.retry_after_ms) == (pb.RECONCILE_OUTCOME_ASK_AGAIN, 2_000)
    service.lever.found = "it was done"
    settled = await service.stub.Reconcile(request, metadata=metadata())
    assert settled.outcome == pb.RECONCILE_OUTCOME_SETTLED
    assert (settled.result.state, settled.result.content) == (
        resources_pb2.TOOL_CALL_STATE_COMPLETED,
        "it was done",
    )
    assert service.lever.calls == []


async def test_execute_and_cancel_are_for_the_mesh(service: Service) -> None:
    key = (("authorization", "Bearer hm_good"),)
    request = pb.ExecuteRequest(call_id=CALL, session_id=str(SESSION), run_id=str(RUN), name="lever")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        _ = [update async for update in service.outside.Execute(request, metadata=key, timeout=DEADLINE)]
    assert from_rpc_error(caught.value).reason == "MESH_ONLY"
    assert await reason(service.outside.Cancel(pb.CancelRequest(call_id=CALL), metadata=key)) == "MESH_ONLY"
    whole = pb.ReadResultRequest(content_ref="sha256:" + "0" * 64)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        _ = [piece async for piece in service.outside.ReadResult(whole, metadata=key, timeout=DEADLINE)]
    assert from_rpc_error(caught.value).reason == "MESH_ONLY"
    look = pb.ReconcileRequest(call_id=CALL, session_id=str(SESSION), run_id=str(RUN), name="lever")
    assert await reason(service.outside.Reconcile(look, metadata=key)) == "MESH_ONLY"
    gone = pb.DeleteResultsRequest(session_id=str(SESSION))
    assert await reason(service.outside.DeleteResults(gone, metadata=key)) == "MESH_ONLY"
    assert service.lever.calls == []


async def test_tools_are_listed_page_by_page_for_a_key(service: Service) -> None:
    key = (("authorization", "Bearer hm_good"),)
    names: list[str] = []
    token = ""
    for _ in range(4):
        page = await service.outside.ListTools(
            pb.ListToolsRequest(page_size=1, page_token=token), metadata=key
        )
        names += [tool.name for tool in page.tools]
        token = page.next_page_token
    assert (names, token) == (["calculator", "current_time", "fetch_page", "lever"], "")
    all_of_them = await service.stub.ListTools(pb.ListToolsRequest(), metadata=metadata(None))
    assert [json.loads(tool.input_schema)["type"] for tool in all_of_them.tools] == ["object"] * 4
    assert all_of_them.tools[3].effect == resources_pb2.EFFECT_CLASS_NON_IDEMPOTENT
    assert all_of_them.tools[2].timeout_ms == 25_000
    assert [tool.reconciles for tool in all_of_them.tools] == [False, False, False, True]


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (pb.ListToolsRequest(page_size=501), "INVALID_ARGUMENT"),
        (pb.ListToolsRequest(page_size=-1), "INVALID_ARGUMENT"),
        (pb.ListToolsRequest(page_token="x" * 501), "INVALID_ARGUMENT"),
        (pb.ListToolsRequest(page_token="nonsense"), "PAGE_TOKEN_INVALID"),
    ],
)
async def test_a_wrong_list_request_is_told(
    service: Service, request_: pb.ListToolsRequest, expected: str
) -> None:
    assert await reason(service.stub.ListTools(request_, metadata=metadata())) == expected


@pytest.mark.parametrize(
    "more", [{"call_id": ""}, {"call_id": "x" * 101}, {"session_id": "1"}, {"run_id": ""}, {"name": ""}]
)
async def test_a_wrong_execute_request_is_told(service: Service, more: dict[str, str]) -> None:
    assert await reason(service.execute("lever", **more)) == "INVALID_ARGUMENT"
    assert service.journal.begins == []
