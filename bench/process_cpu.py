"""CPU seconds and resident memory of processes with their children, read from /proc."""

import os
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def _children() -> dict[int, list[int]]:
    tree: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            fields = _stat(int(entry.name))
            if fields:
                tree.setdefault(int(fields[1]), []).append(int(entry.name))
    return tree


def _stat(pid: int) -> list[str]:
    # The command may hold spaces and brackets; what follows its last bracket does not.
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


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
        fields = _stat(one)
        if fields:
            total += sum(int(value) for value in fields[11:15])
    return total / _TICKS


def resident_bytes(pid: int) -> int:
    """Resident memory of a process and its descendants; shared pages count in each."""
    total = 0
    for one in family(pid):
        fields = _stat(one)
        if fields:
            total += int(fields[21]) * _PAGE
    return total
