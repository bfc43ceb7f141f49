"""Breaks a mesh on purpose and checks what is left.

python -m tests.chaos --seeds 20               a run of episodes, one a seed
python -m tests.chaos --seed 4711              one of them again
python -m tests.chaos --check FOLDER           judge a recorded episode again
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from tests.chaos.cases import CASES, Case
from tests.chaos.episode import Episode, Verdict
from tests.chaos.faults.cluster import ROOT, Cluster
from tests.chaos.faults.plan import FAULTS, THEMES, only
from tests.chaos.model.history import History
from tests.chaos.running import run
from tests.chaos.validate import check

DEFAULT_FOLDER = ROOT / "build" / "chaos"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20, help="how many episodes")
    parser.add_argument("--base", type=int, help="the first seed; from the clock if left out")
    parser.add_argument("--seed", type=int, help="this one episode")
    parser.add_argument("--theme", choices=sorted(THEMES), default="", help="of faults, for every seed")
    parser.add_argument(
        "--fault",
        choices=sorted(FAULTS),
        action="append",
        help="in place of a theme; more than one in their order",
    )
    parser.add_argument(
        "--megabytes", type=float, default=0.0, help="of results in each run of one more client"
    )
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="gets a folder a seed")
    parser.add_argument("--cases", action="store_true", help="every case of cases.py, first")
    parser.add_argument("--case", choices=[case.name for case in CASES], help="this one case")
    parser.add_argument("--keep-going", action="store_true", help="go on after an episode that failed")
    parser.add_argument("--check", type=Path, metavar="FOLDER", help="judge a recorded episode again")
    return parser.parse_args()


async def _play(arguments: argparse.Namespace) -> int:
    base = arguments.base if arguments.base is not None else int(time.time())
    seeds = [arguments.seed] if arguments.seed is not None else list(range(base, base + arguments.seeds))
    faults = tuple(arguments.fault or ())
    episodes = [Case("", seed, "", arguments.theme, faults, arguments.megabytes) for seed in seeds]
    if arguments.cases:
        episodes = [*CASES, *episodes]
    if arguments.case:
        episodes = [case for case in CASES if case.name == arguments.case]
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ledger.jsonl").unlink(missing_ok=True)
    prefill = base % 2 == 0
    began = time.monotonic()
    print(f"{len(episodes)} episodes, the last seed is {episodes[-1].seed}, in {folder}", flush=True)
    failed = 0
    async with Cluster(folder, prefill=prefill) as cluster:
        print(f"the mesh is up after {time.monotonic() - began:.1f} s", flush=True)
        for one in episodes:
            planned = only(*one.faults) if one.faults else None
            place = folder / (one.name or str(one.seed))
            verdict = await Episode(
                cluster, one.seed, place, theme=one.theme, faults=planned, megabytes=one.megabytes
            ).run()
            _say(verdict, one.name)
            failed += not verdict.ok
            if failed and not arguments.keep_going:
                break
    print(f"{len(episodes)} episodes, {failed} failed, {time.monotonic() - began:.0f} s", flush=True)
    return 1 if failed else 0


def _say(verdict: Verdict, name: str) -> None:
    mark = "ok  " if verdict.ok else "FAIL"
    what = name or verdict.theme
    print(
        f"{mark} seed {verdict.seed} {what:8} {verdict.seconds:5.1f} s  {'; '.join(verdict.faults)}",
        flush=True,
    )
    for violation in verdict.violations[:20]:
        print(f"     invariant {violation['invariant']}: {violation['text']}")
        for record in violation["records"][:5]:
            print(f"       {json.dumps(record)[:300]}")


def _check(folder: Path) -> int:
    history = History.load(folder / "history.jsonl", folder / "ledger.jsonl")
    violations = check(history)
    for violation in violations:
        print(f"invariant {violation.invariant}: {violation.text}")
        for record in violation.records[:10]:
            print(f"  {json.dumps(record)[:400]}")
    print(f"{len(history.records)} records, {len(violations)} violations")
    return 1 if violations else 0


def main() -> int:
    arguments = _arguments()
    if arguments.check is not None:
        return _check(arguments.check)
    return run(_play(arguments))


if __name__ == "__main__":
    sys.exit(main())
