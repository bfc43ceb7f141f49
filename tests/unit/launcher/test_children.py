"""Children of a supervisor, with small processes in place of services."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from launcher.children import LOG_BYTES, Child, Children
from launcher.errors import LaunchError
from launcher.folder import Folder
from launcher.plan import Spec
from launcher.processes import Identity, identify, spawn
from launcher.state import Remembered

SECONDS = 20.0


async def true(probe: Callable[[], bool]) -> None:
    """Returns once it is true; fails after a deadline."""
    async with asyncio.timeout(SECONDS):
        while not probe():  # noqa: ASYNC110 - what another process does has no event here
            await asyncio.sleep(0.01)


class Kept:
    """Children of a folder of their own, and what they said."""

    def __init__(self, folder: Folder, group: asyncio.TaskGroup, **more: int) -> None:
        self.folder = folder
        self.published = 0
        self.saved = 0
        self.children = Children(folder, group, self.publish, self.save, **more)

    def publish(self) -> None:
        self.published += 1

    def save(self) -> None:
        self.saved += 1

    def spec(self, script: str, replica: str = "tool-1", **more: object) -> Spec:
        """A shell script that tells its pid in a ready file and goes on."""
        ready = self.folder.ready / f"{replica}.json"
        record = '{\\"pid\\": $$, \\"address\\": \\"127.0.0.1:1\\"}'
        told = f'echo "{record}" > {ready}.tmp; mv {ready}.tmp {ready}'
        command = ["sh", "-c", script.replace("READY", told)]
        return Spec(replica.partition("-")[0], replica, command, dict(os.environ), ready_file=ready, **more)  # type: ignore[arg-type]

    async def start(self, script: str, left: Remembered | None = None, **more: object) -> Child:
        child = self.children.start(self.spec(script, **more), left)  # type: ignore[arg-type]
        await self.children.wait_ready([child])
        return child


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    folder = Folder(tmp_path / "data")
    folder.prepare()
    return folder


@asynccontextmanager
async def keeping(folder: Folder, **more: int) -> AsyncIterator[Kept]:
    async with asyncio.TaskGroup() as group:
        kept = Kept(folder, group, **more)
        yield kept
        await asyncio.gather(*(kept.children.end(child, 1) for child in kept.children.all.values()))


def living(child: Child) -> Identity:
    assert child.identity is not None
    assert child.identity.alive
    return child.identity


async def test_a_child_is_ready_once_it_says_so(folder: Folder) -> None:
    async with keeping(folder) as kept:
        child = await kept.start("READY; exec sleep 60")
        assert child.address == "127.0.0.1:1"
        assert child.restarts == 0
        assert kept.published >= 1
        process = living(child)
    assert not process.alive


async def test_an_old_ready_file_counts_for_nothing(folder: Folder) -> None:
    (folder.ready / "tool-1.json").write_text('{"pid": 1, "address": "127.0.0.1:2"}')
    async with keeping(folder) as kept:
        child = await kept.start("sleep 0.2; READY; exec sleep 60")
        assert child.address == "127.0.0.1:1"


async def test_a_killed_child_is_started_again_and_it_is_told(folder: Folder) -> None:
    async with keeping(folder) as kept:
        child = await kept.start("READY; exec sleep 60")
        first = living(child)
        first.send(signal.SIGKILL)
        await true(lambda: child.restarts == 1 and child.ready.is_set())
        assert child.last_exit == "killed by SIGKILL"
        assert living(child) != first


async def test_the_first_replica_of_each_service_starts_before_the_second_of_any(folder: Folder) -> None:
    order = folder.root / "order"
    names = ("agent-1", "agent-2", "gateway-1", "gateway-2", "session-1", "session-2", "tool-1")
    async with keeping(folder, at_once=1) as kept:
        specs = [kept.spec(f"echo {name} >> {order}; READY; exec sleep 60", replica=name) for name in names]
        children = [kept.children.start(spec, None) for spec in specs]
        await kept.children.wait_ready(children)
        for child in children:
            living(child).send(signal.SIGKILL)
        await true(lambda: all(child.restarts == 1 and child.ready.is_set() for child in children))
    started = order.read_text().split()
    for lives in (started[: len(names)], started[len(names) :]):
        assert sorted(lives) == sorted(names)
        # And before those that ask it.
        assert [name.partition("-")[0] for name in lives[:4]] == ["session", "tool", "agent", "gateway"]


async def test_a_start_that_takes_long_keeps_no_other_from_starting(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.children.TURN_SECONDS", 0.2)
    async with keeping(folder, at_once=1) as kept:
        slow = kept.children.start(kept.spec("exec sleep 60", replica="agent-1"), None)
        await true(lambda: slow.identity is not None)
        await kept.start("READY; exec sleep 60", replica="tool-1")
        assert not slow.ready.is_set()


async def test_a_child_that_keeps_failing_is_named_with_its_last_words(folder: Folder) -> None:
    async with keeping(folder) as kept:
        with pytest.raises(LaunchError, match="tool-1 does not start: exit status 3: the reason"):
            await kept.start("echo the reason; exit 3")
        assert kept.children.of("tool")[0].failures >= 3


async def test_what_starting_again_cannot_mend_is_said_at_once(folder: Folder) -> None:
    said = "x: error while loading shared libraries: libgomp.so.1: cannot open shared object file: No such"
    async with keeping(folder) as kept:
        with pytest.raises(LaunchError, match=r"tool-1 needs .* libgomp\.so\.1.*apt-get install libgomp1"):
            await kept.start(f"echo '{said}'; exit 127")
        assert kept.children.of("tool")[0].failures <= 1


async def test_an_earlier_lifes_last_words_are_not_this_ones(folder: Folder) -> None:
    (folder.logs / "tool-1.log").write_text("write: No space left on device\n")
    async with keeping(folder) as kept:
        with pytest.raises(LaunchError, match=r"exit status 4$"):
            await kept.start("exit 4")


async def test_a_preparation_that_fails_is_the_reason(folder: Folder) -> None:
    def refuse() -> None:
        raise LaunchError("the folder is broken; mend it")

    async with keeping(folder) as kept:
        with pytest.raises(LaunchError, match=r"^the folder is broken; mend it$"):
            await kept.start("READY; exec sleep 60", prepare=refuse)


async def test_a_program_that_is_not_there_does_not_end_the_others(folder: Folder) -> None:
    async with keeping(folder) as kept:
        other = await kept.start("READY; exec sleep 60", replica="tool-2")
        missing = Spec("tool", "tool-1", ["/nowhere/program"], {}, ready_file=folder.ready / "x")
        with pytest.raises(LaunchError, match="No such file"):
            await kept.children.wait_ready([kept.children.start(missing, None)])
        living(other)


async def test_a_probe_that_raises_does_not_end_the_others(folder: Folder) -> None:
    async def broken() -> bool:
        raise RuntimeError("a bug")

    async with keeping(folder) as kept:
        other = await kept.start("READY; exec sleep 60", replica="tool-2")
        spec = Spec("model", "model-1", ["sleep", "60"], dict(os.environ), probe=broken, address="x")
        child = kept.children.start(spec, None)
        await true(lambda: child.restarts > 0)
        assert "a bug" in child.last_exit
        living(other)


async def test_a_child_of_an_earlier_supervisor_is_taken_over(folder: Folder) -> None:
    async with keeping(folder) as kept:
        spec = kept.spec("READY; exec sleep 60")
        process = spawn(spec.command, dict(spec.environment), folder.logs / "tool-1.log")
        me = identify(process.pid)
        assert me is not None
        left = Remembered("tool", "tool-1", me.pid, me.start_time, "127.0.0.1:1", 5, "killed by SIGKILL")
        child = kept.children.start(spec, left)
        await kept.children.wait_ready([child])
        assert (living(child), child.restarts) == (me, 5)
        me.send(signal.SIGKILL)
        process.wait()
        await true(lambda: child.restarts == 6 and child.ready.is_set())
        assert living(child) != me


async def test_a_pid_that_is_anothers_now_is_not_taken_over(folder: Folder) -> None:
    async with keeping(folder) as kept:
        left = Remembered("tool", "tool-1", os.getpid(), 1, "127.0.0.1:1")
        child = await kept.start("READY; exec sleep 60", left=left)
        assert living(child).pid != os.getpid()
    os.kill(os.getpid(), 0)


async def test_a_child_that_ignores_its_end_is_killed(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.children.HURRY_SECONDS", 0.1)
    async with keeping(folder) as kept:
        child = await kept.start("trap '' TERM; READY; while :; do sleep 0.05; done")
        process = living(child)
        await kept.children.end(child, 0.1)
        assert not process.alive


async def test_a_drained_child_is_out_of_the_list_before_it_ends(folder: Folder) -> None:
    async with keeping(folder) as kept:
        child = await kept.start("trap 'sleep 0.2; exit 0' TERM; READY; while :; do sleep 0.02; done")
        draining = asyncio.ensure_future(kept.children.drain(child, 10))
        await true(lambda: child.stopping)
        assert kept.children.count("tool") == 0
        await draining
        assert "tool-1" not in kept.children.all
        assert child.restarts == 0


async def test_ending_a_child_that_waits_to_be_started_again_is_quick(folder: Folder) -> None:
    async with keeping(folder) as kept:
        child = kept.children.start(kept.spec("exit 1"), None)
        await true(lambda: child.failures >= 5)
        async with asyncio.timeout(1):
            await kept.children.end(child, 10)


def test_long_logs_start_anew(folder: Folder) -> None:
    log = folder.logs / "tool-1.log"
    with log.open("ab") as file:
        file.truncate(LOG_BYTES + 1)
    short = folder.logs / "tool-2.log"
    short.write_text("kept\n")
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", "import sys; sys.stdin.read(); print('after', flush=True)"],
            stdin=subprocess.PIPE,
            stdout=output,
        )

    async def trim() -> None:
        async with asyncio.TaskGroup() as group:
            Children(folder, group, lambda: None, lambda: None).trim_logs()

    asyncio.run(trim())
    assert log.stat().st_size == 0
    assert (folder.logs / "tool-1.log.1").stat().st_size == LOG_BYTES + 1
    assert short.read_text() == "kept\n"
    process.communicate(timeout=SECONDS)
    assert log.read_text() == "after\n"
