"""The page and the plot of `bench.hpa`."""

from __future__ import annotations

import os
from pathlib import Path

import matplotlib as mpl
import orjson
from matplotlib.figure import Figure

from bench.autoscaler import TOLERANCE
from bench.facts import ROOT
from bench.hpa import METRIC, Outcome, decode, encode
from bench.publish import ELSEWHERE, RESULTS
from bench.report import ReportError, machine, table, write_section

NAME = "hpa"
PAGE = ROOT / "docs" / "autoscaling.md"


def stored() -> Outcome:
    """Reads the results there are. Raises ReportError without any."""
    file = RESULTS / f"{NAME}.json"
    if not file.is_file():
        raise ReportError(f"there is no {file}; measure first")
    return decode(orjson.loads(file.read_bytes()))


def publish(outcome: Outcome) -> list[Path]:
    """Writes results, plot and page; returns what it wrote. Outside of a checkout there is no page."""
    checkout = PAGE.is_file()
    folder = RESULTS if checkout else ELSEWHERE
    folder.mkdir(parents=True, exist_ok=True)
    file, plot = folder / f"{NAME}.json", folder / f"{NAME}.svg"
    file.write_bytes(orjson.dumps(encode(outcome), option=orjson.OPT_INDENT_2) + b"\n")
    _plot(outcome).savefig(plot, metadata={"Date": None})
    if not checkout:
        return [file, plot]
    write_section(PAGE, NAME, section(outcome, os.path.relpath(plot, PAGE.parent)))
    return [file, plot, PAGE]


def section(outcome: Outcome, plot: str) -> str:
    """Returns what the command writes."""
    moments, steps = outcome.moments, outcome.steps
    most = max(moment.decided for moment in moments)
    above = [one for one in moments if one.sessions / one.replicas > outcome.target * (1 + TOLERANCE)]
    interval = moments[-1].at / max(1, len(moments) - 1)
    rows = [
        ["runs, each whole to its last token", f"{outcome.runs:,}"],
        ["runs that were cut", "0"],
        ["requests that were refused for lack of a place", f"{outcome.refused:,}"],
        ["runs that a drain handed to another agent", f"{outcome.moved:,}"],
        ["runs of which text was written again", f"{outcome.reset:,}"],
        ["longest delay of a run beyond its model's time, s", f"{outcome.late:.1f}"],
        ["sessions at once, the most that were exported", f"{max(one.sessions for one in moments):.0f}"],
        [
            "agents: at the beginning, the most, at the end",
            f"{moments[0].replicas}, {most}, {moments[-1].decided}",
        ],
        ["changes up, down", f"{sum(step > 0 for step in steps)}, {sum(step < 0 for step in steps)}"],
        ["changes of direction (up and then down is one)", f"{outcome.turns}"],
        [
            f"seconds above {outcome.target:.0f} an agent and its tolerance",
            f"{len(above) * interval:.0f} of {moments[-1].at:.0f}",
        ],
        ["decided by", _deciders(outcome)],
    ]
    parts = [
        f"Measured on {machine(outcome.facts)}",
        f"The autoscaler's clock ran {outcome.speed:g} times as fast as a cluster's; its seconds are below.",
        f"![Sessions and agents over time]({plot})" if plot else "",
        table(["", ""], rows),
    ]
    return "\n\n".join(part for part in parts if part)


def _deciders(outcome: Outcome) -> str:
    """Which metric asked for the most when replicas were added."""
    added = [one for one in outcome.moments if one.decided > one.replicas]
    names: dict[str, int] = {}
    for one in added:
        name = max(one.by_metric, key=lambda metric: one.by_metric[metric])
        names[name] = names.get(name, 0) + 1
    return ", ".join(f"{name} {count} times" for name, count in names.items()) or "nothing"


def _plot(outcome: Outcome) -> Figure:
    mpl.rcParams["svg.hashsalt"] = "hermesh"
    mpl.rcParams["svg.fonttype"] = "none"
    mpl.rcParams["font.size"] = 9
    moments = outcome.moments
    minutes = [one.at / 60 for one in moments]
    figure = Figure(figsize=(9, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.plot(minutes, [one.asked for one in moments], "--", color="#999999", label="asked for")
    above.plot(minutes, [one.sessions for one in moments], color="C0", label=f"{METRIC}, all agents")
    room = [one.replicas * outcome.target for one in moments]
    above.step(minutes, room, where="post", color="C1", label=f"{outcome.target:.0f} for each agent")
    above.set_ylabel("sessions at once")
    wanted = [max(one.by_metric.values()) for one in moments]
    below.plot(minutes, wanted, ".", color="#999999", label="asked for by the metrics")
    below.step(minutes, [one.decided for one in moments], where="post", color="C1", label="set")
    below.plot(
        minutes, [one.exporting for one in moments], ":", color="C2", label="exporting, drains included"
    )
    below.set_ylabel("agents")
    below.set_xlabel("minutes of the autoscaler's clock")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)
    return figure
