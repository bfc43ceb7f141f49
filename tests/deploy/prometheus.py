"""Debian's Prometheus on the project's own rules, their times shortened, and what it says.

`promtool` tests the rules in their real times (deploy/prometheus/hermesh.test.yml). Here every duration in
them is a thirtieth.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from bench.mesh import free_ports, wait_until
from tests.deploy.debian import debian

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy/prometheus"
RULES = FOLDER / "hermesh.rules.yml"
FASTER = 30
_DURATION = re.compile(r"\b(\d+)(s|m|h)\b")
_UNITS = {"s": 1, "m": 60, "h": 3600}
SECONDS = 60.0


def promtool() -> Path:
    return debian("prometheus", "promtool")


def alerts() -> dict[str, dict[str, Any]]:
    """The project's alerts by name."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def shortened() -> str:
    """The rules with every duration a thirtieth."""

    def shorter(found: re.Match[str]) -> str:
        return f"{max(1, round(int(found[1]) * _UNITS[found[2]] / FASTER))}s"

    rules = yaml.safe_load(RULES.read_text())
    for group in rules["groups"]:
        group["interval"] = "1s"
        for rule in group["rules"]:
            rule["expr"] = _DURATION.sub(shorter, rule["expr"])
            if "for" in rule:
                rule["for"] = _DURATION.sub(shorter, rule["for"])
    text: str = yaml.safe_dump(rules, width=1000)
    return text


@dataclass
class Prometheus:
    """A running one."""

    url: str
    process: subprocess.Popen[bytes]

    def _get(self, path: str, **parameters: str) -> Any:
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=10, trust_env=False)
        document = answer.json()
        assert document["status"] == "success", document
        return document["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """An instant vector: `metric` and `value` of each sample."""
        found: list[dict[str, Any]] = self._get("query", query=expression)["result"]
        return found

    def value(self, expression: str) -> float:
        """The one sample's value; 0 when there is none."""
        found = self.query(expression)
        return float(found[0]["value"][1]) if found else 0.0

    def series(self, *selectors: str) -> list[dict[str, str]]:
        """The label sets that were ever scraped."""
        answer = httpx.get(
            f"{self.url}/api/v1/series",
            params=[("match[]", one) for one in selectors],
            timeout=30,
            trust_env=False,
        )
        found: list[dict[str, str]] = answer.json()["data"]
        return found

    def firing(self) -> dict[str, dict[str, str]]:
        """The annotations of each alert that fires."""
        return {
            one["labels"]["alertname"]: one["annotations"]
            for one in self._get("alerts")["alerts"]
            if one["state"] == "firing"
        }

    def until_fires(self, alert: str, seconds: float = SECONDS) -> None:
        wait_until(lambda: alert in self.firing(), seconds, f"{alert} to fire")
        for text in self.firing().get(alert, {}).values():
            assert "error expanding" not in text, text

    def until_clear(self, *names: str, seconds: float = SECONDS) -> None:
        """Returns once these, or all, have stopped firing."""
        wait_until(
            lambda: not (self.firing().keys() & set(names) if names else self.firing()),
            seconds,
            f"{', '.join(names) or 'all'} to clear",
        )

    def until_scraped(self, *instances: str, seconds: float = SECONDS) -> None:
        """Returns once these were scraped well."""
        wait_until(
            lambda: {s["metric"]["instance"] for s in self.query("up == 1")} >= set(instances),
            seconds,
            f"Prometheus to read {', '.join(instances)}",
        )


def targets_of(places: Mapping[str, str]) -> str:
    """A file for `file_sd_configs`: address by instance."""
    return json.dumps(
        [{"targets": [address], "labels": {"instance": name}} for name, address in places.items()]
    )


@contextmanager
def prometheus(targets: Path, **others: Path) -> Iterator[Prometheus]:
    """Runs one that scrapes, each second, what the file names; `others` are further jobs by their files."""
    [port] = free_ports(1)
    with tempfile.TemporaryDirectory(prefix="hm-prom-") as place:
        folder = Path(place)
        (folder / "rules.yml").write_text(shortened())
        jobs = {"hermesh": targets, **{f"hermesh-{name}": file for name, file in others.items()}}
        config = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "rule_files": ["rules.yml"],
            "scrape_configs": [
                {"job_name": name, "file_sd_configs": [{"files": [str(file)], "refresh_interval": "1s"}]}
                for name, file in jobs.items()
            ],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        log = folder / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [
                    str(debian("prometheus", "prometheus")),
                    f"--config.file={folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address=127.0.0.1:{port}",
                    "--log.level=warn",
                ],
                stdout=output,
                stderr=output,
            )
        found = Prometheus(f"http://127.0.0.1:{port}", process)
        try:
            end = time.monotonic() + SECONDS
            while not _ready(found.url):
                assert process.poll() is None, log.read_text(errors="replace")[-2000:]
                assert time.monotonic() < end, "Prometheus does not start"
                time.sleep(0.1)
            yield found
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(timeout=10)


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/-/ready", timeout=2, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False
