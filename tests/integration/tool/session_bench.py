"""A claimed run in a real session service, whose calls a test makes."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from uuid import UUID

from hermesh.session.v1 import resources_pb2 as resources
from hermesh.session.v1 import session_internal_service_pb2 as internal
from services.tool.domain import CallRequest
from services.tool.journal import Journal
from services.tool.registry import Effect
from tests.integration.session.process import Client
from tests.unit.session.calls import Writer, append_stream, claim
from tests.unit.tool.fakes import call


class SessionBench:
    """Over a session process on PostgreSQL."""

    def __init__(self, journal: Journal, client: Client, writer: Writer) -> None:
        self.journal = journal
        self._client = client
        self._writer = writer
        self._numbers = count()

    async def intend(self, effect: Effect = Effect.PURE) -> CallRequest:
        writer = self._writer
        call_id = f"{writer.run_id}:1:{next(self._numbers)}"
        write = writer.append("tool.call")
        write.commit.intents.append(
            resources.ToolCall(
                call_id=call_id,
                name="lever",
                arguments="{}",
                effect=resources.EffectClass.ValueType(effect),
                idempotency_key=f"key-{call_id}",
            )
        )
        async with append_stream(self._client) as stream:
            [result] = await stream.write(write)
        assert result.outcome == internal.APPEND_OUTCOME_COMMITTED
        made = call(call_id, fence=writer.fence)
        return replace(made, session_id=UUID(writer.session_id), run_id=UUID(writer.run_id))

    async def take_over(self, request: CallRequest) -> CallRequest:
        writer = self._writer
        lease = internal.LeaseRef(session_id=writer.session_id, run_id=writer.run_id, fence=writer.fence)
        released = await self._client.mesh.ReleaseLease(internal.ReleaseLeaseRequest(lease=lease))
        assert released.released
        self._writer = await claim(self._client, writer.run_id, "agent-2")
        return replace(request, fence=self._writer.fence)
