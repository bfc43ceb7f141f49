"""compose.yaml's services as pods of the small kubelet: their commands, variables, users, files and signals.

Compose's stores are those of the tests, on the node. What is not proven: images, volumes that stay, limits,
and Docker's name server, for which the kubelet's stands, by the same names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.chart import NAMESPACE
from tests.deploy.debian import debian
from tests.deploy.kubelet import NODE, Node
from tools.kubectl import ROOT

STORES = ("postgresql", "redis", "model")
# Of whom the images are: our own, Envoy's and HAProxy's.
_USERS = {"envoy": 101, "edge": 99}
_OUR_USER = 10001
_DOCKERS_NAMES = "127.0.0.11:53"
_VARIABLE = re.compile(r"\$\{(\w+)(?:(:-|:\?)([^}]*))?\}")


def read(environment: Mapping[str, str]) -> dict[str, Any]:
    """Returns compose.yaml's services with the variables of an environment in them.

    Raises:
        ValueError: One that is needed is not there.
    """

    def value(found: re.Match[str]) -> str:
        name, kind, text = found.groups()
        given = environment.get(name, "")
        if kind == ":?" and not given:
            raise ValueError(f"{name}: {text}")
        return given or (text if kind == ":-" else "")

    services: dict[str, Any] = yaml.safe_load(_VARIABLE.sub(value, (ROOT / "compose.yaml").read_text()))
    return services["services"]


def workload(name: str, service: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a service as a Deployment's pod template, as far as the kubelet reads it."""
    user = _USERS.get(name, _OUR_USER)
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    volumes = [*_volumes(name, service)]
    restart = {"restartPolicy": "OnFailure"} if service["restart"] == "no" else {}
    environment = service.get("environment", {})
    return {
        "metadata": {"name": name},
        "spec": {
            "template": {
                "metadata": {"labels": {"app.kubernetes.io/component": name}},
                "spec": restart
                | {
                    "terminationGracePeriodSeconds": _seconds(service.get("stop_grace_period", "10s")),
                    "securityContext": {"runAsUser": user, "runAsGroup": user, "fsGroup": user},
                    "volumes": [volume for volume, _ in volumes],
                    "containers": [
                        {
                            "command": [*service.get("entrypoint", ()), *service["command"]],
                            # One without a value is passed on where it is set outside; here none is.
                            "env": [
                                {"name": key, "value": str(value)}
                                for key, value in environment.items()
                                if value is not None
                            ],
                            "securityContext": {"readOnlyRootFilesystem": True},
                            "volumeMounts": [mount for _, mount in volumes],
                        }
                    ],
                },
            }
        },
    }


def _seconds(text: str) -> int:
    return int(text.removesuffix("s"))


def _volumes(name: str, service: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
    for place in service.get("tmpfs", ()):
        volume = place.strip("/")
        yield {"name": volume, "emptyDir": {}}, {"name": volume, "mountPath": place}
    files = False
    for given in service.get("volumes", ()):
        source, target = given.split(":")[:2]
        if not source.startswith("."):
            yield {"name": source, "emptyDir": {}}, {"name": source, "mountPath": target}
        elif not files:
            files = True
            folder = target if (ROOT / source).is_dir() else str(Path(target).parent)
            yield {"name": "files", "configMap": {"name": name}}, {"name": "files", "mountPath": folder}


def files(service: Mapping[str, Any]) -> dict[str, str]:
    """Returns the texts of a service's bound files, by their names in it."""
    found: dict[str, str] = {}
    for given in service.get("volumes", ()):
        source, target = given.split(":")[:2]
        path = ROOT / source
        if not source.startswith("."):
            continue
        if path.is_dir():
            found |= {one.name: one.read_text() for one in path.iterdir()}
        else:
            found[Path(target).name] = path.read_text()
    return {name: text.replace(_DOCKERS_NAMES, f"{NODE}:53") for name, text in found.items()}


class Host(Node):
    """A machine with Docker, as far as compose.yaml asks for one."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Reads compose.yaml."""
        self.services = read(environment)
        objects: list[dict[str, Any]] = [
            {
                "kind": "Service",
                "metadata": {"name": name},
                "spec": {"selector": {"app.kubernetes.io/component": name}},
            }
            for name in self.services
        ]
        objects += [
            {"kind": "ConfigMap", "metadata": {"name": name}, "data": held}
            for name, service in self.services.items()
            if (held := files(service))
        ]
        super().__init__(objects, {})

    def publish(self) -> None:
        """Sets the names, without a domain for who looks for none."""
        super().publish()
        addresses = self._names.addresses
        within = f"{NAMESPACE}.svc.cluster.local."
        addresses |= {f"{name}.{within}": [NODE] for name in STORES}
        addresses |= {name.removesuffix(within): found for name, found in addresses.items()}

    def workload(self, name: str) -> dict[str, Any]:
        """Returns a service's workload; HAProxy's program is Debian's."""
        service = self.services[name]
        if service["command"][0] == "haproxy":
            service = service | {"command": [str(debian("haproxy", "haproxy")), *service["command"][1:]]}
        return workload(name, service)
