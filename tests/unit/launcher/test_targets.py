"""What Prometheus is told of a mesh on one machine."""

import json
import os
from pathlib import Path
from typing import Any

from launcher import targets
from launcher.children import Child
from launcher.plan import Spec


def child(replica: str, metrics: str = "", **more: Any) -> Child:
    spec = Spec(replica.rpartition("-")[0], replica, ["true"], {})
    return Child(spec, metrics_address=metrics, **more)


def places(text: str) -> dict[str, str]:
    return {group["labels"]["instance"]: group["targets"][0] for group in json.loads(text)}


def test_every_process_that_has_figures_is_there_by_its_name() -> None:
    children = [
        child("tool-1", "127.0.0.1:7001"),
        child("agent-2", "127.0.0.1:7002"),
        # It died, and has its place until it says anew where it is.
        child("agent-1", "127.0.0.1:7003", restarts=3),
        child("session-1", "127.0.0.1:7004", stopping=True),
        child("postgresql-1"),
        child("envoy-1"),
    ]
    text = targets.render(children, {"http": "127.0.0.1:8080"})
    assert places(text) == {
        "agent-1": "127.0.0.1:7003",
        "agent-2": "127.0.0.1:7002",
        "tool-1": "127.0.0.1:7001",
    }
    [envoy] = [
        one
        for one in json.loads(targets.render(children, {"envoy_metrics": "127.0.0.1:9902"}))
        if one["labels"]["instance"] == "envoy-1"
    ]
    assert envoy["labels"]["__metrics_path__"] == "/stats/prometheus"


def test_the_file_is_written_where_it_says_something_else(tmp_path: Path) -> None:
    path = tmp_path / "prometheus.json"
    children = [child("tool-1", "127.0.0.1:7001")]
    targets.write(path, children, {})
    os.utime(path, (1, 1))
    targets.write(path, children, {})
    assert path.stat().st_mtime == 1
    targets.write(path, [], {})
    assert json.loads(path.read_text()) == []
