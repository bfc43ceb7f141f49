"""A store of the suite's own comes back at its place, also when something keeps it from that for a while."""

from __future__ import annotations

import signal
from pathlib import Path

from tests.chaos.faults.stores import Store, own_valkey


async def test_a_store_is_stopped_and_comes_back_empty_at_its_place(tmp_path: Path) -> None:
    store = own_valkey(tmp_path, tmp_path / "log")
    await store.start()
    first = store.process
    assert first is not None
    await store.stop(signal.SIGKILL)
    assert store.process is None
    await store.start()
    try:
        assert store.process is not None
        assert store.process.pid != first.pid
    finally:
        await store.stop(signal.SIGKILL)


async def test_a_store_that_ends_while_it_starts_is_started_again(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    script = f"echo x >> {marks}; test $(wc -l < {marks}) -ge 3 && exec sleep 60; exit 1"

    async def answers(_: str) -> bool:
        return marks.exists() and marks.read_text().count("x") >= 3

    store = Store("none", ["sh", "-c", script], tmp_path / "log", "", tmp_path / "socket", answers)
    await store.start()
    await store.stop(signal.SIGKILL)
    assert marks.read_text().count("x") == 3
