"""What another version started is replaced, Envoy's successor first; scripts stand for processes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path

import pytest

from launcher import renew
from launcher.children import Child, Children
from launcher.errors import LaunchError
from launcher.folder import Folder
from launcher.plan import Spec
from launcher.renew import Renewal
from launcher.restart import Restart

READY = (
    'echo "{\\"pid\\": $$, \\"address\\": \\"127.0.0.1:1\\"}" > READY.tmp; mv READY.tmp READY; exec sleep 60'
)


class FakeAdmin:
    """A FAKE admin interface of an Envoy, with streams that end as it is asked."""

    def __init__(self, mesh: Mesh, number: int) -> None:
        self.mesh, self.number = mesh, number

    async def leave(self) -> None:
        self.mesh.seen.append(f"envoy-{self.number} leaves")

    async def under_way(self) -> int:
        self.mesh.streams = max(0, self.mesh.streams - 1)
        return self.mesh.streams


class Mesh:
    """Scripts that stand for a mesh that another version started; a plan, too."""

    def __init__(self, folder: Folder, group: asyncio.TaskGroup) -> None:
        self.folder = folder
        self.envoy_number = 1
        self.streams = 0
        self.script = READY
        self.seen: list[str] = []
        self.children = Children(folder, group, lambda: None, lambda: None)
        restart = Restart(
            self,  # type: ignore[arg-type] - of the plan nothing but `service` is used
            self.children,
            number=self.number,
            balanced=self.balanced,
            take_out=self.take_out,
            say=self.say,
        )
        self.renewal = Renewal(
            self,  # type: ignore[arg-type]
            self.children,
            restart,
            balanced=self.balanced,
            code="new",
            say=self.say,
        )

    def service(self, service: str, number: int) -> Spec:
        ready = self.folder.ready / f"{service}-{number}.json"
        script = self.script.replace("READY", str(ready))
        return Spec(service, f"{service}-{number}", ["sh", "-c", script], dict(os.environ), ready_file=ready)

    def envoy_spec(self, number: int) -> Spec:
        return self.service("envoy", number)

    def admin_of(self, number: int) -> FakeAdmin:
        return FakeAdmin(self, number)

    def number(self, service: str) -> int:
        taken = {child.spec.number for child in self.children.all.values() if child.spec.service == service}
        return next(number for number in count(1) if number not in taken)

    async def balanced(self, children: Sequence[Child]) -> None:
        return None

    async def take_out(self, child: Child) -> None:
        self.seen.append(f"{child.spec.replica} ends")
        await self.children.drain(child, 10)

    async def say(self, text: str) -> None:
        self.seen.append(text)

    async def start(self, **codes: str) -> None:
        for name, code in codes.items():
            service, _, number = name.rpartition("_")
            self.children.start(self.service(service, int(number)), None)
            await self.children.wait_ready(self.children.all.values())
            self.children.all[f"{service}-{number}"].code = code


@asynccontextmanager
async def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Mesh]:
    monkeypatch.setattr("launcher.children.code_here", lambda: "new")
    monkeypatch.setattr(renew, "LOOK_SECONDS", 0.01)
    folder = Folder(tmp_path / "data")
    folder.prepare()
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        mesh = Mesh(folder, group)
        yield mesh
        await asyncio.gather(*(mesh.children.end(child, 1) for child in list(mesh.children.all.values())))


async def test_the_former_envoy_takes_nothing_new_before_and_ends_after_every_replica(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path, monkeypatch) as mesh:
        await mesh.start(envoy_1="old", agent_1="old", gateway_1="old", session_1="")
        mesh.streams = 4
        assert await mesh.renewal.run()
        assert sorted(mesh.children.all) == ["agent-2", "envoy-2", "gateway-2", "session-2"]
        assert mesh.envoy_number == 2
        order = [text for text in mesh.seen if text.endswith((" ends", " leaves"))]
        assert order == [
            *("envoy-1 leaves", "session-1 ends", "agent-1 ends", "gateway-1 ends", "envoy-1 leaves"),
        ]
        assert mesh.seen[-1].startswith("envoy-1: ended after")
        assert "cut" not in mesh.seen[-1]
        # The next upgrade goes the other way.
        for child in mesh.children.all.values():
            child.code = "old"
        await mesh.renewal.run()
        assert sorted(mesh.children.all) == ["agent-1", "envoy-1", "gateway-1", "session-1"]


async def test_what_is_new_already_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(tmp_path, monkeypatch) as mesh:
        await mesh.start(envoy_1="new", agent_1="new", agent_2="old")
        await mesh.renewal.run()
        assert sorted(mesh.children.all) == ["agent-1", "agent-3", "envoy-1"]
        mesh.seen.clear()
        assert not await mesh.renewal.run()
        assert mesh.seen == []


async def test_an_envoy_that_does_not_come_up_stops_before_anything_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path, monkeypatch) as mesh:
        await mesh.start(envoy_1="old", agent_1="old")
        before = {name: child.identity for name, child in mesh.children.all.items()}
        mesh.script = "echo the reason; exit 3"
        with pytest.raises(LaunchError, match=r"the reason.*before envoy-1 was touched.*hermesh up") as told:
            await mesh.renewal.run()
        assert "\n" not in str(told.value)
        assert {name: child.identity for name, child in mesh.children.all.items()} == before
        assert mesh.envoy_number == 1
        assert not any("leaves" in text for text in mesh.seen)


async def test_an_upgrade_that_was_broken_off_ends_the_former_envoy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path, monkeypatch) as mesh:
        await mesh.start(envoy_1="old", envoy_2="new", agent_1="new")
        mesh.envoy_number = 2
        assert await mesh.renewal.run()
        assert sorted(mesh.children.all) == ["agent-1", "envoy-2"]


async def test_what_does_not_leave_the_former_envoy_is_cut_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(renew, "LEAVE_SECONDS", 0.0)
    async with running(tmp_path, monkeypatch) as mesh:
        await mesh.start(envoy_1="old")
        mesh.streams = 3
        await mesh.renewal.run()
        assert mesh.seen[-1].endswith("2 streams were cut")
