"""Trees of other versions, each with an environment of its own, as somebody has them who runs a release."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.faults.cluster import ROOT

# Until there is a tag: what was there before. Nothing looks at it once a tag can be reached.
BEFORE_TAGS = ROOT / "tests" / "chaos" / "drills" / "before-tags.txt"
INSTALL_SECONDS = 600.0
_MIGRATIONS = "services/session/store/migrations"


class VersionError(Exception):
    """A version could not be had; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Version:
    """One version on the disk.

    Attributes:
        name: a tag, or the beginning of a commit's name.
        tree: its checkout.
    """

    name: str
    tree: Path

    @property
    def program(self) -> Path:
        """Its command `hermesh`."""
        return self.tree / ".venv" / "bin" / "hermesh"


def _run(*words: str | Path, cwd: Path = ROOT, seconds: float = 60.0) -> str:
    # Of a `make` that runs us nothing is to reach the one that is run.
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "HERMESH_"))}
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env=outside,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()
        raise VersionError(f"{' '.join(map(str, words[:3]))} failed: {said[-1]}")
    return done.stdout.strip()


def previous() -> str:
    """The release before what is here: the newest tag before this commit, or the commit in `BEFORE_TAGS`.

    Raises:
        VersionError: Neither is in this clone.
    """
    try:
        return _run("git", "describe", "--tags", "--abbrev=0", "--match", "v[0-9]*", "HEAD^")
    except VersionError:
        commit = BEFORE_TAGS.read_text().split()[0]
    try:
        _run("git", "cat-file", "-e", f"{commit}^{{commit}}")
    except VersionError:
        raise VersionError(
            f"the commit {commit} is not in this clone: git fetch --unshallow --tags"
        ) from None
    return commit[:9]


def checkout(revision: str, tree: Path) -> Version:
    """A clone at a revision with its own environment, from its own lock. Raises VersionError."""
    _run("git", "clone", "--quiet", "--shared", "--no-checkout", ROOT, tree)
    _run("git", "checkout", "--quiet", "--detach", revision, cwd=tree)
    return _installed(Version(revision, tree))


def here(tree: Path) -> Version:
    """What is in this working tree, changes that are not committed among it, as a clone elsewhere."""
    _run("git", "clone", "--quiet", "--shared", "--no-checkout", ROOT, tree)
    write_here(tree)
    return _installed(Version("here", tree))


def after(tree: Path) -> Version:
    """What may come after what is here: the same with one more migration, as version 999.0.0."""
    _run("git", "clone", "--quiet", "--shared", "--no-checkout", ROOT, tree)
    write_here(tree)
    project = tree / "pyproject.toml"
    project.write_text(project.read_text().replace('\nversion = "0.', '\nversion = "999.', 1))
    folder = tree / _MIGRATIONS
    number = max(int(path.name[:4]) for path in folder.glob("*.sql")) + 1
    (folder / f"{number:04d}_pre_later.sql").write_text(
        "ALTER TABLE session.session ADD COLUMN later text NOT NULL DEFAULT '';\n"
    )
    return _installed(Version("after", tree), "--frozen")


def write_here(tree: Path) -> None:
    """Brings a tree to what is in this working tree as `git pull` does: only what differs is touched."""
    listed = _run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    wanted = {name for name in listed if name and (ROOT / name).is_file()}
    for name in _run("git", "ls-files", "-z", cwd=tree).split("\0") if (tree / "Makefile").exists() else ():
        if name and name not in wanted:
            (tree / name).unlink(missing_ok=True)
    for name in wanted:
        source, target = ROOT / name, tree / name
        if target.is_file() and target.read_bytes() == source.read_bytes():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")
        shutil.copy(source, partial)
        partial.replace(target)


def _installed(version: Version, *more: str) -> Version:
    if more:
        # A lock that names another version of ours is not one that `--locked` takes.
        makefile = version.tree / "Makefile"
        makefile.write_text(makefile.read_text().replace("--locked", *more))
    _run("make", ".venv/.run-ready", cwd=version.tree, seconds=INSTALL_SECONDS)
    return version
