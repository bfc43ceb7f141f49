"""`hermesh bench` starts another process, and says when that is not installed."""

import importlib.util
import sys

import pytest

from launcher import benchmark
from launcher.errors import LaunchError


def test_arguments_are_passed_on() -> None:
    assert benchmark.command(["--only", "tools", "--help"]) == [
        *(sys.executable, "-P", "-m", "bench"),
        *("--only", "tools", "--help"),
    ]


def test_what_is_missing_is_said_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(benchmark, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    with pytest.raises(LaunchError, match="matplotlib is missing"):
        benchmark.command([])
