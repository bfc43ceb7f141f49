"""The chart's objects for kustomize: what `deploy/kubernetes/kustomize` holds, rendered by `make docs`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from tools.kubectl import template

NAME = "hermesh"
_MADE = "# Made from the chart by `make docs`; docs/deploy/kubernetes.md says how it is used.\n"
# What an overlay replaces: see example/.
VALUES = {
    "secrets": {"existingSecret": "hermesh-secrets"},
    "model": {"baseUrl": "http://model.hermesh.svc.cluster.local:8000/v1"},
    "autoscaling": {name: {"enabled": True} for name in ("agent", "gateway", "session")},
    "podMonitor": {"enabled": True},
    "prometheusRule": {"enabled": True},
    "gatewayApi": {"enabled": True, "parentRefs": [{"name": "edge"}]},
}
# What is not for everybody is a component of its own; all that is left is the mesh.
_COMPONENTS = {
    "autoscaling": ("HorizontalPodAutoscaler",),
    "monitoring": ("PodMonitor", "PrometheusRule"),
    "gateway-api": ("HTTPRoute", "GRPCRoute"),
}


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as such, and no references."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def render() -> dict[str, str]:
    """Returns the files, by their names in the folder."""
    objects = [_plain(one) for one in template(NAME, NAME, VALUES)]
    job = [one for one in objects if one["kind"] == "Job"]
    files = {
        "migrate/migrate.yaml": _dump(job),
        "migrate/kustomization.yaml": _dump([_kustomization("Kustomization", ["migrate.yaml"])]),
        "mesh/mesh.yaml": _dump(
            [one for one in objects if one not in job and not _component_of(one["kind"])]
        ),
        "mesh/kustomization.yaml": _dump([_kustomization("Kustomization", ["mesh.yaml"])]),
    }
    for component in _COMPONENTS:
        of = [one for one in objects if _component_of(one["kind"]) == component]
        head = _kustomization("Component", [f"{component}.yaml"])
        if component == "autoscaling":
            # Each apply would undo what an autoscaler did.
            head["patches"] = [_without_replicas(one["spec"]["scaleTargetRef"]["name"]) for one in of]
        files[f"components/{component}/{component}.yaml"] = _dump(of)
        files[f"components/{component}/kustomization.yaml"] = _dump([head])
    return files


def _component_of(kind: str) -> str:
    return next((name for name, kinds in _COMPONENTS.items() if kind in kinds), "")


def _kustomization(kind: str, resources: Sequence[str]) -> dict[str, Any]:
    version = "v1alpha1" if kind == "Component" else "v1beta1"
    return {"apiVersion": f"kustomize.config.k8s.io/{version}", "kind": kind, "resources": list(resources)}


def _without_replicas(deployment: str) -> dict[str, Any]:
    return {
        "target": {"kind": "Deployment", "name": deployment},
        "patch": "- {op: remove, path: /spec/replicas}\n",
    }


def _plain(one: dict[str, Any]) -> dict[str, Any]:
    """An object without what only helm reads, and with the replicas that autoscalers begin with."""
    for meta in (one["metadata"], one.get("spec", {}).get("template", {}).get("metadata", {})):
        labels = meta.get("labels", {})
        for label in ("helm.sh/chart", "app.kubernetes.io/managed-by"):
            labels.pop(label, None)
        annotations = meta.get("annotations", {})
        for name in [name for name in annotations if name.startswith("helm.sh/")]:
            del annotations[name]
        if not annotations:
            meta.pop("annotations", None)
    if one["kind"] == "Deployment":
        one["spec"].setdefault("replicas", 2)
    return one


def _dump(objects: Sequence[dict[str, Any]]) -> str:
    return _MADE + yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, width=110)
