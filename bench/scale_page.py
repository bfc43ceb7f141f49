"""The page and plot of `bench.scale`, and the simulations that they show."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from bench.cells_forecast import NEAR, TENANTS, Placement, Spread, placements, spreads
from bench.costs import Costs
from bench.facts import ROOT
from bench.forecast import (
    NAMES,
    ROOM,
    SESSIONS_AN_AGENT,
    TARGET,
    WORK,
    Curve,
    Prediction,
    Step,
    curves,
    demand,
    ladder,
    predictions,
)
from bench.publish import ELSEWHERE, RESULTS
from bench.report import ReportError, machine, packages, table, write_section
from bench.scale_data import MODEL_SECONDS, SLOTS, Measured, costs_of, decode, encode

NAME = "scale"
PAGE = ROOT / "docs" / "scaling.md"

_MEASURED_NOTE = (
    f"{SLOTS} slots an agent, {MODEL_SECONDS:g} s of the model a run, half as many clients again as slots: "
    f"{SLOTS / MODEL_SECONDS:.1f} runs a second an agent is the most that the slots allow. Model and load "
    "generator work on the same {cores} cores."
)
_COSTS_NOTE = (
    "A run commits {costs.run_commits:.1f} transactions beside those that write its tokens; "
    "PostgreSQL alone commits {costs.commit_rate:,.0f} one-row transactions a second here; {hop_ms:.1f} ms "
    "of a run are neither CPU nor the model."
)
_WORK_NOTE = (
    f"Replies of {WORK.tokens} tokens in {WORK.seconds:g} s, agents with {SLOTS} slots of which "
    f"{TARGET:.0%} are taken: {{rate:.1f}} runs a second an agent. The simulation of these has "
    f"{WORK.portions} portions a reply; the mesh sends smaller ones while it has time, and costs more then. "
    "A process under load finds more than one portion each time: it can do between the two figures."
)


def _folder() -> Path:
    return RESULTS if PAGE.is_file() else ELSEWHERE


def read() -> Measured:
    """Returns the last results. Raises ReportError when there are none."""
    path = _folder() / f"{NAME}.json"
    if not path.is_file():
        raise ReportError("there are no results yet: make bench-scale")
    return decode(path.read_bytes())


def keep(measured: Measured) -> Path:
    """Writes the results as JSON; returns where."""
    folder = _folder()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{NAME}.json"
    file.write_bytes(encode(measured))
    return file


def publish(measured: Measured, *, far: bool = True) -> list[Path]:
    """Simulates, `far` or only what was measured, and writes plot and page; returns what it wrote.

    Raises:
        ReportError: The page has no place for it.
    """
    plot = _folder() / f"{NAME}.svg"
    costs = costs_of(measured)
    compared = predictions(measured, costs)
    grown, steps = (curves(costs), ladder(costs)) if far else ([], [])
    _plot(compared, grown).savefig(plot, metadata={"Date": None})
    written = [plot]
    if PAGE.is_file():
        link = os.path.relpath(plot, PAGE.parent)
        parts = (spreads(costs), placements()) if far else ([], [])
        write_section(PAGE, NAME, section(measured, costs, compared, grown, steps, link, *parts))
        written.append(PAGE)
    return written


def section(
    measured: Measured,
    costs: Costs,
    compared: Sequence[Prediction],
    grown: Sequence[Curve],
    steps: Sequence[Step],
    plot: str,
    spread: Sequence[Spread] = (),
    placed: Sequence[Placement] = (),
) -> str:
    """The page's section, made of what was measured and simulated."""
    parts = [
        f"Measured on {machine(measured.facts)}",
        f"Packages: {packages(measured.facts)}.",
        f"![Runs a second by agents, measured and simulated]({plot})",
        "### Measured",
        _measured(measured),
        "### The simulation against the measurements",
        _compared(compared),
        "### What it is calibrated with",
        _costs(costs),
        "### Where each part becomes the limit",
        _limits(costs),
    ]
    if steps:
        parts += ["### One limit after the other, at 1,000 agents", _ladder(steps)]
    if grown:
        parts += ["### From one agent to 1,000", _curves(grown)]
    if spread:
        parts += ["### A million sessions on cells, and ten", _spreads(spread), _placements(placed)]
    return "\n\n".join(parts)


