"""kubectl and helm for pages whose cluster is not here: what they would send is made and checked.

    python -m tests.deploy.cluster_tools kubectl|helm ARGUMENTS...

What came of it is kept in the folder that HERMESH_TEST_OBJECTS names, a file for each command, so that later
commands can only name objects that earlier ones made.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

from tools import kubectl

VERSION = "1.37"
# Kinds of others, whose schemas are in no package.
FOREIGN = {"PodMonitor", "HTTPRoute", "GRPCRoute", "Gateway", "InferencePool", "PrometheusRule"}
# What pods come from: a command may name it or its pods.
_SHORT = {"job": "Job", "service": "Service", "svc": "Service", "deployment": "Deployment"}


class Wrong(Exception):
    """A command that no cluster would take as it stands."""


def _kept(folder: Path) -> list[dict[str, Any]]:
    return [one for path in sorted(folder.glob("*.json")) for one in json.loads(path.read_text())]


def _keep(folder: Path, objects: Iterable[dict[str, Any]]) -> None:
    found = [one for one in objects if one]
    if not found:
        raise Wrong("it makes nothing")
    for one in found:
        if one["kind"] not in FOREIGN:
            kubernetes_validate.validate(one, VERSION, strict=True)
        print(f"{one['kind'].lower()}/{one['metadata']['name']} is well formed")
    number = len(list(folder.glob("*.json")))
    (folder / f"{number:03d}.json").write_text(json.dumps(found))


def _run(name: Any, *arguments: str) -> list[dict[str, Any]]:
    done = kubectl.run(name, *arguments)
    if done.returncode:
        raise Wrong(done.stderr.strip())
    return list(yaml.safe_load_all(done.stdout))


def _namespace(arguments: list[str]) -> list[str]:
    for flag in ("-n", "--namespace"):
        if flag in arguments:
            place = arguments.index(flag)
            return arguments[:place] + arguments[place + 2 :]
    return arguments


def run_kubectl(arguments: list[str], folder: Path) -> None:
    """One command of kubectl."""
    match _namespace(arguments):
        case ["create", *rest]:
            _keep(folder, _run("kubectl", "create", *rest, "--dry-run=client", "-o", "yaml"))
        case ["apply", "-k", place]:
            _keep(folder, _run("kubectl", "kustomize", place))
        case ["apply", "-f", "-"]:
            _keep(folder, yaml.safe_load_all(sys.stdin.read()))
        case ["apply", "-f", place]:
            _keep(folder, yaml.safe_load_all(Path(place).read_text()))
        case ["wait" | "port-forward" as verb, *rest]:
            # Its flags are kubectl's, and what it names is there by now.
            known = kubectl.run("kubectl", verb, "--help").stdout
            flags = [word.partition("=")[0] for word in rest if word.startswith("-")]
            if unknown := [flag for flag in flags if f"{flag}=" not in known]:
                raise Wrong(f"kubectl {verb} does not know {', '.join(unknown)}")
            named = [word for word in rest if "/" in word and not word.startswith("-")]
            for kind, _, name in (word.partition("/") for word in named):
                made = {(one["kind"], one["metadata"]["name"]) for one in _kept(folder)}
                if (_SHORT[kind], name) not in made:
                    raise Wrong(f"nothing has made {kind}/{name}")
            if not named:
                raise Wrong("it names nothing")
        case other:
            raise Wrong(f"this is not known here: kubectl {' '.join(other)}")


def run_helm(arguments: list[str], folder: Path) -> None:
    """`helm upgrade`, as `helm template` with the same values."""
    if arguments[0] != "upgrade":
        raise Wrong(f"this is not known here: helm {' '.join(arguments)}")
    rest = [word for word in arguments[1:] if word not in ("--install", "--wait", "--reuse-values")]
    before = folder / "values"
    if "--reuse-values" in arguments:
        if not before.exists():
            raise Wrong("there is no former release whose values it could use")
        rest += json.loads(before.read_text())
    before.write_text(json.dumps([word for word in rest[2:] if word not in rest[:2]]))
    _keep(folder, _run("helm", "template", *rest))


def main() -> int:
    """Runs one command; the status is 1 where a cluster would refuse it."""
    name, *arguments = sys.argv[1:]
    folder = Path(os.environ["HERMESH_TEST_OBJECTS"])
    try:
        (run_kubectl if name == "kubectl" else run_helm)(arguments, folder)
    except (Wrong, kubernetes_validate.ValidationError, yaml.YAMLError, OSError) as error:
        print(f"{name} {' '.join(arguments)}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
