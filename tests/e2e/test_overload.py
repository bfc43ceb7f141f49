"""More than there is room for: some are refused and lose nothing, all that were accepted come to an end."""

import asyncio
import json
import uuid
from collections.abc import Iterator

import httpx
import pytest

from bench.mesh import Mesh
from tests.e2e.client import assert_whole, frames_of, http, new_session, text_of

ASKED = 40
QUESTION = "[[tokens=10 rate=20]]"


@pytest.fixture(scope="module")
def small() -> Iterator[Mesh]:
    """A mesh with room for eight runs, and for four that wait."""
    settings = {"HERMESH_MAX_ACTIVE_RUNS": "4", "HERMESH_MAX_WAITING_STREAMS": "4"}
    with Mesh(settings=settings) as mesh:
        yield mesh


async def ask(client: httpx.AsyncClient, session: str, key: str) -> int:
    """Asks once; returns 0 when the reply was whole, else when to come back, milliseconds."""
    body = {"input": QUESTION, "stream": True, "options": {"memory": False}}
    headers = {"Idempotency-Key": key}
    async with client.stream("POST", f"/v1/sessions/{session}/runs", json=body, headers=headers) as answer:
        if answer.status_code == 429:
            assert json.loads(await answer.aread())["reason"] == "OVERLOADED"
            assert int(answer.headers["retry-after"]) >= 1
            return int(answer.headers["retry-after-ms"])
        assert answer.status_code == 200
        log = [frame async for frame in frames_of(answer) if frame.id]
    assert_whole(log)
    assert log[-1].event == "run.completed"
    assert text_of(log) == "".join(f"t{number} " for number in range(10))
    return 0


def refusals_logged(mesh: Mesh) -> int:
    lines = (mesh.data_dir / "logs" / "gateway-1.log").read_text().splitlines()
    events = [json.loads(line) for line in lines if line.startswith("{")]
    assert not [event for event in events if event["event"] == "request" and event["status"] == 429]
    return sum(event["count"] for event in events if event["event"] == "requests refused")


async def test_who_is_refused_lost_nothing_and_gets_a_reply_later(small: Mesh) -> None:
    refused = 0
    async with http(small) as client, asyncio.timeout(120):
        sessions = [await new_session(client) for _ in range(ASKED)]

        async def one(session: str) -> bool:
            nonlocal refused
            key = str(uuid.uuid4())
            while wait := await ask(client, session, key):
                refused += 1
                assert 0 < wait <= 60_000
                runs = (await client.get(f"/v1/sessions/{session}/runs")).json()["runs"]
                assert runs == []
                await asyncio.sleep(wait / 1000)
            runs = (await client.get(f"/v1/sessions/{session}/runs")).json()["runs"]
            return [run["status"] for run in runs] == ["completed"]

        assert all(await asyncio.gather(*(one(session) for session in sessions)))
        assert refused
        while refusals_logged(small) < refused:  # noqa: ASYNC110 -- a line is due within a second
            await asyncio.sleep(0.1)
    assert refusals_logged(small) == refused
