"""Restarting replicas, with small processes in place of services and a list in place of Envoy's."""

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path

import pytest

from launcher.children import Child, Children
from launcher.errors import LaunchError
from launcher.folder import Folder
from launcher.plan import SERVICES, Spec
from launcher.restart import ORDER, Restart, parse_service

SERVES = 'echo "{\\"pid\\": $$, \\"address\\": \\"127.0.0.1:NUMBER\\"}" > READY.tmp; mv READY.tmp READY; '


class Mesh:
    """A mesh of shell scripts, and what was seen of it."""

    def __init__(self, folder: Folder, group: asyncio.TaskGroup) -> None:
        self.folder = folder
        self.script = SERVES + "exec sleep 60"
        self.said: list[str] = []
        self.counts: list[int] = []
        self.children = Children(folder, group, self.publish, lambda: None)
        self.restart = Restart(
            self,  # type: ignore[arg-type] - of the plan nothing but `service` is used
            self.children,
            number=self.number,
            balanced=self.balanced,
            take_out=self.take_out,
            say=self.say,
        )

    def publish(self) -> None:
        names = [child.spec.replica for child in self.children.all.values()]
        assert len(names) == len(set(names))
        self.counts.append(sum(child.ready.is_set() for child in self.children.of("agent")))

    def service(self, service: str, number: int) -> Spec:
        ready = self.folder.ready / f"{service}-{number}.json"
        script = self.script.replace("READY", str(ready)).replace("NUMBER", str(number))
        return Spec(service, f"{service}-{number}", ["sh", "-c", script], dict(os.environ), ready_file=ready)

    def number(self, service: str) -> int:
        taken = {child.spec.number for child in self.children.all.values() if child.spec.service == service}
        return next(number for number in count(1) if number not in taken)

    async def balanced(self, children: Sequence[Child]) -> None:
        assert all(child.ready.is_set() for child in children)

    async def take_out(self, child: Child) -> None:
        await self.children.drain(child, 10)

    async def say(self, text: str) -> None:
        self.said.append(text)

    async def start(self, *replicas: str) -> dict[str, int]:
        """Starts replicas and returns their pids."""
        for name in replicas:
            service, _, number = name.partition("-")
            self.children.start(self.service(service, int(number)), None)
        await self.children.wait_ready(self.children.all.values())
        self.counts.clear()
        return self.pids()

    def pids(self) -> dict[str, int]:
        return {name: child.identity.pid for name, child in self.children.all.items() if child.identity}


@asynccontextmanager
async def running(tmp_path: Path) -> AsyncIterator[Mesh]:
    folder = Folder(tmp_path / "data")
    folder.prepare()
    async with asyncio.TaskGroup() as group:
        mesh = Mesh(folder, group)
        yield mesh
        await asyncio.gather(*(mesh.children.end(child, 1) for child in list(mesh.children.all.values())))


async def test_every_replica_is_replaced_and_there_are_never_fewer(tmp_path: Path) -> None:
    async with running(tmp_path) as mesh:
        before = await mesh.start("agent-1", "agent-2")
        await mesh.restart.rolling(["agent"])
        after = mesh.pids()
        assert sorted(after) == ["agent-1", "agent-3"]
        assert not set(after.values()) & set(before.values())
        assert min(mesh.counts) >= 2
        assert all(child.restarts == 0 for child in mesh.children.all.values())
        assert mesh.said[0] == "agent-1: starting agent-3 in its place"


async def test_names_come_round_again(tmp_path: Path) -> None:
    async with running(tmp_path) as mesh:
        await mesh.start("agent-1", "agent-2")
        for _ in range(3):
            await mesh.restart.rolling(["agent"])
        assert set(mesh.pids()) <= {"agent-1", "agent-2", "agent-3"}


async def test_a_service_with_one_replica_is_never_without(tmp_path: Path) -> None:
    async with running(tmp_path) as mesh:
        await mesh.start("agent-1")
        await mesh.restart.rolling(["agent"])
        assert list(mesh.pids()) == ["agent-2"]
        assert min(mesh.counts) >= 1


async def test_a_successor_that_does_not_come_up_stops_the_roll_and_is_gone(tmp_path: Path) -> None:
    async with running(tmp_path) as mesh:
        before = await mesh.start("agent-1", "agent-2")
        mesh.script = "echo the reason; exit 3"
        with pytest.raises(LaunchError) as failed:
            await mesh.restart.rolling(["session", "agent"])
        assert mesh.pids() == before
        assert "\n" not in str(failed.value)
        assert str(failed.value) == (
            "agent-3 does not start: exit status 3: the reason; stopped before agent-1 was touched: nothing "
            "is lost, and agent-1, agent-2 work on as before. Mend that, then: hermesh restart all --rolling"
        )


async def test_a_successor_that_envoy_does_not_find_stops_the_roll_too(tmp_path: Path) -> None:
    async with running(tmp_path) as mesh:
        before = await mesh.start("agent-1")

        async def never(_: Sequence[Child]) -> None:
            raise LaunchError("Envoy does not find agent-2 healthy")

        mesh.restart._balanced = never
        with pytest.raises(LaunchError, match=r"agent-1 works on as before.*hermesh restart agent --rolling"):
            await mesh.restart.rolling(["agent"])
        assert mesh.pids() == before


async def test_all_at_once_keeps_the_names(tmp_path: Path) -> None:
    async with running(tmp_path) as mesh:
        before = await mesh.start("agent-1", "agent-2", "tool-1")
        await mesh.restart.at_once(["agent"])
        after = mesh.pids()
        assert sorted(after) == sorted(before)
        assert {name for name in before if after[name] == before[name]} == {"tool-1"}
        assert min(mesh.counts) == 0


async def test_a_long_drain_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.restart.NEWS_SECONDS", 0.05)
    async with running(tmp_path) as mesh:
        mesh.script = "trap 'sleep 0.3; exit 0' TERM; " + SERVES + "while :; do sleep 0.02; done"
        await mesh.start("agent-1")
        await mesh.restart.rolling(["agent"])
        assert [text for text in mesh.said if text.startswith("agent-1: still at work after")]
        assert mesh.said[-1].startswith("agent-1: ended after")


async def test_a_service_without_replicas_is_not_restarted(tmp_path: Path) -> None:
    async with running(tmp_path) as mesh:
        await mesh.start("tool-1")
        for restart in (mesh.restart.rolling, mesh.restart.at_once):
            with pytest.raises(LaunchError, match="hermesh scale agent=1"):
                await restart(["agent"])
        with pytest.raises(LaunchError, match="hermesh up"):
            await mesh.restart.rolling(["agent", "session"])
        await mesh.restart.rolling(["agent", "tool"])
        assert list(mesh.pids()) == ["tool-2"]


def test_what_is_restarted_is_named() -> None:
    assert parse_service("agent") == ["agent"]
    assert set(parse_service("all")) == set(ORDER) == set(SERVICES)
    with pytest.raises(LaunchError, match="'postgresql' is not one of agent, gateway"):
        parse_service("postgresql")
