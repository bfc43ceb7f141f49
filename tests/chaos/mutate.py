"""Tests the suite itself: runs it against code with a known bug, one bug after the other.

    python -m tests.chaos.mutate [--only NAME ...] [--no-control] [--folder FOLDER]

Fails if a bug is not caught, or if the code without any is not found clean under the same faults.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.chaos.episode import Episode, Verdict
from tests.chaos.faults.cluster import ROOT, Cluster
from tests.chaos.mutations import MUTATIONS, Mutation, copy_tree
from tests.chaos.running import run

DEFAULT_FOLDER = ROOT / "build" / "chaos-mutations"
# Of the seeds that bugs are looked for with; any would do.
_BASE = 9000
# Longer than a takeover after a silent death; code with a bug may never come to rest.
_SETTLE_SECONDS = 20.0


def _episode(cluster: Cluster, mutation: Mutation, seed: int, folder: Path, name: str) -> Episode:
    faults = mutation.faults or None
    return Episode(
        cluster,
        seed,
        folder,
        theme=mutation.theme,
        faults=faults,
        mutation=name,
        megabytes=mutation.megabytes,
        settle=_SETTLE_SECONDS,
    )


async def hunt(mutation: Mutation, source: Path, folder: Path) -> list[Verdict]:
    """Plays episodes on a tree with a bug until one finds something, at most as many as the mutation says."""
    verdicts: list[Verdict] = []
    folder.mkdir(parents=True, exist_ok=True)
    async with Cluster(folder, source=source, prefill=mutation.prefill) as cluster:
        for seed in range(_BASE, _BASE + mutation.tries):
            verdicts.append(await _episode(cluster, mutation, seed, folder / str(seed), mutation.name).run())
            if not verdicts[-1].ok:
                break
    return verdicts


async def control(mutations: Sequence[Mutation], folder: Path) -> int:
    """Plays the same faults on the code as it is; returns how many episodes found something."""
    failed = 0
    for prefill in (True, False):
        chosen = {str(one.faults) + one.theme: one for one in mutations if one.prefill is prefill}
        if not chosen:
            continue
        place = folder / f"control-{'prefill' if prefill else 'reset'}"
        place.mkdir(parents=True, exist_ok=True)
        async with Cluster(place, prefill=prefill) as cluster:
            for number, mutation in enumerate(chosen.values()):
                verdict = await _episode(cluster, mutation, _BASE + number, place / str(number), "").run()
                failed += not verdict.ok
                print(
                    f"control {mutation.name:26} {'clean' if verdict.ok else verdict.violations}", flush=True
                )
    return failed


async def _catch(mutations: Sequence[Mutation], folder: Path) -> list[str]:
    missed: list[str] = []
    for mutation in mutations:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="hm-mutant-") as place:
            tree = copy_tree(Path(place))
            mutation.apply(tree)
            try:
                verdicts = await hunt(mutation, tree, folder / mutation.name)
            except Exception as error:
                # A mesh that does not even start is no proof of the checker.
                print(f"MISSED  {mutation.name}: the mesh did not run: {error}", flush=True)
                missed.append(mutation.name)
                continue
        last = verdicts[-1]
        found = sorted({violation["invariant"] for violation in last.violations})
        took = time.monotonic() - began
        if last.ok:
            missed.append(mutation.name)
            print(f"MISSED  {mutation.name:26} after {len(verdicts)} seeds, {took:.0f} s", flush=True)
        else:
            print(
                f"caught  {mutation.name:26} by seed {last.seed}, invariants {found}, {took:.0f} s: "
                f"{last.violations[0]['text'][:120]}",
                flush=True,
            )
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.mutate", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="these mutations")
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--no-control", action="store_true", help="do not play them on the code as it is")
    parser.add_argument("--list", action="store_true", help="name the mutations and what each breaks")
    arguments = parser.parse_args()
    chosen = [one for one in MUTATIONS if not arguments.only or one.name in arguments.only]
    if arguments.list:
        for one in chosen:
            print(f"{one.name:26} {one.what}")
        return 0
    missed = run(_catch(chosen, arguments.folder))
    unclean = 0 if arguments.no_control else run(control(chosen, arguments.folder))
    print(f"{len(chosen) - len(missed)} of {len(chosen)} mutations caught", flush=True)
    return 1 if missed or unclean else 0


if __name__ == "__main__":
    sys.exit(main())
