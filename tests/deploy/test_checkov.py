"""checkov on the rendered chart: nothing that it finds is left without a reason."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bench.facts import ROOT
from bench.peers.install import make_environment
from tests.deploy.chart import ALL, render

PINS = Path(__file__).with_name("checkov")
# As somebody installs it who follows the advice: images by digest, the cloud's identity for the object store.
VALUES = ALL | {
    "defaults": {},
    "image": {"repository": "registry.example.com/hermesh", "digest": f"sha256:{'a' * 64}"},
    "envoy": {"image": {"repository": "envoyproxy/envoy", "digest": f"sha256:{'b' * 64}"}},
}

# It installs some hundred packages the first time.
pytestmark = [pytest.mark.deploy_long, pytest.mark.timeout(600)]


def test_checkov_finds_nothing_but_what_is_explained(tmp_path: Path) -> None:
    programs = make_environment(PINS, ROOT / "build" / "checkov", lambda: sys.executable)
    rendered = tmp_path / "chart.yaml"
    rendered.write_text(yaml.safe_dump_all(render(VALUES)))
    config = yaml.safe_load((PINS / "config.yaml").read_text())
    done = subprocess.run(
        [
            *(
                programs / "python",
                programs / "checkov",
                "--file",
                rendered,
                "--framework",
                *config["framework"],
            ),
            # It would ask its maker's server about the checks' severities.
            *("--compact", "--quiet", "--skip-download", "--output", "json"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    (found,) = [json.loads(done.stdout)] if done.stdout else [{}]
    assert found, done.stderr
    assert found["summary"]["passed"] > 500
    assert found["summary"]["parsing_errors"] == 0
    failed: dict[str, list[str]] = {}
    for one in found["results"]["failed_checks"]:
        failed.setdefault(one["check_id"], []).append(f"{one['check_name']}: {one['resource']}")
    unexplained = {check: where for check, where in failed.items() if check not in config["skip-check"]}
    assert not unexplained, unexplained
    assert set(config["skip-check"]) == failed.keys(), "a check that is skipped would find nothing"
