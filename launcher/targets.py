"""Where Prometheus finds the mesh of one machine: a file for `file_sd_configs`, in step with what runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from launcher.children import Child
from launcher.folder import write_private


def render(children: Iterable[Child], addresses: Mapping[str, str]) -> str:
    """The file: a group a process.

    A process that died keeps its place until it says anew where it is, so that Prometheus sees it down.
    Its `instance` is its name, which a new port does not change.
    """
    groups: list[dict[str, Any]] = []
    for child in sorted(children, key=lambda one: one.spec.replica):
        if child.stopping:
            continue
        if child.metrics_address:
            groups.append(_group(child.metrics_address, child.spec.replica))
        elif child.spec.service == "envoy" and "envoy_metrics" in addresses:
            group = _group(addresses["envoy_metrics"], child.spec.replica)
            group["labels"]["__metrics_path__"] = "/stats/prometheus"
            groups.append(group)
    return json.dumps(groups, indent=1) + "\n"


def _group(address: str, replica: str) -> dict[str, Any]:
    return {"targets": [address], "labels": {"instance": replica}}


def write(path: Path, children: Iterable[Child], addresses: Mapping[str, str]) -> None:
    """Replaces the file where it says something else. Raises OSError."""
    text = render(children, addresses)
    if not path.exists() or path.read_text() != text:
        write_private(path, text)
