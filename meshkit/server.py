"""The life of a gRPC server process: start, health, reflection, probes, ready file, drain."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

from meshkit import failpoints, otlp, tracing
from meshkit.auth import Authenticator
from meshkit.channel import MAX_MESSAGE_BYTES
from meshkit.context import current_request_id, remaining
from meshkit.errors import StartupError
from meshkit.interceptor import MAX_CALLS, RpcInterceptor
from meshkit.lifecycle import (
    StopSignals,
    bind_failure,
    check_free,
    freeze_heap,
    reachable,
    remove_ready_file,
    run,
    scheduling,
    write_ready_file,
)
from meshkit.probes import Check, ProbeServer, Readiness
from meshkit.settings import MeshSettings, parse_address
from meshkit.tasks import TaskOwner
from meshkit.telemetry import rpc_metrics, setup_logging, tell_process, watch_loop

_log = structlog.get_logger("meshkit.server")

_HEALTH_PERIOD = 1.0
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

DrainCallback = Callable[[], Awaitable[None]]


def server_options(max_request_bytes: int = MAX_MESSAGE_BYTES) -> list[tuple[str, Any]]:
    """Returns the channel arguments of every server in the mesh.

    Args:
        max_request_bytes: The largest message that it takes.
    """
    return [
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", max_request_bytes),
        # One process a port: siblings on one port would sit idle behind Envoy's one connection a worker, and
        # a port in use would go unnoticed.
        ("grpc.so_reuseport", 0),
        # Envoy pings its upstreams, also without calls under way; gRPC's defaults answer "Too many pings"
        # and close the connection with everything on it.
        ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_ping_strikes", 0),
        # A peer that died silently is noticed in 20 s, so that its streams end.
        ("grpc.keepalive_time_ms", 15_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.http2.max_pings_without_data", 0),
    ]


class Server:
    """A gRPC server with all that every service of the mesh has.

    Example:
        async with Server(settings, service="tool", authenticator=keys) as server:
            server.add(add_ToolServiceServicer_to_server, servicer, "hermesh.tool.v1.ToolService")
            server.on_drain(servicer.drain)
            await server.serve()

    Attributes:
        signals: The process's stop signals, from the time the block is entered.
        address: host:port that it listens on, once started.
    """

    def __init__(
        self,
        settings: MeshSettings,
        *,
        service: str,
        authenticator: Authenticator | None = None,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        configure_logging: bool = True,
        max_request_bytes: int = MAX_MESSAGE_BYTES,
        max_calls: int = MAX_CALLS,
    ) -> None:
        """Makes a server that is not started.

        Args:
            settings: Addresses, secret, drain times.
            service: Short name, for example `agent`.
            authenticator: For calls with an API key; None admits only the mesh.
            interceptors: The service's own; they run inside of the common one.
            configure_logging: False in tests that keep their own logging.
            max_request_bytes: The largest message that any of its methods takes.
            max_calls: Most calls at once, health checks not counted; more are refused.
        """
        self._settings = settings
        self._service = service
        self._common = RpcInterceptor(
            authenticator=authenticator,
            mesh_token=settings.mesh_token.get_secret_value(),
            metrics=rpc_metrics(),
            max_calls=max_calls,
            arrival_seconds=settings.arrival_seconds,
            proxies=settings.proxies,
        )
        self._interceptors = tuple(interceptors)
        self._max_request_bytes = max_request_bytes
        self._configure_logging = configure_logging
        self._health = health.aio.HealthServicer()
        self._names: list[str] = []
        self._reflected: list[str] = []
        self._drain_callbacks: list[DrainCallback] = []
        self._late_callbacks: list[DrainCallback] = []
        self._readiness = Readiness()
        self._gates = Readiness()
        self._gated = False
        self._stack = AsyncExitStack()
        self._probes: ProbeServer | None = None
        self._tasks = TaskOwner(f"{service}-server")
        self._serving = False
        self._started = False
        self._stopped = False
        self.signals = StopSignals()
        self.draining = asyncio.Event()
        self.address = settings.listen
        self._server: grpc.aio.Server | None = None

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            if self._configure_logging:
                setup_logging(self._settings, self._service)
            tell_process(self._service, self._settings.replica)
            failpoints.arm(self._settings.failpoints)
            stack.callback(
                tracing.configure(
                    self._service,
                    self._settings.replica,
                    self._settings.trace_file,
                    self._settings.trace_ratio,
                )
            )
            stack.enter_context(self.signals)
            self._probes = await stack.enter_async_context(
                ProbeServer(self._settings.metrics_listen, self._readiness)
            )
            await stack.enter_async_context(self._tasks)
            self._server = self._make()
            stack.callback(remove_ready_file, self._settings.ready_file)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.stop(grace=0)
        finally:
            await self._stack.aclose()

    def _make(self) -> grpc.aio.Server:
        server = grpc.aio.server(
            interceptors=(self._common, *self._interceptors),
            # Calls are counted by the interceptor: gRPC's own limit counts those that nobody may make.
            options=server_options(self._max_request_bytes),
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        return server

    @property
    def metrics_address(self) -> str:
        """host:port of /metrics, /health and /ready."""
        return self._probes.address if self._probes is not None else self._settings.metrics_listen

    def add(self, add_to_server: Callable[[Any, Any], None], servicer: Any, service_name: str) -> None:
        """Adds a servicer; before `serve`.

        Args:
            add_to_server: The generated `add_XServicer_to_server`.
            servicer: Its argument.
            service_name: Full name, for example `hermesh.agent.v1.AgentService`, for health and reflection.
        """
        add_to_server(servicer, self._require())
        self._names.append(service_name)

    def reflect(self, *service_names: str) -> None:
        """Lists services of other replicas too, where one server answers for the whole public port."""
        self._reflected.extend(service_names)

    def on_drain(self, callback: DrainCallback, *, after_delay: bool = False) -> None:
        """Adds what ends the service's own work when the process is told to stop.

        Callbacks run side by side, once, and have `drain_seconds` beyond the delay. By default they start at
        once, when health turns NOT_SERVING and calls still come; with `after_delay` they start when the load
        balancer has noticed, just before new calls are refused.
        """
        (self._late_callbacks if after_delay else self._drain_callbacks).append(callback)

    def add_readiness(self, name: str, check: Check, *, gates_health: bool = False) -> None:
        """Adds a check to /ready.

        Args:
            name: As /ready and the gauge `hermesh_dependency_up` show it.
            check: Returns None, or why the process is degraded.
            gates_health: While the check fails /ready is 503, and gRPC health tells the load balancer
                NOT_SERVING. Only for what is wrong with this replica alone: for something that all replicas
                share (the database) it would take out all of them, and turn a clear error into an unclear
                one.
        """
        self._readiness.add(name, check, own=gates_health)
        if gates_health:
            self._gates.add(name, check)
            self._gated = True

    async def start(self) -> None:
        """Binds, serves, reports SERVING and writes the ready file.

        Raises:
            StartupError: The address cannot be bound or the ready file not written.
        """
        server = self._require()
        self._add_reflection(server)
        listen = self._settings.listen
        host, _ = parse_address(listen)
        check_free(listen, "HERMESH_LISTEN")
        try:
            port = server.add_insecure_port(listen)
        except RuntimeError as error:
            raise bind_failure(listen, "HERMESH_LISTEN", OSError(str(error))) from error
        await server.start()
        self._started = True
        self.address = reachable(host, port)
        await self._report(serving=True)
        self._tasks.start(watch_loop(), name="loop-lag")
        self._tasks.start(otlp.send_metrics(self._service, self._settings.replica), name="otlp-metrics")
        if self._gated:
            self._tasks.start(self._watch_gates(), name="health")
        if self._probes is not None:
            self._probes.set_ready()
        write_ready_file(self._settings, self._service, self.address, self.metrics_address)
        _log.info(
            "serving",
            address=self.address,
            metrics_address=self.metrics_address,
            scheduling=scheduling(),
        )

    async def serve(self) -> None:
        """Serves until SIGTERM or SIGINT, then drains and returns.

        Raises:
            StartupError: As `start`.
        """
        if not self._started:
            await self.start()
        freeze_heap()
        await self.signals.stop.wait()
        await self.drain()

    async def drain(self) -> None:
        """Ends as the load balancer's clients like it: they see no error.

        Health turns NOT_SERVING; calls are still served until the load balancer must have noticed; then new
        ones are refused and those under way get the rest of `drain_seconds`. A second signal ends all that.
        """
        if self.draining.is_set():
            return
        settings = self._settings
        self.draining.set()
        if self._probes is not None:
            self._probes.set_ready("draining")
        await self._report(serving=False)
        _log.info("draining", delay_s=settings.drain_delay_seconds, grace_s=settings.drain_seconds)
        loop = asyncio.get_running_loop()
        early = self._run_callbacks(self._drain_callbacks)
        if not await self.signals.pause(settings.drain_delay_seconds):
            end = loop.time() + settings.drain_seconds
            pending = early | self._run_callbacks(self._late_callbacks)
            ended = self._tasks.start(self._stop_gracefully(pending, end), name="drain")
            hurry = self._tasks.start(self.signals.now.wait(), name="second-signal")
            await asyncio.wait({ended, hurry}, return_when=asyncio.FIRST_COMPLETED)
            hurry.cancel()
        if self.signals.now.is_set():
            _log.warning("stopping at once: second signal")
        await self.stop(grace=0)
        _log.info("stopped")

    def _run_callbacks(self, callbacks: list[DrainCallback]) -> set[asyncio.Task[Any]]:
        return {
            self._tasks.start(_call(callback), name=f"drain-{number}")
            for number, callback in enumerate(callbacks)
        }

    async def _stop_gracefully(self, callbacks: set[asyncio.Task[Any]], end: float) -> None:
        loop = asyncio.get_running_loop()
        if callbacks:
            # They end the service's own streams, which would otherwise hold the server for all of the grace.
            await asyncio.wait(callbacks, timeout=max(0.0, end - loop.time()))
        self._common.end_watches()
        await self._require().stop(max(0.0, end - loop.time()))

    async def stop(self, grace: float = 0.0) -> None:
        """Refuses new calls, and ends those under way after `grace` seconds. A second call does nothing."""
        if self._stopped or self._server is None:
            return
        self._stopped = True
        await self._report(serving=False)
        await self._server.stop(grace)

    async def _report(self, *, serving: bool) -> None:
        self._serving = serving
        status = _SERVING if serving else _NOT_SERVING
        for name in ("", *self._names):
            await self._health.set(name, status)

    async def _watch_gates(self) -> None:
        while not self.draining.is_set():
            problems = {name: why for name, why in (await self._gates.problems()).items() if why is not None}
            if not self.draining.is_set() and self._serving == bool(problems):
                _log.warning("health changed", serving=not problems, problems=problems)
                await self._report(serving=not problems)
            await asyncio.sleep(_HEALTH_PERIOD)

    def _add_reflection(self, server: grpc.aio.Server) -> None:
        # What is for the mesh only is not for those who look around from outside.
        public = [name for name in (*self._names, *self._reflected) if not name.endswith("InternalService")]
        names = (*public, health.SERVICE_NAME, reflection.SERVICE_NAME)
        servicer = reflection.aio.ReflectionServicer(service_names=names)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
        # grpcio-reflection has v1alpha only; v1 is the same messages under another name.
        method = grpc.stream_stream_rpc_method_handler(
            servicer.ServerReflectionInfo,
            reflection_pb2.ServerReflectionRequest.FromString,
            reflection_pb2.ServerReflectionResponse.SerializeToString,
        )
        handler = grpc.method_handlers_generic_handler(
            "grpc.reflection.v1.ServerReflection", {"ServerReflectionInfo": method}
        )
        server.add_generic_rpc_handlers((handler,))

    def _require(self) -> grpc.aio.Server:
        if self._server is None:
            raise RuntimeError("the server is used outside of its `async with` block")
        return self._server


async def _call(callback: DrainCallback) -> None:
    await callback()


__all__ = [
    "DrainCallback",
    "Server",
    "StartupError",
    "current_request_id",
    "remaining",
    "run",
    "server_options",
]
