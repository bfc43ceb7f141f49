"""What the bench of the autoscaler reads from streams, and what it writes of it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import orjson
import pytest

from bench import hpa_page
from bench.hpa import CPU, KINDS, METRIC, Moment, Outcome, decode, encode, read
from bench.model_script import sequence
from bench.target import IncompleteReply
from bench.targets import MeshTarget


class Target:
    """Reads bodies as the mesh's target does, without a mesh."""

    text = MeshTarget.text


def body(*events: tuple[str, dict[str, Any]]) -> str:
    """A stream with these events, as an HTTP body."""
    frames = []
    for seq, (kind, data) in enumerate(events, 1):
        event = {"run_id": "r", "seq": seq, "type": kind, "data": data}
        frames.append(f"id: r:{seq}\nevent: {kind}\ndata: {orjson.dumps(event).decode()}\n\n")
    return "".join(frames)


def row(*events: tuple[str, dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"tenant": "short", "status": 200, "error": "", "text": body(*events)} | more


def text(piece: str) -> tuple[str, dict[str, Any]]:
    return ("text.delta", {"text": piece})


STARTED: tuple[str, dict[str, Any]] = ("run.started", {"attempt": 1})
DONE: tuple[str, dict[str, Any]] = ("run.completed", {})
TOKENS = sequence(KINDS["short"][0])
WHOLE = "".join(TOKENS)


def test_runs_that_moved_or_were_written_again_are_counted() -> None:
    rows = [
        row(STARTED, text(WHOLE), DONE),
        row(STARTED, text(WHOLE[:9]), STARTED, text(WHOLE[9:]), DONE),
        # The third event and what came after it are taken back.
        row(
            STARTED,
            text(WHOLE[:9]),
            text("x"),
            STARTED,
            ("attempt.reset", {"from_seq": 3}),
            text(WHOLE[9:]),
            DONE,
        ),
    ]
    assert read(rows, Target()) == (2, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "broken",
    [
        row(STARTED, text(WHOLE)),
        row(STARTED, text(WHOLE[:-1]), DONE),
        row(STARTED, text(WHOLE), ("run.failed", {})),
        row(STARTED, text(WHOLE), status=502),
        row(STARTED, text(WHOLE), DONE, error="the connection broke"),
        {"tenant": "short", "error": "no session was free"},
        row(STARTED, text("x"), ("attempt.reset", {"from_seq": 2}), text(WHOLE)),
    ],
)
def test_a_run_that_was_cut_is_no_result(broken: dict[str, Any]) -> None:
    with pytest.raises(IncompleteReply):
        read([broken], Target())  # type: ignore[arg-type]


def test_the_page_says_what_happened(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    replicas = [2, 2, 4, 4, 3, 2]
    moments = [
        Moment(15.0 * n, 100, 45.0 * before, before, before, {METRIC: after, CPU: 1}, after)
        for n, (before, after) in enumerate(pairwise(replicas))
    ]
    facts = {
        "cores": 2,
        "cpu": "x",
        "memory_gib": 1,
        "kernel": "k",
        "python": "3",
        "time": "now",
        "load_average": 0.1,
    }
    outcome = Outcome(facts, 6, 50, moments, runs=1234, refused=0, moved=5, reset=0, late=1.5)
    assert decode(orjson.loads(orjson.dumps(encode(outcome)))) == outcome
    said = hpa_page.section(outcome, "plot.svg")
    assert "| runs, each whole to its last token | 1,234 |" in said
    assert "| agents: at the beginning, the most, at the end | 2, 4, 2 |" in said
    assert "| changes up, down | 1, 2 |" in said
    assert "| changes of direction (up and then down is one) | 1 |" in said
    assert f"| decided by | {METRIC} 1 times |" in said
    monkeypatch.setattr(hpa_page, "RESULTS", tmp_path)
    page = tmp_path / "autoscaling.md"
    page.write_text("<!-- bench:hpa -->\n<!-- /bench:hpa -->\n")
    monkeypatch.setattr(hpa_page, "PAGE", page)
    assert hpa_page.publish(outcome) == [tmp_path / "hpa.json", tmp_path / "hpa.svg", page]
    assert "![Sessions and agents over time](hpa.svg)" in page.read_text()
    assert hpa_page.stored() == outcome
