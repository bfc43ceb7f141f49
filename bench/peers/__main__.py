"""The mesh against other servers of agents: `make bench-peers`.

Each peer is installed from PyPI into an environment of its own, at pinned versions, and started as its own
pages say, on the same zero-delay model server. It and the mesh are measured turn about. Every reply is
checked: tokens are counted, not lines or messages. The results go to bench/results/peers.json, the page is
docs/peers.md.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from types import FrameType

import uvloop
from rich.console import Console

from bench.command import FAILURES, clock, new_console
from bench.facts import ROOT
from bench.mesh import Mesh
from bench.peers.catalog import PEERS, Peer
from bench.peers.install import InstallError, install
from bench.peers.kept import Kept, KeptError
from bench.peers.page import section
from bench.peers.run import Said, mesh_kept, result_name, run_peer, scenarios
from bench.peers.server import running
from bench.peers.show import show
from bench.publish import RESULTS
from bench.report import write_section
from bench.results import Result, encode, merge
from bench.run import SETTINGS
from launcher.errors import LaunchError

RUNS = 3
NAME = "peers"
FILE = RESULTS / f"{NAME}.json"
PAGE = ROOT / "docs" / "peers.md"
_FAILURES = (*FAILURES, InstallError, KeptError, LaunchError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = _parse(arguments)
    console = new_console()
    said = clock(console)
    signal.signal(signal.SIGTERM, _interrupt)

    try:
        chosen = [peer for peer in PEERS if not options.only or peer.name in options.only]
        new = [] if options.render else _measure(chosen, options, said, console)
        if not options.install:
            _publish(new, console)
    except _FAILURES as error:
        print(f"no result: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; mesh and peers are stopped", file=sys.stderr)
        return 130
    return 0


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    """Mesh and peers are not left running, however the bench is ended."""
    raise KeyboardInterrupt


def _measure(
    chosen: Sequence[Peer], options: argparse.Namespace, said: Said, console: Console
) -> list[Result]:
    programs = {}
    for peer in chosen:
        said(f"{peer.title}: installing, unless it is")
        programs[peer.name] = install(peer.files)
    if options.install:
        return []
    results: list[Result] = []
    said("starting a mesh")
    with Mesh(settings=SETTINGS) as mesh:
        assert mesh.model is not None
        ours: Kept = uvloop.run(mesh_kept(mesh))
        for peer in chosen:
            said(f"{peer.title}: starting")
            with running(peer, programs[peer.name], mesh.model.url) as there:
                found = uvloop.run(
                    run_peer(mesh, there, scenarios(options.scenario), options.runs, ours, said)
                )
            for result in found:
                show(console, result)
            results += found
    return results


def _publish(new: Sequence[Result], console: Console) -> None:
    targets = [target.name for peer in PEERS for target in peer.named()]
    order = [result_name(target, scenario.name) for scenario in scenarios() for target in targets]
    results = merge(FILE, new, order)
    if not results:
        return
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_bytes(encode(results))
    write_section(PAGE, NAME, section(results))
    for path in (FILE, PAGE):
        console.print(f"written: {path}", highlight=False, soft_wrap=True)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [peer.name for peer in PEERS]
    parser.add_argument(
        "--only", action="append", default=[], choices=names, help="one peer, may be repeated"
    )
    parser.add_argument(
        "--scenario",
        action="append",
        default=[],
        choices=[scenario.name for scenario in scenarios()],
        help="one scenario, may be repeated",
    )
    parser.add_argument("--runs", type=int, default=RUNS, metavar="N", help="how often each is measured")
    parser.add_argument("--install", action="store_true", help="only install the peers")
    parser.add_argument("--render", action="store_true", help="measure nothing; write the page again")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
