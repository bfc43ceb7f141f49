"""What the mesh costs: `make bench`, `hermesh bench`.

It starts a mesh of its own on the zero-delay model server, puts load on it by a process of its own, and asks
that model directly in the same run, so that what the mesh adds can be told. Every reply is checked: whatever
is not whole, in order and once is no result.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import uvloop
from rich.console import Console

from bench.load import LoadError
from bench.mesh import Mesh, MeshError
from bench.process_cpu import ProcessGone
from bench.results import encode
from bench.run import SETTINGS, run_scenario
from bench.scenarios import SCENARIOS, UnknownScenario, select
from bench.tables import show
from bench.target import IncompleteReply

RUNS = 3
QUICK_RUNS = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = _parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 140)
    try:
        chosen = select(options.only, quick=options.quick)
    except UnknownScenario as error:
        print(error, file=sys.stderr)
        return 2
    runs = options.runs or (QUICK_RUNS if options.quick else RUNS)
    began = time.monotonic()
    results = []

    def said(text: str) -> None:
        console.print(f"[dim]{time.monotonic() - began:5.0f} s  {text}[/dim]", highlight=False)

    try:
        said("starting a mesh")
        with Mesh(settings=SETTINGS) as mesh:
            for scenario in chosen:
                result = uvloop.run(run_scenario(mesh, scenario, runs, said))
                results.append(result)
                show(console, result)
    except (IncompleteReply, LoadError, MeshError, ProcessGone) as error:
        print(f"no result: {error}", file=sys.stderr)
        return 1
    if options.json is not None:
        options.json.write_bytes(encode(results))
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="hermesh bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(scenario.name for scenario in SCENARIOS)
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help=f"one scenario, may be repeated: {names}"
    )
    parser.add_argument("--quick", action="store_true", help="a few scenarios, short, in about a minute")
    parser.add_argument("--runs", type=int, metavar="N", help=f"how often each is measured (default {RUNS})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write these results there, too")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
