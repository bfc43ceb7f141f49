"""The figures of the drills of many rounds in a page, and the whole table of one drill in another.

python -m tests.chaos.report.drills FOLDER --into PAGE
python -m tests.chaos.report.drills FOLDER --table upgrade --into PAGE

Fails if a bound was broken.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.chaos.report.render import into

_COLUMNS = ("drill", "whose silence", "rounds", "times", "p50", "max", "p50 of a round, lowest to highest")


def records(folder: Path) -> list[dict[str, Any]]:
    """What the drills left in their folder, by name."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def markdown(found: Sequence[dict[str, Any]]) -> str:
    """Returns the section, without its markers."""
    rows = [_COLUMNS, ("---", "---", *["---:"] * (len(_COLUMNS) - 2))]
    for record in found:
        for series in record["series"]:
            middles = sorted(middle for middle, _ in series["rounds"])
            rows.append(
                (
                    f"`{record['name']}`",
                    series["what"],
                    str(len(series["rounds"])),
                    f"{series['times']:,}",
                    _held(series["p50"], series["p50_bound"]),
                    _held(series["max"], series["max_bound"]),
                    f"{middles[0]:.2f} to {middles[-1]:.2f} s",
                )
            )
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    causes = "\n".join(f"- `{record['name']}`: {record['about']}." for record in found)
    return f"Made by `make drill-report` from the last run of each drill.\n\n{causes}\n\n{table}"


def table(record: dict[str, Any]) -> str:
    """Returns a drill's own table, without its markers."""
    # Each "from" begins a part of the drill.
    named = [
        (f"**{name}**" if name == "from" else name, found, bound) for name, found, bound in record["rows"]
    ]
    rows = [("", "found", "bound"), ("---", "---:", "---"), *named]
    lines = "\n".join(
        f"| {name.strip()} | {found} | {bound} |".replace("  ", " ") for name, found, bound in rows
    )
    return f"Made by `make drill-report` from the last `make drill DRILL={record['name']}`.\n\n{lines}"


def _held(found: float, bound: float | None) -> str:
    """A time and its bound, if it has one; one that is broken is seen."""
    if bound is None:
        return f"{found:.2f} s"
    text = f"{found:.2f} s (<= {bound:g})"
    return text if found <= bound else f"**{text}**"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.report.drills")
    parser.add_argument("folder", type=Path, help="has a file of each drill")
    parser.add_argument("--table", metavar="DRILL", help="the whole table of this drill, and nothing else")
    parser.add_argument("--into", type=Path, metavar="PAGE", required=True, help="gets the section")
    options = parser.parse_args(arguments)
    name = options.table or "drills"
    found = [
        one for one in records(options.folder) if one["name"] == name or (one["series"] and not options.table)
    ]
    if not found:
        asked = options.table or "frozen"
        print(f"no drill has left anything in {options.folder}: make drill DRILL={asked}", file=sys.stderr)
        return 2
    section = table(found[0]) if options.table else markdown(found)
    options.into.write_text(into(options.into.read_text(), section, name))
    print(section)
    return 1 if any(record["broken"] for record in found) else 0


if __name__ == "__main__":
    sys.exit(main())
