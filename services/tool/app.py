"""The tool service's wiring."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import replace
from types import ModuleType

from hermesh.tool.v1.tool_service_pb2_grpc import add_ToolServiceServicer_to_server
from meshkit.auth import MeshAuthenticator
from meshkit.channel import mesh_check, open_channel
from meshkit.errors import StartupError
from meshkit.server import Server
from meshkit.tasks import TaskOwner
from services.tool.builtin import calculator, current_time
from services.tool.builtin.fetch import make_fetch_page
from services.tool.builtin.fetch.address import Allowed
from services.tool.builtin.fetch.client import Fetcher
from services.tool.execution import Executor
from services.tool.journal import MeshJournal
from services.tool.reconcile import Reconciler
from services.tool.registry import Registry, Tool, load_modules, tools_in
from services.tool.results import open_results
from services.tool.runs import MeshRuns
from services.tool.servicer import ToolServicer
from services.tool.settings import ToolSettings, split

SERVICE_NAME = "hermesh.tool.v1.ToolService"
# A call's arguments, in whatever characters, and its ids.
_MAX_REQUEST_BYTES = 5 * 1024 * 1024
_BUILTIN: tuple[ModuleType, ...] = (calculator, current_time)


def builtin_tools(settings: ToolSettings) -> list[Tool]:
    """Returns the tools that come with Hermesh."""
    tools = [declared for module in _BUILTIN for declared in tools_in(module)]
    return [*tools, make_fetch_page(Fetcher(Allowed(split(settings.tool_fetch_allow))))]


def make_registry(settings: ToolSettings) -> Registry:
    """Returns the tools that this process offers.

    Raises:
        StartupError: A tool is not declared as it should be, or a name is not known.
    """
    tools = [*builtin_tools(settings), *load_modules(split(settings.tool_modules))]
    names = {declared.name for declared in tools}
    disabled = set(split(settings.tool_disabled))
    approval = {name.removeprefix("-"): name[0] != "-" for name in split(settings.tool_approval)}
    for variable, named in (("HERMESH_TOOL_DISABLED", disabled), ("HERMESH_TOOL_APPROVAL", set(approval))):
        if named - names:
            raise StartupError(f"{variable} names what is no tool: {', '.join(sorted(named - names))}")
    return Registry(
        replace(declared, requires_approval=approval.get(declared.name, declared.requires_approval))
        if declared.name in approval
        else declared
        for declared in tools
        if declared.name not in disabled
    )


async def serve(settings: ToolSettings) -> None:
    """Serves until the process is told to stop.

    Raises:
        StartupError: Something that is needed is not there.
    """
    registry = make_registry(settings)
    async with AsyncExitStack() as stack:
        channel = await stack.enter_async_context(open_channel(settings))
        owner = await stack.enter_async_context(TaskOwner("tool"))
        journal = MeshJournal(channel, settings)
        results = open_results(settings.object_store_url)
        executor = Executor(
            registry,
            journal,
            results,
            owner,
            runs=MeshRuns(channel, settings),
            max_calls=settings.tool_max_calls,
            complete_seconds=settings.tool_complete_seconds,
        )
        server = await stack.enter_async_context(
            Server(
                settings,
                service="tool",
                authenticator=MeshAuthenticator(channel, settings),
                max_request_bytes=_MAX_REQUEST_BYTES,
            )
        )
        reconciler = Reconciler(registry, journal, results, max_looks=settings.tool_max_calls)
        servicer = ToolServicer(registry, executor, reconciler, results)
        server.add(add_ToolServiceServicer_to_server, servicer, SERVICE_NAME)

        async def drain() -> None:
            await executor.drain(settings.drain_seconds)

        server.on_drain(drain, after_delay=True)
        if results is not None:
            server.add_readiness("object_store", results.problem)
        server.add_readiness("mesh", mesh_check(channel))
        await server.serve()
