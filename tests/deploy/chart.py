"""Renders the Helm chart with the real helm, and finds what it rendered."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from typing import Any

from tools import kubectl

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
    "prometheusRule": {"enabled": True},
    "gatewayApi": {"enabled": True, "parentRefs": [{"name": "edge"}], "hostnames": ["agents.example.com"]},
    "networkPolicy": {
        "clients": [{"namespaceSelector": {"matchLabels": {"edge": "true"}}}],
        "egress": {"gateway": [], "envoy": [], "session": _to(5432, 6379), "migrate": _to(5432)},
    },
}


def run_helm(*arguments: str, values: Mapping[str, Any]) -> subprocess.CompletedProcess[str]:
    """Runs a command of helm on the chart with these values."""
    return kubectl.run("helm", *arguments, values=values)


def render(values: Mapping[str, Any] = LEAST) -> list[dict[str, Any]]:
    """Every object of the chart, in helm's order. A refusal is a ValueError with helm's words."""
    return kubectl.template(RELEASE, NAMESPACE, values)


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
