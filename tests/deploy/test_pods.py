"""The chart's pods for real: migrated, started, probed, rolled and ended as Kubernetes would, under load."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import httpx
import pytest

from bench.exported import exported
from bench.hpa import METRIC
from launcher.embedded.postgres import Postgres
from launcher.embedded.valkey import Valkey
from tests.deploy.chart import ALL, SECRET, named, of_kind, render
from tests.deploy.kubelet import NETWORK, NODE, Node, Pod, available
from tests.deploy.pods import on_node, serves, until
from tests.e2e.client import assert_whole, follow, new_session

SERVICES = ("session", "memory", "tool", "agent", "gateway")
KEY = "hm_" + "k" * 40
PASSWORD = "test-password"
GRPCURL = str(Path(sys.executable).parent / "grpcurl")

pytestmark = [
    pytest.mark.skipif(bool(available()), reason=available() or "it can run"),
    pytest.mark.timeout(480),
]


async def ready(node: Node, component: str, replicas: int) -> list[Pod]:
    """Waits until so many pods of a component are ready."""
    try:
        await until(lambda: sum(pod.ready for pod in node.of(component)) >= replicas)
    except TimeoutError:
        said = "\n".join(pod.log.read_text()[-3000:] for pod in node.of(component) if not pod.ready)
        raise AssertionError(f"{component} is not ready:\n{said}") from None
    return [pod for pod in node.of(component) if pod.ready]


class Chart:
    """The chart installed on a node, with its stores beside it."""

    def __init__(self, node: Node, folder: Path) -> None:
        self.node = node
        self.objects = node.objects
        self.folder = folder
        self.postgres = Postgres.in_folder(folder / "pg", folder, PASSWORD)

    @contextlib.contextmanager
    def database(self) -> Iterator[None]:
        """PostgreSQL for the pods' network."""
        command = [*self.postgres.command(), "-c", f"listen_addresses={NODE}"]
        with on_node(self.node, self.folder, "postgresql", command):
            yield

    async def start(self, component: str, replicas: int) -> list[Pod]:
        """Starts pods of a component until there are so many, and waits until they are ready."""
        workload = named(list(self.objects), "Deployment", component)
        for _ in range(replicas - len(self.node.of(component))):
            await self.node.start(workload)
        return await ready(self.node, component, replicas)

    async def replace(self, component: str) -> float:
        """Rolls a component by one: the next one first. Returns how long the former took to end."""
        former = self.node.of(component)
        await self.start(component, len(former) + 1)
        return await former[0].delete()

    def service(self) -> Service:
        """The way to the Envoys."""
        return Service(lambda: [pod.address for pod in self.node.of("envoy") if pod.ready])


@pytest.fixture
async def chart() -> AsyncIterator[Chart]:
    values = ALL | {"model": {"baseUrl": f"http://{NODE}:8000/v1"}, "objectStoreUrl": "", "defaults": {}}
    values |= {"envoy": {"drainSeconds": 10}}
    address = f"{NODE}:5432/postgres"
    secret = {
        "database-url": f"postgresql://postgres:{PASSWORD}@{address}",
        "redis-url": f"redis://:{PASSWORD}@{NODE}:6379/0",
        "mesh-token": "m" * 40,
        "api-key": KEY,
        "llm-api-key": "sk-model",
    }
    with tempfile.TemporaryDirectory(prefix="hm-k8s-") as name:
        folder = Path(name)
        async with Node(render(values), {SECRET: secret}).running() as node:
            chart = Chart(node, folder)
            chart.postgres.initialize()
            with (chart.postgres.data / "pg_hba.conf").open("a") as rules:
                rules.write(f"host all all {NETWORK} scram-sha-256\n")
            valkey = Valkey(folder, folder / "valkey.conf", PASSWORD)
            cache = [*valkey.command(), "--bind", NODE, "--port", "6379"]
            model = [sys.executable, "-m", "bench.model_server", "--host", NODE, "--port", "8000"]
            with on_node(node, folder, "valkey", cache), on_node(node, folder, "model", model):
                yield chart


class Service(httpx.AsyncBaseTransport):
    """How a client reaches pods by their Service: a connection is to one that is ready, and is used again
    until an answer says that it ends.
    """

    def __init__(self, addresses: Callable[[], list[str]]) -> None:
        self._addresses = addresses
        self._address = ""
        self._inner = httpx.AsyncHTTPTransport()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self._address = self._address or random.choice(self._addresses())
        request.url = request.url.copy_with(host=self._address)
        try:
            response = await self._inner.handle_async_request(request)
        except httpx.ConnectError:
            # It had no connection that it could use again, and a new one would not have gone to that pod.
            assert self._address not in self._addresses()
            self._address = ""
            return await self.handle_async_request(request)
        if response.headers.get("connection") == "close":
            self._address = ""
        return response

    async def aclose(self) -> None:
        await self._inner.aclose()


