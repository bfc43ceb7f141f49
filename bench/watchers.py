"""Idle watchers: what each costs in memory and CPU, and how soon each gets its next event."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from bench.histogram import Times
from bench.load import Generator, LoadError, started
from bench.measure import MODEL, PREPARED_AT_ONCE, Run, by_kind, percentiles
from bench.process_cpu import Usage, usage
from bench.scenarios import Watchers
from bench.targets import MeshTarget

# Memory is read when streams that were just opened have nothing left to set up.
QUIET_SECONDS = 3.0
OPEN_SECONDS = 300.0
KINDS = ("gateway", "session", "envoy")


async def measure_watchers(
    target: MeshTarget, scenario: Watchers, model_pid: int, *, quiet_seconds: float = QUIET_SECONDS
) -> Run:
    """Runs a scenario of watchers once.

    Args:
        target: the mesh; a fresh one, or what it held before hides what the watchers take.
        scenario: what to do.
        model_pid: the model server, whose work is not the mesh's.
        quiet_seconds: how long streams that were just opened are left alone before memory is read.

    Raises:
        LoadError: The load generator failed, a stream ended, or a watcher did not get its event.
    """
    processes = dict(target.processes()) | {MODEL: model_pid}
    async with started("bench.watch_generator", await _job(target, scenario)) as generator:
        await _open(generator, scenario.first, quiet_seconds)
        few = usage(processes)
        await _open(generator, scenario.watchers, quiet_seconds)
        many = usage(processes)
        await asyncio.sleep(scenario.idle_seconds)
        idle = usage(processes)
        generator.tell("post")
        seconds = scenario.sessions / scenario.events_per_second + 2 * scenario.deadline_seconds
        said = _checked(await generator.line(seconds))
        after = usage(processes)
        generator.tell("end")
        rows = await generator.written()
    events = waits(rows)
    figures = {"watchers": float(scenario.watchers)}
    figures |= each(few, many, scenario.watchers - scenario.first)
    figures |= idle_percent(many, idle, scenario.idle_seconds)
    figures |= percentiles({"event": events})
    figures["generator_cpu_s"] = said["cpu"]
    return Run(target.name, figures, by_kind(idle, after), {"event": events})


async def _job(target: MeshTarget, scenario: Watchers) -> dict[str, Any]:
    gate = asyncio.Semaphore(PREPARED_AT_ONCE)

    async def session() -> str:
        async with gate:
            return await target.new_session()

    sessions = await asyncio.gather(*(session() for _ in range(scenario.sessions)))
    followed, posts = [], []
    for session_id in sessions:
        url, headers = target.watch(session_id)
        followed.append({"url": url, "headers": dict(headers)})
        ask = target.ask(session_id, "[[tokens=1]]")
        posts.append(
            {"url": ask.url, "headers": dict(ask.headers), "body": dict(ask.body) | {"stream": False}}
        )
    return {
        "watchers": [followed[number % len(followed)] for number in range(scenario.watchers)],
        "posts": posts,
        "per_second": scenario.events_per_second,
        "deadline_seconds": scenario.deadline_seconds,
    }


async def _open(generator: Generator, count: int, quiet_seconds: float) -> None:
    generator.tell(f"open {count}")
    _checked(await generator.line(OPEN_SECONDS))
    await asyncio.sleep(quiet_seconds)


def _checked(line: str) -> dict[str, Any]:
    said: dict[str, Any] = orjson.loads(line)
    if said["error"]:
        raise LoadError(f"a watcher, or what should bring it its event, failed: {said['error']}")
    return said


def waits(rows: Sequence[Mapping[str, int]]) -> Times:
    """Returns how long each watcher's event took from the moment its input was due.

    Raises:
        LoadError: A watcher did not get its event.
    """
    missing = sum(not row["event"] for row in rows)
    if missing:
        raise LoadError(f"{missing} of {len(rows)} watchers did not get their event")
    return Times(row["event"] - row["due"] for row in rows)


def each(few: Mapping[str, Usage], many: Mapping[str, Usage], more: int) -> dict[str, float]:
    """KiB of resident memory for each watcher beyond the first ones, by kind of process."""
    before, after = by_kind(few, few), by_kind(few, many)
    return {
        f"{kind}_kib_each": (after[kind].rss - before[kind].rss) / 1024 / more
        for kind in KINDS
        if kind in after
    }


def idle_percent(before: Mapping[str, Usage], after: Mapping[str, Usage], seconds: float) -> dict[str, float]:
    """CPU while nothing happened, in percent of a core, by kind of process and of the whole mesh."""
    parts = by_kind(before, after)
    mesh = sum(part.cpu for kind, part in parts.items() if kind != MODEL)
    found = {f"{kind}_percent": parts[kind].cpu / seconds * 100 for kind in KINDS if kind in parts}
    return found | {"mesh_percent": mesh / seconds * 100}
