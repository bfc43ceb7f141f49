"""Requests that many tests make."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hermesh.common.v1.event_pb2 import Event, InputMessage
from hermesh.session.v1 import resources_pb2 as resources
from hermesh.session.v1 import session_internal_service_pb2 as internal
from hermesh.session.v1 import session_service_pb2 as public
from meshkit.channel import stream_call

if TYPE_CHECKING:
    from tests.unit.session.conftest import Client


@dataclass
class Writer:
    """A claimed run, as the agent that holds it knows it."""

    session_id: str
    run_id: str
    fence: int
    next_seq: int

    def append(
        self, *kinds: str, first_seq: int = 0, status: int = 0, data: str = "{}"
    ) -> internal.RunAppend:
        """The run's next write; with `status`, a step commit."""
        first = first_seq or self.next_seq
        if not first_seq:
            self.next_seq += len(kinds)
        events = [internal.NewEvent(type=kind, time_ms=1, data=data) for kind in kinds]
        write = internal.RunAppend(
            session_id=self.session_id, run_id=self.run_id, fence=self.fence, first_seq=first, events=events
        )
        if status:
            write.commit.status = status  # type: ignore[assignment]
        return write


async def new_session(client: Client, metadata: Any = None) -> resources.Session:
    response = await client.public.CreateSession(
        public.CreateSessionRequest(title="t"), metadata=metadata or client.metadata
    )
    return response.session


async def submit(
    client: Client, session_id: str, text: str = "hi", **fields: Any
) -> public.SubmitRunResponse:
    request = public.SubmitRunRequest(
        session_id=session_id, input=[InputMessage(role="user", content=text)], **fields
    )
    return await client.public.SubmitRun(request, metadata=client.metadata)


async def claim(client: Client, run_id: str, owner: str = "agent-1") -> Writer:
    response = await client.mesh.ClaimRun(internal.ClaimRunRequest(run_id=run_id, owner=owner))
    assert response.outcome == internal.CLAIM_OUTCOME_CLAIMED
    grant = response.grant
    return Writer(grant.session_id, grant.run_id, grant.fence, grant.next_seq)


async def new_writer(client: Client, owner: str = "agent-1") -> Writer:
    """A new session with a claimed run."""
    session = await new_session(client)
    submitted = await submit(client, session.session_id)
    return await claim(client, submitted.run.run_id, owner)


class Stream:
    """An open Append stream."""

    def __init__(self, call: Any) -> None:
        self.call = call

    async def send(self, *appends: internal.RunAppend) -> None:
        await self.call.write(internal.AppendRequest(owner="agent-1", appends=appends))

    async def write(self, *appends: internal.RunAppend) -> list[internal.AppendResult]:
        """Sends writes and returns their results, in the order of the writes."""
        await self.send(*appends)
        return await self.results(*appends)

    async def results(self, *appends: internal.RunAppend) -> list[internal.AppendResult]:
        found: dict[tuple[str, int], internal.AppendResult] = {}
        while len(found) < len(appends):
            response = await self.call.read()
            assert response, "the stream ended"
            for result in response.results:
                found[result.run_id, result.first_seq] = result
        return [found[append.run_id, append.first_seq] for append in appends]


async def until(condition: Callable[[], object], timeout: float = 5.0) -> None:
    """Lets the loop run until something that no event announces is so."""
    async with asyncio.timeout(timeout):
        while not condition():  # noqa: ASYNC110 -- what is waited for is a plain attribute
            await asyncio.sleep(0)


@asynccontextmanager
async def append_stream(client: Client) -> AsyncIterator[Stream]:
    async with stream_call(client.mesh.Append()) as call:
        await call.initial_metadata()
        yield Stream(call)


@asynccontextmanager
async def watch(client: Client, run_id: str, after_seq: int = 0) -> AsyncIterator[Any]:
    request = public.WatchRunRequest(run_id=run_id, after_seq=after_seq)
    async with stream_call(client.public.WatchRun(request, metadata=client.metadata)) as call:
        yield call


async def events_of(call: Any) -> list[Event]:
    """All events of a watch until it ends."""
    return [event async for response in call for event in response.frame.events]


async def events_until(call: Any, seq: int) -> list[Event]:
    """Events of a watch up to a seq."""
    found: list[Event] = []
    async for response in call:
        found.extend(response.frame.events)
        if found and found[-1].seq >= seq:
            break
    return found
