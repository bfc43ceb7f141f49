"""The Helm chart: its objects are what Kubernetes takes, and fit each other and the code."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from gateway.settings import GatewaySettings
from launcher import envoy
from meshkit.settings import MeshSettings, env_name
from meshkit.variables import secret_files
from services.agent import metrics
from services.agent.settings import AgentSettings
from services.memory.settings import MemorySettings
from services.session.settings import SessionSettings
from services.tool.settings import ToolSettings
from tests.deploy.chart import ALL, LEAST, SECRET, named, of_kind, render, run_helm, template_of
from tools.kubectl import CHART, ROOT

SERVICES: dict[str, type[MeshSettings]] = {
    "session": SessionSettings,
    "agent": AgentSettings,
    "tool": ToolSettings,
    "memory": MemorySettings,
    "gateway": GatewaySettings,
}
# Kinds that Kubernetes itself does not know.
FOREIGN = ("PodMonitor", "PrometheusRule", "HTTPRoute", "GRPCRoute")
VALUES = {"least": LEAST, "all": ALL}


@pytest.fixture(scope="module", params=VALUES)
def objects(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return render(VALUES[request.param])


def pods(objects: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for workload in of_kind(objects, "Deployment", "Job"):
        yield workload["metadata"]["labels"]["app.kubernetes.io/component"], template_of(workload)


def selected(objects: list[dict[str, Any]], labels: dict[str, str]) -> list[dict[str, Any]]:
    assert labels
    return [
        template for _, template in pods(objects) if labels.items() <= template["metadata"]["labels"].items()
    ]


def ports(template: dict[str, Any]) -> set[str]:
    return {
        port["name"] for container in template["spec"]["containers"] for port in container.get("ports", ())
    }


def test_helm_lints_it_strictly() -> None:
    done = run_helm("lint", "--strict", str(CHART), values=LEAST)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("version", ["1.34", "1.35", "1.36", "1.37"])
def test_kubernetes_takes_every_object(objects: list[dict[str, Any]], version: str) -> None:
    for one in objects:
        if one["kind"] not in FOREIGN:
            kubernetes_validate.validate(one, version, strict=True)


def test_no_two_objects_have_the_same_name(objects: list[dict[str, Any]]) -> None:
    names = [(one["kind"], one["metadata"]["name"]) for one in objects]
    assert len(names) == len(set(names))
    assert all(one["metadata"]["namespace"] == "agents" for one in objects)


def test_every_selector_finds_its_pods(objects: list[dict[str, Any]]) -> None:
    for one in of_kind(objects, "Deployment", "PodDisruptionBudget"):
        assert len(selected(objects, one["spec"]["selector"]["matchLabels"])) == 1, one["metadata"]["name"]
    for one in of_kind(objects, "Service"):
        assert len(selected(objects, one["spec"]["selector"])) == 1, one["metadata"]["name"]
    for one in of_kind(objects, "NetworkPolicy"):
        assert len(selected(objects, one["spec"]["podSelector"]["matchLabels"])) == 1, one["metadata"]["name"]
    for _, template in pods(objects):
        for constraint in template["spec"].get("topologySpreadConstraints", ()):
            found = selected(objects, constraint["labelSelector"]["matchLabels"])
            assert found == [template]
    for one in of_kind(objects, "PodMonitor"):
        # All but the job, which is over before anybody could ask it.
        assert len(selected(objects, one["spec"]["selector"]["matchLabels"])) == 7


def test_every_port_is_one_that_its_pod_has(objects: list[dict[str, Any]]) -> None:
    for one in of_kind(objects, "Service"):
        (template,) = selected(objects, one["spec"]["selector"])
        assert {port["targetPort"] for port in one["spec"]["ports"]} <= ports(template)
    for one in of_kind(objects, "NetworkPolicy"):
        (template,) = selected(objects, one["spec"]["podSelector"]["matchLabels"])
        allowed = {port["port"] for rule in one["spec"]["ingress"] for port in rule["ports"]}
        assert allowed == ports(template)
        for rule in one["spec"].get("egress", ()):
            for peer in rule["to"]:
                if "podSelector" in peer and "namespaceSelector" not in peer:
                    called = selected(objects, peer["podSelector"]["matchLabels"])
                    assert called, one["metadata"]["name"]
                    assert any({port["port"] for port in rule["ports"]} & ports(each) for each in called)
    for one in of_kind(objects, "PodMonitor"):
        assert {end["port"] for end in one["spec"]["podMetricsEndpoints"]} == {"metrics"}
    for _, template in pods(objects):
        for container in template["spec"]["containers"]:
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                asked = container.get(probe, {})
                port = (asked.get("httpGet") or asked.get("tcpSocket") or {}).get("port")
                assert port is None or port in ports(template)


def test_a_service_is_called_by_envoy_and_by_nobody_else(objects: list[dict[str, Any]]) -> None:
    for name in SERVICES:
        calls, _ = named(objects, "NetworkPolicy", name)["spec"]["ingress"]
        (peer,) = calls["from"]
        (template,) = selected(objects, peer["podSelector"]["matchLabels"])
        assert template["metadata"]["labels"]["app.kubernetes.io/component"] == "envoy"


def test_who_may_call_what_is_limited_where_the_values_say_so(objects: list[dict[str, Any]]) -> None:
    limited = {}
    for name in (*SERVICES, "envoy", "migrate"):
        spec = named(objects, "NetworkPolicy", name)["spec"]
        assert ("egress" in spec) == ("Egress" in spec["policyTypes"])
        if "egress" in spec:
            limited[name] = [[port["port"] for port in rule["ports"]] for rule in spec["egress"]]
    assert limited in (
        {},
        {
            "gateway": [[53, 53], ["mesh"]],
            "envoy": [[53, 53], ["http", "grpc"]],
            "session": [[53, 53], ["mesh"], [5432, 6379]],
            "migrate": [[53, 53], [5432]],
        },
    )


def test_routes_and_autoscalers_name_what_is_there(objects: list[dict[str, Any]]) -> None:
    for route in of_kind(objects, "HTTPRoute", "GRPCRoute"):
        for rule in route["spec"]["rules"]:
            for backend in rule["backendRefs"]:
                service = next(
                    one for one in of_kind(objects, "Service") if one["metadata"]["name"] == backend["name"]
                )
                assert backend["port"] in {port["port"] for port in service["spec"]["ports"]}
    for scaler in of_kind(objects, "HorizontalPodAutoscaler"):
        target = scaler["spec"]["scaleTargetRef"]["name"]
        deployment = next(one for one in of_kind(objects, "Deployment") if one["metadata"]["name"] == target)
        # Otherwise each install would undo what the autoscaler did.
        assert "replicas" not in deployment["spec"]
        assert scaler["spec"]["minReplicas"] <= scaler["spec"]["maxReplicas"]
        requests = template_of(deployment)["spec"]["containers"][0]["resources"]["requests"]
        assert "cpu" in requests, "a share of the CPU needs a request to be a share of"


def test_the_adapters_rule_makes_the_metric_that_the_autoscaler_asks_for() -> None:
    scaler = named(render(ALL), "HorizontalPodAutoscaler", "agent")["spec"]
    (asked,) = (one["pods"]["metric"]["name"] for one in scaler["metrics"] if one["type"] == "Pods")
    adapter = yaml.safe_load((ROOT / "deploy/kubernetes/prometheus-adapter.yaml").read_text())
    (rule,) = adapter["rules"]["custom"]
    (exported,) = metrics.active_runs.collect()
    assert rule["name"]["as"] == exported.name == asked
    assert rule["seriesQuery"].startswith(f"{exported.name}{{")
    assert rule["resources"]["overrides"].keys() == {"namespace", "pod"}


def test_every_volume_config_and_account_exists(objects: list[dict[str, Any]]) -> None:
    configs = {one["metadata"]["name"] for one in of_kind(objects, "ConfigMap")}
    accounts = {one["metadata"]["name"] for one in of_kind(objects, "ServiceAccount")}
    for component, template in pods(objects):
        spec = template["spec"]
        volumes = {volume["name"] for volume in spec["volumes"]}
        mounts = {mount["name"] for one in spec["containers"] for mount in one["volumeMounts"]}
        assert mounts == volumes
        assert {one["configMap"]["name"] for one in spec["volumes"] if "configMap" in one} <= configs
        if component == "migrate":
            # It runs before anything of the chart is there.
            assert "serviceAccountName" not in spec
        else:
            assert spec["serviceAccountName"] in accounts


def test_secrets_come_by_reference_and_only_to_who_needs_them(objects: list[dict[str, Any]]) -> None:
    assert not of_kind(objects, "Secret")
    seen: dict[str, set[str]] = {}
    for component, template in pods(objects):
        (container,) = template["spec"]["containers"]
        given = {one["name"]: one.get("value", "") for one in container.get("env", ())}
        assert not secret_files().keys() & {f"{name}_FILE" for name in given}, "a secret in the environment"
        files = {name: path for name, path in given.items() if name in secret_files()}
        held = [one["secret"] for one in template["spec"]["volumes"] if "secret" in one]
        assert len(held) == bool(files)
        for secret in held:
            assert secret["secretName"] == SECRET
            # Readable by its group, which fsGroup makes the pod's own, and written by nobody.
            assert secret["defaultMode"] == 0o440
            assert template["spec"]["securityContext"]["fsGroup"] == 10001
            mount = next(one["mountPath"] for one in container["volumeMounts"] if one["name"] == "secrets")
            assert sorted(f"{mount}/{one['path']}" for one in secret["items"]) == sorted(files.values())
        for name in files:
            seen.setdefault(secret_files()[name], set()).add(component)
    # Only where its key is named.
    assert seen.pop("HERMESH_LLM_API_KEY", {"agent"}) == {"agent"}
    assert seen == {
        "HERMESH_MESH_TOKEN": set(SERVICES),
        "HERMESH_DATABASE_URL": {"session", "memory", "migrate"},
        "HERMESH_REDIS_URL": {"session"},
        "HERMESH_API_KEY": {"migrate"},
    }


def test_redis_and_a_models_key_may_be_left_out() -> None:
    keys = {"redisUrl": "", "llmApiKey": "the-key"}
    one = render({**LEAST, "secrets": {"existingSecret": SECRET, "keys": keys}})
    for component, named_there in (("session", "REDIS_URL_FILE"), ("agent", "LLM_API_KEY_FILE")):
        given = template_of(named(one, "Deployment", component))["spec"]["containers"][0]["env"]
        assert any(named_there in each["name"] for each in given) == (component == "agent")


def test_addresses_beside_the_stores_own_go_to_who_reads_them() -> None:
    keys = {"databaseDirectUrl": "direct", "databaseStandbyUrl": "standby", "redisReadFrom": "read-from"}
    rendered = render({**LEAST, "secrets": {"existingSecret": SECRET, "keys": keys}})
    seen: dict[str, set[str]] = {}
    for component, template in pods(rendered):
        for one in template["spec"]["containers"][0].get("env", ()):
            key = str(one.get("value", "")).rpartition("/")[2]
            if key in keys.values():
                seen.setdefault(secret_files()[one["name"]], set()).add(component)
    assert seen == {
        "HERMESH_DATABASE_DIRECT_URL": {"session", "memory", "migrate"},
        "HERMESH_DATABASE_STANDBY_URL": {"session"},
        "HERMESH_REDIS_READ_FROM": {"session"},
    }


def test_the_alerts_are_those_that_prometheus_is_given_elsewhere() -> None:
    (rule,) = of_kind(render(ALL), "PrometheusRule")
    assert rule["spec"] == yaml.safe_load((ROOT / "deploy/prometheus/hermesh.rules.yml").read_text())
    # Its rules ask for this name in the job, which is namespace/name of the PodMonitor.
    (monitor,) = of_kind(render(ALL), "PodMonitor")
    assert "hermesh" in monitor["metadata"]["name"]


@pytest.mark.parametrize("name", SERVICES)
def test_every_variable_is_a_setting_whose_value_is_accepted(
    objects: list[dict[str, Any]], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    container = template_of(named(objects, "Deployment", name))["spec"]["containers"][0]
    settings = SERVICES[name]
    known = {env_name(settings, field) for field in settings.model_fields}
    given = {variable["name"]: variable.get("value", "") for variable in container["env"]}
    # A default of the values goes to every service, also to those that do not read it.
    extra = {"HERMESH_MAX_STREAMS"} if "HERMESH_MAX_STREAMS" in given else set()
    assert set(given) - known - secret_files().keys() <= extra
    for variable in given.keys() - secret_files().keys():
        monkeypatch.setenv(variable, given[variable])
    loaded = settings()
    assert loaded.mesh_address == "demo-hermesh-mesh.agents.svc.cluster.local:50052"
    assert loaded.listen == ("0.0.0.0:8080" if name == "gateway" else "0.0.0.0:50051")
    assert container["command"] == ["python", "-m", "gateway" if name == "gateway" else f"services.{name}"]
    if "HERMESH_MAX_STREAMS" in given:
        assert given["HERMESH_MAX_STREAMS"] == "1048576"


def test_a_pod_has_time_for_its_drain(objects: list[dict[str, Any]]) -> None:
    for component, template in pods(objects):
        grace = template["spec"].get("terminationGracePeriodSeconds")
        if component in SERVICES:
            given = {one["name"]: one.get("value") for one in template["spec"]["containers"][0]["env"]}
            delay = float(given["HERMESH_DRAIN_DELAY_SECONDS"])
            # A check each second, two of which have to fail, and one that is late.
            assert delay >= 2.5
            assert grace > delay + float(given["HERMESH_DRAIN_SECONDS"])
        elif component == "envoy":
            (drain,) = template["spec"]["containers"][0]["env"]
            assert drain["name"] == "HERMESH_ENVOY_DRAIN_SECONDS"
            assert grace > int(drain["value"])


def test_pods_may_do_nothing_that_they_do_not_need(objects: list[dict[str, Any]]) -> None:
    for _, template in pods(objects):
        spec = template["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] >= 10_000
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["limits"]["memory"]
            assert container["resources"]["requests"]["memory"]


def test_envoy_reads_its_configuration(objects: list[dict[str, Any]], tmp_path: Path) -> None:
    text = named(objects, "ConfigMap", "envoy")["data"]["envoy.yaml"]
    config = tmp_path / "envoy.yaml"
    config.write_text(text)
    envoy.validate(config)
    services = {one["metadata"]["name"] for one in of_kind(objects, "Service")}
    loaded = yaml.safe_load(text)
    asked = {
        cluster["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"][
            "socket_address"
        ]["address"]
        for cluster in loaded["static_resources"]["clusters"]
    } - {"127.0.0.1"}
    assert {host.partition(".")[0] for host in asked} == {f"demo-hermesh-{name}" for name in SERVICES}
    assert {host.partition(".")[0] for host in asked} <= services
    assert all(host.endswith(".agents.svc.cluster.local") for host in asked)
    (template,) = (template for component, template in pods(objects) if component == "envoy")
    listening = {
        listener["address"]["socket_address"]["port_value"]
        for listener in loaded["static_resources"]["listeners"]
    }
    assert listening == {port["containerPort"] for port in template["spec"]["containers"][0]["ports"]}


def test_an_edge_that_refuses_outsiders_stays_ready_and_is_not_ended(objects: list[dict[str, Any]]) -> None:
    """Calls between services go through the same pods; out of their Service, or ended, they would be lost."""
    config = yaml.safe_load(named(objects, "ConfigMap", "envoy")["data"]["envoy.yaml"])
    (status,) = (one for one in config["static_resources"]["listeners"] if one["name"] == "status")
    assert status["ignore_global_conn_limit"]
    assert status["bypass_overload_manager"]
    monitors = config["overload_manager"]["resource_monitors"]
    (heap,) = (one["typed_config"] for one in monitors if one["name"].endswith("fixed_heap"))
    (template,) = (template for component, template in pods(objects) if component == "envoy")
    limit = template["spec"]["containers"][0]["resources"]["limits"]["memory"]
    assert limit.endswith("Mi")
    assert heap["max_heap_size_bytes"] <= 0.8 * int(limit.removesuffix("Mi")) * 1024 * 1024


def test_another_configuration_of_envoy_is_another_envoy() -> None:
    def checksum(values: dict[str, Any]) -> str:
        template = template_of(named(render(values), "Deployment", "envoy"))
        found: str = template["metadata"]["annotations"]["checksum/config"]
        return found

    assert checksum(LEAST) == checksum({**LEAST, "tenant": "other"})
    assert checksum(LEAST) != checksum({**LEAST, "clusterDomain": "example.internal"})


def test_without_policies_and_budgets_of_ones_own() -> None:
    off = render(
        {**LEAST, "networkPolicy": {"enabled": False}, "podDisruptionBudget": {"maxUnavailable": "25%"}}
    )
    assert not of_kind(off, "NetworkPolicy")
    assert {one["spec"]["maxUnavailable"] for one in of_kind(off, "PodDisruptionBudget")} == {"25%"}


def test_a_service_may_differ_from_the_defaults() -> None:
    one = render({**LEAST, "agent": {"replicas": 5, "env": {"HERMESH_LLM_CONTEXT_TOKENS": 32768}}})
    agent = named(one, "Deployment", "agent")
    assert agent["spec"]["replicas"] == 5
    given = template_of(agent)["spec"]["containers"][0]["env"]
    assert {"name": "HERMESH_LLM_CONTEXT_TOKENS", "value": "32768"} in given
    assert named(one, "Deployment", "tool")["spec"]["replicas"] == 2


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model": LEAST["model"]}, "secrets.existingSecret is not set"),
        ({"secrets": LEAST["secrets"]}, "model.baseUrl is not set"),
        ({**LEAST, "model": {"baseUrl": "tcp://models:8000"}}, "/model/baseUrl"),
        ({**LEAST, "agent": {"replica": 3}}, "replica"),
        ({**LEAST, "defaults": {"env": {"hermesh-level": "x"}}}, "hermesh-level"),
        ({**LEAST, "image": {"repository": "h", "digest": "abc"}}, "/image/digest"),
        ({**LEAST, "envoy": {"service": {"type": "Loadbalancer"}}}, "/envoy/service/type"),
        ({**LEAST, "gatewayApi": {"enabled": True}}, "gatewayApi.parentRefs is empty"),
        (
            {**LEAST, "autoscaling": {"agent": {"enabled": True, "minReplicas": 30}}},
            "autoscaling.agent: minReplicas 30 is more than maxReplicas 20",
        ),
    ],
)
def test_wrong_values_are_refused_by_name(values: dict[str, Any], said: str) -> None:
    done: subprocess.CompletedProcess[str] = run_helm("template", "demo", str(CHART), values=values)
    assert done.returncode != 0
    assert said in done.stderr
