"""The composition root of a session replica: everything is made, connected and owned here."""

import asyncio
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO
from uuid import UUID

import structlog

from hermesh.agent.v1 import agent_service_pb2
from hermesh.agent.v1 import agent_service_pb2_grpc as agent_grpc
from hermesh.memory.v1 import memory_service_pb2
from hermesh.session.v1 import session_internal_service_pb2_grpc as internal_grpc
from hermesh.session.v1 import session_service_pb2_grpc as public_grpc
from hermesh.tool.v1 import tool_service_pb2, tool_service_pb2_grpc
from meshkit.auth import CachingAuthenticator
from meshkit.channel import mesh_check, open_channel
from meshkit.envoys import Envoys
from meshkit.errors import HermeshError, StartupError
from meshkit.migrate import migrate as apply_migrations
from meshkit.migrate import open_migrated
from meshkit.postgres import Pool
from meshkit.server import Server
from meshkit.tasks import TaskOwner
from meshkit.waiting import once_there
from services.session import metrics
from services.session.append_hub import AppendHub
from services.session.backlog import Backlog
from services.session.commits import Commits
from services.session.flusher import Flusher
from services.session.leftovers import Collector
from services.session.moved import MovedTenants
from services.session.operations.authenticate import StoreAuthenticator
from services.session.operations.bootstrap import bootstrap as ensure_tenant
from services.session.operations.tenant import change_of, configure, describe
from services.session.servicer import SessionServicer
from services.session.servicer_internal import SessionInternalServicer
from services.session.settings import SessionSettings
from services.session.store.cached import CachedContexts, Contexts
from services.session.store.notifications import CANCEL, LOG, Notifications
from services.session.store.port import Store
from services.session.store.postgres import POOL_SETTINGS, PostgresStore
from services.session.store.postgres_base import SCHEMA
from services.session.store.redis_shard import open_live
from services.session.store.standby_reads import StandbyReads
from services.session.storm import MeshLink, StormGuard
from services.session.sweeper import Sweeper
from services.session.tail import Tail
from services.session.upkeep import keep_up
from services.session.watch import Watcher
from services.session.watch_hub import WatchHub

_log = structlog.get_logger("session.app")

PUBLIC = "hermesh.session.v1.SessionService"
INTERNAL = "hermesh.session.v1.SessionInternalService"
# The public port's reflection is answered here, for every public service.
ELSEWHERE = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in (
        (agent_service_pb2, "AgentService"),
        (tool_service_pb2, "ToolService"),
        (memory_service_pb2, "MemoryService"),
    )
)
MIGRATIONS = Path(__file__).parent / "store" / "migrations"
_STANDBY_SECONDS = 1.5
_NO_STANDBY = "no synchronous standby of PostgreSQL answers: nothing can be stored"
_NOT_ARCHIVED = "PostgreSQL cannot archive its write-ahead log; it keeps it and goes on trying"


@dataclass(frozen=True, slots=True)
class Replica:
    """A session replica that serves; what its notifications are handed to."""

    server: Server
    hub: AppendHub
    tail: Tail
    watches: WatchHub
    sweeper: Sweeper

    def notice(self, channel: str, payload: str) -> None:
        """Takes a notice of PostgreSQL: a run shall be cancelled, its log grew, or it waits for an agent."""
        try:
            identifier = UUID(payload) if payload else None
        except ValueError:
            _log.warning("a notice names nothing", channel=channel, payload=payload[:100])
            return
        if channel == CANCEL:
            if identifier is not None:
                self.hub.cancel(identifier)
            return
        if channel == LOG:
            if identifier is not None:
                self.tail.nudge(identifier)
            return
        self.sweeper.wake()
        if identifier is not None:
            self.tail.announce(identifier)

    async def listen(self, notices: AsyncIterable[tuple[str, str]]) -> None:
        """Takes notices until cancelled."""
        async for channel, payload in notices:
            self.notice(channel, payload)


