"""nginx and HAProxy as deploy/ has them, before a whole mesh: before Envoy, and straight before gateways."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator

import httpx
import pytest
import websockets
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from bench.edges import Edge, Program, gateway_port
from bench.mesh import Mesh
from hermesh.common.v1.event_pb2 import InputMessage
from hermesh.session.v1 import session_service_pb2 as pb
from hermesh.session.v1.session_service_pb2_grpc import SessionServiceStub
from tests.deploy.debian import debian
from tests.deploy.edges import BEHIND, PROGRAMS, connect, connect_grpc, servers, serving
from tests.e2e.client import (
    TERMINAL,
    Frame,
    assert_whole,
    follow,
    new_session,
    run_stream,
    submit,
    watch,
    watch_to_end,
)
from tools.kubectl import ROOT

pytestmark = pytest.mark.timeout(180)
# The short form has each program and each place once.
LONG = pytest.mark.deploy_long
SHORT = (("nginx", "envoy"), ("haproxy", "gateways"))
SHORT_WITH_NGINX = pytest.mark.parametrize("program", ["nginx", pytest.param("haproxy", marks=LONG)])
SHORT_WITH_HAPROXY = pytest.mark.parametrize("program", [pytest.param("nginx", marks=LONG), "haproxy"])

JSON = {"content-type": "application/json"}
# What the limits on silence are cut to, and how long nothing is said then.
LIMIT_SECONDS = 3
SILENT_SECONDS = 8


@pytest.fixture(scope="module")
def shared_mesh() -> Iterator[Mesh]:
    settings = {
        "HERMESH_GATEWAY_PORT": str(gateway_port()),
        "HERMESH_TRUSTED_PROXIES": "1",
        "HERMESH_HEARTBEAT_SECONDS": "1",
        "HERMESH_DRAIN_SECONDS": "4",
    }
    with Mesh(replicas="gateway=2,agent=1,session=1,tool=1,memory=1", settings=settings) as mesh:
        yield mesh


@pytest.fixture
def mesh(shared_mesh: Mesh) -> Mesh:
    """The mesh, healthy: what an earlier test broke has come back."""
    shared_mesh.wait_healthy()
    return shared_mesh


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            (program, behind), marks=() if (program, behind) in SHORT else LONG, id=f"{program}-{behind}"
        )
        for behind in BEHIND
        for program in PROGRAMS
    ],
)
def shared_edge(request: pytest.FixtureRequest, shared_mesh: Mesh) -> Iterator[Edge]:
    program, behind = request.param
    with serving(program, behind, shared_mesh) as edge:
        yield edge


@pytest.fixture
def edge(shared_edge: Edge, mesh: Mesh) -> Edge:
    return shared_edge


async def until(happened: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not happened():
            await asyncio.sleep(0.05)


async def test_events_come_as_they_are_written(edge: Edge) -> None:
    late = []
    async with (
        connect(edge) as client,
        run_stream(client, await new_session(client), "[[tokens=15 rate=10]]") as frames,
    ):
        seen: list[Frame] = []
        async for frame in frames:
            seen.append(frame)
            if frame.event == "text.delta":
                late.append(time.time() - frame.data["time"] / 1000)
    assert_whole(seen)
    assert len(late) > 5
    # A balancer that gathers is late with each; a machine that is busy is not.
    assert min(late) < 0.15


async def test_a_websocket_takes_input_and_gives_events(edge: Edge) -> None:
    async with connect(edge) as client:
        session = await new_session(client)
    seen = []
    address = f"wss://{edge.host}/v1/sessions/{session}/ws"
    async with (
        asyncio.timeout(30),
        websockets.connect(address, ssl=edge.tls, additional_headers=edge.mesh.headers) as socket,
    ):
        await socket.send(json.dumps({"type": "input", "input": "[[tokens=20 rate=20]]"}))
        while not TERMINAL & set(seen):
            seen.append(json.loads(await socket.recv())["type"])
    assert "text.delta" in seen


async def test_bodies_have_the_meshs_own_limit(edge: Edge) -> None:
    async with connect(edge) as client:
        session = await new_session(client)
        # A million line breaks are two million bytes of JSON.
        run = await submit(client, session, "[[tokens=3]]" + "\n" * 1_000_000)
        assert_whole(await watch_to_end(client, run))
        path = f"/v1/sessions/{session}/runs"
        refused = await client.post(path, content=b'{"input":"' + b"x" * 8_600_000 + b'"}', headers=JSON)
        assert (refused.status_code, refused.json()["reason"]) == (413, "INPUT_TOO_LARGE")
        # By the gateway, which has an id for it; what is far too large does not get that far.
        assert refused.json()["request_id"]
    # The head alone: whoever refuses by it reads no further.
    head = f"POST {path} HTTP/1.1\r\nHost: {edge.host}\r\nContent-Length: 12000000\r\n\r\n"
    async with asyncio.timeout(30):
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", edge.port, ssl=edge.tls, server_hostname="localhost"
        )
        writer.write(head.encode())
        answer = (await reader.readuntil(b"}")).decode()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    assert answer.startswith("HTTP/1.1 413 ")
    assert "application/problem+json" in answer
    assert json.loads(answer.partition("\r\n\r\n")[2])["reason"] == "INPUT_TOO_LARGE"


async def test_grpc_carries_large_messages_and_long_streams(edge: Edge) -> None:
    key = (("authorization", f"Bearer {edge.mesh.api_key}"),)

    async def questions() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
        # More than a megabyte in all, which is nginx's limit for one stream where nobody raises it.
        for _ in range(1_200):
            yield reflection_pb2.ServerReflectionRequest(host="x" * 1_000, list_services="")

    async with asyncio.timeout(60), connect_grpc(edge) as channel:
        sessions = SessionServiceStub(channel)
        created = await sessions.CreateSession(pb.CreateSessionRequest(), metadata=key)
        # As much as input may be.
        message = InputMessage(role="user", content="[[tokens=3]]" + "ä" * 520_000)
        request = pb.SubmitRunRequest(session_id=created.session.session_id, input=[message])
        submitted = await sessions.SubmitRun(request, metadata=key)
        watching = sessions.WatchRun(pb.WatchRunRequest(run_id=submitted.run.run_id), metadata=key)
        kinds = [event.type async for answer in watching for event in answer.frame.events]
        assert kinds[-1] == "run.completed"
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        answers = [answer async for answer in stub.ServerReflectionInfo(questions(), metadata=key)]
        assert len(answers) == 1_200


async def test_a_client_is_known_by_its_own_address(edge: Edge) -> None:
    path = f"/v1/runs/{edge.port}"

    # The limit on wrong keys goes by the same address.
    for address, key, status in (("127.0.0.5", "hm_wrong", 401), ("127.0.0.6", edge.mesh.api_key, 404)):
        async with connect(edge, address) as client:
            answer = await client.get(path, headers={"Authorization": f"Bearer {key}"})
            assert answer.status_code == status

    def clients() -> set[str]:
        logs = [log.read_text() for log in (edge.mesh.data_dir / "logs").glob("gateway-*.log")]
        return {json.loads(line)["client"] for log in logs for line in log.splitlines() if path in line}

    # A line is written when its answer has gone.
    await until(lambda: clients() == {"127.0.0.5", "127.0.0.6"})
    await until(lambda: all(f'"client":"{address}"' in edge.log() for address in clients()))


async def test_the_chat_pages_cookie_is_for_tls_only(edge: Edge) -> None:
    async with connect(edge) as client:
        answer = await client.post(
            "/auth/login", json={"api_key": edge.mesh.api_key}, headers={"Origin": edge.url}
        )
        assert answer.status_code == 204, answer.text
        assert "secure" in answer.headers["set-cookie"].lower()
    async with httpx.AsyncClient(timeout=10) as plain:
        answer = await plain.get(f"http://localhost:{edge.plain_port}/v1/sessions?a=b")
        assert answer.status_code == 308
        assert re.fullmatch(r"https://localhost(:\d+)?/v1/sessions\?a=b", answer.headers["location"])


@SHORT_WITH_HAPROXY
async def test_a_killed_gateway_costs_no_answer_and_no_event(program: Program, mesh: Mesh) -> None:
    with serving(program, "gateways", mesh) as edge:
        async with connect(edge) as client:
            sessions = [await new_session(client) for _ in range(6)]
            runs = [await submit(client, session, "[[tokens=60 rate=20]]") for session in sessions]
            first = await watch(client, runs[-1], 0, lambda frame: frame.event == "text.delta")
            watchers = [asyncio.create_task(watch_to_end(client, run)) for run in runs]
            assert first
            os.kill(mesh.of("gateway")[0].pid, signal.SIGKILL)
            for session in sessions * 5:
                assert (await client.get(f"/v1/sessions/{session}")).status_code == 200
            for frames in await asyncio.gather(*watchers):
                assert_whole(frames)


@SHORT_WITH_NGINX
async def test_gateways_are_rolled_without_an_error(program: Program, mesh: Mesh) -> None:
    events: list[str] = []
    over = asyncio.Event()

    async def talk(client: httpx.AsyncClient) -> int:
        session, runs = await new_session(client), 0
        while not over.is_set():
            assert_whole(await follow(client, session, "[[tokens=60 rate=10]]", events))
            runs += 1
        return runs

    async def write(client: httpx.AsyncClient) -> int:
        written = 0
        while not over.is_set():
            await new_session(client, title=f"number {written}")
            written += 1
            await asyncio.sleep(0.01)
        return written

    with serving(program, "gateways", mesh) as edge:
        async with connect(edge) as client, connect(edge) as another, asyncio.TaskGroup() as group:
            tasks = [*(group.create_task(talk(client)) for _ in range(4)), group.create_task(write(another))]
            await until(lambda: "text.delta" in events)
            await asyncio.to_thread(mesh.command, "restart", "gateway", "--rolling")
            over.set()
        assert all(task.result() for task in tasks)
        assert "reconnect" in events
        # The successors have taken part.
        assert len(set(servers(edge))) == 3


@SHORT_WITH_HAPROXY
async def test_silence_is_bridged_by_heartbeats(program: Program, mesh: Mesh) -> None:
    changes = {"300s": f"{LIMIT_SECONDS}s"}
    key = (("authorization", f"Bearer {mesh.api_key}"),)
    text = f"[[tokens=3 delay={SILENT_SECONDS}]]"

    async def by_websocket(edge: Edge, session: str) -> None:
        address = f"wss://{edge.host}/v1/sessions/{session}/ws"
        async with websockets.connect(
            address, ssl=edge.tls, additional_headers=mesh.headers, ping_interval=1
        ) as socket:
            await asyncio.sleep(SILENT_SECONDS)
            await socket.send('{"type":"ping"}')
            assert json.loads(await socket.recv())["type"] == "pong"

    async def by_grpc(edge: Edge, session: str) -> None:
        async with connect_grpc(edge) as channel:
            request = pb.WatchSessionRequest(session_id=session)
            watching = SessionServiceStub(channel).WatchSession(request, metadata=key)
            async for answer in watching:
                if any(event.type in TERMINAL for event in answer.frame.events):
                    return

    async def whole(client: httpx.AsyncClient) -> None:
        body = {"model": "default", "messages": [{"role": "user", "content": text}]}
        answer = await client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text

    with serving(program, "gateways", mesh, changes) as edge:
        async with asyncio.timeout(60), connect(edge) as client, asyncio.TaskGroup() as group:
            session, idle = await new_session(client), await new_session(client)
            group.create_task(by_grpc(edge, session))
            group.create_task(by_websocket(edge, idle))
            group.create_task(whole(client))
            async with run_stream(client, session, text) as frames:
                assert_whole([frame async for frame in frames])


STICKY = {
    "nginx": {"  least_conn;\n  # A gateway": "  ip_hash;\n  # A gateway"},
    "haproxy": {"# cookie SERVERID": "cookie SERVERID"},
}


@SHORT_WITH_NGINX
async def test_a_client_can_be_kept_on_one_gateway_and_needs_it_not(program: Program, mesh: Mesh) -> None:
    async def ask(client: httpx.AsyncClient, times: int) -> None:
        for _ in range(times):
            assert (await client.get("/v1/sessions")).status_code == 200

    with serving(program, "gateways", mesh) as edge:
        async with connect(edge) as client:
            await ask(client, 10)
        assert len(set(servers(edge))) > 1
    with serving(program, "gateways", mesh, STICKY[program]) as edge:
        async with connect(edge) as client:
            await ask(client, 10)
            (place,) = set(servers(edge)[-9:])
            name = {f"hermesh_http/gateway{n}": n for n in (1, 2, 3)}.get(place, 0)
            port = (
                int(mesh.settings["HERMESH_GATEWAY_PORT"]) + name - 1
                if name
                else int(place.rpartition(":")[2])
            )
            os.kill(
                next(row.pid for row in mesh.of("gateway") if row.address.endswith(f":{port}")),
                signal.SIGKILL,
            )
            await ask(client, 5)


def test_haproxy_reads_what_compose_gives_it() -> None:
    folder = ROOT / "deploy/haproxy"
    command = [str(debian("haproxy", "haproxy")), "-c", "-f", str(folder / "haproxy.cfg")]
    done = subprocess.run(
        [*command, "-f", str(folder / "compose.cfg")], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stderr
