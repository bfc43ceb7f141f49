"""AgentService on the wire: glue between the protos and the supervisor."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace

import grpc.aio

from hermesh.agent.v1.agent_service_pb2 import (
    ExecuteRequest,
    ExecuteResponse,
    ListModelsRequest,
    ListModelsResponse,
    Model,
    RunRequest,
    RunResponse,
)
from hermesh.agent.v1.agent_service_pb2_grpc import AgentServiceServicer
from hermesh.common.v1.event_pb2 import Frame
from meshkit.context import run_id_var
from meshkit.errors import NotFoundError
from meshkit.identity import require_mesh, require_tenant
from services.agent.clients.session import Claim, NotClaimed, SessionClient, Submitted
from services.agent.clients.tools import ToolClient
from services.agent.model.catalog import ModelCatalog
from services.agent.runs.bundle import BundledSubscription, Bundles, reconnect
from services.agent.runs.subscription import Subscription
from services.agent.runs.supervisor import Supervisor
from services.agent.runs.unheard import Unheard
from services.agent.settings import AgentSettings

BEAT_SECONDS = 2.0
FRAME_BEAT_SECONDS = 10.0

Context = grpc.aio.ServicerContext[object, object]


class AgentServicer(AgentServiceServicer):
    """Serves Run, Execute and ListModels.

    Args:
        settings: for ListModels.
        supervisor: owns the runs.
        session: accepts input.
        catalog: the models.
        tools: the tools, to refuse unknown ones before anything is stored.
        unheard: looks for leases that a submission was granted unheard.
    """

    def __init__(
        self,
        settings: AgentSettings,
        supervisor: Supervisor,
        session: SessionClient,
        catalog: ModelCatalog,
        tools: ToolClient,
        unheard: Unheard,
    ) -> None:
        self._settings = settings
        self._supervisor = supervisor
        self._session = session
        self._catalog = catalog
        self._tools = tools
        self._unheard = unheard
        self._bundles = Bundles()

    async def Run(self, request: RunRequest, context: Context) -> AsyncIterator[RunResponse]:
        """Submit input and stream the run; the run does not end with this call."""
        tenant_id = str(require_tenant())
        if request.options.model:
            await self._catalog.resolve(request.options.model)
        await self._check_tools(request)
        bundle = None
        if request.bundle:
            require_mesh()
            bundle = self._bundles.bundle(request.bundle)
        subscription = Subscription() if bundle is None else BundledSubscription(bundle)
        try:
            submitted = await self._supervisor.kept(self._submit(request, tenant_id, subscription))
            run_id_var.set(submitted.run.run_id)
            yield RunResponse(frame=Frame(events=[submitted.created]))
            if submitted.claim is None:
                yield _reconnect("not_claimed")
                return
            with _beats(subscription):
                if isinstance(subscription, BundledSubscription):
                    async with aclosing(subscription.responses()) as responses:
                        async for response in responses:
                            yield response
                    return
                while (events := await subscription.next()) is not None:
                    yield RunResponse(frame=Frame(events=events))
            if subscription.reconnect:
                yield _reconnect(subscription.reconnect)
        finally:
            subscription.close()

    async def _submit(self, request: RunRequest, tenant_id: str, subscription: Subscription) -> Submitted:
        """Submit, and take the run when there is a place for it.

        A replica that drains still accepts input for others to work on: the load balancer may not know yet.
        """
        supervisor = self._supervisor
        if supervisor.draining:
            return await self._session.submit(request, tenant_id, claim=False)
        with supervisor.place(tenant_id):
            began = time.monotonic()
            with self._unheard.asking():
                submitted = await self._session.submit(request, tenant_id, claim=True)
            supervisor.accepted(time.monotonic() - began)
            if submitted.unsure:
                claim = await supervisor.claim(submitted.run.run_id)
                submitted = replace(submitted, claim=claim if isinstance(claim, Claim) else None)
            if submitted.claim is not None:
                supervisor.begin(submitted.claim, subscription)
            return submitted

    async def _check_tools(self, request: RunRequest) -> None:
        options = request.options
        wanted = [*options.tools]
        if options.tool_choice not in ("", "auto", "none", "required"):
            wanted.append(options.tool_choice)
        if wanted:
            known = await self._tools.tools()
            for name in wanted:
                if name not in known:
                    raise NotFoundError("TOOL_NOT_FOUND", f"there is no tool named {name[:100]!r}")

    async def Execute(self, request: ExecuteRequest, context: Context) -> AsyncIterator[ExecuteResponse]:
        """Work on a queued or orphaned run; the call's life is the load, not the run."""
        require_mesh()
        active = await self._supervisor.kept(self._supervisor.execute(request.run_id))
        if isinstance(active, NotClaimed):
            yield ExecuteResponse(already_claimed=active.elsewhere, finished=not active.elsewhere)
            return
        last = 0
        while not active.done.is_set():
            try:
                async with asyncio.timeout(BEAT_SECONDS):
                    await active.done.wait()
            except TimeoutError:
                seq = active.writer.next_seq - 1
                if seq != last:
                    last = seq
                    yield ExecuteResponse(last_seq=seq)
        over = active.outcome in ("completed", "failed", "cancelled", "requires_action")
        yield ExecuteResponse(
            last_seq=active.writer.next_seq - 1, finished=over, already_claimed=active.outcome == "lost"
        )

    async def ListModels(self, request: ListModelsRequest, context: Context) -> ListModelsResponse:
        """List what the backend serves, the default first."""
        models = await self._catalog.models()
        mode = self._settings.llm_tool_mode
        return ListModelsResponse(
            models=[Model(name=one.name, owned_by=one.owned_by, tool_mode=mode) for one in models]
        )


@contextmanager
def _beats(subscription: Subscription) -> Iterator[None]:
    """Send an empty frame now and then: a caller tells a silent model from a dead replica by it."""
    loop = asyncio.get_running_loop()
    timer: asyncio.TimerHandle | None = None

    def beat() -> None:
        nonlocal timer
        subscription.beat()
        timer = loop.call_later(FRAME_BEAT_SECONDS, beat)

    timer = loop.call_later(FRAME_BEAT_SECONDS, beat)
    try:
        yield
    finally:
        if timer is not None:
            timer.cancel()


def _reconnect(reason: str) -> RunResponse:
    return RunResponse(frame=Frame(reconnect=reconnect(reason)))
