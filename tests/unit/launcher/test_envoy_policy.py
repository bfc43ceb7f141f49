from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher import envoy
from launcher.envoy import Policy
from launcher.settings import LauncherSettings

PORTS = {"http_port": 1024, "grpc_port": 1025, "mesh_port": 1026}


def rendered(tmp_path: Path, policy: Policy | None) -> dict[str, Any]:
    chosen = {} if policy is None else {"agent_policy": policy}
    text = envoy.render_local(eds=tmp_path, admin_socket=tmp_path / "a.sock", **PORTS, **chosen)
    found: dict[str, Any] = yaml.safe_load(text)["static_resources"]
    return found


def agent_routes(config: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        route["route"]
        for listener in config["listeners"]
        for host in listener["filter_chains"][0]["filters"][0]["typed_config"]["route_config"][
            "virtual_hosts"
        ]
        for route in host["routes"]
        if route.get("route", {}).get("cluster") == "agent"
    ]


@pytest.mark.parametrize(
    ("policy", "name", "more"),
    [
        (None, "LOAD_BALANCING_POLICY_CONFIG", {"load_balancing_policy"}),
        (Policy.LEAST_REQUEST, "LEAST_REQUEST", set()),
        (Policy.LEAST_REQUEST_FULL_SCAN, "LOAD_BALANCING_POLICY_CONFIG", {"load_balancing_policy"}),
        (Policy.ROUND_ROBIN, "ROUND_ROBIN", set()),
        (Policy.RANDOM, "RANDOM", set()),
        (Policy.RING_HASH, "RING_HASH", {"ring_hash_lb_config"}),
        (Policy.RING_HASH_BOUNDED, "RING_HASH", {"ring_hash_lb_config"}),
    ],
)
def test_a_policy_is_for_the_agents_alone(
    tmp_path: Path, policy: Policy | None, name: str, more: set[str]
) -> None:
    config = rendered(tmp_path, policy)
    clusters = {cluster["name"]: cluster for cluster in config["clusters"]}
    agent = clusters.pop("agent")
    assert agent["lb_policy"] == name
    assert {key for key in agent if key in ("load_balancing_policy", "ring_hash_lb_config")} == more
    assert {cluster["lb_policy"] for cluster in clusters.values()} == {"LOAD_BALANCING_POLICY_CONFIG"}
    bounded = "consistent_hashing_lb_config" in agent["common_lb_config"]
    assert bounded == (policy is Policy.RING_HASH_BOUNDED)
    hashed = policy in (Policy.RING_HASH, Policy.RING_HASH_BOUNDED)
    routes = agent_routes(config)
    assert len(routes) == 2
    assert all(("hash_policy" in route) == hashed for route in routes)


@pytest.mark.parametrize("policy", list(Policy))
def test_envoy_accepts_every_policy(tmp_path: Path, policy: Policy) -> None:
    for cluster in envoy.CLUSTERS:
        envoy.write_endpoints(tmp_path, cluster, ["127.0.0.1:1"])
    config = tmp_path / "envoy.yaml"
    config.write_text(
        envoy.render_local(eds=tmp_path, admin_socket=tmp_path / "a.sock", **PORTS, agent_policy=policy)
    )
    envoy.validate(config)


def test_the_policy_is_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    assert LauncherSettings().agent_lb is Policy.LEAST_REQUEST_FULL_SCAN
    monkeypatch.setenv("HERMESH_AGENT_LB", "ring_hash_bounded")
    assert LauncherSettings().agent_lb is Policy.RING_HASH_BOUNDED