@asynccontextmanager
async def assemble(
    settings: SessionSettings, store: Store, *, configure_logging: bool = True
) -> AsyncIterator[Replica]:
    """Connects a replica's parts over a store and runs them for the time of the block.

    Args:
        settings: The replica's settings.
        store: What is durable.
        configure_logging: False in tests that keep their own logging.
    """
    async with AsyncExitStack() as stack:
        live = open_live(
            stack,
            settings,
            settings.redis_url.get_secret_value(),
            settings.redis_read_from.get_secret_value(),
            store,
        )
        channel = await stack.enter_async_context(open_channel(settings))
        keys = StoreAuthenticator(store)
        server = Server(
            settings,
            service="session",
            authenticator=CachingAuthenticator(keys),
            configure_logging=configure_logging,
        )
        # One of these loops ending by a bug would leave a replica that looks alive: the process ends instead.
        loops = await stack.enter_async_context(
            TaskOwner("session", on_failure=lambda _task, _error: server.signals.trigger())
        )
        work = await stack.enter_async_context(TaskOwner("session-work"))
        sweeper = Sweeper(
            store,
            agent_grpc.AgentServiceStub(channel),
            tasks=work,
            interval=settings.sweep_seconds,
            max_dispatches=settings.max_dispatches,
        )
        tail = Tail(
            store,
            readers=live.readers if live else None,
            holds=lambda run_id: hub.holds(run_id),
            poll_seconds=settings.watch_poll_seconds,
            degraded_seconds=settings.watch_poll_degraded_seconds,
        )
        cached = CachedContexts(store, live.conversations, tasks=work) if live else None
        contexts: Contexts = cached or store
        backlog = Backlog(store, settings.max_queued_runs)
        commits = Commits(tail, live.publisher if live else None, cached, sweeper.wake)
        flusher = Flusher(
            store,
            tasks=work,
            on_commit=commits.appended,
            max_appends=settings.max_flush_appends,
            max_steps=settings.max_step_commits,
        )
        collector = Collector(
            store,
            tool_service_pb2_grpc.ToolServiceStub(channel),
            grace_seconds=settings.result_grace_seconds,
        )
        link = MeshLink(channel)
        hub = AppendHub(
            store, flusher, tasks=work, guard=StormGuard(), reachable=lambda: link.up, dispatch=sweeper.wake
        )

        moved = MovedTenants(store, tail)

        def watcher_for(tenant_id: UUID) -> Watcher:
            return Watcher(store, tail, tenant_id, moved.check)

        watches = WatchHub(watcher_for, tasks=work)
        await stack.enter_async_context(server)
        server.add(
            public_grpc.add_SessionServiceServicer_to_server,
            SessionServicer(store, contexts, commits, backlog, watcher_for),
            PUBLIC,
        )
        server.reflect(*ELSEWHERE)
        server.add(
            internal_grpc.add_SessionInternalServiceServicer_to_server,
            SessionInternalServicer(store, contexts, hub, watches, commits, keys),
            INTERNAL,
        )

        async def database() -> str | None:
            try:
                await store.tenant_of_key("")
            except HermeshError:
                return "PostgreSQL does not answer"
            refused = store.refused
            return f"PostgreSQL refuses work: {refused}" if refused else None

        async def stop_dispatching() -> None:
            sweeper.stop()

        async def move_streams() -> None:
            hub.drain()
            tail.drain()
            watches.drain()

        async def standby() -> str | None:
            try:
                if not await store.synchronous():
                    return None
            except HermeshError:
                # That is the other check's to say.
                return None
            try:
                async with asyncio.timeout(_STANDBY_SECONDS):
                    await store.confirm()
            except (HermeshError, TimeoutError):
                return _NO_STANDBY
            return None

        async def archive() -> str | None:
            try:
                return _NOT_ARCHIVED if await store.archive_fails() else None
            except HermeshError:
                return None

        server.add_readiness("postgresql", database)
        server.add_readiness("wal_archive", archive)
        server.add_readiness("standby", standby)
        server.add_readiness("mesh", mesh_check(channel))
        if live is not None:
            server.add_readiness("redis", live.problem)
        server.on_drain(stop_dispatching)
        # Only once Envoy sends nothing here any more: before that, whoever moves could come right back.
        server.on_drain(move_streams, after_delay=True)
        loops.start(flusher.run(), name="flusher")
        loops.start(sweeper.run(), name="sweeper")
        loops.start(backlog.run(), name="backlog")
        loops.start(link.keep(), name="link")
        loops.start(tail.poll(), name="poll")
        loops.start(moved.keep_looking(), name="moved")
        if settings.envoy_status_port:
            envoys = Envoys(tail, settings.envoy_status_port, settings.drain_delay_seconds)
            loops.start(envoys.watch(), name="envoys")
        loops.start(hub.watch_leases(), name="leases")
        loops.start(collector.run(), name="leftovers")
        loops.start(keep_up(store, settings.maintain_seconds), name="upkeep")
        if live is not None:
            metrics.tail_degraded.set_function(lambda: float(tail.degraded))
            for shard in live.shards:
                loops.start(live.keep_looking(shard), name="probe")
                loops.start(shard.publisher.run(), name="publisher")
            for lane in tail.lanes:
                loops.start(tail.follow(lane), name="follow")
                loops.start(tail.wake_reader(lane), name="wake")
        yield Replica(server, hub, tail, watches, sweeper)


