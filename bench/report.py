"""Pages that commands write: sections between markers, tables in Markdown. Shared by all benches.

A page has a hand-written part and, for each command, a pair of markers:

    <!-- bench:NAME -->
    <!-- /bench:NAME -->

What stands between them is the command's; everything else is left as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class ReportError(Exception):
    """A page has no place for a section; the message names both."""


def write_section(page: Path, name: str, text: str) -> None:
    """Replaces what stands between a section's markers in a page.

    Raises:
        ReportError: The page is not there or has no such markers.
    """
    if not page.is_file():
        raise ReportError(f"there is no page {page}")
    page.write_text(replaced(page.read_text(), name, text, str(page)))


def replaced(page: str, name: str, text: str, where: str = "the page") -> str:
    """Returns a page's text with a section's replaced. Raises ReportError without its markers."""
    begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ReportError(f"{where} lacks the markers {begin} and {end}")
    return f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table; the first column is text, the others are numbers."""
    lines = [_row(columns), _row(["---", *["---:"] * (len(columns) - 1)]), *map(_row, rows)]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(re.sub(r"\s+", " ", cell).replace("|", "\\|") for cell in cells) + " |"


def machine(facts: Mapping[str, Any]) -> str:
    """Returns one sentence about the machine, its load and the code that was measured."""
    commit = f", commit `{facts['commit']}`" if facts.get("commit") else ""
    return (
        f"{facts['cores']} cores of {facts['cpu']}, {facts['memory_gib']} GiB, Linux {facts['kernel']}, "
        f"Python {facts['python']}{commit}, {facts['time']}, load average before: {facts['load_average']}."
    )


def packages(facts: Mapping[str, Any]) -> str:
    """Returns the versions of what takes part, as one line."""
    return ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
