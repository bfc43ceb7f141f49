"""The memory service's wiring."""

from __future__ import annotations

from contextlib import AsyncExitStack

from hermesh.memory.v1.memory_service_pb2_grpc import add_MemoryServiceServicer_to_server
from meshkit.auth import MeshAuthenticator
from meshkit.channel import mesh_check, open_channel
from meshkit.errors import HermeshError, StartupError
from meshkit.migrate import migrate
from meshkit.postgres import open_pool
from meshkit.server import Server
from meshkit.tasks import TaskOwner
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


async def apply_migrations(settings: MemorySettings) -> list[str]:
    """Brings the schema up to date and returns what was applied.

    Raises:
        StartupError: It cannot.
    """
    url = settings.database_url.get_secret_value()
    if not url:
        raise StartupError("HERMESH_DATABASE_URL is not set; it names the PostgreSQL database")
    return await migrate(url, MIGRATIONS, schema=SCHEMA)


async def apply_reembed(settings: MemorySettings) -> int:
    """Gives every memory a vector of the present embedder; returns how many changed.

    Raises:
        StartupError: The database or the embedder cannot be used.
    """
    url = settings.database_url.get_secret_value()
    async with await open_pool(url, max_size=1, name=settings.replica) as pool:
        store = PostgresStore(pool, max_per_scope=settings.memory_max_per_scope)
        await _require(store)
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
        # The application's name in pg_stat_activity; two connections make the first calls quick.
        pool = await stack.enter_async_context(
            await open_pool(
                settings.database_url.get_secret_value(),
                min_size=2,
                max_size=settings.memory_pool_size,
                name=settings.replica,
            )
        )
        store = PostgresStore(pool, max_per_scope=settings.memory_max_per_scope)
        await _require(store)
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


async def _require(store: PostgresStore) -> None:
    try:
        problem = await store.ping()
    except HermeshError as error:
        raise StartupError(f"the database does not answer: {error.message}") from error
    if problem is not None:
        raise StartupError(problem)