async def _open_pool(settings: SessionSettings) -> Pool:
    return await open_migrated(
        settings.database_url.get_secret_value(),
        MIGRATIONS,
        service="session",
        schema=settings.database_schema_prefix + SCHEMA,
        min_size=2,
        max_size=settings.database_pool_size,
        name=settings.replica,
        server_settings=POOL_SETTINGS,
    )


@asynccontextmanager
async def _standby(settings: SessionSettings) -> AsyncIterator[StandbyReads | None]:
    """The standby that old events are read from, if there is one."""
    url = settings.database_standby_url.get_secret_value()
    if not url:
        yield None
        return
    async with StandbyReads(
        url,
        name=settings.replica,
        max_lag=settings.database_standby_max_lag_seconds,
        schema=settings.database_schema_prefix + SCHEMA,
    ) as standby:
        yield standby


@asynccontextmanager
async def _store_on(
    pool: Pool, settings: SessionSettings, standby: StandbyReads | None = None
) -> AsyncIterator[PostgresStore]:
    """Makes the store over a pool, and closes that."""
    try:
        yield PostgresStore(
            pool,
            run_timeout_ms=round(settings.run_timeout * 1000),
            standby=standby,
            schema=settings.database_schema_prefix + SCHEMA,
        )
    finally:
        await pool.shut()


async def serve(settings: SessionSettings) -> None:
    """Serves until SIGTERM or SIGINT.

    Raises:
        StartupError: The database or an address cannot be used.
    """
    pool = await once_there(settings, "session", lambda: _open_pool(settings))
    async with (
        _standby(settings) as standby,
        _store_on(pool, settings, standby) as store,
        assemble(settings, store) as replica,
        Notifications(settings.direct_url, name=f"{settings.replica}-listen") as notices,
        TaskOwner("notices", on_failure=lambda _task, _error: replica.server.signals.trigger()) as owner,
    ):
        replica.server.add_readiness("notices", notices.problem)
        owner.start(replica.listen(notices), name="listen")
        if standby is not None:
            replica.server.add_readiness("standby_reads", standby.problem)
            owner.start(standby.watch(store.position), name="standby")
        await replica.server.serve()


async def migrate(settings: SessionSettings, before_rollout: bool, out: TextIO) -> None:
    """Brings the schema up to date, or as far as the version before survives it, and says what was done.

    Raises:
        StartupError: It cannot be done; one line says why.
    """
    if not settings.direct_url:
        raise StartupError("HERMESH_DATABASE_URL is not set; it names the PostgreSQL database")
    applied = await apply_migrations(
        settings.direct_url,
        MIGRATIONS,
        schema=SCHEMA,
        name=settings.database_schema_prefix + SCHEMA,
        before_rollout=before_rollout,
    )
    for name in applied:
        out.write(f"applied {name}\n")
    if not applied:
        out.write("the schema is up to date\n")


async def bootstrap(settings: SessionSettings, tenant: str, variable: str, out: TextIO) -> None:
    """Makes a tenant and its key, if they are not there, and says which tenant it is.

    Raises:
        StartupError: The variable holds no usable key, or the database cannot be used.
    """
    async with _store_on(await _open_pool(settings), settings) as store:
        try:
            tenant_id = await ensure_tenant(store, tenant, variable)
        except HermeshError as error:
            raise StartupError(f"the key in {variable} cannot be stored: {error.message}") from error
        out.write(f"tenant {tenant_id}\n")


async def tenant(
    settings: SessionSettings, name: str, words: tuple[str | None, str | None, float | None], out: TextIO
) -> None:
    """Changes a tenant's settings and says what they are.

    Args:
        settings: For the database.
        name: The tenant's name.
        words: What `operations.tenant.change_of` takes.
        out: Where to say it.

    Raises:
        StartupError: A setting is not valid, there is no such tenant, or the database cannot be used.
    """
    change = change_of(*words)
    async with _store_on(await _open_pool(settings), settings) as store:
        try:
            found = await configure(store, name, change)
        except HermeshError as error:
            raise StartupError(f"the tenant's settings cannot be changed: {error.message}") from error
        out.write(describe(found))
