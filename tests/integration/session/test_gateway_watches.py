"""A gateway's watches over real replicas that drain and die: every reader has the log once, in order."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
from collections.abc import AsyncIterator
from typing import Any

import pytest

from gateway.watches import START, Watches
from hermesh.session.v1 import session_internal_service_pb2 as internal
from tests.integration.session.conftest import Pair
from tests.integration.session.process import Client, SessionProcess, connect, environment
from tests.unit.gateway.watch_reader import Reader
from tests.unit.session.calls import Writer, append_stream, claim, new_session, submit

RUNS = 6
EVENTS = 40
READERS = 12


class Replicas:
    """Stands where Envoy is: each stream goes to the next replica, whether it lives or not."""

    def __init__(self, *clients: Client) -> None:
        self._clients = list(clients)
        self.opened = 0

    def Watch(self, requests: AsyncIterator[internal.WatchRequest]) -> Any:
        self.opened += 1
        return self._clients[self.opened % len(self._clients)].mesh.Watch(requests)


@pytest.mark.parametrize("ending", ["drain", "kill"])
async def test_readers_go_on_over_another_replica(
    pair: Pair, first: Client, second: Client, ending: str
) -> None:
    values = environment(pair.database, pair.valkey.url)
    third = SessionProcess("session-3", values)
    rng = random.Random(7)
    try:
        await asyncio.to_thread(third.wait_ready)
        async with connect(third) as leaving:
            replicas = Replicas(second, leaving)
            watches = Watches(replicas, 30.0)
            session = (await new_session(first)).session_id
            tenant = (
                await first.mesh.Authenticate(internal.AuthenticateRequest(api_key=first.key))
            ).tenant_id
            log = (tenant, "session", session)
            readers = [Reader(watches, log=log) for _ in range(READERS)]
            # Of other sessions, so that both streams carry some.
            others = [
                Reader(watches, log=(tenant, "session", (await new_session(first)).session_id))
                for _ in range(4)
            ]
            for reader in (*readers, *others):
                await reader.until(lambda reader: reader.stands)
            assert replicas.opened == 2
            truth: list[tuple[str, int]] = []

            async def write_run(writer: Writer) -> None:
                truth.append((writer.run_id, 1))
                async with append_stream(first) as stream:
                    for _ in range(EVENTS):
                        truth.append((writer.run_id, writer.next_seq))
                        await stream.write(writer.append("text.delta", data=json.dumps({"text": len(truth)})))
                        for reader in readers:
                            if rng.random() < 0.1:
                                reader.takes = False
                            elif not reader.takes and rng.random() < 0.3:
                                reader.go_on()
                    truth.append((writer.run_id, writer.next_seq))
                    await stream.write(writer.append("run.completed", status=4))

            for number in range(RUNS):
                submitted = await submit(first, session)
                if number == 2:
                    end = third.stop if ending == "drain" else third.kill
                    ended = asyncio.create_task(asyncio.to_thread(end))
                await write_run(await claim(first, submitted.run.run_id))
            await ended
            for reader in readers:
                if not reader.takes:
                    reader.go_on()
                await reader.until(lambda reader: len(reader.seen) >= len(truth), 30)
                assert [(event.run_id, event.seq) for event in reader.seen] == truth
                assert reader.outcome is None
            # Whoever comes back with a cursor reads the rest, and all end on one watch.
            late = Reader(watches, truth[50], log)
            await late.until(lambda reader: len(reader.seen) == len(truth) - 51)
            assert [(event.run_id, event.seq) for event in late.seen] == truth[51:]
            from_start = Reader(watches, START, log)
            await from_start.until(lambda reader: len(reader.seen) == len(truth))
            assert [event.data for event in from_start.seen] == [event.data for event in readers[0].seen]
            assert not any(reader.outcome for reader in others)
            await watches.close()
    finally:
        if third.process.poll() is None:
            third.kill()
        shutil.rmtree(third.folder, ignore_errors=True)
