"""Plots of the mesh's results, as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from bench.histogram import Times
from bench.measure import MODEL
from bench.results import Result
from bench.tables import ordered
from bench.targets import ALONE, MESH

# The same results make the same file.
mpl.rcParams["svg.hashsalt"] = "hermesh"
mpl.rcParams["svg.fonttype"] = "none"
mpl.rcParams["font.size"] = 9
_PERCENTILES = (0, 10, 25, 50, 75, 90, 95, 99, 99.5, 99.9)
_CLIENTS = {"clients_1": 1, "clients_32": 32, "clients_100": 100, "clients_400": 400}


def write_plots(results: Sequence[Result], folder: Path) -> dict[str, Path]:
    """Writes what the results allow into a folder; returns the files by what they show."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {result.name: result for result in results}
    made = {}
    for title, name, draw in (
        ("Tokens a second and CPU by number of clients", "clients", _clients),
        ("CPU for 1,000 tokens by kind of process", "cpu", _cpu),
        ("Time to the first token by percentile", "first_token", _first_token),
        ("Tokens later than the model's schedule by percentile", "added", _added),
    ):
        figure = draw(named)
        if figure is not None:
            made[title] = folder / f"{name}.svg"
            figure.savefig(made[title], metadata={"Date": None})
    return made


def _new(columns: int = 1) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(4.2 * columns + 1, 3.2), layout="constrained")
    axes = [figure.add_subplot(1, columns, number + 1) for number in range(columns)]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(axis="y", alpha=0.3)
        one.set_axisbelow(True)
    return figure, axes


def _clients(named: dict[str, Result]) -> Figure | None:
    there = [(clients, named[name]) for name, clients in _CLIENTS.items() if name in named]
    if len(there) < 2:
        return None
    figure, (left, right) = _new(2)
    labels = [str(clients) for clients, _ in there]
    for axes, figure_name, label in (
        (left, "tokens_per_second", "tokens/s"),
        (right, "cpu_per_1000", "CPU s / 1,000 tokens"),
    ):
        spreads = [result.spreads(MESH)[figure_name] for _, result in there]
        middle = [spread.median for spread in spreads]
        reach = [
            [spread.median - spread.least for spread in spreads],
            [spread.most - spread.median for spread in spreads],
        ]
        axes.bar(labels, middle, yerr=reach, capsize=4, color="#4477aa")
        axes.set_xlabel("clients at once")
        axes.set_ylabel(label)
    return figure


def _cpu(named: dict[str, Result]) -> Figure | None:
    there = [result for result in named.values() if "gap_p99_ms" in result.spreads(MESH)]
    if not there:
        return None
    figure, (axes,) = _new()
    figure.set_size_inches(8, 0.5 * len(there) + 1.6)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", alpha=0.3)
    kinds = ordered(list(dict.fromkeys(kind for result in there for kind in result.kinds(MESH))))
    left = [0.0] * len(there)
    colours = mpl.colormaps["tab10"]
    for number, kind in enumerate(kind for kind in kinds if kind != MODEL):
        costs = [result.cpu_of(MESH, kind).median if kind in result.kinds(MESH) else 0.0 for result in there]
        axes.barh([result.title for result in there], costs, left=left, label=kind, color=colours(number))
        left = [sum(pair) for pair in zip(left, costs, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("CPU s / 1,000 tokens, stores included")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _percentiles(axes: Any, result: Result, name: str, colour: str) -> None:
    """Draws a scenario's distribution, the mesh's and, dashed, the model's alone."""
    for target, style in ((MESH, "-"), (ALONE, "--")):
        times: Times = result.times(target, name)
        if times.count:
            heights = [max(times.ms(p), 0.01) for p in _PERCENTILES]
            label = f"{result.title}: {target}"
            axes.plot(range(len(_PERCENTILES)), heights, style, marker=".", color=colour, label=label)


def _finish(axes: Any, label: str) -> None:
    axes.set_xticks(range(len(_PERCENTILES)), [f"{p:g}" for p in _PERCENTILES])
    axes.set_xlabel("percentile of all runs together")
    axes.set_ylabel(label)
    axes.set_yscale("log")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


def _distributions(there: Sequence[Result], name: str, height: float, label: str) -> Figure | None:
    if not there:
        return None
    figure, (axes,) = _new()
    figure.set_size_inches(7, height)
    for number, result in enumerate(there):
        _percentiles(axes, result, name, f"C{number}")
    _finish(axes, label)
    return figure


def _first_token(named: dict[str, Result]) -> Figure | None:
    there = [named[name] for name in _CLIENTS if name in named]
    return _distributions(there, "ttft", 3.6, "ms to the first token")


def _added(named: dict[str, Result]) -> Figure | None:
    there = [result for result in named.values() if "added_p99_ms" in result.spreads(MESH)]
    return _distributions(there, "added", 3.2, "ms later than scheduled")
