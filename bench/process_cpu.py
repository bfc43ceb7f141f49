"""CPU seconds and memory of processes with their children, read from /proc."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.processes import stat_fields

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


class ProcessGone(Exception):
    """A process that is measured does not run any more; the message names it."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process and its descendants used.

    Attributes:
        cpu: seconds since they began, children that were waited for included.
        rss: resident bytes; pages that several of them share count for each.
        pss: resident bytes; such pages count once, by share. 0 where the kernel does not let us see it.
    """

    cpu: float
    rss: int
    pss: int


def _stats() -> dict[int, list[str]]:
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            fields = stat_fields(int(entry.name))
            if fields:
                found[int(entry.name)] = fields
    return found


def _seconds(fields: list[str]) -> float:
    return sum(int(value) for value in fields[11:15]) / _TICKS


def owners(parents: Mapping[int, int], roots: Mapping[str, int]) -> dict[str, list[int]]:
    """Returns whose each process is: a root's own, or its nearest ancestor's among the roots.

    Args:
        parents: the parent of each process that lives.
        roots: processes by name; one may be a descendant of another, and still counts for itself alone.

    Raises:
        ProcessGone: A root does not live.
    """
    names = {pid: name for name, pid in roots.items()}
    found: dict[str, list[int]] = {name: [] for name in roots}
    for pid in parents:
        above: int | None = pid
        while above is not None and above not in names:
            above = parents.get(above)
        if above is not None:
            found[names[above]].append(pid)
    for name, pid in roots.items():
        if pid not in found[name]:
            raise ProcessGone(f"{name} (process {pid}) does not run any more")
    return found


def cpu_by_name(roots: Mapping[str, int]) -> dict[str, float]:
    """CPU seconds so far of each named process and its descendants. Raises ProcessGone."""
    stats = _stats()
    parents = {pid: int(fields[1]) for pid, fields in stats.items()}
    return {name: sum(_seconds(stats[pid]) for pid in pids) for name, pids in owners(parents, roots).items()}


def usage(roots: Mapping[str, int]) -> dict[str, Usage]:
    """What each named process and its descendants used so far. Raises ProcessGone."""
    stats = _stats()
    parents = {pid: int(fields[1]) for pid, fields in stats.items()}
    return {
        name: Usage(
            cpu=sum(_seconds(stats[pid]) for pid in pids),
            rss=sum(int(stats[pid][21]) for pid in pids) * _PAGE,
            pss=sum(_pss(pid) for pid in pids),
        )
        for name, pids in owners(parents, roots).items()
    }


def _pss(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0
    return 0


def cpu_seconds(pid: int) -> float:
    """CPU seconds of a process and its descendants. Raises ProcessGone."""
    return cpu_by_name({"": pid})[""]


def machine_cpu_seconds() -> float:
    """CPU seconds that this machine spent on anything but idling, time stolen by its host included."""
    values = [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = values
    return (user + nice + system + irq + softirq + steal) / _TICKS
