"""Two whole meshes and the cells' edge before them: who comes where, a cell away, a tenant that is moved."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest
import websockets

from bench.mesh import HERMESH, Mesh, free_ports
from gateway.login import COOKIE
from hermesh.session.v1 import session_service_pb2 as pb
from hermesh.session.v1.session_service_pb2_grpc import SessionServiceStub
from meshkit.api_keys import make_key
from meshkit.errors import from_rpc_error
from tests.e2e.client import TERMINAL, assert_whole, frames_of, new_session, run_stream, submit, watch_to_end

pytestmark = [pytest.mark.deploy_long, pytest.mark.timeout(300)]
REPLICAS = "gateway=1,agent=1,session=1,tool=1,memory=1"
TOKEN = "one-for-both-cells-" + "x" * 32
RETRYABLE = {"TENANT_MOVING", "TENANT_MOVED", "CELL_UNAVAILABLE", "SERVICE_UNAVAILABLE"}


@dataclass
class Place:
    """Both cells and the edge."""

    a: Mesh
    b: Mesh
    folder: Path
    http: str
    grpc: str
    environment: dict[str, str] = field(default_factory=dict)

    def cells(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(HERMESH), "cells", *arguments],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=check,
        )

    @asynccontextmanager
    async def client(self, key: str = "", **headers: str) -> AsyncIterator[httpx.AsyncClient]:
        if key:
            headers["Authorization"] = f"Bearer {key}"
        timeout = httpx.Timeout(30, read=60)
        async with httpx.AsyncClient(
            base_url=f"http://{self.http}", headers=headers, timeout=timeout
        ) as client:
            yield client


async def ask(mesh: Mesh, method: str, path: str, key: str) -> httpx.Response:
    """Asks a cell past the edge."""
    async with httpx.AsyncClient(base_url=mesh.url, timeout=30) as client:
        return await client.request(
            method,
            path,
            headers={"Authorization": f"Bearer {key}"},
            json={} if method == "POST" else None,
        )


def make_tenant(mesh: Mesh, name: str) -> str:
    key = make_key(name)
    database = mesh.command("env", "HERMESH_DATABASE_URL").strip()
    subprocess.run(
        [sys.executable, "-m", "services.session", "bootstrap", "--tenant", name],
        env=mesh.environment | {"HERMESH_DATABASE_URL": database, "HERMESH_API_KEY": key},
        capture_output=True,
        timeout=60,
        check=True,
    )
    return key


@contextmanager
def edge(place: Place) -> Iterator[None]:
    place.cells("render")
    with (place.folder / "edge.log").open("wb") as log:
        process = subprocess.Popen(
            [str(HERMESH), "cells", "serve"], cwd=place.folder, env=place.environment, stdout=log, stderr=log
        )
    try:
        end = time.monotonic() + 30
        while True:
            try:
                if httpx.get(f"http://{place.http}/ready", timeout=2).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            assert time.monotonic() < end, (place.folder / "edge.log").read_text()
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    settings = {"HERMESH_MESH_TOKEN": TOKEN, "HERMESH_TRUSTED_PROXIES": "1"}
    with ExitStack() as stack:
        a = stack.enter_context(Mesh(replicas=REPLICAS, settings=settings))
        b = stack.enter_context(Mesh(replicas=REPLICAS, settings=settings))
        ports = free_ports(2)
        found = Place(
            a, b, tmp_path_factory.mktemp("cells"), f"127.0.0.1:{ports[0]}", f"127.0.0.1:{ports[1]}"
        )
        found.environment = {k: v for k, v in os.environ.items() if not k.startswith("HERMESH_")}
        lines = ['default = "a"', "[edge]", f'http = "{found.http}"', f'grpc = "{found.grpc}"']
        for name, mesh in (("a", a), ("b", b)):
            lines += [f"[cells.{name}]", f'http = ["{mesh.url.removeprefix("http://")}"]']
            lines += [f'grpc = ["{mesh.grpc_address}"]']
            for what in ("DATABASE_URL", "OBJECT_STORE_URL"):
                value = mesh.command("env", f"HERMESH_{what}").strip()
                found.environment[f"HERMESH_CELL_{name.upper()}_{what}"] = value
        (found.folder / "cells.toml").write_text("\n".join(lines) + "\n")
        found.cells("assign", "beta", "--to", "b")
        stack.enter_context(edge(found))
        yield found


async def test_each_tenant_comes_to_its_cell_by_every_protocol(place: Place) -> None:
    acme, beta = make_tenant(place.a, "acme"), make_tenant(place.b, "beta")
    for key, own, other in ((acme, place.a, place.b), (beta, place.b, place.a)):
        async with place.client(
            key, **{"x-hermesh-tag": "beta", "x-hermesh-tenant": str(uuid.uuid4())}
        ) as client:
            session = await new_session(client)
            async with run_stream(client, session, "[[tokens=5]]") as stream:
                frames = [frame async for frame in stream]
            assert_whole(frames)
            models = (await client.get("/v1/models")).json()["data"]
            chat = await client.post(
                "/v1/chat/completions",
                json={"model": models[0]["id"], "messages": [{"role": "user", "content": "[[tokens=3]]"}]},
            )
            assert chat.status_code == 200, chat.text
        direct = {"Authorization": f"Bearer {key}"}
        assert (await ask(own, "GET", f"/v1/sessions/{session}", key)).status_code == 200
        assert (await ask(other, "GET", f"/v1/sessions/{session}", key)).status_code == 401
        async with grpc.aio.insecure_channel(place.grpc) as channel:
            stub, metadata = SessionServiceStub(channel), (("authorization", f"Bearer {key}"),)
            listed = await stub.ListSessions(pb.ListSessionsRequest(), metadata=metadata, timeout=10)
            assert session in [found.session_id for found in listed.sessions]
            seqs = [
                event.seq
                async for response in stub.WatchRun(
                    pb.WatchRunRequest(run_id=frames[0].run_id), metadata=metadata, timeout=20
                )
                for event in response.frame.events
            ]
            assert seqs == [frame.seq for frame in frames]
        address = f"ws://{place.http}/v1/sessions/{session}/ws"
        async with websockets.connect(address, additional_headers=direct) as socket:
            await socket.send(json.dumps({"type": "input", "input": "[[tokens=3]]"}))
            async with asyncio.timeout(30):
                while (message := json.loads(await socket.recv())).get("type") != "run.completed":
                    assert message.get("type") != "error", message
        # A browser: the page signs in with the key in the header, too, and has but its cookie from then on.
        origin = {"origin": f"http://{place.http}"}
        async with place.client() as browser:
            login = await browser.post("/auth/login", json={"api_key": key}, headers=direct | origin)
            assert login.status_code == 204, login.text
            assert browser.cookies[COOKIE].startswith("acme." if key == acme else "beta.")
            assert (await browser.get(f"/v1/sessions/{session}")).status_code == 200


def counted(answer: httpx.Response, errors: Counter[str]) -> bool:
    """Whether a request was accepted; notes why not."""
    if answer.status_code in (200, 202, 204):
        return True
    problem = answer.json()
    errors[problem.get("reason", str(answer.status_code))] += 1
    assert answer.headers.get("retry-after") or answer.status_code == 429, answer.text
    return False


async def test_a_tenant_is_moved_while_streams_and_submissions_run(place: Place) -> None:
    key = make_tenant(place.a, "gamma")
    errors: Counter[str] = Counter()
    accepted: dict[str, str] = {}
    stop = asyncio.Event()
    async with place.client(key) as client:
        sessions = [await new_session(client) for _ in range(6)]

        async def submitter(number: int) -> None:
            sent = 0
            while not stop.is_set():
                idempotency = f"{number}-{sent}"
                body = {"input": f"{idempotency} [[tokens=2]]", "stream": False}
                while True:
                    try:
                        answer = await client.post(
                            f"/v1/sessions/{sessions[number]}/runs",
                            json=body,
                            headers={"Idempotency-Key": idempotency},
                        )
                    except httpx.TransportError as error:
                        errors[type(error).__name__] += 1
                        continue
                    if counted(answer, errors):
                        accepted[idempotency] = answer.json()["run_id"]
                        break
                    await asyncio.sleep(0.1)
                sent += 1
                await asyncio.sleep(0.1)

        async def streamer(number: int) -> None:
            while not stop.is_set():
                run_id, last = "", 0
                idempotency, kinds = str(uuid.uuid4()), []
                body = {"input": "[[tokens=40 rate=20]]", "stream": True}
                while not kinds or kinds[-1] not in TERMINAL:
                    if run_id:
                        order: dict[str, Any] = {"method": "GET", "url": f"/v1/runs/{run_id}/events"}
                        order["headers"] = {"Last-Event-ID": f"{run_id}:{last}"}
                    else:
                        order = {
                            "method": "POST",
                            "url": f"/v1/sessions/{sessions[number]}/runs",
                            "json": body,
                        }
                        order["headers"] = {"Idempotency-Key": idempotency}
                    try:
                        async with client.stream(**order) as response:
                            if response.status_code != 200:
                                await response.aread()
                            if not counted(response, errors):
                                await asyncio.sleep(0.1)
                                continue
                            async for frame in frames_of(response):
                                if frame.id:
                                    assert frame.seq == last + 1, (frame.raw, last)
                                    run_id, last = frame.run_id, frame.seq
                                    kinds.append(frame.event)
                    except httpx.TransportError as error:
                        errors[type(error).__name__] += 1
                assert kinds[-1] == "run.completed"
                finished.append(run_id)

        finished: list[str] = []
        async with asyncio.TaskGroup() as group:
            for number in range(3):
                group.create_task(submitter(number))
            for number in range(3, 6):
                group.create_task(streamer(number))
            await asyncio.sleep(3)
            said = await asyncio.to_thread(place.cells, "move", "gamma", "--to", "b", check=False)
            assert said.returncode == 0, said.stdout + said.stderr
            await asyncio.sleep(3)
            stop.set()
        print(said.stdout, dict(errors), f"{len(accepted)} accepted, {len(finished)} streams to their end")
        assert set(errors) <= RETRYABLE, errors
        assert len(finished) >= 3
        # Every accepted input is there once, in its session, and answered.
        for number in range(3):
            mine = {name: run for name, run in accepted.items() if name.startswith(f"{number}-")}
            for run_id in mine.values():
                assert (await watch_to_end(client, run_id))[-1].event == "run.completed"
            messages, token = [], ""
            while True:
                page = (
                    await client.get(
                        f"/v1/sessions/{sessions[number]}/messages",
                        params={"page_size": 100} | ({"page_token": token} if token else {}),
                    )
                ).json()
                messages += page["messages"]
                token = page.get("next_page_token", "")
                if not token:
                    break
            asked = Counter(m["content"].split()[0] for m in messages if m["role"] == "user")
            assert asked == dict.fromkeys(mine, 1)
    # Past the edge the old cell answers nobody, and the new one does.
    assert (await ask(place.b, "GET", "/v1/sessions", key)).status_code == 200
    moved = await ask(place.a, "POST", "/v1/sessions", key)
    assert (moved.status_code, moved.json()["reason"]) == (503, "TENANT_MOVED")
    assert "Deleted" in place.cells("move", "gamma", "--to", "b", "--forget").stdout


async def test_a_cell_that_stops_is_its_own_tenants_trouble_only(place: Place) -> None:
    delta, epsilon = make_tenant(place.a, "delta"), make_tenant(place.b, "epsilon")
    place.cells("assign", "epsilon", "--to", "b")
    async with place.client(delta) as mine, place.client(epsilon) as theirs:
        session = await new_session(mine)
        await new_session(theirs)
        await asyncio.to_thread(place.b.command, "down")
        try:
            for _ in range(20):
                assert (await mine.get(f"/v1/sessions/{session}")).status_code == 200
                answer = await theirs.get("/v1/sessions")
                assert (answer.status_code, answer.json()["reason"]) == (503, "CELL_UNAVAILABLE")
                assert "tenant epsilon" in answer.json()["detail"]
            run = await submit(mine, session, "[[tokens=3]]")
            assert (await watch_to_end(mine, run))[-1].event == "run.completed"
            async with grpc.aio.insecure_channel(place.grpc) as channel:
                with pytest.raises(grpc.aio.AioRpcError) as raised:
                    await SessionServiceStub(channel).ListSessions(
                        pb.ListSessionsRequest(),
                        metadata=(("authorization", f"Bearer {epsilon}"),),
                        timeout=10,
                    )
                assert from_rpc_error(raised.value).reason == "CELL_UNAVAILABLE"
        finally:
            await asyncio.to_thread(place.b.command, "up", "--no-reply", seconds=120)
        async with asyncio.timeout(30):
            while (await theirs.get("/v1/sessions")).status_code != 200:
                await asyncio.sleep(0.2)