def _measured(measured: Measured) -> str:
    cores = measured.facts["cores"]
    base = measured.points[0].rate / measured.points[0].agents
    rows = []
    for point in measured.points:
        busiest = sorted(point.cores, key=lambda kind: -point.cores[kind])[:4]
        rows.append(
            [
                f"{point.agents}",
                f"{point.rate:.1f}",
                f"{point.rate / (base * point.agents):.0%}",
                f"{point.p50:.2f}",
                f"{point.p99:.2f}",
                f"{sum(point.cores.values()):.2f} + {point.others:.2f}",
                ", ".join(f"{kind} {point.cores[kind]:.2f}" for kind in busiest),
                point.fullest(cores),
            ]
        )
    return "\n\n".join(
        [
            table(
                [
                    "agents",
                    "runs/s",
                    "of linear",
                    "p50, s",
                    "p99, s",
                    "cores: this + others",
                    "busiest processes, cores",
                    "fullest",
                ],
                rows,
            ),
            _MEASURED_NOTE.format(cores=cores),
        ]
    )


def _compared(compared: Sequence[Prediction]) -> str:
    rows = [
        [
            f"{one.point.agents}",
            f"{one.point.rate:.1f}",
            f"{one.observed.rate:.1f}",
            f"{one.error:+.1%}",
            f"{one.point.p50:.2f}",
            f"{one.observed.percentile(0.5):.2f}",
            f"{one.latency_error:+.1%}",
            f"{one.point.commits:.1f}",
            f"{one.observed.commits:.1f}",
            f"{NAMES[one.observed.fullest]} ({one.observed.used[one.observed.fullest]:.0%})",
        ]
        for one in compared
    ]
    heads = [
        "agents",
        "runs/s measured",
        "simulated",
        "error",
        "p50 measured, s",
        "simulated",
        "error",
        "commits a run",
        "simulated",
        "fullest",
    ]
    worst = max(abs(one.error) for one in compared)
    return table(heads, rows) + f"\n\nThe largest error of the throughput is {worst:.1%}."


def _costs(costs: Costs) -> str:
    rows = [
        [
            kind,
            f"{cost.run * 1e3:.2f}",
            f"{cost.wake * 1e6:.0f}",
            f"{cost.token * 1e6:.0f}",
            f"{costs.idle.get(kind, 0.0) * 100:.1f}",
        ]
        for kind, cost in costs.kinds.items()
    ]
    return "\n\n".join(
        [
            table(["process", "CPU ms a run", "µs a wake-up", "µs a token", "idle, % of a core"], rows),
            _COSTS_NOTE.format(costs=costs, hop_ms=costs.hop * 1e3),
        ]
    )


def _limits(costs: Costs) -> str:
    rate = SLOTS / WORK.seconds * TARGET
    gathered = demand(costs, gathered=True)
    rows = [
        [
            NAMES[kind],
            f"{1 / each:,.0f}",
            f"{1 / gathered[kind]:,.0f}",
            f"{1 / each / rate:,.0f} to {1 / gathered[kind] / rate:,.0f}",
            f"{rate * 1000 * each / ROOM:,.1f}",
        ]
        for kind, each in demand(costs).items()
        if each and gathered[kind]
    ]
    heads = [
        "one of it",
        "runs/s, nothing gathered",
        "all gathered",
        "agents that fill it",
        f"for 1,000 agents, {ROOM:.0%} busy with nothing gathered",
    ]
    return table(heads, rows) + "\n\n" + _WORK_NOTE.format(rate=rate)


def _ladder(steps: Sequence[Step]) -> str:
    rows = [
        [step.what, f"{step.observed.rate:,.0f}", f"{step.observed.rate / step.offered:.0%}", step.limit]
        for step in steps
    ]
    return table(["layout", "runs/s", "of what is asked for", "fullest then"], rows)


