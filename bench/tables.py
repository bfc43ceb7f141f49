"""Results as tables in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from bench.figures import SHOWN, number
from bench.goals import outcomes
from bench.measure import MODEL, STORES
from bench.results import Result, Spread
from bench.targets import MESH

_MIB = 2**20


def show(console: Console, result: Result) -> None:
    """Prints one scenario: its figures for each target, and what each kind of process used."""
    table = Table(title=f"{result.title} ({result.name})", title_justify="left")
    table.add_column("figure")
    for target in result.targets:
        table.add_column(f"{target}: min / median / max", justify="right")
    spreads = {target: result.spreads(target) for target in result.targets}
    for figure in SHOWN:
        if any(figure.name in one for one in spreads.values()):
            cells = [cell(one.get(figure.name), figure.digits) for one in spreads.values()]
            table.add_row(f"{figure.label}, {figure.unit}" if figure.unit else figure.label, *cells)
    console.print(table)
    for target in result.targets:
        if len(result.kinds(target)) > 2:
            _processes(console, result, target)


def _processes(console: Console, result: Result, target: str) -> None:
    counted = any(run.figures.get("tokens") for run in result.of(target))
    last = result.of(target)[-1]
    table = Table(title=f"processes of {target}", title_justify="left")
    for name in (
        "process",
        "CPU s / 1,000 tokens: min / median / max" if counted else "CPU s",
        "RSS MiB",
        "PSS MiB",
    ):
        table.add_column(name, justify="left" if name == "process" else "right")
    for kind in ordered(result.kinds(target)):
        part = last.parts[kind]
        cpu = cell(result.cpu_of(target, kind), 4) if counted else number(part.cpu, 2)
        note = " (store)" if kind in STORES else " (not counted)" if kind == MODEL else ""
        table.add_row(kind + note, cpu, number(part.rss / _MIB, 0), number(part.pss / _MIB, 0))
    console.print(table)


def show_goals(console: Console, results: Sequence[Result]) -> None:
    """Prints which goals the mesh met and which it missed."""
    table = Table(title="goals", title_justify="left")
    for name in ("goal", "bound", "median", ""):
        table.add_column(name, justify="left" if name == "goal" else "right")
    for outcome in outcomes(results, MESH):
        goal = outcome.goal
        bound = f"{'≥' if goal.at_least else '≤'} {goal.bound:,g} {goal.unit}"
        colour = "green" if outcome.met else "red"
        value = number(outcome.spread.median, 0 if goal.bound > 1000 else 3)
        table.add_row(goal.what, bound, value, f"[{colour}]{outcome.word}[/{colour}]")
    if table.row_count:
        console.print(table)


def ordered(kinds: Sequence[str]) -> list[str]:
    """Returns kinds of processes with the stores and the model last."""
    return sorted(kinds, key=lambda kind: (kind == MODEL, kind in STORES, kinds.index(kind)))


def cell(spread: Spread | None, digits: int) -> str:
    """Returns a figure's least, median and most as tables show them; nothing for None."""
    if spread is None:
        return ""
    return spread.shown(f",.{digits}f")
