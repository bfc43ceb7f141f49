"""Two replicas on real PostgreSQL and Valkey: what is written on one is watched on any."""

from __future__ import annotations

import asyncio

from hermesh.session.v1 import session_internal_service_pb2 as internal
from tests.integration.session.conftest import Pair
from tests.integration.session.process import Client
from tests.unit.session.calls import (
    append_stream,
    events_of,
    events_until,
    new_writer,
    watch,
)

COMMITTED = internal.APPEND_OUTCOME_COMMITTED


async def test_both_replicas_give_identical_events(first: Client, second: Client) -> None:
    writer = await new_writer(first)
    async with (
        append_stream(first) as stream,
        watch(first, writer.run_id) as here,
        watch(second, writer.run_id) as there,
    ):
        for word in range(50):
            [result] = await stream.write(writer.append("text.delta", data=f'{{"text":"é {word} \\u0000"}}'))
            assert result.outcome == COMMITTED
        await stream.write(writer.append("run.completed", status=4))
        async with asyncio.timeout(10):
            seen_here, seen_there = await asyncio.gather(events_of(here), events_of(there))
    assert seen_here == seen_there
    assert [event.seq for event in seen_here] == list(range(1, 53))
    assert seen_here[1].data == '{"text":"é 0 \\u0000"}'
