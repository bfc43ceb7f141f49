"""Measures one run of a scenario on a target: load, CPU and memory around it, and what the replies tell."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

import httpx

from bench.histogram import Times
from bench.load import Reply, Window, load
from bench.process_cpu import Usage, machine_cpu_seconds, usage
from bench.reading import added, arrivals, check, first_at, gaps
from bench.scenarios import Replies
from bench.target import Ask, IncompleteReply, Recalling, Replayed, Target

PREPARED_AT_ONCE = 16
# What a run leaves to do (publishing, releasing) is part of its cost.
SETTLE_SECONDS = 0.3
# About so many replies of a run are read again from where the target keeps them.
REPLAYED = 8
# A stream fell behind when its last token was this much later than the model wrote it.
BEHIND_NS = 250_000_000
STORES = frozenset({"postgresql", "valkey", "redis"})
MODEL = "model"
_number = count()


@dataclass(frozen=True, slots=True)
class Part:
    """What the processes of one kind used in a run: CPU seconds, resident bytes at its end (see Usage)."""

    cpu: float
    rss: int
    pss: int


@dataclass(slots=True)
class Run:
    """One measured run of a scenario.

    Attributes:
        target: whose.
        figures: by name; what they mean is in `bench.figures`.
        parts: what each kind of process used.
        times: histograms: `ttft`, and where tokens can be told apart `gap`, and `added` for a paced model.
    """

    target: str
    figures: dict[str, float]
    parts: dict[str, Part]
    times: dict[str, Times] = field(default_factory=dict)


async def measure(target: Target, scenario: Replies, model: tuple[str, int]) -> Run:
    """Runs a scenario once.

    Args:
        target: whom to ask.
        scenario: what.
        model: the model server's base URL with its /v1, and its pid: its work is not the target's.

    Raises:
        IncompleteReply: A reply lacks something, or something failed.
        LoadError: The load generator failed.
    """
    names = [[f"{next(_number)}" for _ in range(scenario.asks)] for _ in range(scenario.clients)]
    asks = await _prepare(target, [[scenario.prompt(name) for name in row] for row in names])
    processes = dict(target.processes()) | {MODEL: model[1]}
    async with load(asks, scenario.spread) as generator:
        machine, before = machine_cpu_seconds(), usage(processes)
        window = await generator.go()
        await asyncio.sleep(SETTLE_SECONDS)
        after, machine = usage(processes), machine_cpu_seconds() - machine
        replies = await generator.replies()
    parts = by_kind(before, after)
    figures, times = read(target, scenario, replies)
    if isinstance(target, Replayed):
        for reply in replies[:: max(1, len(replies) // REPLAYED)]:
            await target.check_kept(reply.body)
    if scenario.memory and isinstance(target, Recalling):
        figures["recalled"] = recalled(target, replies)
    if scenario.rate:
        starts = await model_starts(model[0])
        _read_pace(target, scenario, names, replies, starts, figures, times)
    tokens = len(replies) * scenario.reply_tokens
    figures |= _rates(window, tokens, len(replies)) | costs(
        parts, tokens, model_counts=model[1] in target.processes().values()
    )
    figures["cpu_ms_per_reply"] = figures["cpu_with_stores_per_1000"] * scenario.reply_tokens
    figures["generator_cpu_per_1000"] = window.cpu / tokens * 1000
    ours = sum(part.cpu for part in parts.values()) + window.cpu
    figures["others_cores"] = max(0.0, machine - ours) / (window.seconds + SETTLE_SECONDS)
    return Run(target.name, figures, parts, times)


def recalled(target: Recalling, replies: Sequence[Reply]) -> float:
    """Returns how many memories a reply's run got, on average.

    Raises:
        IncompleteReply: One got none: then it is not known what recalling costs.
    """
    found = [target.recalled(reply.body) for reply in replies]
    if not all(found):
        raise IncompleteReply(f"{found.count(0)} of {len(found)} runs recalled nothing")
    return sum(found) / len(found)


async def _prepare(target: Target, prompts: Sequence[Sequence[str]]) -> list[list[Ask]]:
    gate = asyncio.Semaphore(PREPARED_AT_ONCE)

    async def one(prompt: str) -> Ask:
        async with gate:
            return await target.prepare(prompt)

    flat = iter(await asyncio.gather(*(one(prompt) for row in prompts for prompt in row)))
    return [[next(flat) for _ in row] for row in prompts]


def kind_of(name: str) -> str:
    """Returns what a process is by its name: `agent` of `agent-2`."""
    stem, _, number = name.rpartition("-")
    return stem if stem and number.isdigit() else name


def by_kind(before: Mapping[str, Usage], after: Mapping[str, Usage]) -> dict[str, Part]:
    """Adds up what processes of one kind used between two readings; memory is the second's."""
    parts: dict[str, Part] = {}
    for name, then in after.items():
        kind = kind_of(name)
        sofar = parts.get(kind, Part(0.0, 0, 0))
        cpu = max(0.0, then.cpu - before[name].cpu)
        parts[kind] = Part(sofar.cpu + cpu, sofar.rss + then.rss, sofar.pss + then.pss)
    return parts


