"""Puts an agent process together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from hermesh.agent.v1 import agent_service_pb2_grpc
from meshkit.auth import MeshAuthenticator
from meshkit.channel import mesh_check, open_channel
from meshkit.clock import now_ms
from meshkit.errors import StartupError
from meshkit.server import Server
from meshkit.tasks import TaskOwner
from services.agent.clients.memory import MemoryClient
from services.agent.clients.session import SessionClient, owner_of
from services.agent.clients.tools import ToolClient
from services.agent.domain.loop import Limits
from services.agent.domain.prompt import RunSpec
from services.agent.model.backends import Backends, Retry
from services.agent.model.catalog import ModelCatalog
from services.agent.model.http import Origin, Timeouts
from services.agent.model.openai import OpenAIModel
from services.agent.model.profiles import Profile, ProfileError, Profiles
from services.agent.runs.leases import LeaseKeeper
from services.agent.runs.link import AppendLink
from services.agent.runs.ports import World
from services.agent.runs.supervisor import Supervisor
from services.agent.runs.unheard import Unheard
from services.agent.servicer import AgentServicer
from services.agent.settings import AgentSettings

SERVICE_NAME = "hermesh.agent.v1.AgentService"
# New input, which the session service measures by its text, and the options of its run.
_MAX_REQUEST_BYTES = 4 * 1024 * 1024
SAFE_METHODS = (
    "hermesh.session.v1.SessionInternalService/Authenticate",
    "hermesh.tool.v1.ToolService/ListTools",
    "hermesh.memory.v1.MemoryService/GetPreferences",
)


async def main(settings: AgentSettings) -> None:
    """Serve until told to stop.

    Raises:
        StartupError: a setting is missing, or an address cannot be bound.
    """
    async with assemble(settings) as server:
        await server.serve()


@asynccontextmanager
async def assemble(settings: AgentSettings, *, configure_logging: bool = True) -> AsyncIterator[Server]:
    """Connect an agent's parts, and run them for the time of the block.

    Args:
        settings: the replica's settings.
        configure_logging: False in tests that keep their own logging.

    Raises:
        StartupError: a setting is missing.
    """
    if not settings.llm_base_urls:
        raise StartupError("HERMESH_LLM_BASE_URL is not set: name an OpenAI-compatible model server")
    monotonic = asyncio.get_running_loop().time
    async with AsyncExitStack() as stack:
        channel = await stack.enter_async_context(open_channel(settings, safe=SAFE_METHODS))
        # The append stream has a connection of its own: its small messages never wait behind others.
        append_channel = await stack.enter_async_context(open_channel(settings))
        server = await stack.enter_async_context(
            Server(
                settings,
                service="agent",
                authenticator=MeshAuthenticator(channel, settings),
                max_request_bytes=_MAX_REQUEST_BYTES,
                configure_logging=configure_logging,
            )
        )
        model = Backends(
            _backends(settings, stack),
            retry=Retry(attempts=settings.llm_attempts),
            monotonic=monotonic,
        )
        catalog = ModelCatalog(model, settings.llm_model, monotonic)
        owner = owner_of(settings.replica)
        session = SessionClient(channel, settings, owner, append_channel)
        tools = ToolClient(channel, settings)
        memory = MemoryClient(channel, settings)
        background = await stack.enter_async_context(TaskOwner("agent"))
        runs = await stack.enter_async_context(TaskOwner("agent-runs"))

        def limits(spec: RunSpec) -> Limits:
            return Limits(
                spec.max_turns,
                spec.max_output_tokens,
                settings.llm_resumes,
                settings.llm_spare_requests,
                settings.max_run_bytes,
            )

        world = World(
            replica=settings.replica,
            model=model,
            catalog=catalog,
            tools=tools,
            memory=memory,
            reasons=session,
            contexts=session,
            tool_mode=settings.llm_tool_mode,
            can_prefill=settings.llm_prefill,
            context_tokens=settings.llm_context_tokens,
            memory_timeout=settings.memory_timeout,
            limits=limits,
            now_ms=now_ms,
            monotonic=monotonic,
            draining=lambda: supervisor.draining,
        )
        supervisor = Supervisor(settings, session, world, runs)
        link = AppendLink(
            session.open_append,
            owner,
            supervisor.cancel,
            monotonic,
            settings.max_appends_per_second,
        )
        supervisor.serve_with(link)
        keeper = LeaseKeeper(session, supervisor.writers, supervisor.cancel, monotonic)
        unheard = Unheard(session, supervisor.holds, monotonic)
        session.on_missed = unheard.missed
        background.start(link.run(), name="append")
        background.start(unheard.run(), name="unheard")
        background.start(keeper.run(), name="leases")
        background.start(catalog.keep_fresh(), name="models")
        background.start(tools.keep_fresh(), name="tools")
        servicer = AgentServicer(settings, supervisor, session, catalog, tools, unheard)
        server.add(agent_service_pb2_grpc.add_AgentServiceServicer_to_server, servicer, SERVICE_NAME)
        for name, check in model.checks():
            server.add_readiness(name, check)
        server.add_readiness("memory", memory.problem)
        server.add_readiness("tools", tools.problem)
        server.add_readiness("mesh", mesh_check(channel))
        server.on_drain(supervisor.drain)
        yield server


def _backends(settings: AgentSettings, stack: AsyncExitStack) -> list[tuple[str, OpenAIModel]]:
    """Return the model backends, each with its name.

    Raises:
        StartupError: a profile is named that there is not, or the file of profiles is not one.
    """
    try:
        profiles = Profiles(Path(settings.llm_profile_file) if settings.llm_profile_file else None)
        return [
            _backend(settings, url, profiles.chosen(settings.llm_profiles, place), profiles, stack)
            for place, url in enumerate(settings.llm_base_urls)
        ]
    except ProfileError as error:
        raise StartupError(str(error)) from error


def _backend(
    settings: AgentSettings, url: str, profile: Profile | None, profiles: Profiles, stack: AsyncExitStack
) -> tuple[str, OpenAIModel]:
    """Return a model backend's name and its adapter, which closes with the stack."""
    model = OpenAIModel(
        url,
        api_key=settings.llm_api_key.get_secret_value(),
        connections=settings.llm_connections,
        timeouts=Timeouts(
            settings.llm_connect_timeout, settings.llm_first_byte_timeout, settings.llm_idle_timeout
        ),
        profile=profile,
        profiles=profiles,
    )
    stack.push_async_callback(model.aclose)
    return Origin.parse(url).place, model
