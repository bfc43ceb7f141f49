"""Runs scenarios on the mesh and on its model alone, turn about, so that both see the same machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from bench.facts import facts
from bench.long_sessions import measure_long_sessions
from bench.measure import Run, measure
from bench.mesh import Mesh
from bench.neighbours import measure_neighbours
from bench.results import Result
from bench.scenarios import LongSessions, Neighbours, Replies, Scenario, Watchers
from bench.targets import MeshTarget, ModelTarget
from bench.watchers import measure_watchers

WARM_UP = Replies("warm_up", "warming up", clients=8, asks=2, tokens=50)
NOTES = 50
SETTINGS = {
    "HERMESH_MAX_STREAMS": "8000",
    # 400 clients that ask at the same moment are an overload; here all are served, however long they wait.
    # What is refused otherwise is bench.overload's.
    "HERMESH_LINE_SECONDS": "60",
    "HERMESH_MAX_WAITING_STREAMS": "1000",
    "HERMESH_ACCEPT_TARGET_SECONDS": "0",
}


def meshes(scenarios: Sequence[Scenario]) -> list[list[Scenario]]:
    """Returns the scenarios that share a mesh, in order.

    Watchers get one of their own: memory that an earlier load has left to a process hides what they take.
    """
    shared: list[Scenario] = [one for one in scenarios if not isinstance(one, Watchers)]
    groups: list[list[Scenario]] = [shared] if shared else []
    return groups + [[one] for one in scenarios if isinstance(one, Watchers)]


async def run_scenario(mesh: Mesh, scenario: Scenario, runs: int, said: Callable[[str], None]) -> Result:
    """Runs one scenario `runs` times.

    Args:
        mesh: a mesh on the zero-delay model server.
        scenario: what to do.
        runs: how often each target is measured; watchers are measured once, whatever it says.
        said: is told what goes on.

    Raises:
        IncompleteReply: A reply lacks something.
        LoadError: The load generator failed.
    """
    result = Result(scenario.name, scenario.title, facts())
    if isinstance(scenario, Replies):
        await _replies(mesh, scenario, runs, said, result)
        return result
    assert mesh.model is not None
    pid = mesh.model.process.pid
    async with MeshTarget(mesh) as target:
        said(f"{scenario.title}: warming up")
        await measure(target, WARM_UP, (mesh.model.url, pid))
        key = mesh.new_tenant("polite") if isinstance(scenario, Neighbours) else ""
        for number in range(1 if isinstance(scenario, Watchers) else runs):
            said(f"{scenario.title}: run {number + 1}")
            if isinstance(scenario, LongSessions):
                run = await measure_long_sessions(target, scenario, pid)
            elif isinstance(scenario, Neighbours):
                async with MeshTarget(mesh, key=key) as polite:
                    run = await measure_neighbours(target, polite, scenario, pid)
            else:
                run = await measure_watchers(target, scenario, pid)
            result.runs.append(run)
    return result


async def _replies(
    mesh: Mesh, scenario: Replies, runs: int, said: Callable[[str], None], result: Result
) -> None:
    assert mesh.model is not None
    model = (mesh.model.url, mesh.model.process.pid)
    alone = ModelTarget(mesh.model)
    async with MeshTarget(mesh, memory=scenario.memory) as target:
        if scenario.memory:
            said(f"{scenario.title}: {NOTES} things to remember")
            await target.learn(NOTES)
        said(f"{scenario.title}: warming up")
        await measure(target, warm_up(scenario), model)
        for number in range(runs):
            said(f"{scenario.title}: run {number + 1} of {runs}")
            baseline = await measure(alone, scenario, model) if scenario.baseline else None
            run = await measure(target, scenario, model)
            if baseline is not None:
                result.runs.append(baseline)
                compare(run, baseline)
            result.runs.append(run)


def warm_up(scenario: Replies) -> Replies:
    """Returns a short form of a scenario: as many clients, one short reply each.

    Nothing has to be recalled: what is said here are the first memories.
    """
    return replace(
        scenario,
        asks=max(1, 5 // scenario.clients),
        tokens=min(scenario.tokens, 50),
        rate=0.0,
        spread=0.0,
        memory=False,
    )


def compare(run: Run, baseline: Run) -> None:
    """Adds what a run added to the model alone, measured right before it."""
    run.figures["ttft_added_ms"] = run.figures["ttft_p50_ms"] - baseline.figures["ttft_p50_ms"]
    run.figures["tokens_ratio"] = run.figures["tokens_per_second"] / baseline.figures["tokens_per_second"]
