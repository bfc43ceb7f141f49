"""The figures as a section of a Markdown page, and as tables in a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from tests.chaos.report.figures import STUCK, Figures, bound, percentile
from tests.chaos.report.mutations import Hunt, Mutations
from tests.chaos.report.takeovers import UNKNOWN
from tests.chaos.validate import INVARIANTS
from tests.chaos.validate.facts import IDEMPOTENT, NON_IDEMPOTENT, PURE

_MOST_VIOLATIONS = 50


@dataclass(frozen=True)
class Sheet:
    """One table: a title, the names of its columns, and rows of texts. The first column is text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def sheets(figures: Figures, mutations: Mutations | None) -> list[Sheet]:
    """Returns the tables that have anything to say."""
    found = [
        _totals(figures),
        _odds(figures),
        _takeovers(figures),
        _counts("What was broken", "fault", figures.broken),
        _counts("Refusals, by reason", "reason", figures.refusals),
        _counts("Runs that failed, by reason", "reason", figures.reasons),
        _violations(figures),
    ]
    if mutations is not None:
        found.append(_mutations(mutations))
    return [sheet for sheet in found if sheet.rows]


def _number(value: int) -> str:
    return f"{value:,}"


def _totals(figures: Figures) -> Sheet:
    seconds = list(figures.seconds.values())
    closed = figures.closed
    rows = [
        ("episodes", _number(len(seconds))),
        ("episodes that found something", _number(len(figures.failed))),
        ("wall clock of an episode: p50, max", f"{percentile(seconds, 0.5):.1f} s, {max(seconds):.1f} s"),
        ("wall clock in all", f"{sum(seconds) / 60:.0f} min"),
        ("records checked", _number(figures.records)),
        ("**messages acknowledged**", _number(figures.acknowledged)),
        ("lost", _number(figures.lost)),
        ("duplicated", _number(figures.duplicated)),
        ("**runs**", _number(figures.runs.total())),
        *((name, _number(count)) for name, count in figures.runs.most_common() if name != STUCK),
        (STUCK, _number(figures.runs[STUCK])),
        ("**tool calls**", _number(figures.calls)),
        (
            "pure, idempotent, non-idempotent",
            ", ".join(_number(figures.effects[effect]) for effect in (PURE, IDEMPOTENT, NON_IDEMPOTENT)),
        ),
        ("side effects that the ledger saw", _number(figures.acts)),
        ("repeated side effects", _number(figures.repeated)),
        ("**entries of the log**", _number(figures.entries)),
        ("entries of Redis compared with it", _number(figures.live)),
        ("stale writes", _number(figures.stale)),
        ("**client streams**", _number(figures.streams)),
        ("events received", _number(figures.events)),
        ("reconnects", _number(figures.reconnects)),
        ("cut by the client", _number(closed["cut"])),
        ("asked to come back", _number(closed["reconnect"])),
        ("broken under the client", _number(closed["broken"])),
        ("**takeovers**", _number(len(figures.takeovers))),
        ("**drains**", _number(figures.drains.total())),
        ("with nothing else broken at the time", _number(figures.drains["undisturbed"])),
    ]
    return Sheet("What happened", ("", "figure"), rows)


def _odds(figures: Figures) -> Sheet:
    rows = []
    for name, n, failures in figures.odds():
        below = bound(n, failures)
        rows.append((name, _number(n), _number(failures), "-" if below is None else f"{below:.1e}"))
    return Sheet(
        "How often at most, with 95 % confidence", ("failure", "n", "seen", "rate below (3/n)"), rows
    )


def _takeovers(figures: Figures) -> Sheet:
    counts = Counter(takeover.cause for takeover in figures.takeovers)
    rows = []
    for cause, count in sorted(counts.items(), key=lambda pair: (pair[0] == UNKNOWN, -pair[1], pair[0])):
        times = [
            takeover.seconds
            for takeover in figures.takeovers
            if takeover.cause == cause and takeover.seconds is not None
        ]
        spread = [f"{percentile(times, share):.2f} s" for share in (0.5, 0.99, 1.0)] if times else ["-"] * 3
        rows.append((cause, _number(count), _number(len(times)), *spread))
    return Sheet(
        "Takeovers, by what was broken",
        ("after", "takeovers", "with a client waiting", "p50", "p99", "max"),
        rows,
    )


