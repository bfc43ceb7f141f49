"""compose.yaml for real: its processes as compose runs them, and its Envoys replaced behind its HAProxy."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import httpx
import pytest

from launcher.embedded.postgres import Postgres
from launcher.embedded.valkey import binary
from tests.deploy.compose import Host, read
from tests.deploy.kubelet import NETWORK, NODE, available
from tests.deploy.pods import on_node, serves, until
from tests.e2e.client import assert_whole, follow, new_session

KEY = "hm_" + "k" * 40
PASSWORD = "test-password"
ENVIRONMENT = {"POSTGRES_PASSWORD": PASSWORD, "HERMESH_MESH_TOKEN": "m" * 40, "HERMESH_API_KEY": KEY}

pytestmark = [
    pytest.mark.deploy_long,
    pytest.mark.skipif(bool(available()), reason=available() or "it can run"),
    pytest.mark.timeout(480),
]


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_a_secret_that_is_not_set_is_asked_for(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: put a .*into .env"):
        read({key: value for key, value in ENVIRONMENT.items() if key != name})


@pytest.fixture
async def host() -> AsyncIterator[Host]:
    """A machine with compose's stores and model on it, at the ports that compose's names have."""
    with tempfile.TemporaryDirectory(prefix="hm-compose-") as name:
        folder = Path(name)
        async with Host(ENVIRONMENT).running() as host:
            postgres = Postgres.in_folder(folder / "pg", folder, PASSWORD)
            postgres.initialize()
            with (postgres.data / "pg_hba.conf").open("a") as rules:
                rules.write(f"host all all {NETWORK} scram-sha-256\n")
            database = [*postgres.command(), "-c", f"listen_addresses={NODE}"]
            cache = [str(binary()), "--bind", NODE, "--port", "6379", "--save", "", "--protected-mode", "no"]
            model = [sys.executable, "-m", "bench.model_server", "--host", NODE, "--port", "8081"]
            with (
                on_node(host, folder, "postgresql", database),
                on_node(host, folder, "redis", cache),
                on_node(host, folder, "model", model),
            ):
                await user_and_database(postgres)
                yield host


async def user_and_database(postgres: Postgres) -> None:
    """What the image of PostgreSQL makes of POSTGRES_USER and POSTGRES_DB."""
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(OSError, asyncpg.CannotConnectNowError):
                connection = await asyncpg.connect(postgres.url())
                break
            await asyncio.sleep(0.1)
    await connection.execute(f"CREATE ROLE hermesh SUPERUSER LOGIN PASSWORD '{PASSWORD}'")
    await connection.execute("CREATE DATABASE hermesh OWNER hermesh")
    await connection.close()


def client(host: Host) -> httpx.AsyncClient:
    """A client of the edge, as compose publishes it."""
    (edge,) = host.of("edge")
    return httpx.AsyncClient(
        base_url=f"http://{edge.address}:8080", headers={"Authorization": f"Bearer {KEY}"}, timeout=30
    )


async def talk(host: Host, events: list[str], over: asyncio.Event) -> int:
    """Sends one message after the other; returns how many replies were whole."""
    replies = 0
    async with client(host) as one:
        session = await new_session(one)
        while not over.is_set() or not replies:
            frames = await follow(one, session, "[[tokens=400 rate=20]]", events)
            assert_whole(frames)
            assert frames[-1].event == "run.completed"
            replies += 1
    return replies


async def ask(host: Host, over: asyncio.Event) -> int:
    """Sends small requests, one after the other; returns how many."""
    asked = 0
    async with client(host) as one:
        while not over.is_set():
            await new_session(one)
            asked += 1
            await asyncio.sleep(0.02)
    return asked


async def test_it_migrates_serves_and_has_its_envoys_replaced(host: Host) -> None:
    migration = await host.start(host.workload("migrate"))
    await until(lambda: migration.exit_code is not None)
    assert migration.exit_code == 0, migration.log.read_text()[-2000:]
    for name, service in host.services.items():
        if name not in ("migrate", "postgresql", "redis", "model"):
            for _ in range(service.get("deploy", {}).get("replicas", 1)):
                await host.start(host.workload(name))
    (edge,) = host.of("edge")
    await host.within(serves(f"http://{edge.address}:8080"))
    for pod in host.pods[1:]:
        status = Path(f"/proc/{pod.pid}/status").read_text()
        facts = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert int(facts["Uid"].split()[0]) > 0
        assert int(facts["CapEff"], 16) == 0
        assert facts["NoNewPrivs"] == "1"

    events: list[str] = []
    over = asyncio.Event()
    work = [*(talk(host, events, over) for _ in range(3)), ask(host, over)]
    tasks = [asyncio.create_task(host.within(one)) for one in work]
    await until(lambda: "text.delta" in events)
    for pod in host.of("envoy"):
        # As `docker restart` does it.
        assert await pod.delete() < 30
        await host.start(host.workload("envoy"))
        await until(lambda: len(host.of("envoy")) == 2)
        # HAProxy takes it once it has found it well.
        await asyncio.sleep(3)
    over.set()
    assert all(await asyncio.gather(*tasks))
    assert "reconnect" in events
    assert [pod.restarts for pod in host.pods[1:]] == [0] * len(host.pods[1:])
