"""The table of model servers in docs/models.md, made of the profiles and of the tests that show each line.

    python -m tests.fakes.backends [--write]

prints it, or writes it into the page. A test says with `@shows("mistral.ids")` which lines it shows.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from services.agent.model.profiles import built_in

T = TypeVar("T", bound=Callable[..., object])

PAGE = Path(__file__).resolve().parents[2] / "docs/models.md"
BEGIN, END = "<!-- the table: python -m tests.fakes.backends --write -->\n", "<!-- end of the table -->"
MODULES = ("tests.unit.agent.test_dialects",)
SHOWN: dict[str, list[str]] = {}


def shows(*quirks: str) -> Callable[[T], T]:
    """Note which lines of which profiles a test shows: `profile.quirk`."""

    def note(test: T) -> T:
        for quirk in quirks:
            name = f"{test.__module__.rpartition('.')[2]}.py::{test.__name__}"
            SHOWN.setdefault(quirk, []).append(name)
        return test

    return note


def table() -> str:
    """Returns the table.

    Raises:
        KeyError: a line is shown by no test.
    """
    for module in MODULES:
        importlib.import_module(module)
    rows = ["| profile | what differs | source | test |", "|---|---|---|---|"]
    for profile in built_in().values():
        for quirk in profile.quirks:
            tests = SHOWN[f"{profile.name}.{quirk.id}"]
            what = quirk.what.replace("|", "\\|")
            shown = ", ".join(f"`{one}`" for one in dict.fromkeys(tests))
            rows.append(f"| {profile.name} | {what} | [source]({quirk.source}) | {shown} |")
    return "\n".join(rows) + "\n"


def page() -> str:
    """Returns the page with today's table."""
    text = PAGE.read_text()
    before, found, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (found and ended):
        raise SystemExit(f"{PAGE} has no place for the table")
    return before + BEGIN + table() + END + after


def main() -> None:
    """Prints the table, or writes it."""
    if "--write" in sys.argv:
        PAGE.write_text(page())
    else:
        print(table(), end="")


if __name__ == "__main__":
    # The tests note what they show in the module of that name, which this one is not.
    importlib.import_module("tests.fakes.backends").main()