def _counts(title: str, name: str, counts: Counter[str]) -> Sheet:
    return Sheet(title, (name, "times"), [(key, _number(count)) for key, count in counts.most_common()])


def _violations(figures: Figures) -> Sheet:
    rows = [
        (str(seed), str(violation["invariant"]), violation["text"])
        for (seed, _), violations in figures.failed.items()
        for violation in violations
    ]
    if len(rows) > _MOST_VIOLATIONS:
        left = len(rows) - _MOST_VIOLATIONS
        rows = [*rows[:_MOST_VIOLATIONS], ("...", "", f"and {left:,} more")]
    return Sheet("What did not hold", ("seed", "invariant", "what"), rows)


def _caught(hunt: Hunt) -> str:
    if hunt.seed is not None:
        return str(hunt.seed)
    return "**missed**" if hunt.tried else "not played"


def _mutations(mutations: Mutations) -> Sheet:
    rows = [
        (
            hunt.name,
            hunt.what,
            _caught(hunt),
            str(hunt.tried),
            ", ".join(map(str, hunt.invariants)),
        )
        for hunt in mutations.hunts
    ]
    if mutations.controls:
        clean = f"{mutations.controls - mutations.unclean} of {mutations.controls} clean"
        rows.append(("(none)", "The same faults on the code as it is.", clean, str(mutations.controls), ""))
    return Sheet(
        "Bugs that were put in on purpose",
        ("mutation", "the rule it breaks", "caught by seed", "seeds tried", "invariants that fired"),
        rows,
    )


def markdown(figures: Figures, mutations: Mutations | None) -> str:
    """Returns the section, without its markers."""
    seeds = [seed for seed, _ in figures.seconds]
    parts = [f"Made by `make chaos-report` from {len(seeds):,} episodes, seeds {min(seeds)} to {max(seeds)}."]
    for sheet in sheets(figures, mutations):
        rows = [sheet.columns, ["---", *["---:" if _is_number(sheet, i) else "---" for i in _rest(sheet)]]]
        table = "\n".join(f"| {' | '.join(_cell(text) for text in row)} |" for row in [*rows, *sheet.rows])
        parts.append(f"### {sheet.title}\n\n{table}")
    if figures.failed:
        broken = sorted({v["invariant"] for violations in figures.failed.values() for v in violations})
        parts.append("\n".join(f"- Invariant {number}: {INVARIANTS[number - 1]}." for number in broken))
    return "\n\n".join(parts)


def _rest(sheet: Sheet) -> range:
    return range(1, len(sheet.columns))


def _is_number(sheet: Sheet, column: int) -> bool:
    return all(row[column][:1].isdigit() or row[column] == "-" for row in sheet.rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def into(page: str, section: str, name: str = "report") -> str:
    """Returns a page with the section between the markers of this name.

    Raises:
        ValueError: The markers are not there once each, in their order.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise ValueError(f"the page must hold {begin} and then {end}, once each")
    before, _, rest = page.partition(begin)
    return f"{before}{begin}\n{section}\n{end}{rest.partition(end)[2]}"


def show(console: Console, figures: Figures, mutations: Mutations | None) -> None:
    """Prints the tables."""
    for sheet in sheets(figures, mutations):
        table = Table(title=sheet.title, title_justify="left", title_style="bold")
        for index, name in enumerate(sheet.columns):
            table.add_column(
                name, overflow="fold", justify="right" if index and _is_number(sheet, index) else "left"
            )
        for row in sheet.rows:
            bold = row[0].startswith("**")
            table.add_row(*(text.strip("*") for text in row), style="bold" if bold else None)
        console.print(table)
