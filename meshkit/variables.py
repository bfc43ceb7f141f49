"""The names of all settings, so that a mistyped one is named instead of silently having no effect.

`variables.txt` is made from the settings classes by `make docs`: no process imports those of another. A line
is a name, and `secret` after it where it is one.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from meshkit.secret_files import SUFFIX
from meshkit.settings import PREFIX

# What `hermesh env` prints beside settings, and what only benches and tests read.
_BESIDE = frozenset(
    {
        "HERMESH_HTTP_URL",
        "HERMESH_GRPC_ADDRESS",
        "HERMESH_CELLS_FILE",
        "HERMESH_KEEP_DATA",
        "HERMESH_CHROMIUM",
        "HERMESH_TEST_EXAMPLES",
        "HERMESH_WRITE_SCHEMA",
    }
)
# What Kubernetes sets for a service whose name begins with hermesh: nobody typed it.
_OF_A_SERVICE = re.compile(r"_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)$")
# How `hermesh cells` reaches a cell's stores, by the cell's name.
_OF_A_CELL = re.compile(r"HERMESH_CELL_[A-Z0-9]+_(DATABASE|OBJECT_STORE)_URL(_FILE)?")
_NEAR = 0.75


@dataclass(frozen=True, slots=True)
class Unknown:
    """A variable that nothing reads.

    Attributes:
        name: as it is spelt.
        nearest: the setting that may be meant; empty when none is near.
    """

    name: str
    nearest: str

    def __str__(self) -> str:
        meant = f"; is {self.nearest} meant?" if self.nearest else "; docs/settings.md has all that there are"
        return f"{self.name} is no setting and has no effect{meant}"


@cache
def known() -> frozenset[str]:
    """The names of all settings of all processes, and of the files that may hold secrets among them."""
    return frozenset(name for name, _ in _listed()) | secret_files().keys()


@cache
def secret_files() -> Mapping[str, str]:
    """The variables that name files of secrets, and the one in whose place each stands."""
    return {name + SUFFIX: name for name, kind in _listed() if kind}


def _listed() -> list[tuple[str, str]]:
    lines = Path(__file__).with_name("variables.txt").read_text().splitlines()
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in lines]


def unknown(environment: Mapping[str, str], others: Iterable[str] = ()) -> list[Unknown]:
    """Finds the variables that begin as a setting does and are none.

    Args:
        environment: The environment, by name.
        others: Further names that somebody reads.
    """
    taken = known() | _BESIDE | frozenset(others)
    return [
        Unknown(name, _nearest(name))
        for name, value in sorted(environment.items())
        # Some write names small; pydantic reads those as well.
        if name.upper().startswith(PREFIX)
        and name.upper() not in taken
        and not _OF_A_SERVICE.search(name)
        and not _OF_A_CELL.fullmatch(name.upper())
        and not value.startswith(("tcp://", "udp://"))
    ]


def _nearest(name: str) -> str:
    # Without what all have in common, which would make all of them look near.
    rests = [one.removeprefix(PREFIX) for one in sorted(known())]
    found = difflib.get_close_matches(name.upper().removeprefix(PREFIX), rests, 1, _NEAR)
    return f"{PREFIX}{found[0]}" if found else ""
