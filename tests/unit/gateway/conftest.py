"""A gateway over the FAKE mesh of tests/fakes/mesh.py, behind a real HTTP server on a real socket."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from hypothesis import settings
from prometheus_client import CollectorRegistry

from gateway.app import make_app, make_gateway
from gateway.clients import SAFE_METHODS
from gateway.context import Gateway
from gateway.edge import Edge
from gateway.server import bind, serving
from gateway.settings import GatewaySettings
from meshkit.channel import open_channel
from tests.fakes.mesh import API_KEY, FakeMesh

# A busy machine is not a failing test.
settings.register_profile("gateway", deadline=None)
settings.load_profile("gateway")


@dataclass
class Stack:
    """A served gateway."""

    gateway: Gateway
    app: Edge
    mesh: FakeMesh
    url: str
    client: httpx.AsyncClient

    @property
    def host(self) -> str:
        return self.url.removeprefix("http://")


@pytest.fixture
async def mesh() -> AsyncIterator[FakeMesh]:
    async with FakeMesh() as fake:
        yield fake


@pytest.fixture
async def start(mesh: FakeMesh) -> AsyncIterator[Callable[..., Any]]:
    """Starts gateways with given settings; all of them end with the test."""
    async with AsyncExitStack() as stack:

        async def make(**settings: Any) -> Stack:
            chosen = GatewaySettings(mesh_address=mesh.address, mesh_token="secret", **settings)
            registry = CollectorRegistry()
            channel = await stack.enter_async_context(open_channel(chosen, safe=SAFE_METHODS))
            gateway = make_gateway(chosen, channel, registry=registry)
            await stack.enter_async_context(gateway.mesh)
            await stack.enter_async_context(gateway.hub)
            sock = bind("127.0.0.1:0")
            app = make_app(gateway, registry=registry)
            await stack.enter_async_context(serving(app, sock, 1.0))
            url = f"http://127.0.0.1:{sock.getsockname()[1]}"
            client = await stack.enter_async_context(
                httpx.AsyncClient(base_url=url, headers={"authorization": f"Bearer {API_KEY}"}, timeout=10)
            )
            return Stack(gateway, app, mesh, url, client)

        yield make


@pytest.fixture
async def served(start: Callable[..., Any]) -> Stack:
    """A gateway with the default settings."""
    return await start()
