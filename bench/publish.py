"""Writes results where everybody finds them: `bench/results/` and `docs/performance.md`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from bench.facts import ROOT
from bench.page import section
from bench.plots import write_plots
from bench.report import write_section
from bench.results import Result, encode, merge
from bench.scenarios import SCENARIOS

NAME = "mesh"
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "performance.md"
# Where there is no checkout, as in an installed package.
ELSEWHERE = Path("bench-results")


def publish(new: Sequence[Result]) -> list[Path]:
    """Adds results to those there are, and writes plots and the page; returns what it wrote.

    Outside of a checkout there is no page.

    Raises:
        ReportError: The page has no place for it.
    """
    checkout = PAGE.is_file()
    folder = RESULTS if checkout else ELSEWHERE
    file = folder / f"{NAME}.json"
    results = merge(file, new, [scenario.name for scenario in SCENARIOS])
    if not results:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    file.write_bytes(encode(results))
    plots = write_plots(results, folder)
    written = [file, *plots.values()]
    if checkout:
        links = {title: os.path.relpath(path, PAGE.parent) for title, path in plots.items()}
        write_section(PAGE, NAME, section(results, links))
        written.append(PAGE)
    return written
