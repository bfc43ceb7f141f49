"""Whether a run goes on, asked of a real session service."""

from __future__ import annotations

from dataclasses import replace
from uuid import UUID

import pytest

from hermesh.session.v1 import session_internal_service_pb2 as internal
from hermesh.session.v1 import session_service_pb2 as public
from meshkit.channel import open_channel
from meshkit.errors import UnavailableError
from meshkit.ids import uuid7
from services.tool.runs import MeshRuns
from tests.integration.session.process import MESH_TOKEN, SessionProcess, connect
from tests.integration.tool.journal_server import mesh_settings
from tests.unit.session.calls import append_stream, new_writer
from tests.unit.tool.fakes import call


async def test_a_run_is_over_when_it_ended_is_to_be_cancelled_or_is_gone(
    session_process: SessionProcess,
) -> None:
    settings = mesh_settings(mesh_address=session_process.address, token=MESH_TOKEN)
    async with open_channel(settings) as channel, connect(session_process) as client:
        runs = MeshRuns(channel, settings)
        cancelled, finished = await new_writer(client), await new_writer(client)
        asked = internal.AuthenticateRequest(api_key=client.key)
        tenant = UUID((await client.mesh.Authenticate(asked)).tenant_id)
        of = {w.run_id: replace(call(tenant=tenant), run_id=UUID(w.run_id)) for w in (cancelled, finished)}
        for request in of.values():
            assert not await runs.over(request)
        # Its agent holds it still.
        await client.public.CancelRun(
            public.CancelRunRequest(run_id=cancelled.run_id), metadata=client.metadata
        )
        assert await runs.over(of[cancelled.run_id])
        async with append_stream(client) as stream:
            await stream.write(finished.append("run.completed", status=4))
        assert await runs.over(of[finished.run_id])
        assert await runs.over(replace(of[finished.run_id], run_id=uuid7()))
        assert await runs.over(replace(of[finished.run_id], tenant_id=uuid7()))


async def test_a_session_service_that_is_gone_says_nothing() -> None:
    settings = mesh_settings(mesh_address="127.0.0.1:1")
    async with open_channel(settings) as channel:
        with pytest.raises(UnavailableError):
            await MeshRuns(channel, settings).over(call())
