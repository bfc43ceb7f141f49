"""The life of the gateway's process: listen, say so, drain, stop."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager
from typing import Any

import structlog
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway.app import make_app, make_gateway
from gateway.body import MAX_INPUT_BODY
from gateway.clients import SAFE_METHODS
from gateway.context import Gateway
from gateway.problems import problem_response
from gateway.settings import GatewaySettings
from gateway.streams import ABORT_EXTENSION
from gateway.watch_stream import CLIENT_EXTENSION
from meshkit import failpoints, otlp, tracing
from meshkit.channel import open_channel
from meshkit.context import REQUEST_ID_KEY, accept_request_id, request_id_var
from meshkit.envoys import Envoys
from meshkit.errors import InvalidArgumentError
from meshkit.lifecycle import (
    StopSignals,
    bind_failure,
    freeze_heap,
    reachable,
    remove_ready_file,
    scheduling,
    write_ready_file,
)
from meshkit.probes import ProbeServer
from meshkit.settings import parse_address
from meshkit.tasks import TaskOwner
from meshkit.telemetry import setup_logging, tell_process, watch_loop

_log = structlog.get_logger("gateway.server")

_BACKLOG = 2048
_START_SECONDS = 10.0
# How long WebSockets have to say `reconnect`, and their clients to close.
_SOCKETS_SECONDS = 3.0
# Longer than proxies keep idle connections (Envoy: an hour), so that it is never we who close one just as a
# request comes.
_KEEP_ALIVE_SECONDS = 3700
_WEBSOCKET_URL = re.compile(rb"/v1/sessions/[^/?]+/ws(?:\?.*)?")
_NOT_HTTP = "the request is not HTTP as it is taken here: its first line, its path or a header is malformed"


class _Protocol(HttpToolsProtocol):
    """uvicorn's protocol, which tells whether its client takes what is written, and can cut it off.

    Attributes:
        on_writable: Called when the client takes again.
    """

    on_writable: Callable[[], None] | None = None

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {
            ABORT_EXTENSION: self.transport.abort,  # type: ignore[dict-item]
            CLIENT_EXTENSION: self,  # type: ignore[dict-item]
        }

    @property
    def writable(self) -> bool:
        """Whether a write is sent on without waiting."""
        return not self.flow.write_paused

    def abort(self) -> None:
        """Cuts the connection."""
        self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Answers what is not HTTP; uvicorn's own words are bare text."""
        token = request_id_var.set(accept_request_id(None))
        try:
            response = problem_response(InvalidArgumentError(message=_NOT_HTTP))
            headers = [*response.raw_headers, (REQUEST_ID_KEY.encode(), request_id_var.get().encode())]
        finally:
            request_id_var.reset(token)
        lines = [b"HTTP/1.1 400 Bad Request", *(b": ".join(header) for header in headers)]
        lines += [b"connection: close", b"", bytes(response.body)]
        self.transport.write(b"\r\n".join(lines))
        self.transport.close()

    def _should_upgrade(self) -> bool:
        # A handshake that is incomplete, or at another path, would fail in bare text; as the GET that it is,
        # too, it gets a problem document.
        headers = dict(self.headers)
        return (
            super()._should_upgrade()
            and _WEBSOCKET_URL.fullmatch(self.url) is not None
            and b"sec-websocket-key" in headers
            and headers.get(b"sec-websocket-version") == b"13"
        )

    def _unsupported_upgrade_warning(self) -> None:
        """Has the connection end with the answer: the parser reads nothing after an upgrade."""
        if self.cycle is not None:
            self.cycle.keep_alive = False

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.on_writable is not None:
            self.on_writable()


