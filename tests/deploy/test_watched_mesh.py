"""Debian's Prometheus reads a real mesh: each alert fires under its fault, and clears when that is gone."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from bench.mesh import Mesh, free_ports, wait_until
from tests.deploy.board import questions
from tests.deploy.debian import debian
from tests.deploy.prometheus import Prometheus, alerts, prometheus, targets_of
from tests.e2e.client import http, new_session, run_to_end, submit, watch_to_end
from tests.e2e.database import SWITCH, asked
from tests.e2e.faults import Models, down, no_object_store
from tests.e2e.tools_mesh import frozen
from tests.integration.session.process import SessionProcess, environment
from tests.integration.session.standby import replicated
from tests.integration.session.test_disk_full import Disk, database_on, disk, replica_on  # noqa: F401
from tests.unit.session.calls import new_writer
from tests.unit.session.calls import submit as submit_input

HERE = Path(__file__).parent
TOOLS = [HERE, HERE.parent / "e2e"]
REPLICAS = "gateway=1,agent=2,session=1,tool=1,memory=1"
LARGE = '[[tool=long_answer {"lines": 3000}]]'
# Shared with others, at the least priority: what fires in two seconds may take a minute to be seen.
PATIENCE = 90.0


@pytest.fixture(scope="module")
def models() -> Iterator[Models]:
    with Models.serving() as models:
        yield models


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("archive")


@pytest.fixture(scope="module")
def watched(models: Models, archive: Path) -> Iterator[Mesh]:
    settings = {
        "HERMESH_WAL_ARCHIVE": str(archive),
        "HERMESH_LLM_BASE_URL": models.urls,
        "HERMESH_LLM_MODEL": "scripted",
        "HERMESH_LLM_ATTEMPTS": "1",
        "HERMESH_ENVOY_METRICS_PORT": str(free_ports(1)[0]),
        "HERMESH_TOOL_MODULES": "watched_tools,large_tool",
        "HERMESH_TOOL_COMPLETE_SECONDS": "1",
        "HERMESH_MAX_ACTIVE_RUNS": "8",
        "HERMESH_MAX_QUEUED_RUNS": "8",
        # What is frozen stays so.
        "HERMESH_HANG_SECONDS": "0",
        "PYTHONPATH": ":".join(map(str, TOOLS)),
    }
    with Mesh(replicas=REPLICAS, settings=settings, scripted_model=False) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def watcher(watched: Mesh) -> Iterator[Prometheus]:
    with prometheus(watched.data_dir / "prometheus.json") as found:
        found.until_scraped("agent-1", "agent-2", "session-1", "tool-1", "memory-1", "gateway-1", "envoy-1")
        yield found


@pytest.fixture
def calm(watched: Mesh, watcher: Prometheus) -> Prometheus:
    """Nothing fires, and what an earlier test broke has come back."""
    watched.wait_healthy()
    watcher.until_clear(seconds=PATIENCE)
    return watcher


@contextmanager
def kept_up(mesh: Mesh, work: Callable[[Mesh], Awaitable[object]]) -> Iterator[None]:
    """Does something again and again, beside the block; what comes of it does not matter."""
    over = threading.Event()

    async def repeat() -> None:
        while not over.is_set():
            try:
                async with asyncio.timeout(20):
                    await work(mesh)
            except Exception:
                pass
            await asyncio.sleep(0.1)

    thread = threading.Thread(target=lambda: asyncio.run(repeat()))
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


async def ask(mesh: Mesh, text: str = "[[tokens=3]]") -> None:
    async with http(mesh) as client:
        await run_to_end(client, await new_session(client), text)


def shows(watcher: Prometheus, alert: str) -> None:
    watcher.until_fires(alert, PATIENCE)


# What a mesh on which nothing went wrong does not have yet: counted with these labels by this code.
NOT_YET = {
    "hermesh_agent_model_errors_total": {"reason"},
    "hermesh_agent_model_backend_errors_total": {"backend", "reason"},
    "hermesh_agent_degraded_contexts_total": {"part"},
    "hermesh_session_dispatches_total": {"result"},
    "hermesh_key_lookups_total": {"outcome"},
    "ALERTS": {"alertname", "alertstate"},
}


@contextmanager
def exporters(mesh: Mesh, folder: Path) -> Iterator[Path]:
    """Debian's exporters of the mesh's PostgreSQL and Valkey; a file that says where they are."""
    ports = free_ports(2)
    postgres = urlsplit(mesh.command("env", "HERMESH_DATABASE_URL").strip())
    query = parse_qs(postgres.query)
    name = (
        f"host={query['host'][0]} port={query['port'][0]} dbname=postgres sslmode=disable "
        f"user={postgres.username} password={unquote(postgres.password or '')}"
    )
    valkey = urlsplit(mesh.command("env", "HERMESH_REDIS_URL").strip())
    binaries = ("prometheus-postgres-exporter", "prometheus-redis-exporter")
    environments = (
        {"DATA_SOURCE_NAME": name},
        {"REDIS_ADDR": f"unix://{valkey.path}", "REDIS_PASSWORD": unquote(valkey.password or "")},
    )
    targets = folder / "stores.json"
    targets.write_text(targets_of({"postgresql": f"127.0.0.1:{ports[0]}", "redis": f"127.0.0.1:{ports[1]}"}))
    running = []
    with (folder / "exporters.log").open("wb") as log:
        try:
            for binary, environment, port in zip(binaries, environments, ports, strict=True):
                command = [str(debian(binary, binary)), f"--web.listen-address=127.0.0.1:{port}"]
                running.append(
                    subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log)
                )
            yield targets
        finally:
            for process in running:
                process.terminate()
                process.wait(timeout=10)


async def a_little_of_everything(mesh: Mesh) -> None:
    """So much traffic that what is counted by label has its labels."""
    async with http(mesh) as client:
        for text in ("[[tokens=20]]", '[[tool=long_answer {"lines": 3}]]', "[[status=400]]"):
            await run_to_end(client, await new_session(client), text)
        # One that waits behind another is dispatched.
        session = await new_session(client)
        for _ in range(2):
            run = await submit(client, session, "[[tokens=20 rate=40]]")
        await watch_to_end(client, run)
        assert (await client.get("/v1/runs/019b0000-0000-7000-8000-000000000000")).status_code == 404


def test_every_metric_and_label_of_the_board_is_exported(watched: Mesh, tmp_path: Path) -> None:
    asked = list(questions())
    assert len(asked) > 50
    with exporters(watched, tmp_path) as stores:
        with prometheus(watched.data_dir / "prometheus.json", stores=stores) as watcher:
            watcher.until_scraped("gateway-1", "envoy-1", "postgresql", "redis")
            asyncio.run(a_little_of_everything(watched))
            wait_until(lambda: watcher.value("sum(hermesh_session_watchers) + 1") > 0, PATIENCE, "a scrape")
            wait_until(
                lambda: watcher.value('sum(hermesh_agent_runs_total{outcome="completed"})') >= 4,
                PATIENCE,
                "the traffic to be seen",
            )
            labels: dict[str, set[str]] = {}
            names = sorted({name for one in asked for name in one.selectors})
            for series in watcher.series(*names):
                labels.setdefault(series["__name__"], set()).update(series)
            for name, known in NOT_YET.items():
                labels.setdefault(name, set(known)).update({"instance", "job"})
            assert set(names) - set(labels) == set(), "there are no such metrics"
            for one in asked:
                selected = one.selectors
                for name, wanted in selected.items():
                    assert wanted <= labels[name], (one.panel, name)
                shown = set().union(*(labels[name] for name in selected))
                assert one.grouping | set(one.legend) <= shown, one
                watcher.query(one.asked)
            for panel in ("Processes that answer", "Is up", "CPU", "Runs that ended", "Requests by cluster"):
                for one in asked:
                    if one.panel == panel:
                        assert watcher.query(one.asked), f"{panel} shows nothing"


def test_a_database_that_is_gone_is_told_and_its_return_too(watched: Mesh, calm: Prometheus) -> None:
    with down(watched, "postgresql"):
        shows(calm, "HermeshDatabaseDown")
    calm.until_clear("HermeshDatabaseDown", seconds=PATIENCE)


def test_a_service_without_replicas_is_told(watched: Mesh, calm: Prometheus) -> None:
    with down(watched, "tool"):
        shows(calm, "HermeshServiceGone")
        shows(calm, "HermeshReplicaDown")
        shows(calm, "HermeshDegraded")
    calm.until_clear(seconds=PATIENCE)


@pytest.mark.deploy_long
async def test_a_call_of_which_nobody_knows_is_told(watched: Mesh, calm: Prometheus) -> None:
    async with http(watched) as client:
        run = await submit(client, await new_session(client), "[[tool=lose {}]]")
        await asyncio.to_thread(shows, calm, "HermeshToolOutcomeUnknown")
        await client.post(f"/v1/runs/{run}/cancel")
    await asyncio.to_thread(calm.until_clear, "HermeshToolOutcomeUnknown", seconds=PATIENCE)


@pytest.mark.deploy_long
def test_redis_that_is_gone_is_told(watched: Mesh, calm: Prometheus) -> None:
    with down(watched, "valkey"):
        shows(calm, "HermeshRedisDown")
    calm.until_clear(seconds=PATIENCE)


@pytest.mark.deploy_long
def test_an_envoy_that_is_gone_is_told(watched: Mesh, calm: Prometheus) -> None:
    with down(watched, "envoy"):
        shows(calm, "HermeshMeshUnreachable")
        shows(calm, "HermeshReplicaDown")
    calm.until_clear(seconds=PATIENCE)


@pytest.mark.deploy_long
@pytest.mark.timeout(400)
def test_models_that_are_gone_are_told_and_so_are_the_runs_that_fail(
    watched: Mesh, calm: Prometheus, models: Models
) -> None:
    models.stop(0)
    try:
        with kept_up(watched, ask):
            shows(calm, "HermeshModelBackendDown")
            assert "HermeshModelDown" not in calm.firing()
            models.stop(1)
            for alert in ("HermeshModelDown", "HermeshModelErrors", "HermeshRunsFail"):
                shows(calm, alert)
    finally:
        for number in (0, 1):
            models.start(number)
    with kept_up(watched, ask):
        calm.until_clear(seconds=PATIENCE)


@pytest.mark.deploy_long
def test_a_frozen_replica_and_one_that_stutters_are_told(watched: Mesh, calm: Prometheus) -> None:
    [tool] = [row.pid for row in watched.of("tool")]
    with frozen(tool):
        shows(calm, "HermeshReplicaDown")
    calm.until_clear(seconds=PATIENCE)

    async def stutter(_: Mesh) -> None:
        # Runs a sixth of the time: it answers, late.
        os.kill(tool, signal.SIGSTOP)
        await asyncio.sleep(0.5)
        os.kill(tool, signal.SIGCONT)

    with kept_up(watched, stutter):
        shows(calm, "HermeshLoopBlocked")
    calm.until_clear(seconds=PATIENCE)


@pytest.mark.deploy_long
def test_a_replica_that_keeps_ending_is_told(watched: Mesh, calm: Prometheus) -> None:
    for _ in range(4):
        [memory] = [row.pid for row in watched.of("memory")]
        before = calm.value('process_start_time_seconds{instance="memory-1"}')
        os.kill(memory, signal.SIGKILL)

        def came_back(before: float = before) -> bool:
            return calm.value('process_start_time_seconds{instance="memory-1"}') > before

        wait_until(came_back, PATIENCE, "memory-1 to be read again")
    shows(calm, "HermeshReplicaRestarts")
    calm.until_clear(seconds=120)


@pytest.mark.deploy_long
def test_requests_that_fail_are_told(watched: Mesh, calm: Prometheus) -> None:
    with down(watched, "session"), kept_up(watched, ask):
        shows(calm, "HermeshServerErrors")
        shows(calm, "HermeshServiceGone")
    with kept_up(watched, ask):
        calm.until_clear(seconds=PATIENCE)


@pytest.mark.deploy_long
async def test_input_that_is_refused_is_told(watched: Mesh, calm: Prometheus) -> None:
    async with http(watched) as client:
        sessions = [await new_session(client) for _ in range(12)]

        async def flood(mesh: Mesh) -> None:
            body = {"input": "[[tokens=200 rate=20]]"}
            async with http(mesh) as other:
                await asyncio.gather(
                    *(other.post(f"/v1/sessions/{one}/runs", json=body) for one in sessions * 4)
                )

        with kept_up(watched, flood):
            await asyncio.to_thread(shows, calm, "HermeshInputRefused")
        for one in sessions:
            await client.delete(f"/v1/sessions/{one}")
    await asyncio.to_thread(calm.until_clear, seconds=PATIENCE)


@pytest.mark.deploy_long
async def test_runs_that_nobody_takes_are_told(watched: Mesh, calm: Prometheus) -> None:
    async with http(watched) as client:
        session = await new_session(client)

        def stopped() -> None:
            with down(watched, "agent"):
                asyncio.run(_submit(watched, session))
                shows(calm, "HermeshRunsStuck")

        await asyncio.to_thread(stopped)
    await asyncio.to_thread(calm.until_clear, seconds=PATIENCE)


async def _submit(mesh: Mesh, session: str) -> None:
    async with http(mesh) as client:
        await submit(client, session, "[[tokens=3]]")


@pytest.mark.deploy_long
@pytest.mark.timeout(400)
async def test_runs_that_keep_changing_their_agent_are_told(watched: Mesh, calm: Prometheus) -> None:
    async with http(watched) as client:
        # Each agent takes eight.
        sessions = [await new_session(client) for _ in range(8)]
        for one in sessions:
            await submit(client, one, "[[tokens=600 rate=10]]")
        for number in range(8):
            rows = await asyncio.to_thread(watched.of, "agent")
            os.kill(rows[number % 2].pid, signal.SIGKILL)
            await asyncio.to_thread(watched.wait_healthy)
            if "HermeshTakeovers" in await asyncio.to_thread(calm.firing):
                break
        await asyncio.to_thread(shows, calm, "HermeshTakeovers")
        for one in sessions:
            await client.delete(f"/v1/sessions/{one}")
    await asyncio.to_thread(calm.until_clear, seconds=PATIENCE)


@pytest.mark.deploy_long
def test_results_that_are_cut_are_told(watched: Mesh, calm: Prometheus) -> None:
    with no_object_store(watched):
        asyncio.run(ask(watched, LARGE))
        shows(calm, "HermeshResultsCut")
        shows(calm, "HermeshDegraded")
    calm.until_clear(seconds=PATIENCE)


@pytest.mark.deploy_long
def test_an_archive_that_is_gone_is_told(watched: Mesh, calm: Prometheus, archive: Path) -> None:
    aside = archive.with_name("aside")
    archive.rename(aside)
    try:
        asyncio.run(ask(watched))
        asyncio.run(asked(watched, SWITCH))
        shows(calm, "HermeshArchiveFailing")
    finally:
        aside.rename(archive)
    calm.until_clear(seconds=PATIENCE)


@pytest.mark.deploy_long
async def test_a_full_disk_is_told(disk: Disk, tmp_path: Path) -> None:  # noqa: F811
    async with database_on(disk) as database, replica_on(database) as (replica, client):
        targets = tmp_path / "targets.json"
        targets.write_text(targets_of({"session-1": replica.metrics_address}))
        session = (await new_writer(client)).session_id
        with prometheus(targets) as watcher:
            await asyncio.to_thread(watcher.until_scraped, "session-1")
            await database.next_segment()
            disk.fill()
            for _ in range(50):
                try:
                    await submit_input(client, session, text=os.urandom(10_000).hex())
                except Exception:
                    pass
                if "HermeshDiskFull" in await asyncio.to_thread(watcher.firing):
                    break
                await asyncio.sleep(0.5)
            await asyncio.to_thread(watcher.until_fires, "HermeshDiskFull")
            disk.make_room()
            await asyncio.to_thread(watcher.until_clear, "HermeshDiskFull", seconds=PATIENCE)


@pytest.mark.deploy_long
async def test_a_standby_that_is_gone_is_told(tmp_path: Path) -> None:
    async with replicated() as pair:
        replica = SessionProcess("session-1", environment(pair.url))
        try:
            await asyncio.to_thread(replica.wait_ready)
            targets = tmp_path / "targets.json"
            targets.write_text(targets_of({"session-1": replica.metrics_address}))
            with prometheus(targets) as watcher:
                await asyncio.to_thread(watcher.until_scraped, "session-1")
                pair.freeze()
                await asyncio.to_thread(watcher.until_fires, "HermeshStandbyDown", PATIENCE)
                pair.thaw()
                await asyncio.to_thread(watcher.until_clear, "HermeshStandbyDown", seconds=PATIENCE)
        finally:
            replica.kill()


def test_no_alert_is_without_a_fault() -> None:
    text = Path(__file__).read_text()
    assert {name for name in alerts() if f'"{name}"' not in text} == set()