async def talk(transport: httpx.AsyncBaseTransport, events: list[str], text: str, over: asyncio.Event) -> int:
    """Sends a message again and again on a session of its own; returns how many replies were whole.

    `events` gets the name of each frame as it comes.
    """
    replies = 0
    async with httpx.AsyncClient(
        transport=transport,
        base_url="http://mesh:8080",
        headers={"Authorization": f"Bearer {KEY}"},
        timeout=30,
    ) as client:
        session = await new_session(client)
        while not over.is_set() or not replies:
            frames = await follow(client, session, text, events)
            assert_whole(frames)
            assert frames[-1].event == "run.completed"
            replies += 1
    return replies


async def one_session(transport: httpx.AsyncBaseTransport) -> str:
    """Creates a session."""
    headers = {"Authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(
        transport=transport, base_url="http://mesh:8080", headers=headers, timeout=30
    ) as client:
        return await new_session(client)


async def ask(transport: httpx.AsyncBaseTransport, over: asyncio.Event) -> int:
    """Sends small requests, one after the other; returns how many."""
    asked = 0
    async with httpx.AsyncClient(
        transport=transport,
        base_url="http://mesh:8080",
        headers={"Authorization": f"Bearer {KEY}"},
        timeout=30,
    ) as client:
        while not over.is_set():
            await new_session(client)
            asked += 1
            await asyncio.sleep(0.02)
    return asked


async def watch(node: Node, address: str, session: str) -> str:
    """Watches a session over gRPC by one Envoy until the watch ends; returns what came."""
    process = await asyncio.create_subprocess_exec(
        *node.command(GRPCURL, "-plaintext", "-H", f"authorization: Bearer {KEY}"),
        *("-d", json.dumps({"session_id": session}), f"{address}:50051"),
        "hermesh.session.v1.SessionService/WatchSession",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    said, _ = await process.communicate()
    assert process.returncode == 0, said
    return said.decode()


async def active_sessions(agents: list[Pod]) -> float:
    """What these agents export together."""
    async with httpx.AsyncClient(timeout=10) as client:
        return sum([await exported(client, f"{pod.address}:9464", METRIC) for pod in agents])


async def test_it_migrates_serves_rolls_and_ends(chart: Chart) -> None:
    node = chart.node
    (job,) = of_kind(list(chart.objects), "Job")
    migration = await node.start(job)
    # The database is late: the job begins again until it is there, and nothing else has to.
    await until(lambda: migration.restarts > 0)
    with chart.database():
        await until(lambda: migration.exit_code == 0)
        await chart.start("envoy", 2)
        for component in SERVICES:
            await chart.start(component, 2 if component in ("session", "agent") else 1)
        for pod in node.pods[1:]:
            status = Path(f"/proc/{pod.pid}/status").read_text()
            facts = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
            assert int(facts["Uid"].split()[0]) >= 10_000
            assert int(facts["CapEff"], 16) == 0
            assert facts["NoNewPrivs"] == "1"

        for pod in node.of("envoy"):
            await node.within(serves(f"http://{pod.address}:8080"))
        events: list[str] = []
        over = asyncio.Event()
        over.set()
        stream = asyncio.create_task(
            node.within(talk(chart.service(), events, "[[tokens=900 rate=50]] a long reply", over))
        )
        await until(lambda: "text.delta" in events)
        # What the autoscaler goes by.
        assert await node.within(active_sessions(node.of("agent"))) == 1
        for component in ("agent", "session", "tool", "memory", "gateway"):
            took = await chart.replace(component)
            # Out of the services, its delay, what is under way handed over: far below its grace.
            assert took < 25, component
        assert await stream == 1

        # Envoys are replaced under streams and requests, whose clients come back by the other one.
        events.clear()
        over.clear()
        clients = [
            *(talk(chart.service(), events, "[[tokens=100 rate=10]]", over) for _ in range(3)),
            ask(chart.service(), over),
        ]
        tasks = [asyncio.create_task(node.within(client)) for client in clients]
        session = await node.within(one_session(chart.service()))
        watches = [asyncio.create_task(watch(node, pod.address, session)) for pod in node.of("envoy")]
        await until(lambda: "text.delta" in events)
        for _ in range(2):
            await chart.replace("envoy")
        over.set()
        assert all('"reconnect"' in said for said in await asyncio.gather(*watches))
        assert all(await asyncio.gather(*tasks))
        assert "reconnect" in events
        assert [pod.restarts for pod in node.pods[1:]] == [0] * len(node.pods[1:])
