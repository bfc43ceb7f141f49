"""Which code a mesh runs is told by what it is made of and where it is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from launcher import code
from launcher.code import code_here, place_of


def code_of(tree: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(code, "CHECKOUT", tree)
    code_here.cache_clear()
    try:
        return code_here()
    finally:
        code_here.cache_clear()


def test_it_changes_with_code_packages_and_templates_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("services/a.py", "launcher/b.py", "deploy/envoy/c.tmpl", "uv.lock", "docs/d.md"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("one")
    first = code_of(tmp_path, monkeypatch)
    assert code_of(tmp_path, monkeypatch) == first
    (tmp_path / "docs/d.md").write_text("two")
    (tmp_path / "services/__pycache__").mkdir()
    (tmp_path / "services/__pycache__/a.pyc").write_text("two")
    assert code_of(tmp_path, monkeypatch) == first
    seen = {first}
    for name in ("services/a.py", "launcher/b.py", "deploy/envoy/c.tmpl", "uv.lock"):
        (tmp_path / name).write_text("two")
        seen.add(code_of(tmp_path, monkeypatch))
    (tmp_path / "services/e.py").write_text("")
    seen.add(code_of(tmp_path, monkeypatch))
    assert len(seen) == 6


def test_its_place_is_the_environment() -> None:
    assert place_of(code_here()) == sys.prefix
    # A version that did not say.
    assert place_of("") == ""
