"""What the suite made of code with a known bug."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tests.chaos.report.episodes import Verdict
from tests.chaos.validate.facts import grouped

_GONE = "(not among the mutations any more)"


@dataclass(frozen=True)
class Hunt:
    """A bug, and how it was looked for.

    Attributes:
        name: of the mutation.
        what: the rule that it broke, in words.
        tried: episodes that were played.
        seed: of the first one that found something; None if none did.
        invariants: those that did not hold in that one.
    """

    name: str
    what: str
    tried: int
    seed: int | None
    invariants: list[int]


@dataclass(frozen=True)
class Mutations:
    """All hunts, and the same faults on the code as it is.

    Attributes:
        hunts: by name.
        controls: episodes without a bug.
        unclean: of those, the ones that found something all the same.
    """

    hunts: list[Hunt]
    controls: int
    unclean: int

    @property
    def missed(self) -> list[Hunt]:
        """Bugs that were looked for and not found."""
        return [hunt for hunt in self.hunts if hunt.tried and hunt.seed is None]


def hunts(verdicts: Iterable[Verdict], words: Mapping[str, str]) -> Mutations:
    """Sorts verdicts by the bug of their code.

    Args:
        verdicts: of code with bugs, and of code without any.
        words: by the name of a mutation, what it breaks; those that were never played are listed, too.
    """
    every = grouped(({"mutation": verdict.mutation, "verdict": verdict} for verdict in verdicts), "mutation")
    controls = [record["verdict"] for record in every.pop("", [])]
    found = []
    for name in dict.fromkeys([*words, *every]):
        played = [record["verdict"] for record in every.get(name, [])]
        caught = next((verdict for verdict in played if verdict.violations), None)
        found.append(
            Hunt(
                name,
                words.get(name, _GONE),
                len(played),
                caught.seed if caught is not None else None,
                caught.invariants if caught is not None else [],
            )
        )
    return Mutations(found, len(controls), sum(bool(verdict.violations) for verdict in controls))
