"""Makes a release's parts in `dist/<version>/`: packages, chart, SBOM, notes, and an image where that can be.

Run by `make release`. It publishes nothing and makes no tag; what is left to do is printed. `--draft` takes
the changelog's unreleased part and a tree with changes, to see what would come.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NoReturn

from tools import kubectl

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "deploy/kubernetes/hermesh"
UV = Path(sys.executable).with_name("uv")
IMAGE = "hermesh"
SECONDS = 1800
_HEADING = re.compile(r"^## \[(?P<name>[^\]]+)\](?: - (?P<date>\d{4}-\d{2}-\d{2}))?$", re.MULTILINE)
_LINK = re.compile(r"^\[[^\]]+\]: ", re.MULTILINE)


class ReleaseError(Exception):
    """What has to be put right before a release; the message says what and how."""


def version_of(root: Path) -> str:
    """The version that the package and the chart say they are.

    Raises:
        ReleaseError: They do not agree.
    """
    package = str(tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"])
    chart = (root / "deploy/kubernetes/hermesh/Chart.yaml").read_text()
    for field in ("version", "appVersion"):
        found = re.search(rf'^{field}: "?([^"\n]+)"?$', chart, re.MULTILINE)
        if found is None or found[1] != package:
            said = found[1] if found else "nothing"
            raise ReleaseError(
                f"pyproject.toml has version {package}, Chart.yaml's {field} is {said}: make them one"
            )
    return package


def notes_of(changelog: str, version: str) -> str:
    """A version's part of the changelog.

    Raises:
        ReleaseError: There is none, it has no date, or it is empty.
    """
    headings = list(_HEADING.finditer(changelog))
    for found, following in zip(headings, [*headings[1:], None], strict=True):
        if found["name"] != version:
            continue
        if version != "Unreleased" and found["date"] is None:
            raise ReleaseError(
                f"CHANGELOG.md: the heading of {version} needs its date, ## [{version}] - YYYY-MM-DD"
            )
        end = following.start() if following else len(changelog)
        text = _LINK.split(changelog[found.end() : end])[0].strip()
        if not text:
            raise ReleaseError(f"CHANGELOG.md says nothing under {version}")
        return text + "\n"
    raise ReleaseError(
        f"CHANGELOG.md has no part ## [{version}] - YYYY-MM-DD: give Unreleased its name and date"
    )


def check_tree(version: str) -> None:
    """Raises ReleaseError where what is released would not be what is committed, or is already."""
    if _git("status", "--porcelain", "--untracked-files=no"):
        raise ReleaseError("the tree has changes that are not committed: a release is made of a commit")
    tagged = _git("tag", "--list", f"v{version}")
    if tagged and _git("rev-list", "-n", "1", tagged) != _git("rev-parse", "HEAD"):
        raise ReleaseError(f"v{version} is tagged already, at another commit: raise the version")


def build(target: Path, notes: str, version: str, *, image: bool) -> list[str]:
    """Makes all parts; returns what could not be made here, a line each."""
    target.mkdir(parents=True)
    (target / "NOTES.md").write_text(notes)
    _run("packages", [str(UV), "build", "--quiet", "--out-dir", str(target), str(ROOT)])
    (target / ".gitignore").unlink(missing_ok=True)
    _run("chart", [_helm(), "package", str(CHART), "--destination", str(target)])
    _write_sbom(target / f"hermesh-{version}.cdx.json")
    missing = _build_image(target, version) if image else ["no image: it was not asked for"]
    sums = [f"{_sha256(file)}  {file.name}\n" for file in sorted(target.iterdir())]
    (target / "SHA256SUMS").write_text("".join(sums))
    return missing


def _write_sbom(path: Path) -> None:
    """Writes what is in the image, the locked packages of the Dockerfile's `uv sync`, as CycloneDX."""
    command = [str(UV), "export", "--quiet", "--locked", "--no-dev", "--extra", "model"]
    text = _run("SBOM", [*command, "--format", "cyclonedx1.5", "--preview-features", "sbom-export"])
    found = json.loads(text)
    if found.get("bomFormat") != "CycloneDX" or not found.get("components"):
        raise ReleaseError("uv wrote no SBOM")
    path.write_text(text)


def _build_image(target: Path, version: str) -> list[str]:
    builder = shutil.which("podman") or shutil.which("docker")
    if builder is None:
        return ["no image: neither podman nor docker is here (podman build -f deploy/docker/Dockerfile .)"]
    name = f"{IMAGE}:{version}"
    _run("image", [builder, "build", "--tag", name, "--file", "deploy/docker/Dockerfile", "."])
    _run("image", [builder, "save", "--output", str(target / f"{IMAGE}-{version}.tar"), name])
    return []


def _helm() -> str:
    # Where the system has none, the package with which the chart is tested does.
    return shutil.which("helm") or str(kubectl.binary("helm"))


def _git(*words: str) -> str:
    return _run("git", ["git", *words]).strip()


def _run(what: str, command: list[str]) -> str:
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or done.stdout.strip().splitlines() or ["it said nothing"]
        raise ReleaseError(f"the {what} could not be made: {said[-1]}")
    return done.stdout


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fail(text: str) -> NoReturn:
    sys.stderr.write(f"release: {text}\n")
    raise SystemExit(1)


def main() -> None:
    """Makes them, or says in one line why not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draft", action="store_true", help="of what is unreleased, from the tree as it is")
    parser.add_argument("--no-image", action="store_true", help="build no image")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "dist", help="where the folder of the version goes"
    )
    told = parser.parse_args()
    try:
        version = version_of(ROOT)
        changelog = (ROOT / "CHANGELOG.md").read_text()
        notes = notes_of(changelog, "Unreleased" if told.draft else version)
        if not told.draft:
            check_tree(version)
        target: Path = told.out / (f"{version}-draft" if told.draft else version)
        if target.exists():
            raise ReleaseError(f"{target} is there already: remove it first")
        try:
            missing = build(target, notes, version, image=not told.no_image)
        except BaseException:
            shutil.rmtree(target, ignore_errors=True)
            raise
    except ReleaseError as error:
        _fail(str(error))
    for file in sorted(target.iterdir()):
        print(file)
    for line in missing:
        print(line)
    if not told.draft:
        print(f"Left to do:\n  git tag -a v{version} -F {target / 'NOTES.md'} && git push origin v{version}")
        print(f"  helm push {target}/hermesh-{version}.tgz oci://REGISTRY/charts")


if __name__ == "__main__":
    main()
