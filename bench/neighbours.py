"""Neighbours: what a tenant that floods the mesh leaves to another one's clients."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from bench.histogram import Times
from bench.load import Reply, load
from bench.measure import MODEL, SETTLE_SECONDS, Run, by_kind, costs, percentiles
from bench.model_script import sequence
from bench.process_cpu import usage
from bench.reading import check, first_at
from bench.scenarios import Neighbours
from bench.target import Ask, Target


async def measure_neighbours(flood: Target, polite: Target, scenario: Neighbours, model_pid: int) -> Run:
    """Has the polite clients ask alone, and again while the other tenant's clients flood.

    Args:
        flood: the mesh as the tenant sees it that floods.
        polite: the same mesh as the other tenant sees it.
        scenario: what to do.
        model_pid: the model server, whose work is not the mesh's.

    Raises:
        IncompleteReply: A reply of either tenant lacks something, or was refused.
        LoadError: The load generator failed.
    """
    asks = [await _asks(polite, scenario.tokens, scenario.asks) for _ in range(2 * scenario.clients)]
    floods = [await _asks(flood, scenario.flood_tokens, 1) for _ in range(scenario.flood)]
    async with load(asks[: scenario.clients]) as generator:
        await generator.go()
        alone = await generator.replies()
    processes = dict(flood.processes()) | {MODEL: model_pid}
    async with load(floods + asks[scenario.clients :], background=scenario.flood) as generator:
        before = usage(processes)
        window = await generator.go()
        await asyncio.sleep(SETTLE_SECONDS)
        after = usage(processes)
        both = await generator.replies()
    flooding = [reply for reply in both if reply.client < scenario.flood]
    beside = [reply for reply in both if reply.client >= scenario.flood]
    for reply in flooding:
        check(flood, reply, "".join(sequence(scenario.flood_tokens)))
    times = {
        "alone": _first(polite, alone, scenario.tokens),
        "beside": _first(polite, beside, scenario.tokens),
    }
    times["flood"] = Times(first_at(flood, reply) - reply.began for reply in flooding)
    parts = by_kind(before, after)
    tokens = len(flooding) * scenario.flood_tokens + len(beside) * scenario.tokens
    figures = percentiles(times) | costs(parts, tokens)
    figures |= {
        "tokens": tokens,
        "seconds": window.seconds,
        "tokens_per_second": tokens / window.seconds,
        "polite_replies": float(len(beside)),
        "flood_replies": float(len(flooding)),
    }
    return Run(polite.name, figures, parts, times)


async def _asks(target: Target, tokens: int, count: int) -> list[Ask]:
    """Returns questions, each in a session of its own."""
    return [await target.prepare(f"[[tokens={tokens}]]") for _ in range(count)]


def _first(target: Target, replies: Sequence[Reply], tokens: int) -> Times:
    """Checks replies and returns their times to the first token."""
    for reply in replies:
        check(target, reply, "".join(sequence(tokens)))
    return Times(first_at(target, reply) - reply.began for reply in replies)
