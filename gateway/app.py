"""The gateway's parts, put together. The only place where they are."""

from __future__ import annotations

import functools
from importlib import metadata
from typing import Any

import grpc.aio
from prometheus_client import REGISTRY, CollectorRegistry
from starlette.requests import Request
from starlette.routing import Router, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from gateway import openapi
from gateway.clients import MeshClients
from gateway.context import Gateway
from gateway.door import Door, DoorMetrics
from gateway.edge import Edge, HttpMetrics, no_such_path, routes
from gateway.endpoints import Endpoint
from gateway.login import CookieSeal
from gateway.problems import UpgradeRequiredError
from gateway.routes import chat, login, runs, sessions, system, web
from gateway.settings import GatewaySettings
from gateway.streams import StreamHub, StreamMetrics
from gateway.watches import Watches
from gateway.websocket import SessionSocket
from meshkit.auth import Authenticator, MeshAuthenticator
from meshkit.channel import mesh_check
from meshkit.probes import Readiness

WEBSOCKET_PATH = "/v1/sessions/{session_id}/ws"


def make_gateway(
    settings: GatewaySettings,
    channel: grpc.aio.Channel,
    *,
    authenticator: Authenticator | None = None,
    registry: CollectorRegistry = REGISTRY,
) -> Gateway:
    """Makes the gateway's parts on a channel to the mesh.

    Args:
        settings: Its settings.
        channel: From `open_channel` with `gateway.clients.SAFE_METHODS`; the caller closes it.
        authenticator: Keys to tenants; the mesh's if None.
        registry: Where the figures go.
    """
    mesh = MeshClients(channel)
    readiness = Readiness(registry=registry)
    readiness.add("mesh", mesh_check(channel))
    readiness.add("session", mesh.probe_sessions)
    readiness.add("agent", mesh.probe_agents)
    return Gateway(
        settings=settings,
        mesh=mesh,
        hub=StreamHub(
            settings, StreamMetrics(registry), Watches(mesh.internal, settings.follow_timeout_seconds)
        ),
        door=Door(settings.max_waiting_streams, DoorMetrics(registry), line_seconds=settings.line_seconds),
        authenticator=authenticator if authenticator is not None else MeshAuthenticator(channel, settings),
        seal=CookieSeal(settings.mesh_token, settings.login_seconds),
        readiness=readiness,
    )


def api_endpoints() -> list[Endpoint]:
    """Returns the endpoints that the OpenAPI document describes."""
    return [
        *sessions.endpoints,
        *runs.endpoints,
        *chat.endpoints,
        *login.endpoints,
        *system.endpoints,
    ]


def make_app(gateway: Gateway, *, registry: CollectorRegistry = REGISTRY) -> Edge:
    """Makes the ASGI application.

    The caller enters `gateway.mesh` and `gateway.hub` around its serving, and runs `refusals.report` beside.
    """
    served = [
        *api_endpoints(),
        *web.docs_endpoints(*_documents()),
        *web.page_endpoints(),
        Endpoint("GET", WEBSOCKET_PATH, _needs_upgrade, "A WebSocket", {}, public=True),
    ]

    async def websocket(scope: Scope, receive: Receive, send: Send) -> None:
        scope["hermesh.route"] = WEBSOCKET_PATH
        await SessionSocket(gateway, WebSocket(scope, receive, send)).serve()

    router = Router(
        [*routes(gateway, served), WebSocketRoute(WEBSOCKET_PATH, _WebSocketApp(websocket))],
        redirect_slashes=False,
        default=no_such_path,
    )
    return Edge(router, HttpMetrics(registry), gateway.settings.proxies, lambda: gateway.hub.leaving)


async def _needs_upgrade(gateway: Gateway, request: Request) -> ASGIApp:
    raise UpgradeRequiredError(message="this path is a WebSocket's: it takes a handshake of version 13")


@functools.cache
def _documents() -> tuple[dict[str, Any], str]:
    """Returns the OpenAPI document and its page: the same for the life of the process, and slow to make."""
    spec = openapi.document(api_endpoints(), version())
    return spec, openapi.page(spec)


class _WebSocketApp:
    """Makes Starlette take a function as an ASGI application, not as a handler of its own kind."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


def version() -> str:
    """Returns Hermesh's version."""
    try:
        return metadata.version("hermesh")
    except metadata.PackageNotFoundError:
        return "0"
