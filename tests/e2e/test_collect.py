"""A session is deleted on a mesh with S3, and its large result goes from the bucket; the others stay."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import obstore
import pytest

from bench.mesh import Mesh, MeshError
from tests.e2e.client import http, new_session, run_stream
from tests.e2e.large_tool import LINE
from tests.seaweed import BUCKET, KEYS, SeaweedFS, seaweed

LINES = 5000
GRACE = 2.0


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    with seaweed(tmp_path_factory.mktemp("s3")) as server:
        yield server


def settings(s3: SeaweedFS, **more: str) -> dict[str, str]:
    return s3.environment(
        HERMESH_OBJECT_STORE_URL=f"s3://{BUCKET}/mesh",
        HERMESH_TOOL_MODULES="tests.e2e.large_tool",
        HERMESH_RESULT_GRACE_SECONDS=str(GRACE),
        HERMESH_DRAIN_DELAY_SECONDS="0.2",
        PYTHONPATH=str(Path(__file__).resolve().parents[2]),
        NO_PROXY="127.0.0.1,localhost",
        **more,
    )


def stored(s3: SeaweedFS) -> list[str]:
    """The sessions that have objects."""
    paths = [found["path"] for page in obstore.list(s3.bucket("mesh")) for found in page]
    return sorted(path.split("/")[2] for path in paths if path.count("/") == 3)


def sees_keys(pid: int) -> bool:
    return KEYS[1].encode() in Path(f"/proc/{pid}/environ").read_bytes()


async def with_result(client: httpx.AsyncClient) -> tuple[str, str]:
    """A session with a large result, and its run."""
    session = await new_session(client)
    async with run_stream(client, session, f'[[tool=long_answer {{"lines": {LINES}}}]]') as frames:
        last = [frame async for frame in frames][-1]
    assert last.event == "run.completed"
    return session, last.run_id


async def content(client: httpx.AsyncClient, run: str) -> httpx.Response:
    return await client.get(f"/v1/runs/{run}/tool-calls/{run}:1:0/content")


@pytest.mark.timeout(240)
async def test_the_results_of_a_deleted_session_go_and_no_others(s3: SeaweedFS) -> None:
    with Mesh(replicas="gateway=1,agent=1,session=2,tool=2,memory=1", settings=settings(s3)) as mesh:
        async with http(mesh) as client:
            gone, gone_run = await with_result(client)
            kept, kept_run = await with_result(client)
            # The same bytes, and yet each has its own.
            for run in (gone_run, kept_run):
                assert (await content(client, run)).text == LINE * LINES
            assert await asyncio.to_thread(stored, s3) == sorted((gone, kept))
            assert (await client.delete(f"/v1/sessions/{gone}")).is_success
            assert gone in await asyncio.to_thread(stored, s3)
            async with asyncio.timeout(60):
                while gone in await asyncio.to_thread(stored, s3):  # noqa: ASYNC110 - the bucket tells nobody
                    await asyncio.sleep(0.2)
            assert await asyncio.to_thread(stored, s3) == [kept]
            assert (await content(client, kept_run)).text == LINE * LINES
            assert (await content(client, gone_run)).status_code == 404
        # Keys are for those who use the store.
        for replica in mesh.status():
            if replica.pid and replica.service in ("session", "agent", "tool", "gateway", "memory"):
                assert sees_keys(replica.pid) == (replica.service == "tool"), replica


@pytest.mark.timeout(120)
def test_a_mesh_does_not_start_on_a_store_that_refuses_it(s3: SeaweedFS) -> None:
    wrong = settings(s3) | {"AWS_SECRET_ACCESS_KEY": "not-the-secret"}
    with pytest.raises(MeshError) as failed:
        with Mesh(settings=wrong):
            pass
    said = str(failed.value)
    assert (
        "AWS_SECRET_ACCESS_KEY is not the secret of AWS_ACCESS_KEY_ID; check HERMESH_OBJECT_STORE_URL" in said
    )
    assert "not-the-secret" not in said
