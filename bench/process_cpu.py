"""CPU seconds of processes with their children, read from /proc."""

import os
from pathlib import Path

from launcher.processes import stat_fields

_TICKS = os.sysconf("SC_CLK_TCK")


def _children() -> dict[int, list[int]]:
    tree: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            fields = stat_fields(int(entry.name))
            if fields:
                tree.setdefault(int(fields[1]), []).append(int(entry.name))
    return tree


def family(pid: int) -> list[int]:
    """Returns the process and all its descendants that live now."""
    tree = _children()
    found, pending = [], [pid]
    while pending:
        one = pending.pop()
        found.append(one)
        pending.extend(tree.get(one, ()))
    return found


def cpu_seconds(pid: int) -> float:
    """CPU seconds of a process and its descendants, children that were waited for included."""
    total = 0
    for one in family(pid):
        fields = stat_fields(one)
        if fields:
            total += sum(int(value) for value in fields[11:15])
    return total / _TICKS