def costs(parts: Mapping[str, Part], tokens: int, *, model_counts: bool = False) -> dict[str, float]:
    """CPU seconds for 1,000 tokens, with and without the stores; the model's own only if it is the target."""
    mine = {kind: part.cpu for kind, part in parts.items() if model_counts or kind != MODEL}
    stores = sum(cpu for kind, cpu in mine.items() if kind in STORES)
    everything = sum(mine.values())
    return {
        "cpu_per_1000": (everything - stores) / tokens * 1000,
        "cpu_with_stores_per_1000": everything / tokens * 1000,
    }


def _rates(window: Window, tokens: int, replies: int) -> dict[str, float]:
    return {
        "tokens": tokens,
        "seconds": window.seconds,
        "tokens_per_second": tokens / window.seconds,
        "replies_per_second": replies / window.seconds,
    }


def read(
    target: Target, scenario: Replies, replies: Sequence[Reply]
) -> tuple[dict[str, float], dict[str, Times]]:
    """Checks that every reply is whole and reads its times. Raises IncompleteReply."""
    for reply in replies:
        check(target, reply, scenario.expected)
    if len(replies) != scenario.clients * scenario.asks:
        raise AssertionError("the load generator lost replies")
    times = {
        "ttft": Times(first_at(target, reply) - reply.began for reply in replies),
        "reply": Times(reply.ended - reply.began for reply in replies),
    }
    if scenario.counted:
        times["gap"] = Times()
        for reply in replies:
            times["gap"].add(gaps(arrivals(target, reply, scenario.tokens)))
    return percentiles(times), times


def percentiles(times: Mapping[str, Times]) -> dict[str, float]:
    """Returns p50, p90, p99 and the maximum of each histogram, in milliseconds."""
    return {
        f"{name}_{label}_ms": histogram.ms(percentile)
        for name, histogram in times.items()
        for label, percentile in (("p50", 50), ("p90", 90), ("p99", 99), ("max", 100))
    }


def _read_pace(
    target: Target,
    scenario: Replies,
    names: Sequence[Sequence[str]],
    replies: Sequence[Reply],
    starts: Mapping[str, float],
    figures: dict[str, float],
    times: dict[str, Times],
) -> None:
    """Compares each token with the model's schedule."""
    lateness = times["added"] = Times()
    behind = 0
    asked = {client: iter(row) for client, row in enumerate(names)}
    for reply in replies:
        began = round(starts[next(asked[reply.client])] * 1e9)
        late = added(arrivals(target, reply, scenario.tokens), began, scenario.rate)
        lateness.add(late)
        behind += late[-1] > BEHIND_NS
    figures |= percentiles({"added": lateness}) | {"behind": behind}


async def model_starts(url: str) -> dict[str, float]:
    """Returns when the model began each reply by its question's `id`, in seconds of the monotonic clock."""
    async with httpx.AsyncClient(trust_env=False, timeout=30) as client:
        answer = await client.get(f"{url.removesuffix('/v1')}/starts")
        answer.raise_for_status()
        return {str(name): float(at) for name, at in answer.json().items()}
