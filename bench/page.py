"""The mesh's section of docs/performance.md, made of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.figures import SHOWN, number
from bench.goals import outcomes
from bench.measure import MODEL, STORES
from bench.report import machine, packages, table
from bench.results import Result, Spread
from bench.tables import ordered
from bench.targets import MESH

_MIB = 2**20
# In the overview: figure, column, digits.
_OVERVIEW = (
    ("tokens_per_second", "tokens/s", 0),
    ("replies_per_second", "replies/s", 1),
    ("ttft_p50_ms", "first token p50, ms", 1),
    ("ttft_p99_ms", "p99, ms", 1),
    ("ttft_added_ms", "added p50, ms", 1),
    ("gap_p99_ms", "between tokens p99, ms", 1),
    ("cpu_per_1000", "CPU s / 1,000 tokens", 3),
    ("cpu_with_stores_per_1000", "with stores", 3),
    ("cpu_ms_per_reply", "CPU ms / reply, with stores", 1),
)


def section(results: Sequence[Result], plots: Mapping[str, str]) -> str:
    """Returns the section.

    Args:
        results: of the mesh.
        plots: paths of plots as the page links them, by what they show.
    """
    # Where tokens are few and not the point, figures for 1,000 of them say nothing.
    replies = [one for one in results if "gap_p99_ms" in one.spreads(MESH)]
    others = [one for one in results if one not in replies]
    parts = [_facts(results), "### Goals", _goals(results)]
    if replies:
        parts += ["### Replies", _overview(replies)]
        parts += [f"![{title}]({path})" for title, path in plots.items()]
        parts += ["### Where the CPU goes", _cpu(replies), "### Memory", _memory(replies)]
    for result in results:
        if "added_p99_ms" in result.spreads(MESH):
            parts += [f"### Each token against the model's schedule: {result.title}", _figures(result)]
    for result in others:
        parts += [f"### {result.title[0].upper()}{result.title[1:]}", _figures(result)]
    parts += ["### Noise", _noise(results)]
    return "\n\n".join(parts)


def _facts(results: Sequence[Result]) -> str:
    groups: dict[str, list[str]] = {}
    for result in results:
        said = {**result.facts, "time": result.facts["time"][:10], "load_average": "below"}
        groups.setdefault(machine(said), []).append(result.name)
    lines = [
        f"- {text}" if len(groups) == 1 else f"- {', '.join(names)}: {text}" for text, names in groups.items()
    ]
    return "\n".join(
        [
            "Measured on",
            "",
            *lines,
            "",
            f"Packages: {packages(results[-1].facts)}.",
            "",
            "Numbers are medians of the runs, in brackets the least and the most where there were several.",
        ]
    )


def _goals(results: Sequence[Result]) -> str:
    rows = [
        (
            outcome.goal.what,
            f"{'≥' if outcome.goal.at_least else '≤'} {outcome.goal.bound:,g} {outcome.goal.unit}",
            f"{value(outcome.spread, _digits(outcome.goal.figure))}",
            outcome.word if outcome.met else f"**{outcome.word}**",
        )
        for outcome in outcomes(results, MESH)
    ]
    return table(("goal", "bound", "measured", ""), rows)


def _digits(figure: str) -> int:
    return next((one.digits for one in SHOWN if one.name == figure), 2)


def _overview(results: Sequence[Result]) -> str:
    rows = []
    for result in results:
        for target in result.targets:
            spreads = result.spreads(target)
            cells = [value(spreads[name], digits) if name in spreads else "" for name, _, digits in _OVERVIEW]
            rows.append((f"{result.title}: {target}", *cells))
    return table(("", *(label for _, label, _ in _OVERVIEW)), rows)


def _cpu(results: Sequence[Result]) -> str:
    kinds = _kinds(results)
    rows = []
    for result in results:
        there = result.kinds(MESH)
        spreads = result.spreads(MESH)
        cells = [number(result.cpu_of(MESH, kind).median, 4) if kind in there else "" for kind in kinds]
        rows.append(
            (
                result.title,
                *cells,
                number(spreads["cpu_per_1000"].median, 4),
                number(spreads["cpu_with_stores_per_1000"].median, 4),
                number(spreads["generator_cpu_per_1000"].median, 4),
            )
        )
    names = [f"{kind} (store)" if kind in STORES else kind for kind in kinds]
    names = [f"{kind} (not counted)" if kind == MODEL else kind for kind in names]
    text = (
        "CPU seconds for 1,000 tokens, by kind of process; all its replicas together. The sums are all of "
        "the mesh with Envoy, without and with the stores. The model server and the load generator are "
        "processes of their own and in no sum."
    )
    columns = ("", *names, "sum", "sum with stores", "load generator (not counted)")
    return f"{text}\n\n{table(columns, rows)}"


def _kinds(results: Sequence[Result]) -> list[str]:
    return ordered(list(dict.fromkeys(kind for result in results for kind in result.kinds(MESH))))


def _memory(results: Sequence[Result]) -> str:
    kinds = [kind for kind in _kinds(results) if kind != MODEL]
    rows = []
    for result in results:
        last = result.of(MESH)[-1]
        cells = [
            f"{number(last.parts[kind].rss / _MIB, 0)} ({number(last.parts[kind].pss / _MIB, 0)})"
            if kind in last.parts
            else ""
            for kind in kinds
        ]
        rows.append((result.title, *cells))
    text = (
        "MiB resident after the last run, all replicas together. In brackets with pages that processes share "
        "counted once (PSS), which is what matters for PostgreSQL."
    )
    return f"{text}\n\n{table(('', *kinds), rows)}"


def _figures(result: Result) -> str:
    """Every figure of one scenario but what the overview has."""
    spreads = {target: result.spreads(target) for target in result.targets}
    shown = [one for one in SHOWN if any(one.name in spread for spread in spreads.values())]
    rows = [
        (
            f"{one.label}, {one.unit}" if one.unit else one.label,
            *(
                value(spread[one.name], one.digits) if one.name in spread else ""
                for spread in spreads.values()
            ),
        )
        for one in shown
    ]
    return table(("", *result.targets), rows)


def _noise(results: Sequence[Result]) -> str:
    rows = []
    for result in results:
        spreads = result.spreads(MESH)
        others = spreads.get("others_cores")
        rows.append(
            (
                result.name,
                result.facts["time"],
                f"{result.facts['load_average']}",
                value(others, 2) if others else "",
                str(len(result.of(MESH))),
            )
        )
    text = (
        "What else the machine did: the load average before each scenario, and how many cores anything but "
        "the mesh, its model and the load generator used meanwhile."
    )
    return f"{text}\n\n" + table(("scenario", "time", "load average", "cores of others", "runs"), rows)


def value(spread: Spread, digits: int) -> str:
    """Returns a median, in brackets the least and the most where they differ."""
    middle = number(spread.median, digits)
    least, most = number(spread.least, digits), number(spread.most, digits)
    return middle if least == most else f"{middle} ({least} to {most})"