class _Server(uvicorn.Server):
    """uvicorn's server, whose signals are ours, and which waits for its end instead of looking for it."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._stop = asyncio.Event()

    def stop(self) -> None:
        """Ends the serving: open requests have the configured grace."""
        self.should_exit = True
        self._stop.set()

    async def main_loop(self) -> None:
        # Each tick that is a multiple of ten renews the date header, once a second.
        ticks = 0
        while not await self.on_tick(ticks):
            ticks += 10
            try:
                async with asyncio.timeout(1.0):
                    await self._stop.wait()
            except TimeoutError:
                continue

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def bind(listen: str) -> socket.socket:
    """Returns a listening socket.

    Raises:
        StartupError: The address cannot be bound.
    """
    host, port = parse_address(listen)
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        raise bind_failure(listen, "HERMESH_LISTEN", error) from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(place)
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise bind_failure(listen, "HERMESH_LISTEN", error) from error
    return sock


def http_server(app: ASGIApp, grace: float) -> _Server:
    """Returns a server for a bound socket, which installs no signal handlers and logs no requests."""
    config = uvicorn.Config(
        app,
        loop="none",
        http=_Protocol,
        ws="websockets-sansio",
        ws_max_size=MAX_INPUT_BODY,
        ws_ping_interval=15,
        ws_ping_timeout=30,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=max(1, round(grace)),
    )
    return _Server(config)


@asynccontextmanager
async def serving(app: ASGIApp, sock: socket.socket, grace: float) -> AsyncGenerator[None, None]:
    """Serves an application on a bound socket while the block runs, then ends within `grace` seconds."""
    server = http_server(app, grace)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(server.serve(sockets=[sock]), name="http")
        try:
            async with asyncio.timeout(_START_SECONDS):
                while not server.started and not task.done():  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
            yield
        finally:
            server.stop()


async def serve(settings: GatewaySettings) -> None:
    """Runs the gateway until SIGTERM or SIGINT, then drains.

    Raises:
        StartupError: It cannot start.
    """
    setup_logging(settings, "gateway")
    tell_process("gateway", settings.replica)
    failpoints.arm(settings.failpoints)
    end_tracing = tracing.configure("gateway", settings.replica, settings.trace_file, settings.trace_ratio)
    try:
        sock = bind(settings.listen)
        with contextlib.closing(sock):
            async with open_channel(settings, safe=SAFE_METHODS) as channel:
                gateway = make_gateway(settings, channel)
                app = make_app(gateway)
                async with (
                    ProbeServer(settings.metrics_listen, gateway.readiness) as probes,
                    TaskOwner("gateway-server") as tasks,
                    gateway.mesh,
                    gateway.hub,
                ):
                    tasks.start(watch_loop(), name="loop-lag")
                    tasks.start(otlp.send_metrics("gateway", settings.replica), name="otlp-metrics")
                    tasks.start(app.refusals.report(), name="refusals")
                    if settings.envoy_status_port:
                        envoys = Envoys(gateway.hub, settings.envoy_status_port, settings.drain_delay_seconds)
                        tasks.start(envoys.watch(), name="envoys")
                    with StopSignals() as signals:
                        async with serving(app, sock, settings.drain_seconds):
                            bound: Any = sock.getsockname()
                            address = reachable(str(bound[0]), int(bound[1]))
                            write_ready_file(settings, "gateway", address, probes.address)
                            probes.set_ready()
                            _log.info(
                                "serving",
                                address=address,
                                metrics=probes.address,
                                scheduling=scheduling(),
                            )
                            freeze_heap()
                            await signals.stop.wait()
                            probes.set_ready("draining")
                            await _drain(gateway, signals)
    finally:
        remove_ready_file(settings.ready_file)
        await asyncio.to_thread(end_tracing)


async def _drain(gateway: Gateway, signals: StopSignals) -> None:
    """Lets the balancer notice, then asks every client that can to come back elsewhere."""
    settings = gateway.settings
    _log.info("draining", delay_s=settings.drain_delay_seconds, grace_s=settings.drain_seconds)
    gateway.hub.leaving = True
    await signals.pause(settings.drain_delay_seconds)
    gateway.hub.drain()
    await gateway.hub.wait_for_sockets(_SOCKETS_SECONDS)
