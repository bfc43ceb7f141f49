"""Processes that run and do not answer, with small processes and a clock that tests move."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from launcher.children import Child, Children
from launcher.folder import Folder
from launcher.hangs import LATE_SECONDS, HangWatch
from launcher.plan import Spec
from launcher.probes import alive

LIMIT = 20.0
STEP = 4.0


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Watched:
    """Sleeping processes whose answers a test decides."""

    def __init__(self, folder: Folder, group: asyncio.TaskGroup) -> None:
        self.clock = Clock()
        self.children = Children(folder, group, lambda: None, lambda: None)
        self.watch = HangWatch(self.children, LIMIT, self.clock)
        self.silent: set[str] = set()

    async def start(self, *replicas: str, command: tuple[str, ...] = ("sleep", "60")) -> list[Child]:
        children = []
        for name in replicas:

            async def probe(name: str = name) -> bool:
                return name not in self.silent

            service = name.partition("-")[0]
            spec = Spec(service, name, list(command), dict(os.environ), probe=probe, address="x")
            children.append(self.children.start(spec, None))
        await self.children.wait_ready(children)
        return children

    async def pass_time(self, seconds: float) -> None:
        """Lets time go by as the watch's own looks do."""
        end = self.clock.now + seconds
        while self.clock.now < end:
            await self.watch.look()
            self.clock.now += STEP
        await self.watch.look()


@asynccontextmanager
async def watched(tmp_path: Path) -> AsyncIterator[Watched]:
    folder = Folder(tmp_path / "data")
    folder.prepare()
    async with asyncio.TaskGroup() as group:
        found = Watched(folder, group)
        yield found
        await asyncio.gather(*(found.children.end(one, 1) for one in list(found.children.all.values())))


async def restarted(child: Child) -> None:
    async with asyncio.timeout(20):
        while not child.restarts or not child.ready.is_set():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_what_does_not_answer_for_long_is_killed_and_started_again(tmp_path: Path) -> None:
    async with watched(tmp_path) as mesh:
        tool, agent, envoy = await mesh.start("tool-1", "agent-1", "envoy-1")
        mesh.silent.add("tool-1")
        await mesh.pass_time(LIMIT - STEP)
        assert tool.identity is not None
        assert tool.identity.alive
        await mesh.pass_time(2 * STEP)
        mesh.silent.clear()
        await restarted(tool)
        assert "did not answer for" in tool.last_exit
        assert (agent.restarts, envoy.restarts) == (0, 0)


async def test_an_answer_in_between_begins_the_count_anew(tmp_path: Path) -> None:
    async with watched(tmp_path) as mesh:
        tool, *_ = await mesh.start("tool-1", "agent-1", "envoy-1")
        for _ in range(4):
            mesh.silent.add("tool-1")
            await mesh.pass_time(LIMIT - 2 * STEP)
            mesh.silent.clear()
            await mesh.pass_time(STEP)
        assert tool.restarts == 0
        assert tool.identity is not None
        assert tool.identity.alive


async def test_nothing_is_killed_because_the_machine_slept(tmp_path: Path) -> None:
    async with watched(tmp_path) as mesh:
        tool, *_ = await mesh.start("tool-1", "agent-1", "envoy-1")
        mesh.silent.add("tool-1")
        for _ in range(3):
            await mesh.pass_time(LIMIT - 2 * STEP)
            mesh.clock.now += max(LATE_SECONDS, LIMIT) + 1
        await mesh.watch.look()
        assert tool.identity is not None
        assert tool.identity.alive


async def test_nothing_is_killed_while_most_are_late(tmp_path: Path) -> None:
    async with watched(tmp_path) as mesh:
        children = await mesh.start("tool-1", "agent-1", "envoy-1")
        mesh.silent |= {"tool-1", "agent-1"}
        await mesh.pass_time(3 * LIMIT)
        assert all(child.identity is not None and child.identity.alive for child in children)


async def test_postgresql_is_never_killed(tmp_path: Path) -> None:
    async with watched(tmp_path) as mesh:
        postgresql, *_ = await mesh.start("postgresql-1", "agent-1", "envoy-1")
        mesh.silent.add("postgresql-1")
        await mesh.pass_time(3 * LIMIT)
        assert postgresql.identity is not None
        assert postgresql.identity.alive


@pytest.mark.parametrize(
    ("code", "lives"), [("while True: pass", True), ("import time; time.sleep(60)", False)]
)
async def test_a_model_that_computes_is_busy_and_no_hang(tmp_path: Path, code: str, lives: bool) -> None:
    async with watched(tmp_path) as mesh:
        [model] = await mesh.start("model-1", command=(sys.executable, "-c", code))
        await mesh.start("agent-1", "envoy-1")
        process = model.identity
        assert process is not None
        mesh.silent.add("model-1")
        async with asyncio.timeout(20):
            while process.cpu_ticks < 3 and lives:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        for _ in range(10):
            used = process.cpu_ticks
            async with asyncio.timeout(20):
                while lives and process.cpu_ticks == used:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            await mesh.watch.look()
            mesh.clock.now += STEP
        if lives:
            assert process.alive
        else:
            mesh.silent.clear()
            await restarted(model)


async def test_a_probe_that_fails_by_a_bug_kills_nothing(tmp_path: Path) -> None:
    async with watched(tmp_path) as mesh:
        children = await mesh.start("tool-1", "agent-1", "envoy-1")

        async def broken() -> bool:
            raise RuntimeError("a bug")

        object.__setattr__(children[0].spec, "probe", broken)
        await mesh.pass_time(3 * LIMIT)
        assert children[0].identity is not None
        assert children[0].identity.alive


async def test_a_service_is_asked_at_the_address_in_its_ready_file(tmp_path: Path) -> None:
    answers = [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 503 Busy\r\n\r\n", b""]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answers.pop(0))
        writer.close()

    folder = Folder(tmp_path / "data")
    folder.prepare()
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    address = "{}:{}".format(*server.sockets[0].getsockname())
    ready = folder.ready / "tool-1.json"
    record = json.dumps({"address": "127.0.0.1:1", "metrics_address": address})[1:]
    script = f"""echo '{{"pid": '$$', {record}' > {ready}.tmp; mv {ready}.tmp {ready}; exec sleep 60"""
    async with server, asyncio.TaskGroup() as group:
        children = Children(folder, group, lambda: None, lambda: None)
        spec = Spec("tool", "tool-1", ["sh", "-c", script], dict(os.environ), ready_file=ready)
        child = children.start(spec, None)
        await children.wait_ready([child])
        assert child.metrics_address == address
        assert [await alive(address) for _ in range(3)] == [True, False, False]
        await children.end(child, 1)
    assert not await alive(address)
    assert not await alive("")
