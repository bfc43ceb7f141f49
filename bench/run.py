"""Runs scenarios on the mesh and on its model alone, turn about, so that both see the same machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from bench.facts import facts
from bench.measure import Run, measure
from bench.mesh import Mesh
from bench.results import Result
from bench.scenarios import Replies, Scenario
from bench.targets import MeshTarget, ModelTarget

SETTINGS = {"HERMESH_MAX_STREAMS": "8000"}


async def run_scenario(mesh: Mesh, scenario: Scenario, runs: int, said: Callable[[str], None]) -> Result:
    """Runs one scenario `runs` times.

    Args:
        mesh: a mesh on the zero-delay model server.
        scenario: what to do.
        runs: how often each target is measured.
        said: is told what goes on.

    Raises:
        IncompleteReply: A reply lacks something.
        LoadError: The load generator failed.
    """
    result = Result(scenario.name, scenario.title, facts())
    assert isinstance(scenario, Replies)
    await _replies(mesh, scenario, runs, said, result)
    return result


async def _replies(
    mesh: Mesh, scenario: Replies, runs: int, said: Callable[[str], None], result: Result
) -> None:
    assert mesh.model is not None
    model = (mesh.model.url, mesh.model.process.pid)
    alone = ModelTarget(mesh.model)
    async with MeshTarget(mesh, memory=scenario.memory) as target:
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
    """Returns a short form of a scenario: as many clients, one short reply each."""
    return replace(scenario, asks=max(1, 5 // scenario.clients), tokens=min(scenario.tokens, 50), rate=0.0)


def compare(run: Run, baseline: Run) -> None:
    """Adds what a run added to the model alone, measured right before it."""
    run.figures["ttft_added_ms"] = run.figures["ttft_p50_ms"] - baseline.figures["ttft_p50_ms"]
    run.figures["tokens_ratio"] = run.figures["tokens_per_second"] / baseline.figures["tokens_per_second"]
