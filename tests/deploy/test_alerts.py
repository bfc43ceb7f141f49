"""The alerts as they stand: rules that promtool accepts and tests, each with a page that says what to do."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.deploy.prometheus import FOLDER, ROOT, alerts, promtool, shortened

TESTS = FOLDER / "hermesh.test.yml"
PAGES = ROOT / "docs/runbooks"


def run(*arguments: str | Path) -> str:
    done = subprocess.run(
        [str(promtool()), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_promtool_accepts_every_file(tmp_path: Path) -> None:
    run("check", "rules", FOLDER / "hermesh.rules.yml")
    short = tmp_path / "short.yml"
    short.write_text(shortened())
    run("check", "rules", short)
    for config in ("machine.yml", "in-compose.yml"):
        run("check", "config", "--syntax-only", FOLDER / config)


def test_each_alert_fires_and_clears_in_its_real_times() -> None:
    assert "SUCCESS" in run("test", "rules", TESTS)


def test_no_alert_is_left_out_of_promtools_tests() -> None:
    tested = set(re.findall(r'alertname="(\w+)"', TESTS.read_text()))
    assert tested == set(alerts())
    for one in yaml.safe_load(TESTS.read_text())["tests"]:
        # Silent before its fault and after it.
        expected = [bool(step["exp_samples"]) for step in one["promql_expr_test"]]
        assert not expected[0]
        assert not expected[-1]
        assert any(expected)


@pytest.mark.parametrize("name", alerts())
def test_an_alert_says_how_bad_it_is_and_leads_to_a_page(name: str) -> None:
    rule = alerts()[name]
    assert rule["labels"]["severity"] in ("critical", "warning")
    notes = rule["annotations"]
    assert set(notes) == {"summary", "description", "runbook"}
    page = ROOT / notes["runbook"]
    assert page.parent == PAGES
    assert page.exists()


def test_the_documentation_lists_every_alert() -> None:
    page = (ROOT / "docs/deploy/prometheus.md").read_text()
    listed = dict(re.findall(r"^\| `(Hermesh\w+)` \| (\w+) \|", page, re.MULTILINE))
    assert listed == {name: rule["labels"]["severity"] for name, rule in alerts().items()}


def test_prometheus_in_compose_asks_for_what_is_there() -> None:
    config = yaml.safe_load((FOLDER / "in-compose.yml").read_text())
    mesh = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    beside = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
    asked: dict[str, str] = {}
    for job in config["scrape_configs"]:
        for found in job.get("dns_sd_configs", ()):
            asked |= {name: str(found["port"]) for name in found["names"]}
        for static in job.get("static_configs", ()):
            asked |= dict(target.split(":") for target in static["targets"])
    assert set(asked) <= set(mesh) | set(beside)
    for name, port in asked.items():
        told = (mesh.get(name, {}).get("environment") or {}).get("HERMESH_METRICS_LISTEN", "")
        assert told.endswith(f":{port}") or name == "envoy" or name in beside
    envoy = yaml.safe_load((ROOT / "deploy/envoy/compose.yaml").read_text())["static_resources"]["listeners"]
    [status] = [one for one in envoy if one["name"] == "status"]
    assert str(status["address"]["socket_address"]["port_value"]) == asked["envoy"]
    # The paths that the second file mounts are relative to the checkout.
    for service in beside.values():
        for volume in service.get("volumes", ()):
            if volume.startswith("./"):
                assert (ROOT / volume.split(":")[0]).exists(), volume


def test_every_page_of_the_runbooks_names_its_alerts() -> None:
    """Who is woken by a name finds it on the page, and no page names what there is not."""
    for page in PAGES.glob("*.md"):
        named = set(re.findall(r"`(Hermesh\w+)`", page.read_text()))
        assert named == {
            name for name, rule in alerts().items() if rule["annotations"]["runbook"].endswith(page.name)
        }, page.name
