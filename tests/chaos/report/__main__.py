"""The figures of a folder of episodes, in the terminal, in a page and as JSON.

python -m tests.chaos.report FOLDER [--mutations FOLDER] [--into PAGE] [--json FILE]

Fails if an episode found something, or a mutation was not caught.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from tests.chaos.mutations import MUTATIONS
from tests.chaos.report.episodes import verdicts
from tests.chaos.report.figures import Figures
from tests.chaos.report.mutations import Mutations, hunts
from tests.chaos.report.render import into, markdown, show


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.report", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="has a folder of each seed")
    parser.add_argument("--mutations", type=Path, metavar="FOLDER", help="the same of code with known bugs")
    parser.add_argument("--into", type=Path, metavar="PAGE", help="write the section between its markers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything for programs")
    options = parser.parse_args(arguments)
    # A folder may hold episodes of broken code, too: they are no figures of this one.
    episodes = [verdict for verdict in verdicts(options.folder) if not verdict.mutation]
    if not episodes:
        print(f"there is no episode in {options.folder}: make chaos", file=sys.stderr)
        return 2
    figures = Figures.of(episodes)
    mutations = _mutations(options.mutations)
    show(Console(), figures, mutations)
    if options.into is not None:
        options.into.write_text(into(options.into.read_text(), markdown(figures, mutations)))
        print(f"the figures are in {options.into}")
    if options.json is not None:
        everything = figures.as_json()
        if mutations is not None:
            everything["mutations"] = [vars(hunt) for hunt in mutations.hunts]
            everything["controls"] = {"episodes": mutations.controls, "unclean": mutations.unclean}
        options.json.write_text(json.dumps(everything, indent=1) + "\n")
    wrong = bool(figures.failed) or (mutations is not None and bool(mutations.missed or mutations.unclean))
    return 1 if wrong else 0


def _mutations(folder: Path | None) -> Mutations | None:
    if folder is None:
        return None
    if not folder.is_dir():
        print(f"no mutation was played: there is no {folder} (make chaos-mutations)", file=sys.stderr)
        return None
    return hunts(verdicts(folder), {one.name: one.what for one in MUTATIONS})


if __name__ == "__main__":
    sys.exit(main())
