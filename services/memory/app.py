"""The memory service's wiring."""

from __future__ import annotations

from contextlib import AsyncExitStack

from hermesh.memory.v1.memory_service_pb2_grpc import add_MemoryServiceServicer_to_server
from meshkit.auth import MeshAuthenticator
from meshkit.channel import mesh_check, open_channel
from meshkit.errors import HermeshError, StartupError
from meshkit.migrate import migrate, open_migrated
from meshkit.postgres import Pool
from meshkit.server import Server
from meshkit.tasks import TaskOwner
from meshkit.waiting import once_there
from services.memory.embedding.wordllama import WordLlamaEmbedder
from services.memory.operations.recall import Ranking
from services.memory.operations.reembed import reembed
from services.memory.operations.sweep import sweep_forever
from services.memory.servicer import MemoryServicer
from services.memory.settings import MemorySettings
from services.memory.store.postgres import MIGRATIONS, SCHEMA, PostgresStore

SERVICE_NAME = "hermesh.memory.v1.MemoryService"
# What Recall looks for has 1 MiB at most.
_MAX_REQUEST_BYTES = 2 * 1024 * 1024


async def apply_migrations(settings: MemorySettings, *, before_rollout: bool = False) -> list[str]:
    """Brings the schema up to date, or as far as the version before survives it; returns what was applied.

    Raises:
        StartupError: It cannot.
    """
    url = settings.database_direct_url.get_secret_value() or settings.database_url.get_secret_value()
    if not url:
        raise StartupError("HERMESH_DATABASE_URL is not set; it names the PostgreSQL database")
    name = settings.database_schema_prefix + SCHEMA
    return await migrate(url, MIGRATIONS, schema=SCHEMA, name=name, before_rollout=before_rollout)


async def apply_reembed(settings: MemorySettings) -> int:
    """Gives every memory a vector of the present embedder; returns how many changed.

    Raises:
        StartupError: The database or the embedder cannot be used.
    """
    async with await _open_pool(settings, max_size=1) as pool:
        store = await PostgresStore.over(
            pool, max_per_scope=settings.memory_max_per_scope, schema=settings.database_schema_prefix + SCHEMA
        )
        embedder = await WordLlamaEmbedder.load()
        try:
            return await reembed(store, embedder)
        except HermeshError as error:
            raise StartupError(f"the vectors are not all replaced ({error.message}); run it again") from error


async def serve(settings: MemorySettings) -> None:
    """Serves until the process is told to stop.

    Raises:
        StartupError: Something that is needed is not there.
    """
    async with AsyncExitStack() as stack:
        # Two connections make the first calls quick.
        sizes = {"min_size": 2, "max_size": settings.memory_pool_size}
        pool = await once_there(settings, "memory", lambda: _open_pool(settings, **sizes))
        await stack.enter_async_context(pool)
        store = await PostgresStore.over(
            pool, max_per_scope=settings.memory_max_per_scope, schema=settings.database_schema_prefix + SCHEMA
        )
        embedder = await WordLlamaEmbedder.load()
        channel = await stack.enter_async_context(open_channel(settings))
        owner = await stack.enter_async_context(TaskOwner("memory"))
        server = await stack.enter_async_context(
            Server(
                settings,
                service="memory",
                authenticator=MeshAuthenticator(channel, settings),
                max_request_bytes=_MAX_REQUEST_BYTES,
            )
        )
        ranking = Ranking(settings.memory_min_score, settings.memory_importance_weight)
        server.add(
            add_MemoryServiceServicer_to_server, MemoryServicer(store, embedder, ranking), SERVICE_NAME
        )

        async def embedder_ready() -> str | None:
            return None if any(await embedder.embed("ready")) else "the embedder gives no vectors"

        server.add_readiness("postgresql", store.ping)
        server.add_readiness("mesh", mesh_check(channel))
        # Its model is in this process alone: another replica's may work.
        server.add_readiness("embedder", embedder_ready, gates_health=True)
        owner.start(sweep_forever(store, settings.memory_sweep_seconds), name="sweep")
        await server.serve()


async def _open_pool(settings: MemorySettings, **sizes: int) -> Pool:
    return await open_migrated(
        settings.database_url.get_secret_value(),
        MIGRATIONS,
        service="memory",
        schema=settings.database_schema_prefix + SCHEMA,
        name=settings.replica,
        **sizes,
    )
