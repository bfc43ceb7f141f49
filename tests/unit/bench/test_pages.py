"""What stands on the pages is what the results say: nobody wrote it by hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest

from bench import balance_page, hpa_page, model_pool, overload, page, publish
from bench.arrivals import Shape
from bench.facts import ROOT
from bench.peers import __main__ as peers
from bench.report import replaced
from bench.results import decode

RESULTS = ROOT / "bench" / "results"


def plots(text: str) -> dict[str, str]:
    return dict(re.findall(r"!\[([^\]]*)\]\(([^)]*)\)", text))


def mesh(text: str) -> str:
    return page.section(decode((RESULTS / "mesh.json").read_bytes()), plots(text))


def other_servers(text: str) -> str:
    return peers.section(decode(peers.FILE.read_bytes()))


def balance(text: str) -> str:
    results = {result.name: result for result in decode((RESULTS / "lb.json").read_bytes())}
    return balance_page.section(results, Shape(), next(iter(plots(text).values())))


def loads(text: str) -> str:
    found = orjson.loads(overload.RESULTS.read_bytes())
    return overload.section(found, [[overload.Level(**one) for one in rounds] for rounds in found["levels"]])


def pool(text: str) -> str:
    found = orjson.loads(model_pool.RESULTS.read_bytes())
    outcomes = [[model_pool.Outcome(**one) for one in rounds] for rounds in found["outcomes"]]
    return model_pool.section(found, outcomes)


def autoscaler(text: str) -> str:
    if not (RESULTS / "hpa.json").exists():
        return "Not measured yet."
    return hpa_page.section(hpa_page.stored(), next(iter(plots(text).values())))


@pytest.mark.parametrize(
    ("path", "name", "section"),
    [
        (publish.PAGE, publish.NAME, mesh),
        (peers.PAGE, peers.NAME, other_servers),
        (balance_page.PAGE, balance_page.NAME, balance),
        (overload.PAGE, overload.NAME, loads),
        (model_pool.PAGE, model_pool.SECTION, pool),
        (hpa_page.PAGE, hpa_page.NAME, autoscaler),
    ],
)
def test_a_page_has_what_its_results_say(path: Path, name: str, section: Callable[[str], str]) -> None:
    text = path.read_text()
    assert replaced(text, name, section(text)) == text
