"""Fixtures of meshkit's tests: settings, logs as data, and a running server."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import pytest
import structlog

from hermesh.session.v1 import session_internal_service_pb2_grpc as pb_grpc
from meshkit.server import Server
from meshkit.settings import MeshSettings
from tests.unit.meshkit.support import TOKEN, Logs, Servicer, serve


@pytest.fixture
def settings() -> MeshSettings:
    return MeshSettings(mesh_token=TOKEN, drain_delay_seconds=0, drain_seconds=5, replica="test-1")


@pytest.fixture
def logs(monkeypatch: pytest.MonkeyPatch) -> Logs:
    """Log lines of the RPC interceptor."""
    captured = Logs()
    monkeypatch.setattr("meshkit.interceptor._log", structlog.wrap_logger(None, processors=[captured]))
    return captured


@pytest.fixture
def servicer() -> Servicer:
    return Servicer()


@pytest.fixture
async def server(settings: MeshSettings, servicer: Servicer) -> AsyncIterator[Server]:
    async with serve(settings, servicer) as running:
        yield running


@pytest.fixture
async def plain(server: Server) -> AsyncIterator[pb_grpc.SessionInternalServiceStub]:
    """A stub over a channel without the mesh's metadata: what a caller from outside has."""
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield pb_grpc.SessionInternalServiceStub(channel)
