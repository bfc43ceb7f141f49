"""What the supervisor writes, and what it does when it cannot."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.model_server import ModelServer
from launcher import supervisor as module
from launcher.children import Child, Children
from launcher.errors import LaunchError
from launcher.plan import Plan, Spec
from launcher.processes import identify
from launcher.settings import LauncherSettings
from launcher.state import Remembered, State
from launcher.supervisor import Supervisor
from meshkit.settings import load


@pytest.fixture
def supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Supervisor]:
    for name in [name for name in os.environ if name.startswith("HERMESH_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HERMESH_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setattr(module, "WRITE_AGAIN_SECONDS", 0.01)
    made = Supervisor(load(LauncherSettings))
    yield made
    made.close()


def serving(supervisor: Supervisor, group: asyncio.TaskGroup) -> Child:
    """A tool replica that needs no process."""
    supervisor.children = Children(supervisor.folder, group, supervisor.publish, supervisor.save)
    child = Child(Spec("tool", "tool-1", [], {}), identity=identify(os.getpid()), address="127.0.0.1:4242")
    supervisor.children.all["tool-1"] = child
    return child


async def test_what_could_not_be_written_is_written_when_it_can(supervisor: Supervisor) -> None:
    eds = supervisor.folder.envoy / "eds"
    aside = supervisor.folder.envoy / "aside"
    async with asyncio.TaskGroup() as group:
        serving(supervisor, group)
        again = group.create_task(supervisor.write_again())
        await asyncio.to_thread(eds.rename, aside)
        supervisor.publish()
        assert supervisor.unwritten.is_set()
        await asyncio.to_thread(aside.rename, eds)
        async with asyncio.timeout(10):
            while not (eds / "tool.yaml").exists():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        again.cancel()
    assert "4242" in (eds / "tool.yaml").read_text()


async def test_a_child_that_leaves_is_no_endpoint_any_more(supervisor: Supervisor) -> None:
    endpoints = supervisor.folder.envoy / "eds" / "tool.yaml"
    async with asyncio.TaskGroup() as group:
        child = serving(supervisor, group)
        supervisor.publish()
        assert "4242" in endpoints.read_text()
        # It died and comes back: its place is kept, and health checks keep calls off it.
        child.identity = None
        supervisor.publish()
        assert "4242" in endpoints.read_text()
        child.stop()
        supervisor.publish()
        assert "4242" not in endpoints.read_text()


async def test_what_an_earlier_supervisor_left_is_an_endpoint_until_it_is_taken_over(
    supervisor: Supervisor,
) -> None:
    endpoints = supervisor.folder.envoy / "eds" / "tool.yaml"
    async with asyncio.TaskGroup() as group:
        serving(supervisor, group)
        # Its parts are taken over first, and each says where it is before the services' turn comes.
        supervisor.leftovers["tool-2"] = Remembered("tool", "tool-2", os.getpid(), 1, "127.0.0.1:4343")
        supervisor.leftovers["tool-3"] = Remembered("tool", "tool-3", os.getpid(), 1)
        supervisor.publish()
        assert "4242" in endpoints.read_text()
        assert "4343" in endpoints.read_text()
        del supervisor.leftovers["tool-2"]
        supervisor.publish()
        assert "4343" not in endpoints.read_text()


async def test_endpoints_that_somebody_broke_are_right_before_envoy_is_waited_for(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoints = supervisor.folder.envoy / "eds" / "tool.yaml"
    seen: list[str] = []

    async def balanced(_: object) -> None:
        seen.append(endpoints.read_text())

    async def say(_: str) -> None:
        pass

    monkeypatch.setattr(supervisor, "_wait_balanced", balanced)
    async with asyncio.TaskGroup() as group:
        serving(supervisor, group).ready.set()
        endpoints.write_text("resources: 7")
        await supervisor.scale({"tool": 1}, say)
    assert "4242" in seen[0]


async def test_the_state_names_who_runs(supervisor: Supervisor) -> None:
    async with asyncio.TaskGroup() as group:
        serving(supervisor, group)
        supervisor.save()
    state = State.load(supervisor.folder.state_file)
    [child] = state.children
    assert (child.replica, child.pid, child.identity.alive) == ("tool-1", os.getpid(), True)
    assert state.supervisor_identity == identify(os.getpid())
    assert state.addresses == {"http": "127.0.0.1:8080", "grpc": "127.0.0.1:50051"}
    assert supervisor.folder.state_file.stat().st_mode & 0o777 == 0o600


def test_there_is_one_for_a_folder(supervisor: Supervisor) -> None:
    with pytest.raises(LaunchError, match="another supervisor"):
        Supervisor(load(LauncherSettings))


def test_a_proxy_is_for_what_is_outside(supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy:3128")
    monkeypatch.setenv("NO_PROXY", "example.org")
    monkeypatch.delenv("no_proxy", raising=False)
    environment = supervisor.plan.service("agent", 1).environment
    assert environment["HTTP_PROXY"] == "http://proxy:3128"
    assert environment["NO_PROXY"] == "example.org,127.0.0.1,localhost,::1"
    assert environment["no_proxy"] == "127.0.0.1,localhost,::1"


@pytest.mark.parametrize(
    ("service", "sees"),
    [
        ("gateway", set()),
        ("agent", {"HERMESH_LLM_API_KEY"}),
        ("session", {"HERMESH_DATABASE_URL", "HERMESH_REDIS_URL"}),
        ("tool", {"HERMESH_OBJECT_STORE_URL", "AWS_SECRET_ACCESS_KEY"}),
        ("memory", {"HERMESH_DATABASE_URL"}),
    ],
)
def test_a_process_gets_only_the_secrets_it_needs(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch, service: str, sees: set[str]
) -> None:
    secrets = {
        "HERMESH_DATABASE_URL",
        "HERMESH_REDIS_URL",
        "HERMESH_OBJECT_STORE_URL",
        "HERMESH_LLM_API_KEY",
        "HERMESH_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
    }
    for name in secrets:
        monkeypatch.setenv(name, "from outside")
    environment = supervisor.plan.service(service, 1).environment
    assert secrets & environment.keys() == sees
    assert environment["HERMESH_MESH_TOKEN"] == supervisor.plan.mesh_token
    for part in supervisor.plan.parts():
        assert not (secrets | {"HERMESH_MESH_TOKEN"}) & part.environment.keys() - {"HERMESH_LLM_API_KEY"}
        assert part.service == "model" or "HERMESH_LLM_API_KEY" not in part.environment
    # Nothing secret is on a command line, where everybody may read it.
    words = " ".join(word for part in supervisor.plan.parts() for word in part.command)
    for secret in ("mesh-token", "postgresql-password", "valkey-password", "model-key", "api-key"):
        assert supervisor.folder.secret(secret) not in words


async def test_a_new_replica_gets_a_number_that_none_has(supervisor: Supervisor) -> None:
    async with asyncio.TaskGroup() as group:
        child = serving(supervisor, group)
        assert supervisor.free_number("tool") == 2
        assert supervisor.free_number("agent") == 1
        # One that is about to end still has its name, and so has one that an earlier supervisor left.
        child.stop()
        supervisor.leftovers["tool-2"] = Remembered("tool", "tool-2", 1, 1)
        assert supervisor.free_number("tool") == 3


async def test_of_several_model_backends_one_is_enough_to_start(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = "http://127.0.0.1:1/v1"
    async with ModelServer() as model:
        monkeypatch.setenv("HERMESH_LLM_BASE_URL", f"{gone}, {model.base_url}")
        settings = load(LauncherSettings)
        supervisor.plan = Plan(settings, supervisor.folder, supervisor.state.ports)
        await supervisor.check_external()
        wrong = {address: await problem() for service, address, problem in supervisor.plan.external()}
        assert wrong == {gone: "does not answer", model.base_url: ""}
    with pytest.raises(LaunchError, match=f"model at {gone} does not answer"):
        await supervisor.check_external()


@pytest.mark.parametrize(("first", "listen"), [("", ["0", "0"]), ("8101", ["8101", "8102"])])
def test_gateways_have_fixed_ports_where_a_balancer_needs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str, listen: list[str]
) -> None:
    monkeypatch.setenv("HERMESH_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("HERMESH_GATEWAY_PORT", first)
    made = Supervisor(load(LauncherSettings))
    try:
        specs = [made.plan.service("gateway", number) for number in (1, 2)]
        assert [spec.environment["HERMESH_LISTEN"] for spec in specs] == [f"127.0.0.1:{p}" for p in listen]
        assert made.plan.service("agent", 1).environment["HERMESH_LISTEN"] == "127.0.0.1:0"
        said = "hermesh: cannot listen on 127.0.0.1:8102: address already in use; free it or set X to another"
        explained = specs[1].explain(said) if specs[1].explain else ""
        assert ("8102: address already in use" in explained) == bool(first)
        assert ("HERMESH_GATEWAY_PORT" in explained) == bool(first)
    finally:
        made.close()
