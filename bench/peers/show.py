"""One peer's results in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from bench.figures import SHOWN
from bench.peers.compare import RATIOS, wins
from bench.results import Result
from bench.tables import cell
from bench.targets import MESH


def show(console: Console, result: Result) -> None:
    """Prints ratios, then the figures of the mesh and of the peer."""
    target = result.facts["target"]
    if "failed" in result.facts:
        console.print(f"{target}, {result.title}: not measured: {result.facts['failed']}", markup=False)
        return
    ratios = [(one.label, one.of(result)) for one in RATIOS]
    text = ", ".join(f"{label} {spread.median:.2f}" for label, spread in ratios if spread is not None)
    console.print(f"{target}, {result.title}: times better than it: {text}", highlight=False)
    if wins(result):
        console.print(f"{target} is ahead in: {', '.join(wins(result))}", highlight=False)
    table = Table(title_justify="left", title=f"{result.title}: min / median / max")
    for name in ("figure", MESH, target):
        table.add_column(name, justify="left" if name == "figure" else "right")
    spreads = [result.spreads(MESH), result.spreads(target)]
    for figure in SHOWN:
        if any(figure.name in one for one in spreads):
            cells = [cell(one.get(figure.name), figure.digits) for one in spreads]
            table.add_row(f"{figure.label}, {figure.unit}" if figure.unit else figure.label, *cells)
    console.print(table)
