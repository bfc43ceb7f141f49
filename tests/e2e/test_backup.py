"""A mesh is backed up while it works, and restored into an empty one; nothing is overwritten."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from bench.mesh import HERMESH, Mesh, MeshError, free_ports
from hermesh.memory.v1 import memory_service_pb2 as memory_pb
from hermesh.memory.v1.memory_service_pb2_grpc import MemoryServiceStub
from tests.e2e.client import http, new_session, run_stream
from tests.e2e.large_tool import LINE

LINES = 5000
REPLICAS = "gateway=1,agent=1,session=1,tool=1,memory=1"
SETTINGS = {
    "HERMESH_TOOL_MODULES": "tests.e2e.large_tool",
    "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    "HERMESH_DRAIN_DELAY_SECONDS": "0.2",
}
USER = "ada"
MEMORY = "Ada keeps her boat in Lisbon."


@dataclass
class EmptyMesh(Mesh):
    """A mesh that is not started yet, with the model of another one."""

    model_of: Mesh | None = None
    data_dir: Path = field(default_factory=Path)

    def enter(self, folder: Path) -> None:
        assert self.model_of is not None
        self.data_dir = folder
        self.http_port, self.grpc_port = free_ports(2)
        self.model = self.model_of.model


@contextmanager
def empty_mesh(folder: Path, model_of: Mesh) -> Iterator[EmptyMesh]:
    mesh = EmptyMesh(settings=SETTINGS, replicas=REPLICAS, model_of=model_of)
    mesh.enter(folder)
    try:
        yield mesh
    finally:
        mesh.command("down")
        shutil.rmtree(folder, ignore_errors=True)


# It starts and fills meshes.
pytestmark = pytest.mark.deploy_long


@pytest.fixture(scope="module")
def source() -> Iterator[Mesh]:
    with Mesh(replicas=REPLICAS, settings=SETTINGS) as mesh:
        yield mesh


async def said(client: httpx.AsyncClient, session: str, text: str) -> str:
    """Runs one input to its end and returns the run."""
    async with run_stream(client, session, text) as frames:
        last = [frame async for frame in frames][-1]
    assert last.event == "run.completed"
    return last.run_id


async def seen(client: httpx.AsyncClient, session: str, run: str) -> dict[str, Any]:
    """All that an application sees of a session and a run."""
    messages = (await client.get(f"/v1/sessions/{session}/messages")).json()
    found = (await client.get(f"/v1/runs/{run}")).json()
    events = (await client.get(f"/v1/runs/{run}/events")).text
    frames = [line for line in events.splitlines() if line.startswith(("id:", "data:"))]
    assert frames
    return {"messages": messages, "run": found, "events": frames}


async def remembered(mesh: Mesh, key: str) -> list[str]:
    metadata = (("authorization", f"Bearer {key}"),)
    async with grpc.aio.insecure_channel(mesh.grpc_address) as channel:
        answer = await MemoryServiceStub(channel).ListMemories(
            memory_pb.ListMemoriesRequest(scope=memory_pb.Scope(user=USER)), metadata=metadata, timeout=30
        )
    return [memory.text for memory in answer.memories]


async def remember(mesh: Mesh) -> None:
    async with grpc.aio.insecure_channel(mesh.grpc_address) as channel:
        await MemoryServiceStub(channel).Remember(
            memory_pb.RememberRequest(scope=memory_pb.Scope(user=USER), text=MEMORY),
            metadata=(("authorization", f"Bearer {mesh.api_key}"),),
            timeout=30,
        )


def refused(mesh: Mesh, *arguments: str) -> str:
    with pytest.raises(MeshError) as failed:
        mesh.command(*arguments, seconds=120)
    return str(failed.value)


@pytest.mark.timeout(400)
async def test_a_backup_of_a_working_mesh_is_all_there_in_an_empty_one(source: Mesh, tmp_path: Path) -> None:
    backup = tmp_path / "backup"
    async with http(source) as client:
        session = await new_session(client, title="Kept")
        run = await said(client, session, f'[[tool=long_answer {{"lines": {LINES}}}]]')
        gone = await new_session(client, title="Deleted before")
        await said(client, gone, "[[tokens=3]]")
        assert (await client.delete(f"/v1/sessions/{gone}")).is_success
        await remember(source)
        before = await seen(client, session, run)
        # One that is at work while the backup is taken.
        busy = await new_session(client, title="Busy")
        stream = asyncio.create_task(said(client, busy, "[[tokens=120 rate=30]]"))
        await asyncio.sleep(0.5)
        printed = await asyncio.to_thread(source.command, "backup", str(backup), seconds=120)
        await stream
        later = await new_session(client, title="Made afterwards")
    assert "1 large results" in printed
    assert "Not in a backup: API keys in the clear" in printed
    manifest = json.loads((backup / "manifest.json").read_text())
    assert (manifest["objects"], manifest["missing"]) == (1, [])
    assert "there already; nothing is overwritten" in refused(source, "backup", str(backup))
    assert "a mesh runs in" in refused(source, "restore", str(backup))

    with empty_mesh(tmp_path / "new", source) as mesh:
        printed = await asyncio.to_thread(mesh.command, "restore", str(backup), seconds=120)
        assert "Restored; start it with: hermesh up" in printed
        assert "there is a database in" in refused(mesh, "restore", str(backup))
        await asyncio.to_thread(mesh.command, "up", "--no-reply", "--replicas", REPLICAS, seconds=120)
        # The keys of before work, and one of the new mesh's own.
        assert mesh.api_key != source.api_key
        for key in (source.api_key, mesh.api_key):
            async with http(mesh, Authorization=f"Bearer {key}") as client:
                assert await seen(client, session, run) == before
                path = f"/v1/runs/{run}/tool-calls/{run}:1:0/content"
                answer = await client.get(path)
                assert answer.text == LINE * LINES, answer.text[:200]
                assert (await client.get(f"/v1/sessions/{gone}")).status_code == 404
                assert (await client.get(f"/v1/sessions/{later}")).status_code == 404
                # What was at work at that moment is taken up, and ends.
                [found] = (await client.get(f"/v1/sessions/{busy}/runs")).json()["runs"]
                async with asyncio.timeout(60):
                    while found["status"] not in ("completed", "failed"):
                        await asyncio.sleep(0.2)
                        found = (await client.get(f"/v1/runs/{found['run_id']}")).json()
                assert found["status"] == "completed"
                await said(client, session, "[[tokens=3]]")
                before = await seen(client, session, run)
            assert await remembered(mesh, key) == [MEMORY]


def test_what_is_no_whole_backup_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    def restore(folder: Path) -> str:
        done = subprocess.run(
            [str(HERMESH), "restore", str(folder)],
            env={"HERMESH_DATA_DIR": str(tmp_path / "data"), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 1
        assert not (tmp_path / "data" / "postgresql").exists()
        [line] = done.stderr.splitlines()
        return line

    backup = tmp_path / "backup"
    assert "is no whole backup: it has no manifest.json" in restore(backup)
    backup.mkdir()
    (backup / "manifest.json").write_text("{")
    assert "is damaged" in restore(backup)
    (backup / "manifest.json").write_text('{"format": 7}')
    assert "has the format 7, and this version reads 1" in restore(backup)
    whole = {
        "format": 1,
        "taken_at": "",
        "hermesh": "9.9",
        "postgresql": "18.0",
        "migrations": {"session": ["0001_pre_tables.sql", "9999_pre_later.sql"]},
        "rows": {},
        "dump_sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "objects": 0,
        "object_bytes": 0,
    }
    (backup / "manifest.json").write_text(json.dumps(whole))
    assert "it has no database.dump" in restore(backup)
    (backup / "database.dump").write_text("x")
    assert "its SHA-256 is not the manifest's" in restore(backup)
    (backup / "database.dump").write_text("")
    assert "has migration 9999_pre_later.sql, which this version does not know" in restore(backup)
