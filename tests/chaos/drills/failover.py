"""The primary is killed again and again, and its synchronous standby promoted: no acknowledged input is lost.

The drill is what a cluster's manager is elsewhere: it promotes at once, and makes a new standby of the lost
server. The mesh gets a URL with both hosts and finds the primary by itself.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from statistics import median

import asyncpg
import httpx

from bench.mesh import Mesh
from tests.chaos.drills.load import Script, load
from tests.chaos.drills.parts import healthy
from tests.chaos.drills.report import Report, Series
from tests.chaos.drills.rounds import SCRIPTS, SETTINGS, Struck, silences
from tests.integration.session.standby import replicated

REPLICAS = "gateway=2,agent=2,session=2,tool=1,memory=1"
WINDOW_SECONDS = 13.0
P50_SECONDS = 5.0
MAX_SECONDS = 12.0
SENDERS = 10
END_SECONDS = 90.0
_PAUSE_SECONDS = 0.3


@dataclass(slots=True)
class Sent:
    """Input that is sent without waiting for its reply, over and over until it is acknowledged."""

    acknowledged: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)

    async def send(self, client: httpx.AsyncClient, session_id: str) -> None:
        """Sends one input by one key until it is accepted."""
        text, key, since = f"{Script(3, 100).text} {uuid.uuid4()}", str(uuid.uuid4()), time.monotonic()
        while True:
            try:
                answer = await client.post(
                    f"/v1/sessions/{session_id}/runs",
                    json={"input": text, "stream": False},
                    headers={"Idempotency-Key": key},
                )
                if answer.status_code < 300:
                    break
                self.refused.append(f"{answer.status_code} {answer.text[:200]}")
            except httpx.HTTPError as error:
                self.refused.append(type(error).__name__)
            await asyncio.sleep(_PAUSE_SECONDS)
        self.acknowledged.append(text)
        self.waits.append(time.monotonic() - since)


@asynccontextmanager
async def senders(mesh: Mesh, count: int, url: str = "") -> AsyncIterator[Sent]:
    """Has `count` clients send input inside the block, by the mesh's own address or by `url`."""
    found, stopping = Sent(), asyncio.Event()

    async def one(client: httpx.AsyncClient, session_id: str) -> None:
        while not stopping.is_set():
            await found.send(client, session_id)
            await asyncio.sleep(_PAUSE_SECONDS)

    async with httpx.AsyncClient(base_url=url or mesh.url, headers=mesh.headers, timeout=30) as client:
        # Before anything is broken: only input is sent again here.
        answers = [(await client.post("/v1/sessions", json={})).raise_for_status() for _ in range(count)]
        async with asyncio.TaskGroup() as group:
            for answer in answers:
                group.create_task(one(client, answer.json()["session_id"]))
            try:
                yield found
            finally:
                stopping.set()


async def stored_inputs(url: str) -> dict[str, int]:
    """How often each input is stored, once every run has ended."""
    connection = await asyncpg.connect(url, timeout=30)
    try:
        async with asyncio.timeout(END_SECONDS):
            while await connection.fetchval("SELECT count(*) FROM session.run WHERE status < 4"):
                await asyncio.sleep(0.2)
        rows = await connection.fetch(
            "SELECT content, count(*) AS times FROM session.message WHERE role = 'user' GROUP BY 1"
        )
        return {row["content"]: row["times"] for row in rows}
    finally:
        await connection.close()


def compare(report: Report, acknowledged: Sequence[str], stored: dict[str, int]) -> None:
    missing = [text for text in acknowledged if text not in stored]
    doubled = [text for text, times in stored.items() if times > 1]
    report.at_least("acknowledged inputs", len(acknowledged), 1)
    report.at_most("acknowledged inputs lost", len(missing), 0)
    report.at_most("inputs duplicated", len(doubled), 0)
    report.notes += [f"lost: {text}" for text in missing[:5]] + [f"doubled: {text}" for text in doubled[:5]]


async def drill(streams: int, count: int, window: float = WINDOW_SECONDS) -> Report:
    """Acknowledged inputs lost 0, duplicated 0; silence from the kill on, the promotion in it: p50 <= 5 s."""
    report = Report("failover", "the primary killed, its synchronous standby promoted, and a new one made")
    series, promotions = Series("silence from the primary's death on"), []
    async with replicated() as pair:
        settings = SETTINGS | {"HERMESH_DATABASE_URL": pair.both}
        with Mesh(settings=settings, replicas=REPLICAS) as mesh:
            async with load(mesh, streams, SCRIPTS) as seen, senders(mesh, SENDERS) as sent:
                for number in range(1, count + 1):
                    died = time.monotonic()
                    await pair.lose_primary()
                    await pair.promote()
                    promotions.append(time.monotonic() - died)
                    await asyncio.sleep(max(0.0, died + window - time.monotonic()))
                    series.rounds.append(silences(seen, Struck("", died, until=died + window)))
                    report.say(
                        f"round {number}: promoted after {promotions[-1]:.2f} s; silence {series.last}"
                    )
                    await pair.rebuild()
                    await healthy(mesh)
                    await seen.flowing(streams * 9 // 10)
            stored = await stored_inputs(pair.url)
    acknowledged = [run.text for run in seen.runs if run.run_id] + sent.acknowledged
    compare(report, acknowledged, stored)
    report.series(series, p50=P50_SECONDS, longest=min(MAX_SECONDS, window))
    report.note("until promoted, p50 and max", f"{median(promotions):.2f} s, {max(promotions):.2f} s")
    waits = sorted(sent.waits)
    report.note("input accepted after, p50 and max", f"{median(waits):.2f} s, {waits[-1]:.2f} s")
    report.note("inputs sent again", len(sent.refused) + len(seen.refused))
    report.streams(seen, refused=None, errors=None)
    report.note("takeovers", seen.takeovers)
    return report
