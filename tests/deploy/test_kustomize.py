"""What `kubectl kustomize` makes of deploy/kubernetes/kustomize, and of the example with vLLM."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.deploy.chart import of_kind
from tools import kubectl, kustomize
from tools.kubectl import ROOT

FOLDER = ROOT / "deploy/kubernetes/kustomize"
EXAMPLE = ROOT / "deploy/kubernetes/examples/vllm"
FOREIGN = {"PodMonitor", "PrometheusRule", "HTTPRoute", "GRPCRoute", "Gateway", "InferencePool"}


@cache
def _built(folder: Path) -> str:
    done = kubectl.run("kubectl", "kustomize", str(folder))
    assert done.returncode == 0, done.stderr
    # It says so on stderr where something is deprecated.
    assert not done.stderr
    return done.stdout


def built(folder: Path) -> list[dict[str, Any]]:
    return [found for found in yaml.safe_load_all(_built(folder)) if found]


def of(objects: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    (found,) = (one for one in of_kind(objects, kind) if one["metadata"]["name"] == name)
    return found


@pytest.mark.parametrize("folder", [FOLDER / "mesh", FOLDER / "migrate", FOLDER / "example", EXAMPLE])
@pytest.mark.parametrize("version", ["1.34", "1.37"])
def test_kubernetes_takes_every_object(folder: Path, version: str) -> None:
    for one in built(folder):
        if one["kind"] not in FOREIGN:
            kubernetes_validate.validate(one, version, strict=True)


def test_the_files_are_what_the_chart_renders() -> None:
    for name, text in kustomize.render().items():
        assert (FOLDER / name).read_text() == text, f"{name}: make docs"


def test_nothing_of_helm_is_left_and_every_object_is_somewhere() -> None:
    rendered = kubectl.template(kustomize.NAME, kustomize.NAME, kustomize.VALUES)
    names = {(one["kind"], one["metadata"]["name"]) for one in rendered}
    files = [path for path in FOLDER.rglob("*.yaml") if path.name != "kustomization.yaml"]
    held = [one for path in files for one in yaml.safe_load_all(path.read_text())]
    found = [one for one in held if one["kind"] != "Namespace"]
    assert {(one["kind"], one["metadata"]["name"]) for one in found} == names
    assert len(found) == len(names)
    assert not [path for path in files if "helm" in path.read_text().lower()]


def test_the_mesh_of_an_overlay_is_its_own() -> None:
    objects = built(FOLDER / "example")
    agent = of(objects, "Deployment", "hermesh-agent")
    (container,) = agent["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "registry.example.com/hermesh:0.1.0"
    given = [one for one in container["env"] if one["name"] == "HERMESH_LLM_BASE_URL"]
    assert [one["value"] for one in given] == ["http://vllm.models.svc.cluster.local:8000/v1"]
    # An apply does not undo what an autoscaler did; what has none keeps its number.
    scaled = {one["spec"]["scaleTargetRef"]["name"] for one in of_kind(objects, "HorizontalPodAutoscaler")}
    assert scaled == {"hermesh-agent", "hermesh-gateway", "hermesh-session"}
    for one in of_kind(objects, "Deployment"):
        assert ("replicas" in one["spec"]) == (one["metadata"]["name"] not in scaled)
    assert of_kind(objects, "PodMonitor", "PrometheusRule")
    assert not of_kind(objects, "Job")


# The example with vLLM. Kinds of the Gateway API and its Inference Extension are checked here by hand, each
# field that the example uses: the schemas are in no package.


@pytest.fixture(scope="module")
def models() -> list[dict[str, Any]]:
    return built(EXAMPLE)


def servers(models: list[dict[str, Any]], labels: dict[str, str]) -> list[dict[str, Any]]:
    templates = [one["spec"]["template"] for one in of_kind(models, "Deployment")]
    return [one for one in templates if labels.items() <= one["metadata"]["labels"].items()]


def test_the_pool_has_all_servers_and_a_picker(models: list[dict[str, Any]]) -> None:
    pool = of(models, "InferencePool", "qwen")
    assert pool["apiVersion"] == "inference.networking.k8s.io/v1"
    assert pool["spec"].keys() == {"selector", "targetPorts", "endpointPickerRef"}
    assert pool["spec"]["selector"].keys() == {"matchLabels"}
    found = servers(models, pool["spec"]["selector"]["matchLabels"])
    assert len(found) == 2
    ports = {port["number"] for port in pool["spec"]["targetPorts"]}
    for template in found:
        assert {port["containerPort"] for port in template["spec"]["containers"][0]["ports"]} == ports
    reference = pool["spec"]["endpointPickerRef"]
    assert reference.keys() == {"kind", "name", "port", "failureMode"}
    assert reference["failureMode"] in ("FailOpen", "FailClose")
    service = of(models, reference["kind"], reference["name"])
    assert reference["port"]["number"] in {port["port"] for port in service["spec"]["ports"]}
    (picker,) = servers(models, service["spec"]["selector"])
    (container,) = picker["spec"]["containers"]
    assert f"--pool-name={pool['metadata']['name']}" in container["args"]
    assert f"--pool-group={pool['apiVersion'].partition('/')[0]}" in container["args"]
    (config,) = of_kind(models, "ConfigMap")
    plugins = yaml.safe_load(config["data"]["config.yaml"])
    known = {plugin["type"] for plugin in plugins["plugins"]}
    assert {
        one["pluginRef"] for profile in plugins["schedulingProfiles"] for one in profile["plugins"]
    } == known


def test_the_route_leads_to_the_pool_without_a_time_limit(models: list[dict[str, Any]]) -> None:
    (route,) = of_kind(models, "HTTPRoute")
    (gateway,) = of_kind(models, "Gateway")
    assert route["spec"]["parentRefs"] == [{"name": gateway["metadata"]["name"]}]
    (rule,) = route["spec"]["rules"]
    assert rule["timeouts"] == {"request": "0s", "backendRequest": "0s"}
    (backend,) = rule["backendRefs"]
    pool = of(models, backend["kind"], backend["name"])
    assert backend["group"] == pool["apiVersion"].partition("/")[0]


def test_servers_are_of_two_quantizations_and_one_name(models: list[dict[str, Any]]) -> None:
    values = yaml.safe_load((EXAMPLE / "values.yaml").read_text())
    seen = set()
    for template in servers(models, {"models": "qwen"}):
        (container,) = template["spec"]["containers"]
        model, *flags = container["args"]
        given = dict(flag.removeprefix("--").partition("=")[::2] for flag in flags)
        assert given["served-model-name"] == values["model"]["name"]
        assert int(given["max-model-len"]) == values["agent"]["env"]["HERMESH_LLM_CONTEXT_TOKENS"]
        assert {"enable-prefix-caching", "enable-chunked-prefill", "max-num-seqs"} <= given.keys()
        assert given["quantization"].partition("_")[0] in model.lower()
        seen.add(given["quantization"])
        before = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert before < template["spec"]["terminationGracePeriodSeconds"]
    assert seen == {"awq_marlin", "gptq_marlin"}


def test_the_chart_takes_the_examples_values_and_asks_what_is_there(models: list[dict[str, Any]]) -> None:
    values = yaml.safe_load((EXAMPLE / "values.yaml").read_text())
    rendered = kubectl.template("demo", "agents", values | {"secrets": {"existingSecret": "x"}})
    agent = of(rendered, "Deployment", "demo-hermesh-agent")["spec"]["template"]["spec"]["containers"][0]
    (url,) = (one["value"] for one in agent["env"] if one["name"] == "HERMESH_LLM_BASE_URL")
    gateway, plain = url.split()
    (made,) = of_kind(models, "Gateway")
    assert gateway.startswith(f"http://{made['metadata']['name']}.models.svc.cluster.local/")
    service = of(models, "Service", "vllm")
    assert plain.startswith(f"http://vllm.models.svc.cluster.local:{service['spec']['ports'][0]['port']}/")
    assert len(servers(models, service["spec"]["selector"])) == 2
