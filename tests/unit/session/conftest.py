"""A session replica over the fake store, served on a real gRPC port of this process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

import pytest
from pydantic import SecretStr

from hermesh.session.v1 import session_internal_service_pb2_grpc as internal_grpc
from hermesh.session.v1 import session_service_pb2_grpc as public_grpc
from meshkit.channel import open_channel
from services.session.app import Replica, assemble
from services.session.settings import SessionSettings
from tests.unit.session.fake_store import FakeStore

KEY = "hm_" + "k" * 43


class Client:
    """What a test needs to talk to a replica: as a tenant with a key, and as the mesh."""

    def __init__(self, replica: Replica, store: FakeStore, tenant_id: UUID) -> None:
        self.replica = replica
        self.store = store
        self.tenant_id = tenant_id
        self.metadata = (("authorization", f"Bearer {KEY}"),)
        self.public: public_grpc.SessionServiceAsyncStub
        self.mesh: internal_grpc.SessionInternalServiceAsyncStub


@asynccontextmanager
async def serve(store: FakeStore, **values: object) -> AsyncIterator[Client]:
    settings = SessionSettings(
        mesh_token=SecretStr("mesh-secret"), sweep_seconds=30, drain_delay_seconds=0, **values
    )
    tenant_id = store.add_key(KEY)
    async with assemble(settings, store, configure_logging=False) as replica:
        await replica.server.start()
        client = Client(replica, store, tenant_id)
        async with (
            open_channel(settings, replica.server.address, mesh=False) as outside,
            open_channel(settings, replica.server.address) as inside,
        ):
            client.public = public_grpc.SessionServiceStub(outside)
            client.mesh = internal_grpc.SessionInternalServiceStub(inside)
            yield client


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
async def client(store: FakeStore) -> AsyncIterator[Client]:
    async with serve(store) as client:
        yield client
