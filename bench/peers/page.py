"""The section of docs/peers.md that is made of results: ratios first, then figures and how it was run."""

from __future__ import annotations

from collections.abc import Sequence

from bench.figures import number
from bench.measure import MODEL, STORES
from bench.page import value
from bench.peers.catalog import PEERS
from bench.peers.compare import RATIOS, Ratio, outcomes, wins
from bench.report import machine, packages, table
from bench.results import Result
from bench.targets import MESH

NOT_COUNTED = STORES | {MODEL}
_FIGURES = (
    ("tokens_per_second", "tokens/s", 0),
    ("ttft_p50_ms", "first token p50, ms", 1),
    ("ttft_p99_ms", "p99, ms", 1),
    ("gap_p99_ms", "between tokens p99, ms", 1),
    ("added_p99_ms", "behind the model p99, ms", 1),
    ("cpu_per_1000", "CPU s / 1,000 tokens", 3),
    ("cpu_with_stores_per_1000", "with stores", 3),
    ("rss", "MiB resident", 0),
)


def section(results: Sequence[Result]) -> str:
    """Returns the section."""
    titles = list(dict.fromkeys(result.title for result in results))
    groups = [(title, [one for one in results if one.title == title]) for title in titles]
    parts = ["### Goals", _goals(results)]
    parts += ["### Ratios", _RATIOS_TEXT]
    parts += [f"**{title}**\n\n{_ratios(group)}" for title, group in groups]
    parts += ["### What is durable when the client sees it", _kept(results)]
    parts += ["### Figures", _FIGURES_TEXT]
    parts += [f"**{title}**\n\n{_figures(group)}" for title, group in groups]
    parts += ["### How each was run", _how(results)]
    parts += ["### Machine and noise", _noise(results)]
    return "\n\n".join(parts)


_RATIOS_TEXT = (
    "How many times better the mesh was: above 1 the mesh is ahead, **below 1, in bold, the peer is**. Each "
    "number is the median over pairs of runs, one of the mesh and one of the peer right after it on the "
    "same machine."
)
_FIGURES_TEXT = (
    "Medians of the runs, in brackets the least and the most. The mesh has a row for each peer: what it did "
    "right before that peer, while the peer was up and idle. CPU is that of all processes of a server, "
    "without PostgreSQL, Valkey, the model and the load generator; the next column adds PostgreSQL and "
    "Valkey. Memory is that of all its processes without the stores."
)


def _goals(results: Sequence[Result]) -> str:
    rows = [
        (
            one.goal.what,
            f"≥ {one.goal.bound:g}",
            value(one.ratio, 2),
            one.peer,
            "met" if one.met else "**missed**",
        )
        for one in outcomes(results)
    ]
    return table(("goal", "bound", "measured", "best of those", ""), rows)


def _name(result: Result) -> str:
    return f"{result.facts['target']}{' (durable)' if result.facts['durable'] else ''}"


def _ratios(results: Sequence[Result]) -> str:
    shown = [one for one in RATIOS if any(one.of(result) for result in results)]
    rows = []
    for result in results:
        ahead = ", ".join(wins(result)) or "nothing"
        if "failed" in result.facts:
            ahead = f"not measured: {result.facts['failed']}"
        rows.append((_name(result), *(_ratio(result, one) for one in shown), ahead))
    return table(("the mesh against", *(one.label for one in shown), "the peer is ahead in"), rows)


def _ratio(result: Result, ratio: Ratio) -> str:
    spread = ratio.of(result)
    if spread is None:
        return ""
    text = number(spread.median, 2 if spread.median < 10 else 1)
    return f"**{text}**" if spread.median < 1 else text


def _kept(results: Sequence[Result]) -> str:
    rows = []
    ours = results[0].facts["mesh_kept"]
    rows.append(("the mesh", *_kept_cells(ours)))
    seen = {}
    for result in results:
        if "kept" in result.facts:
            seen[result.facts["target"]] = result.facts["kept"]
    rows += [(name, *_kept_cells(found)) for name, found in seen.items()]
    text = (
        "How many of the tokens that the client already had were in PostgreSQL, and in Valkey, at that "
        "moment: a reply of 80 tokens at 20 a second was read until its 40th was there, then every row of "
        "every table and every value of Valkey was searched for them; once more after the reply's end, to "
        "show that the search finds them. A server marked durable is one whose own pages promise that an "
        "accepted run outlives its process. What becomes of the text that it had streamed is another "
        "matter, and this table is about that."
    )
    columns = (
        "",
        "tokens seen by the client",
        "in PostgreSQL then",
        "in Valkey then",
        "in PostgreSQL at the end",
    )
    return f"{text}\n\n{table(columns, rows)}"


def _kept_cells(found: dict[str, int | None]) -> tuple[str, ...]:
    valkey = found["valkey"]
    return (
        f"{found['seen']}",
        f"{found['postgres']}",
        "not looked at" if valkey is None else f"{valkey}",
        f"{found['after']}",
    )


def _figures(results: Sequence[Result]) -> str:
    rows = []
    for result in results:
        if not result.runs:
            continue
        for target, label in ((MESH, f"the mesh, beside {result.facts['target']}"), (None, _name(result))):
            rows.append((label, *_cells(result, target or result.facts["target"])))
    return table(("", *(label for _, label, _ in _FIGURES)), rows)


def _cells(result: Result, target: str) -> list[str]:
    spreads = result.spreads(target)
    cells = []
    for name, _, digits in _FIGURES:
        if name == "rss":
            cells.append(number(memory(result, target) / 2**20, digits))
        else:
            cells.append(value(spreads[name], digits) if name in spreads else "")
    return cells


def memory(result: Result, target: str) -> int:
    """Returns the resident bytes of a server without its stores and the model, after its last run."""
    parts = result.of(target)[-1].parts
    return sum(part.rss for kind, part in parts.items() if kind not in NOT_COUNTED)


def _how(results: Sequence[Result]) -> str:
    rows = []
    for peer in PEERS:
        found = next((one for one in results if one.facts["peer"] == peer.name), None)
        if found is None:
            continue
        pinned = ", ".join(f"{name} {version}" for name, version in found.facts["versions"].items())
        rows.append((peer.title, pinned, f"`{' '.join(peer.command)}`", peer.pages, peer.changed))
    ours = (
        f"Of the mesh: {packages(results[-1].facts)}; two agents, two session replicas and one of each other "
        "service, as `hermesh up` starts them. As in `make bench` only limits are raised, so that nothing is "
        "refused. Its processes schedule themselves in batches (docs/adr/0019), those of the peers as usual."
    )
    return f"{table(('', 'versions', 'command', 'as written in', 'set beside that'), rows)}\n\n{ours}"


def _noise(results: Sequence[Result]) -> str:
    said = {**results[-1].facts, "time": results[-1].facts["time"][:10], "load_average": "below"}
    rows = []
    for result in results:
        if result.runs:
            target = result.facts["target"]
            others = [value(result.spreads(one)["others_cores"], 2) for one in (MESH, target)]
            average = f"{result.facts['load_average']}"
            rows.append(
                (
                    f"{target}: {result.title}",
                    result.facts["time"],
                    average,
                    *others,
                    f"{len(result.of(target))}",
                )
            )
    columns = (
        "",
        "time",
        "load average before",
        "cores of others, mesh",
        "cores of others, peer",
        "runs each",
    )
    return f"{machine(said)}\n\n{table(columns, rows)}"
