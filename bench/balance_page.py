"""The page, plot and tables of `bench.balance`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from bench.arrivals import Shape
from bench.balance import EDGE_HEALTHY, EDGES, SLOWED, TITLES, balancers, name_of
from bench.facts import ROOT
from bench.fronts import FRONTS
from bench.publish import ELSEWHERE, RESULTS
from bench.report import machine, packages, table, write_section
from bench.results import Result, decode, encode

NAME = "lb"
PAGE = ROOT / "docs" / "load-balancing.md"
_PERCENTILES = (10, 25, 50, 75, 90, 95, 99)
_COLUMNS = (
    ("mean_ms", "mean, ms", 0),
    ("p50_ms", "p50", 0),
    ("p90_ms", "p90", 0),
    ("p99_ms", "p99", 0),
    ("max_ms", "longest", 0),
    ("short_mean_ms", "mean of the short, ms", 0),
    ("busiest_share", "busiest agent's share, %", 0),
    ("slowed_share", "slowed agent's share, %", 0),
    ("reconnects", "streams taken up again", 0),
    ("cores", "cores busy", 2),
    ("others_cores", "others on the machine, cores", 2),
)


def rows(result: Result) -> list[list[str]]:
    """A row a policy: the median of its runs, in brackets least and most where there were several."""
    found = []
    for target in result.targets:
        spreads = result.spreads(target)
        cells = [target]
        for name, label, digits in _shown(result):
            factor = 100 if "%" in label else 1
            spread = spreads[name]
            text = f"{spread.median * factor:,.{digits}f}"
            if len(result.of(target)) > 1 and name in ("mean_ms", "p99_ms"):
                text += f" ({spread.least * factor:,.{digits}f}-{spread.most * factor:,.{digits}f})"
            cells.append(text)
        found.append(cells)
    return found


def _shown(result: Result) -> list[tuple[str, str, int]]:
    return [one for one in _COLUMNS if one[0] != "slowed_share" or SLOWED[result.name]]


def _headings(result: Result) -> list[str]:
    labels = ["policy", *(label for _, label, _ in _shown(result))]
    return [label.replace("agent", "gateway") for label in labels] if "edge" in result.name else labels


def show(console: Console, result: Result) -> None:
    """Prints one result."""
    shown = Table(title=result.title, title_justify="left")
    for number, label in enumerate(_headings(result)):
        shown.add_column(label, justify="right" if number else "left")
    for row in rows(result):
        shown.add_row(*row)
    console.print(shown)


def merge(path: Path, new: Mapping[str, Result]) -> dict[str, Result]:
    """Returns the results in a file with new runs in the place of the same policy's, in the tables' order."""
    old = {result.name: result for result in decode(path.read_bytes())} if path.exists() else {}
    merged = {}
    for key in TITLES:
        fresh, kept = new.get(key), old.get(key)
        newest = fresh if fresh and fresh.runs else kept
        if newest is None:
            continue
        measured = set(fresh.targets) if fresh else set()
        runs = [run for run in (kept.runs if kept else []) if run.target not in measured]
        runs += fresh.runs if fresh else []
        order = [name_of(one) for one in balancers()]
        runs.sort(key=lambda run: order.index(run.target))
        merged[key] = Result(key, newest.title, newest.facts, runs)
    return merged


def publish(new: Mapping[str, Result], shape: Shape) -> list[Path]:
    """Writes results, plot and page; returns what it wrote. Raises ReportError."""
    folder = RESULTS if PAGE.is_file() else ELSEWHERE
    file = folder / f"{NAME}.json"
    results = merge(file, new)
    if not results:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    file.write_bytes(encode(list(results.values())))
    plot = folder / f"{NAME}.svg"
    _plot(results).savefig(plot, metadata={"Date": None})
    written = [file, plot]
    if PAGE.is_file():
        write_section(PAGE, NAME, section(results, shape, os.path.relpath(plot, PAGE.parent)))
        written.append(PAGE)
    return written


def section(results: Mapping[str, Result], shape: Shape, plot: str) -> str:
    """The page's section, made of results."""
    first = next(iter(results.values()))
    figures = first.runs[0].figures
    load = (
        f"{shape.agents} agents with {shape.slots} slots each. {1 - shape.long_share:.0%} of the runs take "
        f"the model {shape.short * 1000:.0f} ms, {shape.long_share:.0%} take {shape.long:g} s: the slots "
        f"could do {shape.capacity:.0f} runs a second, {figures['load']:.0%} of that arrive, "
        f"{figures['runs']:,.0f} runs a measurement. An unhindered run takes {shape.mean * 1000:.0f} ms of "
        "the model in the mean, and the mesh's own few."
    )
    parts = [f"Measured last on {machine(first.facts)}", f"Packages: {packages(first.facts)}.", load]
    for result in results.values():
        parts += [f"### {result.title[0].upper()}{result.title[1:]}", table(_headings(result), rows(result))]
    parts.append(f"![Time of a run by percentile]({plot})")
    measured = {target for result in results.values() for target in result.targets}
    for front in (*FRONTS, *(EDGES if EDGE_HEALTHY in results else ())):
        if front.name not in measured:
            parts.append(f"{front.name}: {'not measured' if front.binary else 'not installed'}.")
    return "\n\n".join(parts)


def _plot(results: Mapping[str, Result]) -> Figure:
    mpl.rcParams["svg.hashsalt"] = "hermesh"
    mpl.rcParams["svg.fonttype"] = "none"
    mpl.rcParams["font.size"] = 9
    figure = Figure(figsize=(5.0 * len(results) + 2, 3.8), layout="constrained")
    for number, result in enumerate(results.values()):
        axes = figure.add_subplot(1, len(results), number + 1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        axes.set_title(result.title, fontsize=9)
        axes.set_xticks(range(len(_PERCENTILES)), [f"{percent:g}" for percent in _PERCENTILES])
        axes.set_xlabel("percentile")
        axes.set_ylabel("ms from arrival to the run's end")
        axes.set_yscale("log")
        _draw(axes, result)
        if number == len(results) - 1:
            axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _draw(axes: Any, result: Result) -> None:
    for number, target in enumerate(result.targets):
        times = result.times(target, "run")
        heights = [max(times.ms(percent), 0.01) for percent in _PERCENTILES]
        style = "-" if target.startswith("Envoy") else ":"
        axes.plot(range(len(_PERCENTILES)), heights, style, marker=".", color=f"C{number}", label=target)
