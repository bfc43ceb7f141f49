"""What the mesh costs: `make bench`, `hermesh bench`.

It starts a mesh of its own on the zero-delay model server, puts load on it by a process of its own, and asks
that model directly in the same run, so that what the mesh adds can be told. Every reply is checked: whatever
is not whole, in order and once is no result.

With neither --only, --quick, --runs nor --replicas all of it is measured and written: the results as JSON and
plots, and the page docs/performance.md.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import uvloop
from rich.console import Console

from bench.command import FAILURES, clock, new_console, whole
from bench.mesh import Mesh
from bench.results import Result, encode
from bench.run import SETTINGS, meshes, run_scenario
from bench.scenarios import SCENARIOS, Scenario, UnknownScenario, select
from bench.tables import show, show_goals

RUNS = 3
QUICK_RUNS = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = _parse(arguments)
    console = new_console()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        chosen = select(options.only, quick=options.quick)
        if not options.render:
            _measure(chosen, options, console)
        elif not _write([], console):
            print("there are no results yet: make bench", file=sys.stderr)
            return 2
    except UnknownScenario as error:
        print(error, file=sys.stderr)
        return 2
    except FAILURES as error:
        print(f"no result: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the mesh is stopped", file=sys.stderr)
        return 130
    return 0


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    """A mesh is not left running, however its bench is ended."""
    raise KeyboardInterrupt


def _measure(chosen: Sequence[Scenario], options: argparse.Namespace, console: Console) -> None:
    runs = options.runs or (QUICK_RUNS if options.quick else RUNS)
    results = _results(chosen, runs, options.replicas, console)
    show_goals(console, results)
    if options.json is not None:
        options.json.write_bytes(encode(results))
    if options.write or not (options.only or options.quick or options.runs or options.replicas):
        _write(results, console)


def _results(chosen: Sequence[Scenario], runs: int, replicas: str, console: Console) -> list[Result]:
    results = []
    said = clock(console)
    for scenarios in meshes(chosen):
        said("starting a mesh")
        with Mesh(settings=SETTINGS, replicas=replicas) as mesh:
            for scenario in scenarios:
                results.append(uvloop.run(run_scenario(mesh, scenario, runs, said)))
                show(console, results[-1])
    return results


def _write(results: Sequence[Result], console: Console) -> bool:
    """Writes results, plots and the page, of older results too; returns whether there were any."""
    # Only this pays for matplotlib.
    from bench.publish import publish

    written = publish(results)
    for path in written:
        console.print(f"written: {path}", highlight=False, soft_wrap=True)
    return bool(written)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="hermesh bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(scenario.name for scenario in SCENARIOS)
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help=f"one scenario, may be repeated: {names}"
    )
    parser.add_argument("--quick", action="store_true", help="a few scenarios, short, in about a minute")
    parser.add_argument(
        "--runs", type=whole(1), metavar="N", help=f"how often each is measured (default {RUNS})"
    )
    parser.add_argument(
        "--replicas", default="", metavar="LIST", help="of the mesh, such as agent=1,session=1; only printed"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write these results there, too")
    parser.add_argument(
        "--write",
        action="store_true",
        help="write a selection into the results and the page, beside the rest",
    )
    parser.add_argument("--render", action="store_true", help="measure nothing; write plots and page again")
    options = parser.parse_args(arguments)
    if options.write and options.replicas:
        parser.error("--write takes no --replicas: the page is about a mesh with its default replicas")
    return options


if __name__ == "__main__":
    sys.exit(main())
