"""What is read of a process is what it holds."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.watch.processes import BUSY, Reading, Watch, Watched, figures_of

METRICS = """# TYPE hermesh_event_loop_tasks gauge
hermesh_event_loop_tasks 7.0
# TYPE hermesh_memory_blocks gauge
hermesh_memory_blocks 1234.0
# TYPE hermesh_session_watchers gauge
hermesh_session_watchers{kind="run"} 2.0
hermesh_session_watchers{kind="session"} 1.0
# TYPE hermesh_tool_running gauge
hermesh_tool_running 4.0
# TYPE hermesh_rpc_active gauge
hermesh_rpc_active 9.0
"""
# Holds, once told by a line, one thing more each, and says so.
CHILD = """
import socket, sys, threading
print("ready", flush=True)
held = []
for line in sys.stdin:
    what, *rest = line.split()
    if what == "file":
        held.append(open("/dev/null"))
    elif what == "tcp":
        held.append(socket.create_connection(("127.0.0.1", int(rest[0]))))
    elif what == "unix":
        held.append(socket.socketpair())
    elif what == "listen":
        held.append(socket.create_server(("127.0.0.1", 0)))
    elif what == "thread":
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    elif what == "memory":
        held.append(b"x" * 30 * 1024 * 1024)
    elif what == "child":
        import subprocess
        reads = [sys.executable, "-c", "import sys; sys.stdin.read()"]
        held.append(subprocess.Popen(reads, stdin=subprocess.PIPE))
    print("done", flush=True)
"""


class Held:
    """A process that holds what it is told to."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()

    def _answer(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline()

    def hold(self, what: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        self._answer()

    async def read(self, **fields: object) -> Reading:
        watch = Watch()
        try:
            (reading,) = await watch.take([Watched("it", self.process.pid, **fields)], "rest")  # type: ignore[arg-type]
        finally:
            await watch.close()
        return reading


@pytest.fixture
def held() -> Iterator[Held]:
    made = Held()
    yield made
    made.process.communicate(timeout=10)


@pytest.mark.parametrize(
    ("what", "more"),
    [
        ("file", {"fds": 1}),
        ("tcp", {"fds": 1, "tcp": 1}),
        ("unix", {"fds": 2, "unix": 2}),
        ("listen", {"fds": 1}),
        ("thread", {"threads": 1}),
    ],
)
async def test_what_a_process_takes_up_is_counted(held: Held, what: str, more: dict[str, int]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        before = await held.read()
        held.hold(f"{what} {server.getsockname()[1]}")
        after = await held.read()
    counted = ("fds", "tcp", "unix", "threads")
    assert {name: after[name] - before[name] for name in counted} == dict.fromkeys(counted, 0) | more
    assert (after["process"], after["phase"], after["pid"]) == ("it", "rest", held.process.pid)


async def test_memory_is_in_mebibytes(held: Held) -> None:
    before = await held.read()
    held.hold("memory")
    after = await held.read()
    for name in ("memory", "own", "pss"):
        assert after[name] - before[name] == pytest.approx(30, abs=2)


async def test_a_familys_children_count_with_it(held: Held) -> None:
    before = await held.read(family=True)
    held.hold("child")
    after = await held.read(family=True)
    assert after["processes"] - before["processes"] == 1
    assert after["memory"] > before["memory"]
    assert not {"fds", "threads"} & after.keys()


async def test_a_process_that_is_gone_is_left_out() -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "")
    await process.wait()
    watch = Watch()
    try:
        assert await watch.take([Watched("gone", process.pid)], "load") == []
    finally:
        await watch.close()


async def test_one_that_does_not_answer_has_no_figures(held: Held) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        reading = await held.read(metrics=f"127.0.0.1:{silent.getsockname()[1]}")
    assert "tasks" not in reading
    assert reading["memory"] > 0


async def test_figures_come_from_the_processs_own_metrics(held: Held) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n" + METRICS.encode())
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        reading = await held.read(metrics=f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
    assert (reading["tasks"], reading["blocks"]) == (7, 1234)


def test_gauges_of_somebody_there_are_added_up_and_series_counted() -> None:
    found = figures_of(METRICS)
    assert found.pop("open") == {
        "hermesh_session_watchers run": 2,
        "hermesh_session_watchers session": 1,
        "hermesh_tool_running": 4,
    }
    assert found == {"series": 6, "busy": 7, "tasks": 7, "blocks": 1234}


def test_every_gauge_that_means_somebody_is_there_exists() -> None:
    root = Path(__file__).parents[3]
    sources = "".join(
        path.read_text()
        for folder in ("services", "gateway", "meshkit")
        for path in (root / folder).rglob("*.py")
    )
    assert not [name for name in BUSY if f'"{name}"' not in sources]
