"""Failpoints: nothing while nothing is armed, and exactly one process where one is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshkit import failpoints
from meshkit.errors import StartupError

_first = failpoints.point("test.first")
_second = failpoints.point("test.second")

CHILD = """
import sys
from meshkit import failpoints
here = failpoints.point("here")
failpoints.arm(sys.argv[1])
for n in range(1, 6):
    print(n, flush=True)
    here()
"""


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    failpoints.arm("")


def child(setting: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CHILD, setting], capture_output=True, text=True, timeout=30, check=False
    )


def test_nothing_happens_where_nothing_is_armed() -> None:
    _first()
    failpoints.arm("test.second=crash")
    _first()


def test_a_point_crashes_its_process_as_kill_9_does() -> None:
    done = child("here=crash")
    assert done.returncode == -signal.SIGKILL
    assert done.stdout.split() == ["1"]


def test_a_point_may_be_passed_some_times_first() -> None:
    assert child("here=crash@3").stdout.split() == ["1", "2", "3"]


def test_a_folder_arms_a_point_once_for_all_processes(tmp_path: Path) -> None:
    (tmp_path / "here").write_text("crash@2")
    first, second = child(str(tmp_path)), child(str(tmp_path))
    assert first.returncode == -signal.SIGKILL
    assert first.stdout.split() == ["1", "2"]
    assert second.returncode == 0
    assert not (tmp_path / "here").exists()
    assert len(list(tmp_path.glob("here.hit.*"))) == 1


def test_a_hang_blocks_and_then_goes_on(tmp_path: Path) -> None:
    failpoints.arm(str(tmp_path))
    (tmp_path / "test.first").write_text("hang:0.2")
    began = time.monotonic()
    _first()
    assert time.monotonic() - began >= 0.2
    assert (tmp_path / f"test.first.hit.{os.getpid()}").exists()
    _first()


def test_what_was_counted_for_one_arming_does_not_count_for_the_next(tmp_path: Path) -> None:
    failpoints.arm(str(tmp_path))
    (tmp_path / "test.first").write_text("hang:0@3")
    _first()
    _first()
    (tmp_path / "test.first").unlink()
    _first()
    (tmp_path / "test.first").write_text("hang:0@3")
    _first()
    assert (tmp_path / "test.first").exists()


@pytest.mark.parametrize("setting", ["here", "here=explode", "here=crash@", "/no/such/folder"])
def test_a_setting_that_means_nothing_is_refused(setting: str) -> None:
    with pytest.raises(StartupError, match="HERMESH_FAILPOINTS"):
        failpoints.arm(setting)


async def test_around_declares_a_point_before_and_one_after(tmp_path: Path) -> None:
    def armed() -> list[str]:
        return sorted(path.name for path in tmp_path.iterdir())

    @failpoints.around("test.work")
    async def work(number: int) -> int:
        seen.append(armed())
        return number + 1

    seen: list[list[str]] = []
    failpoints.arm(str(tmp_path))
    (tmp_path / "test.work.before").write_text("hang:0")
    (tmp_path / "test.work.after").write_text("hang:0")
    assert await work(1) == 2
    hit = f".hit.{os.getpid()}"
    assert seen == [["test.work.after", f"test.work.before{hit}"]]
    assert f"test.work.after{hit}" in armed()
    assert {"test.work.before", "test.work.after"} <= set(failpoints.names())


def test_a_name_stands_for_one_point() -> None:
    with pytest.raises(ValueError, match=r"test\.first"):
        failpoints.point("test.first")
