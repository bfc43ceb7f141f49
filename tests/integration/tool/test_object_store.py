"""An object store that goes away and comes back: large results wait, small ones do not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from meshkit.tasks import TaskOwner
from services.tool import execution as execution_module
from services.tool.domain import CallState, Outcome
from services.tool.execution import Executor, Progress
from services.tool.registry import Registry
from services.tool.results import INLINE_BYTES, open_results
from tests.unit.tool.fakes import FakeJournal, Lever, call


class Folder:
    """The folder of an object store, which a test may take away."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._aside = path.with_name("aside")

    def go(self) -> None:
        """What is at its place can hold nothing, not even for root."""
        self.path.rename(self._aside)
        self.path.touch()

    def come_back(self) -> None:
        self.path.unlink()
        self._aside.rename(self.path)

    @property
    def objects(self) -> list[bytes]:
        return [file.read_bytes() for file in self.path.glob("tool-results/*/*/*")]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "objects")


@pytest.fixture
async def owner() -> AsyncIterator[TaskOwner]:
    async with TaskOwner("test") as owner:
        yield owner


async def test_large_results_wait_for_the_store_and_small_ones_do_not(
    folder: Folder, owner: TaskOwner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution_module, "_TELL_AFTER", 0.05)
    journal = FakeJournal()
    results = open_results(folder.path.as_uri())
    assert results is not None
    lever = Lever()
    runner = Executor(Registry([lever.tool]), journal, results, owner)
    assert await results.problem() is None
    folder.go()
    assert "the object store file://" in (await results.problem() or "")
    journal.intend("run:1:0")
    small = [update async for update in runner.run(call())]
    assert isinstance(small[-1], Outcome)
    assert small[-1].content == "done"
    lever.result = "x" * (INLINE_BYTES + 1)
    journal.intend("run:1:1")
    async with asyncio.timeout(20):
        waiting = runner.run(call("run:1:1"))
        async for update in waiting:
            if update == Progress("the result waits for the store"):
                assert len(journal.completes) == 1
                folder.come_back()
                break
        large = [update async for update in waiting][-1]
    assert isinstance(large, Outcome)
    assert (large.state, large.content_ref[:7]) == (CallState.COMPLETED, "sha256:")
    assert folder.objects == [lever.result.encode()]
    assert len(journal.completes) == 2
    assert await results.problem() is None
