"""What each process of a mesh holds: read from outside in /proc, and from its own /metrics.

A reading is a flat record: `t` (Unix seconds), `phase`, `process` (its name), `pid`, `start` (its start
time), and what was measured:

    memory      MiB resident; of a family, what its processes have of their own, since they share the rest
    own         MiB resident that are no file's and nobody else's
    pss         MiB, a page that n processes share counted as 1/n
    threads     threads; a family has processes in place of them
    fds         open descriptors, and of them
    tcp         connections by TCP
    unix        connections by unix sockets
    tasks       asyncio tasks that are not done
    blocks      blocks of memory that Python's objects occupy
    series      samples in /metrics: a label that has a value for each run or client shows here
    busy        gauges that are 0 when nobody is there, added up
    open        those of them that are not 0, by name
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from launcher.processes import stat_fields

Reading = dict[str, Any]

# Whatever of these stays up when nobody is there belongs to somebody who has left.
BUSY = frozenset(
    {
        "hermes_active_sessions",
        "hermesh_gateway_streams",
        "hermesh_gateway_lingering_streams",
        "hermesh_session_attached_runs",
        "hermesh_session_watchers",
        "hermesh_session_dispatched_runs",
        "hermesh_tool_running",
    }
)
_GAUGES = {"hermesh_event_loop_tasks": "tasks", "hermesh_memory_blocks": "blocks"}
_SCRAPE_SECONDS = 2.0
_SOCKET = re.compile(r"socket:\[(\d+)\]")
_LISTEN = "0A"


@dataclass(frozen=True, slots=True)
class Watched:
    """A process to be looked at.

    Attributes:
        name: what it is called whichever life it is in.
        metrics: host:port of its /metrics, if it has any.
        family: whether its children are a part of it.
    """

    name: str
    pid: int
    metrics: str = ""
    family: bool = False


def of_cluster(cluster: Any) -> list[Watched]:
    """The services, Envoy and the supervisor of a cluster's mesh, and its stores."""
    folder: Path = cluster.mesh.data_dir
    addresses = {}
    for path in (folder / "ready").glob("*.json"):
        ready = json.loads(path.read_text())
        addresses[ready["pid"]] = ready["metrics_address"]
    state = json.loads((folder / "state.json").read_text())
    found = [
        Watched(child["replica"], child["pid"], addresses.get(child["pid"], ""))
        for child in state["children"]
        if child["pid"]
    ]
    found.append(Watched("supervisor", state["supervisor"]["pid"]))
    for store in (cluster.postgres, cluster.valkey):
        if store.process is not None:
            found.append(Watched(store.name, store.process.pid, family=store.name == "postgres"))
    return found


class Watch:
    """Takes readings; to be closed."""

    def __init__(self) -> None:
        self._client = httpx.AsyncClient(timeout=_SCRAPE_SECONDS)

    async def close(self) -> None:
        """Ends its connections."""
        await self._client.aclose()

    async def take(self, watched: Iterable[Watched], phase: str) -> list[Reading]:
        """Reads all processes at once; one that is gone is left out, one that is stopped has no figures."""
        sockets = _sockets()
        readings = []
        for process, figures in zip(watched, await self._figures(watched), strict=True):
            values = _of_family(process.pid, sockets) if process.family else _of_process(process.pid, sockets)
            if values:
                head = {
                    "t": round(time.time(), 2),
                    "phase": phase,
                    "process": process.name,
                    "pid": process.pid,
                    "start": _start(process.pid),
                }
                readings.append(head | values | figures)
        return readings

    async def _figures(self, watched: Iterable[Watched]) -> list[dict[str, Any]]:
        return await asyncio.gather(*(self._scrape(process.metrics) for process in watched))

    async def _scrape(self, address: str) -> dict[str, Any]:
        if not address:
            return {}
        try:
            text = (await self._client.get(f"http://{address}/metrics")).text
        except httpx.TransportError:
            return {}
        return figures_of(text)


def figures_of(text: str) -> dict[str, Any]:
    """What is of interest in the text of /metrics."""
    found: dict[str, Any] = {"series": 0.0, "busy": 0.0, "open": {}}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found["series"] += 1
            if sample.name in BUSY and sample.value:
                found["busy"] += sample.value
                found["open"][" ".join((sample.name, *sample.labels.values()))] = sample.value
            elif sample.name in _GAUGES:
                found[_GAUGES[sample.name]] = sample.value
    return found


def _start(pid: int) -> int:
    fields = stat_fields(pid)
    return int(fields[19]) if fields else 0


def _sockets() -> dict[str, str]:
    """What each socket of the machine is, by inode: "tcp" or "unix"; listening ones are left out."""
    found: dict[str, str] = {}
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] != _LISTEN:
                found[fields[9]] = "tcp"
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        # Flags: __SO_ACCEPTCON is a listening one.
        if not int(fields[3], 16) & 0x10000:
            found[fields[6]] = "unix"
    return found


def _of_process(pid: int, sockets: dict[str, str]) -> dict[str, float]:
    """What one process holds; empty if it is gone."""
    try:
        status = _kilobytes_and_counts(Path(f"/proc/{pid}/status").read_text())
        rollup = _kilobytes_and_counts(Path(f"/proc/{pid}/smaps_rollup").read_text())
        folder = f"/proc/{pid}/fd"
        links = [_link(f"{folder}/{name}") for name in os.listdir(folder)]
    except (FileNotFoundError, ProcessLookupError):
        return {}
    kinds = [sockets.get(match[1], "") for link in links if (match := _SOCKET.fullmatch(link))]
    return {
        "memory": status.get("VmRSS", 0) / 1024,
        "own": status.get("RssAnon", 0) / 1024,
        "pss": rollup.get("Pss", 0) / 1024,
        "threads": status.get("Threads", 0),
        "fds": len(links),
        "tcp": kinds.count("tcp"),
        "unix": kinds.count("unix"),
    }


def _of_family(pid: int, sockets: dict[str, str]) -> dict[str, float]:
    members = [values for one in (pid, *_children(pid)) if (values := _of_process(one, sockets))]
    if not members:
        return {}
    # Its descriptors are mostly files of tables, which it keeps open up to a bound of its own.
    names = members[0].keys() - {"fds", "threads"}
    total = {name: sum(values[name] for values in members) for name in names}
    return total | {"memory": total["own"], "processes": len(members)}


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except FileNotFoundError:
        # Closed meanwhile.
        return ""


def _kilobytes_and_counts(text: str) -> dict[str, float]:
    pairs = (line.split() for line in text.splitlines())
    return {pair[0].rstrip(":"): float(pair[1]) for pair in pairs if len(pair) > 1 and pair[1].isdecimal()}
