"""What a Grafana board asks of Prometheus, taken apart."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BOARD = Path(__file__).resolve().parents[2] / "deploy/grafana/hermesh.json"
_SELECTOR = re.compile(r"\b([a-zA-Z_:][a-zA-Z0-9_:]*)\s*(\{[^}]*\})?")
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_MATCHER = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)")
_TEMPLATE = re.compile(r"\{\{\s*(\w+)\s*\}\}")
# Whatever is a word of PromQL and no metric.
_WORDS = {
    "sum",
    "max",
    "min",
    "avg",
    "count",
    "rate",
    "increase",
    "histogram_quantile",
    "by",
    "without",
    "on",
}
_WORDS |= {"ignoring", "group_left", "group_right", "and", "or", "unless", "bool", "offset"}


@dataclass(frozen=True)
class Question:
    """One expression of a panel, with the labels that its legend shows."""

    panel: str
    expression: str
    legend: tuple[str, ...]

    @property
    def asked(self) -> str:
        """The expression as Grafana sends it, over the last minute."""
        return self.expression.replace("$__rate_interval", "60s")

    @property
    def selectors(self) -> dict[str, set[str]]:
        """The labels that each metric is selected by."""
        bare = _GROUPING.sub(" ", self.expression)
        bare = re.sub(r"\[[^\]]*\]", " ", bare)
        found: dict[str, set[str]] = {}
        quoted = re.sub(r'"[^"]*"', '""', bare)
        for name, matchers in _SELECTOR.findall(quoted):
            if name not in _WORDS and not re.fullmatch(r"\d.*", name):
                found.setdefault(name, set()).update(_MATCHER.findall(matchers))
        return found

    @property
    def grouping(self) -> set[str]:
        """The labels that it groups or joins by."""
        groups = _GROUPING.findall(self.expression)
        return {label.strip() for group in groups for label in group.split(",") if label.strip()}


def board() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(BOARD.read_text())
    return found


def questions() -> Iterator[Question]:
    for panel in board()["panels"]:
        for target in panel.get("targets", ()):
            legend = tuple(_TEMPLATE.findall(target["legendFormat"]))
            yield Question(panel["title"], target["expr"], legend)
