"""compose.yaml against the code: variables, commands, ports and Envoy's configuration fit together."""

import importlib.util
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.settings import GatewaySettings
from launcher import envoy
from launcher.settings import LauncherSettings
from meshkit.settings import MeshSettings, env_name
from services.agent.settings import AgentSettings
from services.memory.settings import MemorySettings
from services.session.settings import SessionSettings
from services.tool.settings import ToolSettings

ROOT = Path(__file__).resolve().parents[3]
SETTINGS: dict[str, type[MeshSettings]] = {
    "session": SessionSettings,
    "agent": AgentSettings,
    "tool": ToolSettings,
    "memory": MemorySettings,
    "gateway": GatewaySettings,
}
# The first tenant's key reaches `bootstrap` by the variable that its option names.
ALSO = {
    "migrate": {"HERMESH_API_KEY"},
    "model": {"HERMESH_LLM_API_KEY"},
    "tool": {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_ENDPOINT_URL"},
}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
    return loaded


def variables(service: dict[str, Any]) -> dict[str, str]:
    # One without a value is passed on as it is outside, or not at all.
    return {name: str(value or "") for name, value in (service.get("environment") or {}).items()}


@pytest.mark.parametrize("name", [*SETTINGS, "migrate", "model"])
def test_every_variable_is_one_that_the_process_reads(compose: dict[str, Any], name: str) -> None:
    known = set(ALSO.get(name, set()))
    for settings in [SETTINGS[name]] if name in SETTINGS else [SessionSettings] if name == "migrate" else []:
        known |= {env_name(settings, field) for field in settings.model_fields}
    given = variables(compose["services"][name])
    assert given
    assert set(given) <= known


@pytest.mark.parametrize("name", SETTINGS)
def test_the_values_are_accepted(compose: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in variables(compose["services"][name]).items():
        chosen = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value)
        monkeypatch.setenv(variable, re.sub(r"\$\{\w+:\?[^}]*\}", "secret", chosen))
    settings = SETTINGS[name]()
    assert settings.mesh_address == "envoy:50052"
    assert settings.listen.endswith(":8080" if name == "gateway" else ":50051")


def test_the_commands_exist(compose: dict[str, Any]) -> None:
    commands = [
        str(part)
        for service in compose["services"].values()
        for part in [service.get("command") or []]
        if "services." in str(part) or "gateway" in str(part) or "launcher" in str(part)
    ]
    modules = {
        name for text in commands for name in re.findall(r"\b(services\.\w+|gateway|launcher\.model)\b", text)
    }
    assert modules == {
        *(f"services.{name}" for name in SETTINGS if name != "gateway"),
        "gateway",
        "launcher.model",
    }
    for module in modules:
        assert importlib.util.find_spec(module if module == "launcher.model" else f"{module}.__main__")


def test_envoys_endpoints_are_the_services_and_their_ports(compose: dict[str, Any]) -> None:
    config = yaml.safe_load((ROOT / "deploy/envoy/compose.yaml").read_text())
    *clusters, admin = config["static_resources"]["clusters"]
    assert admin["name"] == "admin"
    assert [cluster["name"] for cluster in clusters] == list(envoy.CLUSTERS)
    for cluster in clusters:
        [endpoint] = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
        place = endpoint["endpoint"]["address"]["socket_address"]
        assert place["address"] in compose["services"]
        listen = variables(compose["services"][place["address"]])["HERMESH_LISTEN"]
        assert listen.rpartition(":")[2] == str(place["port_value"])
    ports = {
        listener["name"]: listener["address"]["socket_address"]["port_value"]
        for listener in config["static_resources"]["listeners"]
    }
    published = compose["services"]["edge"]["ports"]
    for name, field in (("http", "http_port"), ("grpc", "grpc_port")):
        default = LauncherSettings.model_fields[field].default
        assert f"127.0.0.1:${{{env_name(LauncherSettings, field)}:-{default}}}:{ports[name]}" in published
    assert variables(compose["services"]["session"])["HERMESH_MESH_ADDRESS"] == f"envoy:{ports['mesh']}"
    assert not any(str(ports["mesh"]) in port for port in published)
    assert variables(compose["services"]["gateway"])["HERMESH_ENVOY_STATUS_PORT"] == str(ports["status"])
    assert "ports" not in compose["services"]["envoy"]
    edge = (ROOT / "deploy/haproxy/compose.cfg").read_text()
    for name, place in (("http", "8080"), ("grpc", "50051")):
        assert f"bind :{place}" in edge
        assert f"envoy:{ports[name]} " in edge


def test_the_rendered_file_is_what_the_templates_say() -> None:
    assert (ROOT / "deploy/envoy/compose.yaml").read_text() == envoy.render_compose()


def test_envoy_accepts_both_renderings(tmp_path: Path) -> None:
    eds = tmp_path / "eds"
    eds.mkdir()
    for cluster in envoy.CLUSTERS:
        envoy.write_endpoints(eds, cluster, ["127.0.0.1:1"])
    local = tmp_path / "local.yaml"
    local.write_text(
        envoy.render_local(
            eds=eds, admin_socket=tmp_path / "a.sock", http_port=1024, grpc_port=1025, mesh_port=1026
        )
    )
    envoy.validate(local)
    envoy.validate(ROOT / "deploy/envoy/compose.yaml")


def test_secrets_have_no_default(compose: dict[str, Any]) -> None:
    text = (ROOT / "compose.yaml").read_text()
    for name in ("POSTGRES_PASSWORD", "HERMESH_MESH_TOKEN", "HERMESH_API_KEY"):
        assert re.search(rf"\${{{name}:\?", text)
        assert not re.search(rf"\${{{name}:-", text)
        assert f"{name}=" in (ROOT / "deploy/docker/env.example").read_text()


def test_the_image_gets_what_the_build_needs() -> None:
    copied = {
        source
        for line in (ROOT / "deploy/docker/Dockerfile").read_text().splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
    }
    assert all((ROOT / source).exists() for source in copied)
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {
        *wheel["packages"],
        *wheel["force-include"],
        "pyproject.toml",
        "uv.lock",
        "README.md",
        "LICENSE",
    }
    assert {path for path in needed if not any(f"{path}/".startswith(f"{c}/") for c in copied)} == set()
