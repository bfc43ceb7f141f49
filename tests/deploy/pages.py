"""The fenced blocks of the pages for operators: each is run by a test as it stands, or says why not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "deploy"
# A mark is a comment right above its block.
_BLOCK = re.compile(r"^(?:<!-- ([^\n]*?) -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = "not run: "
SERVES = "runs until it is stopped"


@dataclass(frozen=True, slots=True)
class Block:
    """One block.

    Attributes:
        page: its file's name.
        line: where its text begins, from 1.
        language: what the fence says.
        text: what is in it.
        mark: the comment above it; empty for none.
    """

    page: str
    line: int
    language: str
    text: str
    mark: str

    @property
    def place(self) -> str:
        """Where a person finds it."""
        return f"docs/deploy/{self.page}:{self.line}"

    @property
    def runs(self) -> bool:
        """Whether it can be run here, as far as its page says."""
        return not self.mark.startswith(NOT_RUN)

    def at(self, places: Mapping[str, str]) -> str:
        """The text with this machine's addresses and folders; each has to be in it."""
        text = self.text
        for old, new in places.items():
            assert old in text, f"{old!r} is not in {self.place}"
            text = text.replace(old, new)
        return text


def blocks(page: Path) -> list[Block]:
    """Every block of a page, in its order."""
    text = page.read_text()
    found = []
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start(3)) + 1
        found.append(Block(page.name, line, match[2], match[3], match[1] or ""))
    # A fence that the pattern does not see would be a command that nobody runs.
    assert len(found) * 2 == len(re.findall(r"^\s*(?:```|~~~)", text, re.MULTILINE)), page
    return found


def of(page: str, language: str = "sh") -> list[Block]:
    """The blocks of a page in one language that can be run."""
    found = [one for one in blocks(PAGES / page) if one.language == language and one.runs]
    assert found, f"{page} has no block of {language} that can be run"
    return found
