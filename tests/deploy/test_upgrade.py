"""Versions follow each other on one mesh under load, and no client notices: what the drill `upgrade` plays.

The streams are fewer than the drill's; the bounds are the same.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.chaos.drills import upgrade, versions
from tests.chaos.drills.report import Report
from tests.deploy.debian import debian

Way = Callable[[Report, int, Path], Awaitable[None]]

STREAMS = 20


@pytest.mark.deploy_long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("way", [upgrade.from_previous, upgrade.in_place, upgrade.to_next_and_back])
async def test_nobody_notices(way: Way, tmp_path: Path) -> None:
    debian("haproxy", "haproxy")
    report = Report("upgrade")
    await way(report, STREAMS, tmp_path)
    assert report.show()


def test_the_release_before_is_in_this_clone() -> None:
    assert versions.previous()


def test_a_tree_is_brought_to_what_is_here_and_no_further(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    versions._run("git", "clone", "--quiet", "--shared", "--no-checkout", versions.ROOT, tree)
    versions._run("git", "checkout", "--quiet", "--detach", versions.previous(), cwd=tree)
    (tree / ".venv").mkdir()
    (tree / "Makefile").write_text("")
    kept = (tree / "LICENSE").stat().st_mtime_ns
    versions.write_here(tree)
    assert (tree / "Makefile").read_bytes() == (versions.ROOT / "Makefile").read_bytes()
    assert (tree / "LICENSE").stat().st_mtime_ns == kept
    assert (tree / ".venv").is_dir()
    here = versions._run("git", "ls-files", "--cached", "--others", "--exclude-standard").splitlines()
    there = {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()}
    assert there - {name for name in there if name.startswith(".git/")} == {
        name for name in here if (versions.ROOT / name).is_file()
    }
