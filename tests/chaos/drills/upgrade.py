"""A mesh of the release before is brought to this one, part by part, while clients stream and send; and back.

Three upgrades: from the release before to what is here, the same in one folder, and from what is here to what
may come after it (the same with one more migration) and back again, since the release before may not know the
way back yet.
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from bench.mesh import Mesh
from launcher.state import State
from tests.chaos.drills import versions
from tests.chaos.drills.callers import callers
from tests.chaos.drills.edge import Front, front
from tests.chaos.drills.failover import compare, senders, stored_inputs
from tests.chaos.drills.load import Script, load
from tests.chaos.drills.parts import folder, healthy
from tests.chaos.drills.report import Report
from tests.chaos.drills.versions import Version
from tests.chaos.faults.cluster import ROOT

REPLICAS = "gateway=2,agent=2,session=2,tool=1,memory=1"
SCRIPTS = (Script(40, 10), Script(300, 10), Script(30, 10, tool=True), Script(80, 10, watched=True))
SETTINGS = {"HERMESH_LLM_PREFILL": "true", "HERMESH_TRUSTED_PROXIES": "1"}
UPGRADE_SECONDS = 400.0
STEADY_SECONDS = 3.0
SENDERS = 10
CALLERS = 10
HERE = Version("here", ROOT)
_ENDED = re.compile(r"^envoy-\d+: ended after (?P<seconds>[\d.]+ s.*)$")


async def roll(mesh: Mesh, version: Version, report: Report, *, by_make: bool = False) -> list[str]:
    """`hermesh up`, or `make up`, of a version on a mesh that another one runs; returns its lines."""
    began = time.monotonic()
    command = ["make", "up", "ARGS=--no-reply"] if by_make else [str(version.program), "up", "--no-reply"]
    process = await asyncio.create_subprocess_exec(
        *command,
        env={name: value for name, value in mesh.environment.items() if not name.startswith("MAKE")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=version.tree,
    )
    lines = []
    try:
        assert process.stdout is not None
        async with asyncio.timeout(UPGRADE_SECONDS):
            async for line in process.stdout:
                lines.append(line.decode().rstrip())
                report.say(f"{time.monotonic() - began:5.1f} s  {lines[-1]}")
            status = await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if status:
        raise RuntimeError(f"hermesh up of {version.name} ended with {status}: {lines[-1:]}")
    return lines


def _check_all_new(mesh: Mesh, version: Version, report: Report, before: set[int]) -> None:
    """Every part but the stores and the model is another process, of this version, never started twice."""
    state = State.load(mesh.data_dir / "state.json")
    replaced = [child for child in state.children if child.service not in ("postgresql", "valkey", "model")]
    report.at_most("processes of the version before", sum(child.pid in before for child in replaced), 0)
    report.at_most("processes started again", sum(child.restarts for child in state.children), 0)
    commands = [Path(f"/proc/{child.pid}/cmdline").read_bytes().decode() for child in replaced]
    report.at_most(
        "processes of another folder", sum(str(version.tree) not in command for command in commands), 0
    )
    report.at_least("processes that were replaced", len(replaced), 8)


async def _upgrade(
    report: Report,
    mesh: Mesh,
    edge: Front,
    way: Sequence[Version],
    streams: int,
    *,
    in_place: bool = False,
) -> None:
    """Brings a mesh from one version to the next, and on, under clients who must not notice."""
    phases = [("before", 0.0, float("inf"))]
    async with (
        load(mesh, streams, SCRIPTS, lambda: [edge.http]) as seen,
        senders(mesh, SENDERS, edge.url) as sent,
        callers(edge.grpc, mesh.api_key, CALLERS) as called,
    ):
        for version in way:
            await asyncio.sleep(STEADY_SECONDS)
            before = {child.pid for child in State.load(mesh.data_dir / "state.json").children}
            began = time.monotonic()
            phases[-1] = (*phases[-1][:2], began)
            if in_place:
                await asyncio.to_thread(versions.write_here, version.tree)
            if (version.tree / "deploy" / "haproxy").is_dir():
                await asyncio.to_thread(edge.reload, version.tree)
            lines = await roll(mesh, version, report, by_make=in_place)
            ended = time.monotonic()
            phases += [(f"while {version.name} comes", began, ended), ("after", ended, float("inf"))]
            report.note(f"the upgrade to {version.name} took", f"{ended - began:.1f} s")
            for found in filter(None, map(_ENDED.match, lines)):
                report.note("  the former Envoy ended after", found["seconds"])
            mesh.program = version.program
            await healthy(mesh)
            _check_all_new(mesh, version, report, before)
        await asyncio.sleep(STEADY_SECONDS)
    stored = await stored_inputs(mesh.command("env", "HERMESH_DATABASE_URL").strip())
    report.streams(seen, asked=1)
    report.at_least("runs over gRPC completed", called.completed, 1)
    report.at_most("errors over gRPC", len(called.errors), 0)
    report.at_most("gaps and duplicates over gRPC", len(called.wrong), 0)
    report.note("came back over gRPC when asked", called.reconnects)
    report.at_most("input sent alone and refused", len(sent.refused), 0)
    report.notes += [f"gRPC: {text}" for text in [*called.errors[:5], *called.wrong[:5]]]
    report.notes += [f"input alone: {text}" for text in sent.refused[:5]]
    acknowledged = [run.text for run in seen.runs if run.run_id] + sent.acknowledged + called.acknowledged
    compare(report, acknowledged, stored)
    report.note("runs that changed their agent", seen.takeovers)
    report.waits(seen, phases)


async def from_previous(report: Report, streams: int, work: Path) -> None:
    """From the release before to what is here, each in its own folder."""
    name = await asyncio.to_thread(versions.previous)
    old = await asyncio.to_thread(versions.checkout, name, work / "previous")
    report.note("from", f"{name} to this, in another folder")
    source = old.tree if (old.tree / "deploy" / "haproxy").is_dir() else ROOT
    with (
        Mesh(program=old.program, replicas=REPLICAS, settings=SETTINGS) as mesh,
        front(mesh, source) as edge,
    ):
        await _upgrade(report, mesh, edge, [HERE], streams)


async def in_place(report: Report, streams: int, work: Path) -> None:
    """From the release before to what is here in one and the same folder: `git pull`, `make up`."""
    name = await asyncio.to_thread(versions.previous)
    tree = await asyncio.to_thread(versions.checkout, name, work / "pulled")
    report.note("from", f"{name} to this, in one folder")
    with (
        Mesh(program=tree.program, replicas=REPLICAS, settings=SETTINGS) as mesh,
        front(mesh, ROOT) as edge,
    ):
        await _upgrade(report, mesh, edge, [tree], streams, in_place=True)


async def to_next_and_back(report: Report, streams: int, work: Path) -> None:
    """From what is here to what may come after it, and back."""
    later = await asyncio.to_thread(versions.after, work / "after")
    report.note("from", "this to one that may come next, and back")
    with Mesh(replicas=REPLICAS, settings=SETTINGS) as mesh, front(mesh, ROOT) as edge:
        await _upgrade(report, mesh, edge, [later, HERE], streams)


async def drill(streams: int) -> Report:
    """0 client errors, 0 gaps, every acknowledged input in its conversation once."""
    report = Report("upgrade", whole=True)
    with folder("hm-upgrade-") as work:
        await from_previous(report, streams, work)
        await in_place(report, streams, work)
        await to_next_and_back(report, streams, work)
    return report