def _curves(grown: Sequence[Curve]) -> str:
    rows = [
        [
            f"{one.agents:,}",
            f"{one.agents * SESSIONS_AN_AGENT:,}",
            f"{one.single.rate:,.1f}",
            f"{one.sharded.rate:,.1f}",
            one.layout,
            f"{one.added(0.5) * 1e3:,.0f}",
            f"{one.added(0.99) * 1e3:,.0f}",
            f"{one.hottest}",
        ]
        for one in grown
    ]
    heads = [
        "agents",
        "sessions",
        "runs/s, one of each",
        "runs/s, sharded",
        "gateways / Envoy workers / sessions / PostgreSQL / Valkey",
        "added p50, ms",
        "p99, ms",
        "busiest single one",
    ]
    return table(heads, rows)


def _spreads(spread: Sequence[Spread]) -> str:
    rows = [
        [
            f"{one.sessions:,}",
            f"{one.cells}",
            f"{one.agents // one.cells:,}",
            one.layout,
            f"{one.edge_workers}",
            f"{one.rate:,.0f}",
            f"{one.added(0.5) * 1e3:,.0f}",
            f"{one.added(0.99) * 1e3:,.0f}",
            one.hottest,
            f"{one.sessions // one.cells:,}",
        ]
        for one in spread
    ]
    heads = [
        "sessions",
        "cells",
        "agents a cell",
        "a cell: gateways / Envoy workers / sessions / PostgreSQL / Valkey",
        "edge's workers",
        "runs/s",
        "added p50, ms",
        "p99, ms",
        "busiest single one of a cell",
        "sessions that one cell's end stops",
    ]
    note = (
        "Cells have nothing in common, so one is simulated and counts for all. The edge is one more Envoy "
        "on a run's way, as busy as any part may be."
    )
    return f"{table(heads, rows)}\n\n{note}"


def _placements(placed: Sequence[Placement]) -> str:
    rows = [
        [
            f"{one.cells}",
            f"{one.largest:.1%}",
            f"{one.hashed:.2f}",
            f"{one.moves}",
            f"{one.moved:.2f}",
        ]
        for one in placed
    ]
    heads = [
        "cells",
        "largest tenant",
        "fullest cell, of the mean",
        "tenants moved",
        "fullest then, of the mean",
    ]
    note = (
        f"{TENANTS:,} tenants whose sizes fall as one over their rank, placed by a hash; then tenants are "
        f"moved from the fullest cell to the emptiest until it is within {NEAR - 1:.0%} of the mean, or of "
        "the largest tenant, which no cell can hold less than."
    )
    return f"{table(heads, rows)}\n\n{note}"


def _plot(compared: Sequence[Prediction], grown: Sequence[Curve]) -> Figure:
    mpl.rcParams["svg.hashsalt"] = "hermesh"
    mpl.rcParams["svg.fonttype"] = "none"
    mpl.rcParams["font.size"] = 9
    figure = Figure(figsize=(10.5, 3.8), layout="constrained")
    left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    agents = [one.point.agents for one in compared]
    base = compared[0].point.rate / compared[0].point.agents
    _curve(left, agents, [base * number for number in agents], "linear", "--", "#999999")
    _curve(left, agents, [one.point.rate for one in compared], "measured", "o-", "C0")
    _curve(left, agents, [one.observed.rate for one in compared], "simulated", "x:", "C1")
    left.set_title("on this machine", fontsize=9)
    if not grown:
        right.set_axis_off()
        return figure
    agents = [one.agents for one in grown]
    _curve(right, agents, [one.offered for one in grown], "asked for", "--", "#999999")
    _curve(right, agents, [one.single.rate for one in grown], "one of each store and proxy", "x-", "C3")
    _curve(right, agents, [one.sharded.rate for one in grown], "sharded", "o:", "C2")
    right.set_title("simulated", fontsize=9)
    return figure


def _curve(axes: Any, x: Sequence[float], y: Sequence[float], label: str, style: str, colour: str) -> None:
    axes.plot(x, y, style, label=label, color=colour)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(x, [f"{number:,}" for number in x])
    axes.minorticks_off()
    axes.set_xlabel("agents")
    axes.set_ylabel("runs/s")
    axes.legend(fontsize=8)
